"""Every block of README.md, CONTRIBUTING.md and docs/ that can be run, in the order in which it stands there.

A block of `sh` or `python` is run, with a tiny model as `my-model`; one of `yaml` that begins with its name is written,
for the blocks after it. Of `make` only the targets are looked up: `.ci/run` runs them. Commands of other tools stand in
blocks of `text`, and are run in tests/tools/test_guides.py. What stands in a line of text is looked up: options
have to exist, and so do files.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from statistics import median

import pytest
import typer.main
import yaml

from splaser_plugin.cli.app import app, main
from splaser_plugin.cli.emit import app as emit
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.scanning.records import Scan
from tests.builders import ROOT
from tests.pages import BLOCK, PAGES, commands_of
from tests.report_data import made_up_scan

BLOCKS = [(page, *found) for page in PAGES for found in BLOCK.findall(page.read_text(encoding="utf-8"))]
SMALL = "--max-new-tokens 6 --candidates 3 --samples 16"


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """What the reader of each page has: a model, some pairs and a text."""
    found = {}
    for page in PAGES:
        found[page] = tmp_path_factory.mktemp(page.stem)
        (found[page] / "my-model").symlink_to(tiny_folder)
        rows = (ROOT / "examples" / "data" / "pairs.jsonl").read_text().splitlines()[:16]
        (found[page] / "pairs.jsonl").write_text("\n".join(rows) + "\n")
        (found[page] / "notes.txt").write_text((ROOT / "README.md").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "language", "code"),
    BLOCKS,
    ids=[f"{page.stem}-{number}-{language}" for number, (page, language, _) in enumerate(BLOCKS)],
)
def test_block(page, language, code, folders, minilm, monkeypatch, tmp_path):
    monkeypatch.chdir(folders[page])
    if language == "sh":
        for words in commands_of(code):
            run(words, minilm, monkeypatch, tmp_path)
    elif language == "python":
        script = tmp_path / "block.py"
        script.write_text(code)
        runpy.run_path(str(script), run_name="__main__")
    elif language == "yaml":
        check_yaml(code, folders[page])
    else:
        assert language in ("text", "json")
        if page.name != "guides.md":
            assert not shutil.which(code.split()[0]), "a command that no test runs"


def run(words, minilm, monkeypatch, tmp_path):
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
    elif words[0] == "pip":
        run_pip(words[1:], tmp_path / "clone")
    elif words[0] == "accelerate":
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        monkeypatch.setenv("PATH", path)
        subprocess.run([*words, *shlex.split(SMALL), *on_cpu(words), "--embedder", "self", "--edge", "mp"], check=True)
        assert Path(words[-1], "recipe.json").is_file()
    else:
        assert words[0] == "splaser"
        run_splaser(words, minilm, monkeypatch)


def on_cpu(words):
    """The CPU, except where the command says itself where the model goes."""
    return [] if "--device-map" in words else ["--device", "cpu"]


def run_pip(words, clone):
    """In a clone, into a folder beside it and without dependencies; with extras they only have to be found."""
    leave_out = shutil.ignore_patterns(".*", "*.egg-info", "build", "__pycache__", "splaser-demo")
    shutil.copytree(ROOT, clone, ignore=leave_out, dirs_exist_ok=True)
    command = [sys.executable, "-m", "pip", "--quiet", *words]
    if words != ["install", "."]:
        subprocess.run([*command, "--dry-run"], cwd=clone, check=True)
        return
    installed = clone.parent / "installed"
    subprocess.run([*command, "--no-deps", "--target", installed], cwd=clone, check=True)
    assert (installed / "splaser_plugin" / "py.typed").is_file()
    made_up_scan(1).save(clone.parent / "scan.json")
    subprocess.run(
        [sys.executable, installed / "bin" / "splaser", "report", "scan.json", "-o", "report.html"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=clone.parent,
        check=True,
    )


def run_splaser(words, minilm, monkeypatch):
    if words[1] in ("laser", "compare"):
        embedder = str(minilm) if words[1] == "compare" else "self"
        small = [*shlex.split(SMALL), *on_cpu(words)]
        given = [word for word in small if words[1] == "laser" or word not in ("--candidates", "3")]
        words = [*words, *given, "--embedder", embedder]
    if words[1] == "laser":
        if "--plan" not in words:
            words = [*words, "--write-unchanged"]  # the next block may use the model, whatever the tiny one kept
        if not {"--ranks", "--edge", "--config"} & set(words):
            words = [*words, "--edge", "mp"]
    monkeypatch.setattr("sys.argv", words)
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, f"{shlex.join(words)} failed"


def check_yaml(code, folder):
    values = yaml.safe_load(code)
    name = re.match(r"# (\S+\.ya?ml)\n", code)
    if name:
        (folder / name[1]).write_text(code)
    if "splaser" in values:
        assert values["splaser"].keys() <= {"mode", "top", "fraction", "laser"}
        laser = values["splaser"].get("laser", {})
        LaserConfig.from_dict({key: value for key, value in laser.items() if key not in ("when", "pairs")})
    else:
        assert name, "a block of YAML needs its file's name as a comment in its first line"


def flags_of(command):
    return {flag for param in command.params for flag in [*param.opts, *param.secondary_opts] if flag.startswith("--")}


def known_flags():
    groups = [typer.main.get_command(app), typer.main.get_command(emit)]
    completion = {"--install-completion", "--show-completion"}  # typer adds them when the program starts
    commands = [command for group in groups for command in (group, *group.commands.values())]
    return completion.union(*map(flags_of, commands))


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
@pytest.mark.slow
def test_options_and_files_that_are_named_exist(page):
    """In inline code: options of splaser, files of this repository; and the targets of links."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    flags = known_flags()
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.split()
        if words[0] == "splaser" or words[0].startswith("--"):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
                assert flag in flags or flag in ("--help",), code
        for path in re.findall(r"(?:examples|tests|docs|splaser_plugin|integrations)/[\w./-]+\.\w+", code):
            assert (ROOT / path).exists(), code
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target


