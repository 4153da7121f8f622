"""Folders of factored models: runs that write them, loading, expanding, and folders that lie."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splaser_plugin import LaserConfig, expand, laser, load
from splaser_plugin.cli.app import main
from splaser_plugin.errors import CheckpointError, ModelError, OutputError
from splaser_plugin.jobs.apply import apply
from splaser_plugin.scanning.scan import scan as run_scan
from splaser_plugin.spectra import spectrum
from splaser_plugin.weights.factored_layers import FactoredLinear
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from tests.builders import QUICK, THREE_PAIRS, tiny_llama
from tests.planted import Facts
from tests.weights.factored_models import same_state, small_llama

FACTORED = {**QUICK, "save": "factored"}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, tiny_folder, tmp_path_factory):
    """A finished laser run that was saved factored."""
    result = laser(tiny_folder, THREE_PAIRS, config=LaserConfig(**FACTORED, dtype=request.param))
    return result, result.save(tmp_path_factory.mktemp("out") / "factored")


@pytest.mark.slow
def test_a_run_saves_what_it_scored(run, tmp_path):
    result, out = run
    assert result.search.kept, "this run has to keep something to show anything"
    loaded = load(out)
    layers = {name for name, module in loaded.named_modules() if isinstance(module, FactoredLinear)}
    assert layers and layers <= {step.name for step in result.recipe.steps}
    assert result.parameters == (result.model.num_parameters(), loaded.num_parameters())
    assert result.parameters[0] - result.parameters[1] == result.search.parameters_removed
    result.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > (out / "model.safetensors").stat().st_size
    assert same_state(expand(loaded), result.model)


def test_a_dense_run_is_untouched_by_all_this(tiny_folder):
    dense, factored = Weights(load_model(tiny_folder)[0]), Weights(load_model(tiny_folder)[0])
    factored.keep_factors()
    matrix = dense.matrices()[0][0]
    before = dense.read(matrix).clone()
    for weights in (dense, factored):
        weights.reduce(matrix, 4)
    assert dense.factors is None
    assert torch.equal(dense.read(matrix), spectrum.truncate(before, 4))
    torch.testing.assert_close(dense.read(matrix), factored.read(matrix), rtol=1e-5, atol=1e-5)


def test_the_recipe_reproduces_the_factors(run, tiny_folder, tmp_path, monkeypatch):
    result, out = run
    model = apply(out / "recipe.json", tiny_folder).model
    assert same_state(model, result.model)
    again = tmp_path / "again"
    call(monkeypatch, "apply", out / "recipe.json", tiny_folder, "-o", again, "--device", "cpu")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((out / "config.json").read_text())


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["splaser", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, "the command failed"


@pytest.mark.slow
def test_expanding_gives_the_dense_folder(run, tmp_path, monkeypatch, capsys):
    result, out = run
    result.model.save_pretrained(tmp_path / "dense")
    for overwrite in ([], ["--overwrite"]):
        call(monkeypatch, "expand", out, "-o", tmp_path / "expanded", *overwrite)
    assert re.search(r"expanded +\d+ layers", capsys.readouterr().err)
    expanded = AutoModelForCausalLM.from_pretrained(tmp_path / "expanded")
    assert same_state(expanded, result.model)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "expanded" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    assert "splaser_plugin.load" in (out / "README.md").read_text()
    card = (tmp_path / "expanded" / "README.md").read_text()
    assert "splaser_plugin.load" not in card and "candidates were tried" in card
    assert (tmp_path / "expanded" / "recipe.json").read_bytes() == (out / "recipe.json").read_bytes()
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "expanded")("Hello")["input_ids"]
        == result.tokenizer("Hello")["input_ids"]
    )


def test_laser_prints_the_parameters_before_and_after(tiny_folder, tmp_path, monkeypatch, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, THREE_PAIRS)))
    options = shlex.split("--embedder self --max-new-tokens 6 --candidates 3 --edge mp --device cpu --save factored")
    call(monkeypatch, "laser", tiny_folder, "--pairs", pairs, "-o", tmp_path / "out", *options)
    printed = " ".join(capsys.readouterr().err.split())
    before = load_model(tiny_folder)[0].num_parameters()
    after = load(tmp_path / "out").num_parameters()
    assert after < before
    assert f"parameters {before:,} before, {after:,} after" in printed
    assert f"dense model splaser expand {tmp_path / 'out'} -o ANOTHER_FOLDER" in printed


def test_a_factored_model_is_loaded_for_comparison_and_refused_for_another_reduction(run):
    _, out = run
    model, _ = load_model(out, device="cpu")
    assert any(isinstance(module, FactoredLinear) for module in model.modules())
    with pytest.raises(ModelError, match=r"has factored layers.*splaser expand FOLDER -o DENSE"):
        run_scan(model)
    with pytest.raises(ModelError, match="has factored layers"):
        laser(out, THREE_PAIRS, config=LaserConfig(**FACTORED))
    with pytest.raises(CheckpointError, match=r"stored as factors, which are not scanned.*splaser expand"):
        run_scan(str(out))


def test_a_folder_is_expanded_from_python_as_by_the_command(run, tmp_path):
    result, out = run
    expanded = expand(out, output=tmp_path / "dense")
    assert same_state(expanded, result.model) and same_state(expand(out), result.model)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), result.model)
    assert (tmp_path / "dense" / "recipe.json").read_bytes() == (out / "recipe.json").read_bytes()
    with pytest.raises(OutputError, match="isn't empty"):
        expand(out, output=tmp_path / "dense")
    with pytest.raises(ModelError, match="a loaded model has no tokenizer to write"):
        expand(expanded, output=tmp_path / "other")


def test_expanding_a_run_that_kept_nothing_copies_it(tiny_folder, tmp_path):
    seen = Facts()
    expand(tiny_folder, output=tmp_path / "expanded", progress=seen)
    assert seen.facts == [("expanded", "0 layers")]
    assert (tmp_path / "expanded" / "model.safetensors").read_bytes() == (
        tiny_folder / "model.safetensors"
    ).read_bytes()


def test_expanding_onto_a_disk_too_small_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    _, out = run
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"dense: needs \d+\.\d MB, but 0\.1 MB are free there\. Make room there"):
        expand(out, output=tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


def test_a_sharded_model_is_not_kept_as_factors():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weights = Weights(fully_shard(small_llama(), mesh=init_device_mesh("cpu", (1,))))
        with pytest.raises(ModelError, match="sharded over processes, so its matrices can't be kept as factors"):
            weights.keep_factors()
    finally:
        dist.destroy_process_group()


def test_a_model_with_adapters_is_not_kept_as_factors():
    from peft import LoraConfig, get_peft_model

    from splaser_plugin.weights.adapted import MergedWeights

    adapted = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match=r"has adapters, so its matrices can't be kept as factors\. Use save dense"):
        MergedWeights(adapted).keep_factors()


def test_a_trainer_refuses_a_factored_model_as_it_is_made(saved):
    from transformers import Trainer

    from splaser_plugin import LaserCallback

    with pytest.raises(ModelError, match=r"has factored layers.*expand\(model\)"):
        Trainer(load(saved[1]), callbacks=[LaserCallback(pairs=THREE_PAIRS)])


def test_a_trainer_refuses_factors_of_adapted_weights_before_it_trains(tmp_path, tokenizer):
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from splaser_plugin import LaserCallback

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
    callback = LaserCallback(pairs=THREE_PAIRS, config=LaserConfig(**FACTORED))
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])
    with pytest.raises(ModelError, match="has adapters, so its matrices can't be kept as factors"):
        trainer.train()
