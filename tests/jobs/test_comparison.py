"""Models side by side: each figure against one computed by hand."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from splaser_plugin.cli.terminal import comparison_tables
from splaser_plugin.config.stages import CompareConfig
from splaser_plugin.data.pairs import PairSet, pairs_from_rows
from splaser_plugin.errors import CheckpointError, ConfigError, PairsError, TextError
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.jobs.compare import OTHER_TOKENS, UNBOUNDED, ComparedModel, Comparison, compare
from splaser_plugin.scoring.scores import Scores
from tests.builders import VOCABULARY, tiny_llama
from tests.reference import one_token_at_a_time

QUICK = {"max_new_tokens": 5, "window": 16, "samples": 9, "device": "cpu"}


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, tokenizer):
    """A model with another seed and a longer second block."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tiny_llama(seed=1, intermediate_size=48).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(minilm, text):
    return {**QUICK, "embedder": str(minilm), "text": text}


@pytest.fixture
def compared(tiny_folder, other_folder, pairs, settings):
    return compare([tiny_folder, other_folder], pairs, config=CompareConfig(**settings))


@torch.no_grad()
def by_hand(folder, tokenizer, rows, text):
    """Margins, losses and parameters, one token or window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompter = Prompter(tokenizer, context=512)
    margins = [
        one_token_at_a_time(model, prompter, pair, pair.chosen)
        - one_token_at_a_time(model, prompter, pair, pair.rejected)
        for pair in pairs_from_rows(rows)
    ]
    ids = tokenizer(Path(text).read_text(), add_special_tokens=False)["input_ids"]
    windows = [torch.tensor([ids[16 * place : 16 * place + 16]]) for place in range(9)]
    losses = [model(input_ids=window, labels=window).loss.item() for window in windows]
    return np.array(margins), np.array(losses), model.num_parameters()


@pytest.mark.slow
def test_figures_are_those_computed_by_hand(compared, tiny_folder, other_folder, tokenizer, pairs, settings):
    first, second = compared.figures()
    margins, losses, counts = zip(
        *(by_hand(folder, tokenizer, pairs, settings["text"]) for folder in (tiny_folder, other_folder)), strict=True
    )
    assert first["margin"].value == pytest.approx(margins[0].mean(), abs=1e-4)
    assert second["margin"].change == pytest.approx((margins[1] - margins[0]).mean(), abs=1e-4)
    assert first["likelier"].value == np.mean(margins[0] > 0)
    assert second["likelier"].change == np.mean(margins[1] > 0) - np.mean(margins[0] > 0)
    assert first["perplexity"].value == pytest.approx(np.exp(losses[0].mean()), rel=1e-4)
    assert second["perplexity"].change == pytest.approx(np.exp((losses[1] - losses[0]).mean()), rel=1e-4)
    assert [first["parameters"].value, second["parameters"].change] == [counts[0], counts[1] - counts[0]]
    size = (other_folder / "model.safetensors").stat().st_size
    assert second["file_bytes"].value == size
    assert second["file_bytes"].change == size - (tiny_folder / "model.safetensors").stat().st_size
    for name in ("semantic", "margin", "likelier", "perplexity"):
        assert first[name].interval is first[name].change is None
    low, high = second["perplexity"].interval
    assert low <= second["perplexity"].change <= high
    answers = compared.models[1].semantic
    assert second["tokens_per_s"].value * compared.models[1].generation_s == pytest.approx(answers.generated_tokens)


@pytest.mark.slow
def test_semantic_scores_are_those_of_a_laser_runs_baseline(compared, tiny_folder, pairs, minilm):
    from splaser_plugin import LaserConfig, laser

    config = LaserConfig(embedder=str(minilm), max_new_tokens=5, candidates=1, edge="mp", device="cpu")
    baseline = laser(tiny_folder, pairs, config=config).search.baseline
    assert compared.models[0].semantic.values == pytest.approx(baseline.values, abs=1e-5)
    assert compared.figures()[0]["semantic"].value == pytest.approx(baseline.mean, abs=1e-5)


@pytest.mark.slow
def test_a_model_against_itself_has_no_difference_at_all(tiny_folder, pairs, settings):
    figures = compare([tiny_folder] * 2, pairs, config=CompareConfig(**settings)).figures()[1]
    for name, none in (("semantic", 0.0), ("margin", 0.0), ("likelier", 0.0), ("perplexity", 1.0)):
        assert figures[name].change == none
        assert figures[name].interval is None
        assert re.fullmatch(r"0 of \d+ differ, expected at least 6 for an interval", figures[name].reason)
    assert figures["parameters"].change == figures["file_bytes"].change == 0
    assert figures["tokens_per_s"].interval is None


def planted(values):
    """A model as it was measured, but for what is planted here."""
    scores = Scores(tuple(range(len(values))), tuple(values))
    none = Scores((), ())
    return ComparedModel("m", scores, scores, none, scores, 1, 1, 1.0, ())


def planted_figures(first, second):
    models = tuple(planted(values) for values in (first, second))
    return Comparison(models, PairSet((), "rows", {}, 0), CompareConfig())


def test_there_is_no_interval_where_too_few_items_differ_but_its_reason():
    for differing, has_interval in ((5, False), (6, True)):
        found = planted_figures([0.5] * 9, [0.6] * differing + [0.5] * (9 - differing)).figures()[1]
        for name in ("semantic", "margin", "perplexity"):
            assert (found[name].interval is not None) is has_interval
            reason = None if has_interval else "5 of 9 differ, expected at least 6 for an interval"
            assert found[name].reason == reason
        assert found["semantic"].change == pytest.approx(differing / 90)
    assert planted_figures([0.5] * 5, [0.6] * 5).figures()[1]["margin"].interval is None


def test_a_broken_models_perplexity_is_null_with_a_reason():
    found = planted_figures([-2.0] * 9, [-900.0 - place for place in range(9)])
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))["models"]
    broken = stored[1]["figures"]["perplexity"]
    assert (broken["value"], broken["ratio"], broken["interval"]) == (None, None, None)
    assert broken["reason"] == UNBOUNDED
    assert stored[0]["figures"]["perplexity"]["value"] == pytest.approx(np.exp(2.0))
    printed = io.StringIO()
    Console(file=printed, width=80).print(*comparison_tables(["a", "b"], found.figures()))
    back = planted_figures([-900.0] * 9, [-2.0 - place for place in range(9)]).figures()[1]["perplexity"]
    assert back.value is not None and back.change == 0.0


@pytest.mark.slow
def test_only_the_files_that_are_loaded_count(tiny_folder, pairs, settings, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = list((tmp_path / "model").glob("model-*.safetensors"))
    shutil.copy(shards[0], tmp_path / "model" / "consolidated.safetensors")
    found = compare([tmp_path / "model"], pairs, config=CompareConfig(**settings)).figures()[0]
    assert len(shards) > 1
    assert found["file_bytes"].value == sum(shard.stat().st_size for shard in shards)


def test_without_a_text_or_rejected_answers_their_metrics_are_left_out(tiny_folder, minilm):
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("yes", "no", "maybe")]
    config = CompareConfig(**{**QUICK, "embedder": str(minilm)})
    found = compare([tiny_folder], rows, config=config)
    assert set(found.figures()[0]) == {"semantic", "margin", "parameters", "file_bytes", "tokens_per_s"}
    assert found.to_dict()["windows"] == 0


@pytest.mark.slow
def test_figures_a_token_are_not_compared_between_tokenizers(tiny_folder, pairs, settings, tmp_path):
    from transformers import AutoTokenizer

    tiny_llama(vocabulary=VOCABULARY + 1).save_pretrained(tmp_path / "model")
    changed = AutoTokenizer.from_pretrained(tiny_folder)
    changed.add_tokens(["France"])
    changed.save_pretrained(tmp_path / "model")
    found = compare([tiny_folder, tmp_path / "model"], pairs, config=CompareConfig(**settings))
    figures = found.figures()[1]
    for name in ("margin", "perplexity"):
        assert (figures[name].change, figures[name].interval, figures[name].reason) == (None, None, OTHER_TOKENS)
    assert figures["semantic"].change is not None


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_the_same_as_json(
    splaser, tiny_folder, other_folder, pairs_file, settings, tmp_path
):
    flags = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]
    out = tmp_path / "table.json"
    out.write_text('{"schema": "splaser.comparison/1"}')  # an earlier one, which may be replaced
    command = ["compare", tiny_folder, other_folder, tiny_folder, tiny_folder, "--pairs", pairs_file, "-o", out, *flags]
    code, printed, stderr = splaser(*command, "--json")
    assert code == 0, stderr
    stored = json.loads(out.read_text())
    assert json.loads(printed) == stored
    assert stored["schema"] == "splaser.comparison/1"
    assert [model["model"] for model in stored["models"]] == [str(command[place]) for place in (1, 2, 3, 4)]
    assert stored["models"][0]["figures"]["margin"]["difference"] is None
    assert stored["models"][1]["figures"]["perplexity"]["ratio"] > 0
    assert len(stored["models"][1]["per_window"]) == 9
    tables = [line for line in stderr.splitlines() if re.match("[┏┃┡│└]", line)]
    assert len([line for line in tables if line.startswith("┏")]) == 2
    assert max(map(len, tables)) <= 80
    assert "preference margin" in stderr and "by mean log-prob." in stderr and "tokens a second" in stderr


def test_a_file_that_is_not_ours_is_not_overwritten(splaser, tiny_folder, pairs_file, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, stderr = splaser("compare", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "thesis.txt")
    assert code == 1
    assert "exists and was not written by splaser" in stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_what_is_missing_is_reported_before_any_model_is_loaded(tiny_folder, pairs, settings, monkeypatch):
    monkeypatch.setattr("splaser_plugin.jobs.compare.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(CheckpointError, match=r"\./nowhere: there is no such model folder"):
        compare([tiny_folder, "./nowhere"], pairs, config=CompareConfig(**settings))
    with pytest.raises(TextError, match=r"nothing\.txt: there is no such file"):
        compare([tiny_folder], pairs, config=CompareConfig(text="nothing.txt"))
    with pytest.raises(PairsError, match="1 pair, expected at least 2"):
        compare([tiny_folder], pairs[:1])
    with pytest.raises(ConfigError, match="no model was given"):
        compare([], pairs)
    with pytest.raises(ConfigError, match="embedder self: each model would measure itself"):
        CompareConfig(embedder="self")


@pytest.mark.slow
def test_a_model_stored_in_factors_is_compared_by_what_it_stores(tiny_folder, pairs, settings, tmp_path):
    from splaser_plugin import LaserConfig, laser

    config = LaserConfig(
        embedder="self",
        max_new_tokens=5,
        candidates=2,
        device="cpu",
        save="factored",
        accept="harmless",
        tolerance=10.0,
    )
    result = laser(tiny_folder, pairs, config=config, output=tmp_path / "factored")
    figures = compare([tiny_folder, tmp_path / "factored"], pairs, config=CompareConfig(**settings)).figures()[1]
    assert figures["parameters"].change == -result.search.parameters_removed < 0
    assert figures["file_bytes"].change < 0
    assert figures["perplexity"].change != 1.0


@pytest.mark.slow
def test_a_table_of_one_model_has_one_column(compared):
    printed = io.StringIO()
    tables = comparison_tables(["only"], compared.figures()[:1])
    assert len(tables) == 1
    Console(file=printed, width=80).print(*tables)
    assert "only" in printed.getvalue() and "perplexity" in printed.getvalue()
