"""What holds for the tree as a whole: where things may lie, what may import what, how long a file may be."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import typer.main
import yaml
from importlinter import api
from packaging.specifiers import SpecifierSet
from setuptools import find_packages

import splaser_plugin
from splaser_plugin.cli.app import app
from tests.builders import ROOT

LINT = "from importlinter.cli import lint_imports_command as lint; lint()"
LINES = 400
"""A file that has as many is two things."""
SOURCES = sorted(
    path
    for folder in ("splaser_plugin", "integrations")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".js")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PACKAGES = sorted(path.parent for path in SOURCES if path.name == "__init__.py")
FOR_WHOLE_RUNS = {"gpu", "architectures", "benchmarks", "data", "fuzz", "tools"}
"""Folders of tests/ that aren't a package's."""


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def house_of(path: Path) -> str:
    """The package's name as it is installed."""
    parts = path.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "splaser_plugin" else ("splaser_plugin", *parts))


@pytest.fixture
def rooms(tmp_path):
    """A copy of the tree as it is installed, as `make rooms` lays it."""
    folder = tmp_path / "rooms"
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "splaser_plugin", folder / "splaser_plugin", ignore=leave_out)
    shutil.copytree(ROOT / "integrations", folder / "splaser_plugin" / "integrations", ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(rooms: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, "--no-cache"]
    return subprocess.run(command, cwd=rooms, capture_output=True, text=True, check=False)


def test_imports_point_one_way(rooms):
    result = lint(rooms)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("spectra/spectrum.py", "scanning.scan"),
        ("search/search.py", "jobs.laser"),
        ("progress.py", "search.candidates"),
        ("integrations/configs/plan.py", "artifacts.report"),
        ("artifacts/report.py", "integrations.peft"),
        ("cli/emit.py", "integrations.peft"),
        ("scoring/scores.py", "scanning.records"),
    ],
)
def test_an_import_that_points_up_or_aside_is_refused_by_lint(rooms, importer, imported):
    path = rooms / "splaser_plugin" / importer
    added = f"\n\ndef _later() -> None:\n    import splaser_plugin.{imported}  # noqa: F401\n"
    path.write_text(path.read_text(encoding="utf-8") + added, encoding="utf-8")
    result = lint(rooms)
    assert result.returncode == 1, result.stdout
    name = importer.removesuffix(".py").replace("/", ".")
    assert re.search(rf"splaser_plugin\.{name} ->\s+splaser_plugin\.{imported}", result.stdout), result.stdout


def test_a_circle_in_a_package_is_refused_by_lint(rooms):
    path = rooms / "splaser_plugin" / "spectra" / "edges.py"
    added = "\n\ndef _later() -> None:\n    import splaser_plugin.spectra.spectrum  # noqa: F401\n"
    path.write_text(path.read_text(encoding="utf-8") + added, encoding="utf-8")
    result = lint(rooms)
    assert result.returncode == 1, result.stdout
    assert re.search(r"No package has a circle in it.*BROKEN", result.stdout)


def test_every_adapter_has_its_place_in_the_contract():
    [contract, *_] = api.read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    named = {name.strip() for layer in contract["layers"] for name in re.split("[|:]", layer)}
    modules = {path.stem for path in (ROOT / "integrations").glob("*.py")} - {"__init__"} | {"configs"}
    assert {f"integrations.{module}" for module in modules} == {
        name for name in named if name.startswith("integrations.")
    }


@pytest.mark.parametrize("package", PACKAGES, ids=shown)
def test_a_package_says_in_one_paragraph_what_is_in_it(package):
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert docstring
    assert docstring.split("\n\n")[0].rstrip().endswith(".")


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=shown)
def test_a_file_stays_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < LINES, f"{lines} lines"


def test_every_package_is_installed():
    found = {"splaser_plugin", "splaser_plugin.integrations", "splaser_plugin.example_data"}
    found |= {f"splaser_plugin.{name}" for name in find_packages(str(ROOT / "splaser_plugin"))}
    found |= {f"splaser_plugin.integrations.{name}" for name in find_packages(str(ROOT / "integrations"))}
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r'"(.*?)"', listed[1])) == found
    assert {house_of(package) for package in PACKAGES} == found - {"splaser_plugin.example_data"}


def test_the_tests_lie_in_folders_of_the_packages_names():
    packages = {path.name for path in PACKAGES if path.name != "splaser_plugin"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - FOR_WHOLE_RUNS <= packages


def test_there_is_one_version_number():
    assert metadata("splaser_plugin")["Version"] == splaser_plugin.__version__
    stated = [
        shown(path)
        for path in [ROOT / "pyproject.toml", *SOURCES]
        if re.search(rf'version\w* = "{re.escape(splaser_plugin.__version__)}"', path.read_text(encoding="utf-8"))
    ]
    assert stated == ["splaser_plugin/__init__.py"]


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: splaser_plugin\.(\w+)$", page, re.MULTILINE)
    assert sorted([*names, "__version__"]) == sorted(splaser_plugin.__all__)


def imported_by(tree: ast.AST) -> set[str]:
    """Modules, and what is taken from them by its whole name: a module too, or not."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", TESTS, ids=shown)
def test_nothing_is_imported_from_a_test_module_or_conftest(path):
    """What tests share is in helper modules, so that a test file can be read, run and moved alone."""
    found = re.compile(r"tests\.(?:\w+\.)*(?:test_\w+|conftest)\b")
    assert not [name for name in imported_by(ast.parse(path.read_text(encoding="utf-8"))) if found.match(name)]


def commands_of_workflow() -> list[str]:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def hooks_of_pre_commit() -> list[str]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    return [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]


@pytest.mark.parametrize("command", [*commands_of_workflow(), *hooks_of_pre_commit()])
def test_what_the_workflow_and_pre_commit_run_is_there(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, check=False).returncode == 0
    elif words[0] == "splaser":
        assert words[1] in typer.main.get_command(app).commands
    else:
        assert words[0].endswith(("python", "ruff"))
        assert all((ROOT / word).is_file() for word in words[1:] if word.endswith(".py"))
        if words[1:3] == ["-m", "pytest"]:
            assert set(re.findall(r"not (\w+)", command)) <= {"browser", "real", "slow"}


def test_the_workflow_tries_every_python_that_is_allowed():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    allowed = SpecifierSet(re.search(r'requires-python = "(.*?)"', (ROOT / "pyproject.toml").read_text())[1])
    tried = workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    assert tried == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in allowed]


def test_the_lowest_versions_that_are_tried_are_those_that_are_allowed():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|gguf|trl|eval|emit) = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    allowed = {name for list in lists for name in re.findall(r'"(.*?)"', list) if "python_version" not in name}
    lines = (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    assert {line.replace("==", ">=") for line in lines if "==" in line} == allowed


def test_no_step_of_a_workflow_may_fail_unseen():
    workflows = sorted((ROOT / ".github" / "workflows").iterdir())
    assert workflows
    for path in workflows:
        text = path.read_text(encoding="utf-8")
        assert "continue-on-error" not in text and "|| true" not in text, shown(path)
