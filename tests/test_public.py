"""The public names: typed, documented, and with results that can be looked at."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import splaser_plugin
from splaser_plugin import LaserConfig, SelectConfig, choose, laser
from splaser_plugin.errors import ConfigError, in_python
from splaser_plugin.scanning.selection import SelectOptions
from tests.builders import QUICK, ROOT
from tests.report_data import made_up_scan

SCRIPT = """
from pathlib import Path
from transformers import PreTrainedModel
import splaser_plugin as s

found: s.Scan = s.scan("m", config=s.ScanConfig(edge="mp"), output="scan.json", progress=s.Progress())
bars: s.Progress = s.Bars()
same: s.Scan = s.Scan.load("scan.json")
selection: s.Selection = s.choose(found, s.SelectConfig(top=3, by="snr"))
published = s.choose(s.load_scan("scan.json"), fraction=0.5, by="rank", edge="mp", types=["mlp"]).names
names: list[str] = selection.names
beside: tuple[s.Agreement, ...] = s.agreements(found, selection)
config = s.LaserConfig(candidates=3, objective="compress", save="factored")
result: s.LaserResult = s.laser("m", s.load_pairs("p.jsonl"), config=config, output=Path("out"))
gain: float = result.score_after - result.score_before
verdict: str | None = result.verdict
lasered: PreTrainedModel = result.model
ranks: list[int] = [candidate.rank for candidate in result.kept]
saved: Path = result.save("again")
recipe: s.Recipe = result.recipe
applied: s.ApplyResult = s.apply(recipe, "m", config=s.ApplyConfig(device="cpu"))
compared: s.Comparison = s.compare(["a", "b"], "p.jsonl", config=s.CompareConfig(samples=4))
compared.save("c.json")
callback = s.LaserCallback(when="after", config=config)
frozen = s.FreezeCallback(names)
lora = s.lora_config(selection, rank=8)
s.freeze_all_but(lasered, names)
pairs: s.PairSet = s.load_pairs("p.jsonl", limits=s.TokenLimits(result.tokenizer, prompt=64))
model: PreTrainedModel = s.expand(s.load("m"))
same_model: PreTrainedModel = s.expand("m")
plain = s.merge_and_unload(model)
values: dict[str, float] = s.importances(model, result.tokenizer, by="fisher", text="notes.txt")
version: str = s.__version__
table = found.to_dataframe()
try:
    pass
except s.SplaserError as error:
    text: str = str(error)