BENCHMARKS = sorted(
    {found for page in PAGES for found in re.findall(r"python (tests/benchmarks/[^`]*)`", page.read_text())}
)


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHMARKS)
def test_the_benchmarks_that_figures_are_from_understand_their_options(command):
    """They run for minutes to hours, so only their imports and arguments are tried.

    argparse shows the help before it refuses an option that it doesn't know.
    """
    result = subprocess.run(
        [sys.executable, *shlex.split(command), "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout
    known = set(re.findall(r"--[a-z][a-z-]*", result.stdout))
    assert {word for word in shlex.split(command) if word.startswith("--")} <= known


def test_the_ranks_that_the_edges_keep_are_those_of_the_stored_scan():
    found = Scan.load(ROOT / "tests" / "data" / "smollm2_scan.json")
    page = (ROOT / "docs" / "edges.md").read_text(encoding="utf-8")
    for edge in found.matrices[0].edges:
        shares = [matrix.edges[edge].rank / min(matrix.shape) for matrix in found.matrices]
        line = f"{edge:14} keeps {median(shares):.0%} of a matrix's rank, {min(shares):.0%} to {max(shares):.0%}"
        assert line in page


def test_the_versions_of_trainers_are_those_of_the_tests():
    table = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    build = (ROOT / "tests" / "tools" / "build.sh").read_text(encoding="utf-8")
    files = {"the lowest versions": ".ci/lowest.txt"}
    for tool, name in (("llamafactory", "LLaMA-Factory"), ("axolotl", "Axolotl")):
        files[f"{name} {re.search(f'{tool}==(.*?) ', build)[1]}"] = f"tests/tools/{tool}.txt"
    for environment, file in files.items():
        pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
        versions = [pins[name] for name in ("transformers", "trl", "peft", "accelerate", "datasets")]
        assert f"| {environment} | {' | '.join(versions)} |" in table


def test_messages_in_troubleshooting_are_those_of_the_code():
    sources = [*(ROOT / "splaser_plugin").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    # the parts of a message stand in neighbouring literals
    code = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in sources)
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) >= 20
    for heading in headings:
        for part in heading.split("..."):
            assert part.strip() in code, heading


@pytest.mark.slow
def test_what_the_blocks_of_the_readme_wrote_is_there(folders):
    folder = folders[PAGES[0]]
    for name in ("scan.json", "lasered/recipe.json", "rebuilt/recipe.json", "axolotl.yml", "report.html"):
        assert (folder / name).is_file(), name
