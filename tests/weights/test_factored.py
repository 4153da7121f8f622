from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from splaser_plugin import LaserConfig, expand, laser, load
from splaser_plugin.cli.app import main
from splaser_plugin.errors import CheckpointError, ModelError, OutputError
from splaser_plugin.integrations.peft import merge_and_unload
from splaser_plugin.jobs.apply import apply
from splaser_plugin.jobs.expand import expand_folder
from splaser_plugin.scanning.scan import scan as run_scan
from splaser_plugin.spectra import spectrum
from splaser_plugin.weights.factored import CONFIG_KEY, FactoredLinear, factorize, is_factorable
from splaser_plugin.weights.factored_folder import save_model
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from tests.builders import QUICK, THREE_PAIRS, tiny_llama
from tests.reference import truncate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small_llama(**changes):
    return tiny_llama(vocabulary=64, attention_bias=True, **changes)


def small_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2, bos_token_id=1)
    ).eval()


def lasered(model, rank=5):
    """Every matrix of the first block reduced, as factors."""
    weights = Weights(model)
    weights.keep_factors()
    for matrix in weights.matrices()[0]:
        if matrix.block == 0:
            weights.reduce(matrix, rank)
    return weights


@pytest.fixture
def saved(tmp_path):
    """A model whose first block is factored, and the folder it was saved to."""
    weights = lasered(small_llama())
    save_model(weights, tmp_path / "factored", None)
    return weights, tmp_path / "factored"


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@given(
    rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 2**31), exponent=st.integers(-12, 12),
    dtype=st.sampled_from(DTYPES), fraction=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_factors_multiply_to_the_best_approximation_but_for_rounding(rows, columns, seed, exponent, dtype, fraction):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 2.0**exponent).to(dtype)
    rank = 1 + round(fraction * (min(rows, columns) - 1))
    factors = factorize(weight, rank)
    assert factors.left.shape == (rows, rank) and factors.right.shape == (rank, columns)
    assert factors.left.dtype == factors.right.dtype == factors.product().dtype == dtype
    best = truncate(weight, rank)
    error = (factors.product().double() - best).norm() / best.norm()
    assert error < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_factors_of_extreme_weights_are_finite_and_balanced(scale):
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)) * scale
    factors = factorize(weight, 4)
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(factors.product().double(), truncate(weight, 4), rtol=1e-4, atol=scale * 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_the_expanded_model_is_the_lasered_one_bit_for_bit(make, dtype, tmp_path):
    weights = lasered(make().to(dtype))
    save_model(weights, tmp_path / "factored", None)
    weights.model.save_pretrained(tmp_path / "dense")
    loaded = load(tmp_path / "factored")
    assert any(isinstance(module, FactoredLinear) for module in loaded.modules())
    assert same_state(expand(loaded), weights.model)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in weights.model.modules()]
    loaded.save_pretrained(tmp_path / "expanded")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "expanded" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factored_layers_compute_what_the_dense_ones_do(make, dtype, tmp_path):
    weights = lasered(make().to(dtype))
    save_model(weights, tmp_path, None)
    loaded = load(tmp_path)
    assert not loaded.training and loaded.dtype == dtype
    assert type(loaded) is type(weights.model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        dense, factored = weights.model(ids).logits.float(), loaded(ids).logits.float()
    assert (factored - dense).norm() < 20 * torch.finfo(dtype).eps * dense.norm()


def test_the_model_gets_smaller_by_what_the_ranks_say(saved):
    weights, folder = saved
    stored = load_file(folder / "model.safetensors")
    loaded = load(folder)
    removed = sum(32 * n - 5 * (32 + n) for n in (32, 16, 16, 32, 64, 64, 64))
    dense = sum(parameter.numel() for parameter in weights.model.parameters())
    assert sum(parameter.numel() for parameter in loaded.parameters()) == dense - removed
    assert sum(tensor.numel() for tensor in stored.values()) == dense - removed
    weights.model.save_pretrained(folder / "dense")
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder / "dense", folder)]
    assert 4 * removed - 1000 < sizes[0] - sizes[1] <= 4 * removed


