from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from splaser_plugin.errors import CheckpointError
from splaser_plugin.jobs.laser import laser
from splaser_plugin.scanning.scan import Scan
from splaser_plugin.weights.loading import load_model
from tests.builders import FLAGS, QUICK, ROOT, SPLASER, tiny_llama


@pytest.mark.slow
def test_a_switch_can_be_turned_off(splaser, tiny_folder, pairs_file, tmp_path):
    code, printed, _ = splaser(
        "laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", "--no-race", "--json", *FLAGS
    )
    assert code == 0
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["settings"]["race"] is False
    assert "stopped" not in printed


def test_the_verdict_on_held_out_pairs_is_printed_and_stored(splaser, tiny_folder, pairs_file, tmp_path):
    held_out = ROOT / "examples" / "data" / "held_out.jsonl"
    rules = ["--held-out", held_out, "--samples", 10, "--accept", "confident", "--alpha", 0.1]
    code, _, stderr = splaser("laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS, *rules)
    assert code == 0, stderr
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["held_out"]
    assert stored["pairs"] == 10
    assert f"verdict  {stored['verdict']}" in stderr
    assert f"10 pairs of {held_out}" in stderr.replace("\n", "")
    settings = json.loads((tmp_path / "out" / "recipe.json").read_text())["settings"]
    assert (settings["held_out"], settings["accept"], settings["alpha"]) == (str(held_out), "confident", 0.1)
    code, _, stderr = splaser(
        "laser", tiny_folder, "--pairs", pairs_file, "-o", held_out, *FLAGS, "--held-out", held_out
    )
    assert code == 1
    assert "would overwrite" in stderr


def test_scan_writes_the_scan_and_the_top_names(splaser, tiny_folder, tmp_path):
    out, top = tmp_path / "scan.json", tmp_path / "top.json"
    code, _, stderr = splaser(
        "scan", tiny_folder, "-o", out, "--top", 1, "--top-json", top, "--exclude", "layers.1.mlp"
    )
    assert code == 0
    scan = Scan.load(out)
    assert len(scan.matrices) == 11
    names = json.loads(top.read_text())
    assert set(names) == {matrix.type for matrix in scan.matrices}
    assert all(len(name) == 1 for name in names.values())
    assert "scanned  11 matrices" in stderr
    assert str(out) in stderr


@pytest.mark.parametrize("content", ["my notes", '{"a": 1}', "[]", '{"schema": "splaser.scan/1", "matrices": []}'])
def test_the_top_names_replace_no_other_file(splaser, tiny_folder, tmp_path, content):
    top = tmp_path / "top.json"
    top.write_text(content)
    code, _, stderr = splaser("scan", tiny_folder, "-o", tmp_path / "scan.json", "--top-json", top)
    assert (code, top.read_text()) == (1, content)
    assert f"OutputError: {top}: exists and was not written by splaser. Choose another --top-json." in stderr
    assert not (tmp_path / "scan.json").exists()
    top.write_text('{"mlp.up_proj": ["a"]}')
    assert splaser("scan", tiny_folder, "-o", tmp_path / "scan.json", "--top-json", top)[0] == 0
    assert "self_attn.q_proj" in top.read_text()


def test_scan_prints_json_to_stdout_and_nothing_else(splaser, tiny_folder, tmp_path):
    code, printed, _ = splaser("scan", tiny_folder, "-o", tmp_path / "scan.json", "--json")
    assert code == 0
    assert json.loads(printed) == json.loads((tmp_path / "scan.json").read_text())


@pytest.mark.slow
def test_laser_then_apply_give_the_same_model(splaser, tiny_folder, pairs_file, tmp_path):
    out = tmp_path / "out"
    code, printed, stderr = splaser("laser", tiny_folder, "--pairs", pairs_file, "-o", out, *FLAGS, "--json")
    assert code == 0, stderr
    assert json.loads(printed) == json.loads((out / "results.json").read_text())
    assert {path.name for path in out.iterdir()} >= {"scan.json", "recipe.json", "results.json", "model.safetensors"}
    assert "baseline score" in stderr
    assert "kept" in stderr
    code, _, stderr = splaser("apply", out / "recipe.json", tiny_folder, "-o", tmp_path / "again", "--device", "cpu")
    assert code == 0, stderr
    first = AutoModelForCausalLM.from_pretrained(out).state_dict()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_run_comes_with_its_report_and_card(splaser, tiny_folder, pairs_file, tmp_path):
    out = tmp_path / "out"
    code, _, stderr = splaser("laser", tiny_folder, "--pairs", pairs_file, "-o", out, *FLAGS)
    assert code == 0, stderr
    assert f"report  {out / 'report.html'}" in stderr
    code, printed, stderr = splaser("report", out, "-o", tmp_path / "again.html")
    assert (code, printed) == (0, "")
    assert str(tmp_path / "again.html") in stderr
    page = (tmp_path / "again.html").read_bytes()
    assert page == (out / "report.html").read_bytes()
    assert b"What is the capital of France?" in page
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model is None
    assert str(tiny_folder) not in str(card) and str(tmp_path) not in str(card)
    recipe = json.loads((out / "recipe.json").read_text())
    assert all(step["name"] in card.text for step in recipe["steps"])
    code, _, stderr = splaser("apply", out / "recipe.json", tiny_folder, "-o", tmp_path / "rebuilt", "--device", "cpu")
    assert code == 0, stderr
    rebuilt = ModelCard.load(tmp_path / "rebuilt" / "README.md").data.to_dict()
    assert rebuilt == {key: value for key, value in card.data.to_dict().items() if key != "model-index"}


@pytest.mark.slow
def test_a_run_can_be_pushed_to_the_hub(splaser, tiny_folder, pairs_file, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **options: SimpleNamespace(repo_id=repo))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: pushed.append(options["repo_id"]))
    run = ("laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS, "--push-to-hub")
    code, _, stderr = splaser(*run, "not/a/repo")
    assert code == 2 and "--push-to-hub: got 'not/a/repo'" in stderr
    assert not (tmp_path / "out").exists()
    code, printed, stderr = splaser(*run, "alice/mine")
    assert code == 0, stderr
    assert pushed == ["alice/mine"]
    assert "hf_planted" not in printed + stderr
    assert not any(b"hf_planted" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_lora_adapter_is_merged_first(tiny_folder, pairs, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merged, _ = load_model(tiny_folder, device="cpu", adapter=tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"there is no adapter_config\.json"):
        load_model(tiny_folder, device="cpu", adapter=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["scan", "./nowhere"], 1, "CheckpointError: "),
        (["scan", "MODEL", "--edge", "iqrr"], 2, "ConfigError: --edge: got 'iqrr'"),
        (["scan", "MODEL", "--include", "mlp.dwn_proj"], 1, "nearest: "),
        (["scan", "MODEL", "-o", "no-such-folder/scan.json"], 1, "OutputError: "),
        (["scan"], 2, "Missing argument"),
        (["laser", "MODEL", "--pairs", "PAIRS", "-o", "out", "--candidates", "0"], 2, "--candidates: got 0"),
        (["laser", "MODEL", "--pairs", "nothing.jsonl", "-o", "out"], 1, "PairsError: nothing.jsonl"),
        (["laser", "MODEL", "--pairs", "PAIRS", "-o", "MODEL"], 1, "OutputError: "),
        (["laser", "MODEL", "--pairs", "PAIRS", "-o", "out", "--embedder", "./none"], 1, "EmbedderError: "),
        (["laser", "MODEL", "--pairs", "PAIRS", "-o", "out", "--device", "cuda:9"], 2, "ConfigError: --device cuda:9"),
        (["laser", "MODEL", "--pairs", "PAIRS", "-o", "out", "--held-out", "PAIRS"], 1, "PairsError: "),
        (["laser", "MODEL", "--pairs", "PAIRS", "-o", "out", "--accept", "all"], 2, "--accept: got 'all'"),
        (["laser", "MODEL", "--pairs", "PAIRS", "-o", "out", "--held-out-fraction", "1"], 2, "at most 0.9"),
        (["report", "nothing.json"], 1, "RecipeError: nothing.json"),
        (["report", "MODEL"], 1, "has no scan.json"),
        (["apply", "nothing.json", "MODEL", "-o", "out"], 1, "RecipeError: nothing.json"),
    ],
)
def test_bad_input_is_one_line_with_an_exit_code_and_writes_nothing(
    splaser, tiny_folder, pairs_file, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    known = {"MODEL": str(tiny_folder), "PAIRS": pairs_file}
    got, printed, stderr = splaser(*[known.get(argument, argument) for argument in arguments])
    assert got == code
    assert printed == ""
    assert message in stderr
    assert "Traceback" not in stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_weight_that_is_not_finite_stops_the_laser_by_name(splaser, tokenizer, pairs_file, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    code, _, stderr = splaser("laser", tmp_path / "broken", "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS)
    assert code == 1
    assert "SpectrumError: model.layers.0.mlp.up_proj" in stderr
    assert not (tmp_path / "out").exists()


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom splaser_plugin.cli.app import main\nsys.argv = ['splaser', 'laser', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"
    assert "--max-new-tokens" in run.stdout
    assert "The search" in run.stdout


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["scan", "-h"], ["emit", "axolotl", "-h"]])
def test_both_spellings_of_help_are_known(splaser, arguments):
    code, printed, _ = splaser(*arguments)
    assert code == 0
    assert "Usage:" in printed


@pytest.mark.real
def test_the_real_models_go_through_scan_laser_and_apply(smollm2, minilm, tmp_path):
    """SmolLM2-135M and all-MiniLM-L6-v2, as the command line runs them."""
    pairs = ROOT / "examples" / "data" / "pairs.jsonl"

    def run(*arguments):
        command = [*SPLASER, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)

    narrow = ["--include", "layers.24.self_attn", "--include", "layers.7.self_attn"]
    run("scan", smollm2, *narrow)
    scan = Scan.load(tmp_path / "scan.json")
    assert len(scan.matrices) == 8
    options = ["--samples", 6, "--candidates", 2, "--max-new-tokens", 16, "--device", "cpu", "--embedder", minilm]
    run("laser", smollm2, "--pairs", pairs, "-o", "out", *options, *narrow)
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    run("apply", "out/recipe.json", smollm2, "-o", "again", "--device", "cpu")
    lasered = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, value in lasered.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    for step in recipe["steps"]:
        weight = lasered.get_parameter(step["name"] + ".weight")
        assert torch.linalg.matrix_rank(weight.double(), rtol=1e-5) == step["rank"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    answer = lasered.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


@pytest.mark.slow
def test_python_and_the_command_line_agree(splaser, tiny_folder, pairs_file, tmp_path):
    from splaser_plugin import LaserConfig

    splaser("laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS)
    result = laser(tiny_folder, pairs_file, config=LaserConfig(**{**QUICK, "candidates": 4}))
    stored = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert [step["name"] for step in stored["steps"]] == [step.name for step in result.recipe.steps]
    assert stored["scores"] == result.recipe.scores