"""
WRONG = {
    's.LaserConfig(objective="small")': "Literal",
    "s.LaserConfig(candidate=3)": "candidate",
    's.laser("m", "p", config=s.ScanConfig())': "LaserConfig",
    's.scan("m").score_before': "score_before",
    's.SelectConfig(top="3")': "int",
    's.choose(s.load_scan("s"), tops=3)': "tops",
    's.choose(s.load_scan("s"), top="3")': "int",
    's.choose(s.load_scan("s"), top=3, by="sigma")': "Literal",
    's.laser(3, "p")': "Module",
    's.laser("m", "p", tokenizer="m")': "PreTrainedTokenizerBase",
    's.expand("m") + 1': "PreTrainedModel",
    's.LaserCallback(trainer="t")': "Trainer",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Run mypy --strict on a script, with the package as it is installed beside it."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "splaser_plugin").symlink_to(ROOT / "splaser_plugin")
    (folder / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")  # has mypy leave out what takes it longest
    installed = folder / "site"
    installed.mkdir()
    package = installed / "splaser_plugin"
    package.mkdir()
    for path in (ROOT / "splaser_plugin").iterdir():
        (package / path.name).symlink_to(path)
    (package / "integrations").symlink_to(ROOT / "integrations")

    def run(text: str) -> subprocess.CompletedProcess[str]:
        (folder / "script.py").write_text(text)
        options = ["--strict", "--ignore-missing-imports", "--follow-imports=silent", "--cache-dir", folder / "cache"]
        return subprocess.run(
            [sys.executable, "-m", "mypy", *options, "script.py"],
            cwd=folder,
            env={**os.environ, "MYPYPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.slow
def test_a_script_that_uses_every_public_name_passes_strict_type_checks(checked):
    for name in set(splaser_plugin.__all__) - {"ScanConfig"}:
        assert f"s.{name}" in SCRIPT, name
    result = checked(SCRIPT)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_wrong_uses_are_seen_by_the_type_checker(checked):
    result = checked("import splaser_plugin as s\n" + "\n".join(WRONG) + "\n")
    for line, (use, part) in enumerate(WRONG.items(), start=2):
        errors = [text for text in result.stdout.splitlines() if text.startswith(f"script.py:{line}: error")]
        assert any(part in text for text in errors), (use, result.stdout)


def test_the_package_says_that_it_is_typed():
    assert (Path(splaser_plugin.__file__).parent / "py.typed").is_file()


CONFIGS = [
    splaser_plugin.ScanConfig,
    LaserConfig,
    SelectConfig,
    splaser_plugin.ApplyConfig,
    splaser_plugin.CompareConfig,
]


@pytest.mark.parametrize("config", CONFIGS)
def test_help_explains_every_option_and_names_its_default(config):
    told = " ".join(pydoc.render_doc(config, renderer=pydoc.plaintext).replace("|", " ").split())
    for name, field in config.fields().items():
        assert field.description, name
        assert f"{name} = {field.default!r}: {in_python(' '.join(field.description.split()))}" in told, name


def test_options_are_there_without_docstrings_too():
    script = "from splaser_plugin import LaserConfig; print(LaserConfig(candidates=3).candidates)"
    run = subprocess.run([sys.executable, "-OO", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.stdout == "3\n", run.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LaserConfig(candidate=3), "option 'candidate' is not known; nearest: candidates"),
        (lambda: LaserConfig(max_new_tokens=0), "max_new_tokens: got 0, expected at least 1"),
        (lambda: SelectConfig(by="sigma"), "by: got 'sigma', expected one of snr_ratio, snr, rank"),
        (lambda: LaserConfig(include=3), "include: got 3, expected a list of text"),
    ],
)
def test_a_wrong_option_is_named_as_python_callers_write_it(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def documented():
    """Each public function, class and method of a class, with whether it is a method."""
    for name in sorted(set(splaser_plugin.__all__) - {"__version__"}):
        public = getattr(splaser_plugin, name)
        yield pytest.param(public, False, id=name)
        for method, value in vars(public).items() if inspect.isclass(public) else ():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            is_event = method.startswith("on_")  # of transformers' callbacks, which document them
            if inspect.isfunction(value) and not method.startswith("_") and not is_event:
                yield pytest.param(value, True, id=f"{name}.{method}")


@pytest.mark.parametrize(("public", "is_method"), list(documented()))
def test_a_public_name_has_a_docstring_in_googles_style(public, is_method):
    text = inspect.getdoc(public) or ""
    assert re.match(r"[^\n]+[.:?]|[^\n]+\n", text), "no docstring"
    assert not re.search(r"Raises \w+(Error)? ", text), "an error outside of Raises:"
    if inspect.isclass(public) and (hasattr(public, "__dataclass_fields__") or public.__init__ is object.__init__):
        return  # its fields are documented
    if inspect.isclass(public) and issubclass(public, Exception):
        return
    parameters = {
        {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "") + name
        for name, parameter in inspect.signature(public).parameters.items()
        if name != "self"
    }
    arguments = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    explained = set(re.findall(r"^    ([*\w]+): ", arguments[1], re.MULTILINE)) if arguments else set()
    if not is_method or explained:
        assert explained == parameters
    if inspect.isfunction(public) and not is_method:
        assert "\nReturns:\n    " in text and "\nRaises:\n    " in text


def test_choose_takes_the_options_of_its_configuration_by_name_and_type():
    hints = get_type_hints(SelectOptions)
    assert list(hints) == list(SelectConfig.fields())
    own = get_type_hints(SelectConfig)
    assert hints | {"types": own["types"]} == own
    with pytest.raises(ConfigError, match="option 'tops' is not known; nearest: top"):
        choose(made_up_scan(1), tops=1)


def test_results_are_short_in_words_and_tables_in_a_notebook():
    scan = made_up_scan(3)
    selection = choose(scan, top=2)
    assert repr(scan) == "Scan('somebody/model', edge='iqr', 9 matrices, 1 parameters left out)"
    assert repr(selection) == (
        "Selection('somebody/model', 6 of 9 matrices: top 2 of each module type by snr_ratio (edge iqr))"
    )
    table = scan.to_dataframe()
    assert list(table["name"]) == [matrix.name for matrix in scan.matrices]
    assert list(table["snr"]) == [matrix.edges["iqr"].snr for matrix in scan.matrices]
    assert list(selection.to_dataframe()["name"]) == selection.names
    assert "<table" in scan._repr_html_() and "model.layers.0.mlp.down_proj" in selection._repr_html_()


def test_names_in_tables_are_text(tmp_path):
    scan = made_up_scan(1, model="<script>")
    named = scan.matrices[0].__class__(**{**vars(scan.matrices[0]), "name": "<script>alert(1)</script>"})
    changed = scan.__class__(**{**vars(scan), "matrices": (named,)})
    assert "<script>" not in changed._repr_html_()


def test_a_laser_result_says_what_it_found(tiny_folder, pairs):
    result = laser(tiny_folder, pairs, config=LaserConfig(**{**QUICK, "candidates": 2}))
    assert (result.score_before, result.score_after) == (result.search.baseline.mean, result.search.final.mean)
    assert result.kept == result.search.kept
    assert repr(result.recipe) == f"Recipe('{tiny_folder}', {len(result.kept)} steps)"
    assert repr(result.pairs) == f"PairSet('{result.pairs.source}', {len(result.pairs)} pairs)"
    assert result.verdict is None
    assert f"{len(result.kept)} of 2 candidates kept" in repr(result) and len(repr(result)) < 300
    table = result.to_dataframe()
    assert list(table["outcome"]) == [trial.judgement.outcome for trial in result.search.trials]
    assert list(table["rank"]) == [trial.candidate.rank for trial in result.search.trials]