def test_only_what_takes_less_room_is_factored():
    model = small_llama()
    matrices = {matrix.name: matrix for matrix in Weights(model).matrices()[0]}
    query = matrices["model.layers.0.self_attn.q_proj"]
    assert is_factorable(model, query, 15) and not is_factorable(model, query, 16)
    weights = Weights(model)
    weights.keep_factors()
    dense = Weights(small_llama())
    for each in (weights, dense):
        each.reduce(query, 16)
    assert torch.equal(weights.read(query), dense.read(query))
    assert not weights.factors


def test_experts_stay_dense():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    for matrix in Weights(model).matrices()[0]:
        assert is_factorable(model, matrix, 1) == (matrix.expert is None and matrix.type != "mlp.gate")


def test_a_mixture_of_experts_comes_back_whole(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    weights = lasered(MixtralForCausalLM(config).eval(), rank=2)
    assert {matrix.type for matrix in weights.factors} == {f"self_attn.{each}_proj" for each in "qkvo"}
    save_model(weights, tmp_path, None)
    assert same_state(expand(load(tmp_path)), weights.model)


def test_an_undone_reduction_leaves_the_factors_of_the_one_before():
    weights = Weights(small_llama())
    weights.keep_factors()
    matrix = weights.matrices()[0][0]
    with weights.trying(matrix) as attempt:
        attempt.reduce(3)
    assert not weights.factors
    with weights.trying(matrix) as attempt:
        attempt.reduce(6)
        attempt.keep()
    kept = weights.factors[matrix]
    with weights.trying(matrix) as attempt:
        attempt.reduce(2)
    assert weights.factors[matrix] is kept
    assert torch.equal(kept.product(), weights.read(matrix))


def test_a_matrix_that_was_trained_since_is_stored_as_it_is_now(tmp_path):
    weights = lasered(small_llama())
    trained, other = list(weights.factors)[:2]
    with torch.no_grad():
        weights.parameters[trained.parameter][0, 0] += 1
    save_model(weights, tmp_path, None)
    loaded = load(tmp_path)
    assert type(loaded.get_submodule(trained.name)) is nn.Linear
    assert isinstance(loaded.get_submodule(other.name), FactoredLinear)
    assert same_state(expand(loaded), weights.model)


def test_nothing_reduced_is_a_plain_model(tmp_path):
    weights = Weights(small_llama())
    weights.keep_factors()
    save_model(weights, tmp_path, None)
    assert CONFIG_KEY not in json.loads((tmp_path / "config.json").read_text())
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path), weights.model)
    assert same_state(load(tmp_path), weights.model)


def test_saving_a_loaded_model_and_loading_it_again_changes_nothing(saved, tmp_path):
    _, folder = saved
    loaded = load(folder)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = load(tmp_path / "again")
    assert same_state(again, loaded)
    assert getattr(again.config, CONFIG_KEY) == getattr(loaded.config, CONFIG_KEY)


def test_generation_is_the_dense_models(saved):
    weights, folder = saved
    ids = torch.arange(5)[None]
    answers = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (weights.model, load(folder))]
    assert torch.equal(*answers)


def test_load_takes_what_from_pretrained_takes(saved):
    _, folder = saved
    loaded = load(str(folder), dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"


def test_loading_draws_no_random_number(saved):
    _, folder = saved
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(params=["by name", "all-linear"])
def trained_lora(saved, request):
    """Adapters trained for two steps on a factored model, its folder, some tokens, and the logits of both."""
    from peft import LoraConfig, get_peft_model

    _, folder = saved
    targets = ["q_proj", "down_proj"] if request.param == "by name" else request.param
    ids = torch.arange(12)[None]
    adapted = get_peft_model(load(folder), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    before = adapted(ids).logits.detach()
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=1.0)
    for _ in range(2):  # after the first step LoRA's A is still as it was
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    return adapted, folder, ids, before, adapted(ids).logits.detach()


def test_lora_trains_on_factored_layers_and_is_saved(trained_lora, tmp_path):
    from peft import PeftModel

    adapted, folder, ids, before, after = trained_lora
    query = adapted.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(query.base_layer, FactoredLinear)
    assert query.lora_A["default"].weight.grad.abs().sum() > 0
    assert (after - before).norm() > 1e-3 * before.norm()
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(load(folder), tmp_path).eval()(ids).logits, after)


def test_lora_merges_into_the_factors(trained_lora, tmp_path):
    adapted, folder, ids, _, after = trained_lora
    merged = merge_and_unload(adapted)
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    query = merged.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(query, FactoredLinear) and query.factors.rank == 5 + 2
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_state(again, merged)
    assert again.num_parameters() < expand(load(folder)).num_parameters()


def test_lora_merges_into_the_dense_model(trained_lora):
    adapted, _, ids, _, after = trained_lora
    merged = expand(adapted).merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    assert not hasattr(merged.config, CONFIG_KEY)


def test_an_adapter_too_large_for_the_factors_makes_a_plain_layer(saved):
    from peft import LoraConfig, get_peft_model

    _, folder = saved
    config = LoraConfig(r=11, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(folder), config).eval()
    ids = torch.arange(12)[None]
    after = adapted(ids).logits
    merged = merge_and_unload(adapted)
    assert type(merged.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    assert getattr(merged.config, CONFIG_KEY).keys() == getattr(load(folder).config, CONFIG_KEY).keys() - {
        "model.layers.0.self_attn.q_proj"
    }


def test_an_adapter_that_is_no_plain_lora_is_not_merged(saved):
    from peft import LoHaConfig, get_peft_model

    adapted = get_peft_model(load(saved[1]), LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(
        ModelError, match=r"q_proj has an adapter that is no plain LoRA \(Linear\).*expand\(model\) first"
    ):
        merge_and_unload(adapted)


def test_trainer_trains_saves_and_resumes(saved, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    _, folder = saved
    rows = Dataset.from_list(
        [{"input_ids": list(range(start, start + 8)), "labels": list(range(8))} for start in range(8)]
    )

    def trainer(steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=2, save_steps=2,
            learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        return Trainer(load(folder), arguments, train_dataset=rows)

    first = trainer(2)
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    first.train()
    name = "model.layers.0.self_attn.q_proj"
    for part in ("weight", "right_factor", "bias"):
        assert not torch.equal(first.model.state_dict()[f"{name}.{part}"], before[f"{name}.{part}"])
    assert same_state(load(tmp_path / "run" / "checkpoint-2"), first.model)
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


FACTORED = {**QUICK, "save": "factored"}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, tiny_folder, tmp_path_factory):
    """A finished laser run that was saved factored."""
    result = laser(tiny_folder, THREE_PAIRS, config=LaserConfig(**FACTORED, dtype=request.param))
    return result, result.save(tmp_path_factory.mktemp("out") / "factored")


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


def test_other_loaders_stop_at_a_factored_folder(saved):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(saved[1])


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


def test_expanding_a_run_that_kept_nothing_copies_it(tiny_folder, tmp_path):
    assert expand_folder(str(tiny_folder), tmp_path / "expanded") == 0
    assert (tmp_path / "expanded" / "model.safetensors").read_bytes() == (
        tiny_folder / "model.safetensors"
    ).read_bytes()


def test_expanding_onto_a_disk_too_small_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    _, out = run
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"dense: needs \d+\.\d MB, but 1\.0 MB are free there\. Make room there"):
        expand_folder(str(out), tmp_path / "dense")
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


def edit_config(folder, ranks):
    config = json.loads((folder / "config.json").read_text())
    config[CONFIG_KEY] = ranks(config[CONFIG_KEY]) if callable(ranks) else ranks
    (folder / "config.json").write_text(json.dumps(config))


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (["a"], r"config\.json: splaser_factored is \['a'\], expected module names to ranks of at least 1"),
        ({QUERY: 0}, "expected module names to ranks of at least 1"),
        ({QUERY: True}, "expected module names to ranks of at least 1"),
        ({QUERY: "5"}, "expected module names to ranks of at least 1"),
        (None, "expected module names to ranks of at least 1"),
        (lambda old: {**old, QUERY: 33}, rf"{QUERY}: rank 33, but its shape \(32, 32\) allows at most 32"),
        (lambda old: {**old, QUERY: 10**30}, f"{QUERY}: rank 1{'0' * 30}, but its shape"),
        (lambda old: {**old, QUERY: 4}, rf"tensor '{QUERY}.\w+' has shape .*, expected .* by config\.json"),
        (
            lambda old: {**old, "model.layers.9.mlp": 4},
            "'model.layers.9.mlp' is no linear layer of this model; nearest",
        ),
        (lambda old: {**old, "model.embed_tokens": 4}, "'model.embed_tokens' is no linear layer of this model"),
        (lambda old: {**old, "": 4}, "'' is no linear layer of this model"),
        (
            lambda old: {**old, "model.layers.1.mlp.up_proj": 4},
            r"model\.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' has shape \(64, 32\), expected \(64, 4\)",
        ),
        (
            lambda old: {name: rank for name, rank in old.items() if name != QUERY},
            rf"model\.safetensors: tensor '{QUERY}.weight' has shape \(32, 5\), expected \(32, 32\)",
        ),
    ],
)
def test_a_configuration_that_lies_is_refused(saved, ranks, message):
    edit_config(saved[1], ranks)
    with pytest.raises(CheckpointError, match=message):
        load(saved[1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", "abc", r"config\.json: makes no causal language model \(StrictDataclass"),
        ("num_attention_heads", 0, r"config\.json: makes no causal language model \(ZeroDivisionError"),
        ("hidden_act", "zzz", r"config\.json: makes no causal language model \(KeyError: 'zzz'\)"),
        ("model_type", "t5", r"config\.json: makes no causal language model"),
        ("vocab_size", 10**15, r"tensor '\w+\.\S+' has shape \(64, 32\), expected \(1000000000000000, 32\)"),
        ("num_hidden_layers", 3, "tensor 'model.layers.2.input_layernorm.weight' is missing"),
    ],
)
def test_a_configuration_of_another_model_is_refused(saved, key, value, message):
    file = saved[1] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=message):
        load(saved[1])


def without(name):
    return lambda state: {each: tensor for each, tensor in state.items() if each != name}


def with_changed(name, change):
    return lambda state: {**state, name: change(state[name]).contiguous()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{QUERY}.right_factor"), f"tensor '{QUERY}.right_factor' is missing"),
        (without(f"{QUERY}.weight"), f"tensor '{QUERY}.weight' is missing"),
        (without("model.norm.weight"), "tensor 'model.norm.weight' is missing"),
        (
            with_changed(f"{QUERY}.weight", lambda t: t[:, :3]),
            rf"safetensors: tensor '{QUERY}.weight' has shape \(32, 3\)",
        ),
        (
            with_changed(f"{QUERY}.right_factor", lambda t: t.T),
            rf"'{QUERY}.right_factor' has shape \(32, 5\), expected \(5",
        ),
        (
            with_changed(f"{QUERY}.weight", lambda t: t.long()),
            rf"tensor '{QUERY}.weight' is torch.int64, expected floating",
        ),
        (lambda state: {**state, "model.extra": torch.zeros(3)}, "tensor 'model.extra' belongs to no layer"),
    ],
)
def test_tensors_that_are_missing_or_at_odds_are_refused(saved, change, message):
    file = saved[1] / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(saved[1])


def test_a_file_that_was_cut_off_is_refused(saved):
    file = saved[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* cut off"):
        load(saved[1])


def test_a_factored_head_that_is_tied_is_refused(tmp_path):
    weights = lasered(small_llama(tie_word_embeddings=True))
    save_model(weights, tmp_path, None)
    edit_config(tmp_path, lambda old: {**old, "lm_head": 4})
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "lm_head.right_factor": torch.zeros(4, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head"):
        load(tmp_path)
