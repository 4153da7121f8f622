"""Scorers by name, and what is said of a text or a function that can't be used."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from splaser_plugin import CompareConfig, LaserConfig, compare, laser
from splaser_plugin.config.stages import MeasureConfig
from splaser_plugin.data.pairs import pairs_from_rows
from splaser_plugin.data.split import LEAST, split_windows
from splaser_plugin.data.windows import BLOCK_CHARS, open_text, read_windows
from splaser_plugin.errors import ConfigError, ModelError, ScorerError, TextError
from splaser_plugin.generation.generator import Generator
from splaser_plugin.scoring.own_scorer import CallableScorer, load_function
from splaser_plugin.scoring.perplexity import PerplexityScorer, perplexity
from splaser_plugin.scoring.scorers import Material, Scorers
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.judge import Judge
from splaser_plugin.search.search import search
from splaser_plugin.weights.in_memory import Weights
from tests.builders import EXAMPLE_PAIRS, PROSE, QUICK
from tests.planted import Facts, outcomes, shorter_is_better


def test_windows_are_the_text_from_its_beginning_and_do_not_overlap(text, tokenizer):
    ids = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    windows = read_windows(text, tokenizer, window=16, count=10_000)
    assert [token for window in windows for token in window] == ids[: len(ids) // 16 * 16]
    assert read_windows(text, tokenizer, window=16, count=5) == windows[:5]


def words(part, **_):
    return {"input_ids": part.split(" ")}


@pytest.mark.parametrize("line", ["one line of many words\r\n", "all in a single line "])
def test_of_a_long_file_only_as_much_is_read_as_the_windows_need(tmp_path, line):
    text = "\ufeff" + line * (10 * BLOCK_CHARS // len(line))
    (tmp_path / "long.txt").write_bytes(text.encode())
    plain = text[1:].replace("\r\n", "\n")
    parts = list(open_text(str(tmp_path / "long.txt")))
    assert "".join(parts) == plain
    assert max(map(len, parts)) <= 2 * BLOCK_CHARS
    assert "\n" not in line or all(part.endswith("\n") for part in parts)
    seen = []

    def counted(part, **_):
        seen.append(len(part))
        return words(part)

    windows = read_windows(str(tmp_path / "long.txt"), counted, window=16, count=9)
    assert len(seen) == 1
    assert [token for window in windows for token in window] == plain.split(" ")[: 9 * 16]


def test_a_long_file_that_stops_being_utf_8_is_refused_where_it_does(tmp_path):
    (tmp_path / "long.txt").write_bytes(b"word\n" * BLOCK_CHARS + b"\xe9")
    with pytest.raises(TextError, match=f"not UTF-8 \\(at byte {5 * BLOCK_CHARS:,}\\)"):
        list(open_text(str(tmp_path / "long.txt")))


def test_a_data_set_is_read_row_by_row_from_its_test_split(tmp_path, tokenizer):
    for split, words in (("train", "wrong"), ("test", "right")):
        rows = [{"text": f"{words} {number}"} for number in range(40)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert next(iter(open_text(str(tmp_path)))) == "right 0\n"
    windows = read_windows(str(tmp_path), tokenizer, window=8, count=4)
    assert "right" in tokenizer.decode(windows[0]) and "wrong" not in "".join(tokenizer.batch_decode(windows))


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_perplexity_is_transformers_own_loss_one_window_at_a_time(tiny_model, text, tokenizer, batch_size):
    windows = read_windows(text, tokenizer, window=16, count=9)
    scorer = PerplexityScorer(tiny_model, windows, batch_size=batch_size)
    losses = [tiny_model(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss.item() for w in windows]
    scores = scorer.score(range(9))
    assert scores.values == pytest.approx([-loss for loss in losses], abs=1e-4)
    assert perplexity(scores) == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert scorer.score([7, 2]).values == pytest.approx([-losses[7], -losses[2]], abs=1e-4)


def test_a_perplexity_that_is_too_large_for_a_number_is_none():
    assert perplexity(Scores((0, 1), (-900.0, -900.0))) is None
    assert perplexity(Scores((0, 1), (-700.0, -700.0))) == pytest.approx(np.exp(700.0))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"short", {}, r"text .*: 2 tokens make 0 windows of 16, expected at least 2.*smaller window"),
        (b"caf\xe9 " * 50, {}, r"not UTF-8 \(at byte 3\)"),
        (b"word " * 500, {"context": 8}, r"window 16: longer than the model's context of 8 tokens"),
    ],
)
def test_a_text_that_can_not_be_used_is_refused(tmp_path, tokenizer, content, options, message):
    (tmp_path / "prose.txt").write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_windows(str(tmp_path / "prose.txt"), tokenizer, window=16, count=9, **options)


def test_a_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"nothing\.txt: there is no such file"):
        open_text("nothing.txt")
    (tmp_path / "rows.jsonl").write_text('{"prose": "no such column"}\n')
    with pytest.raises(TextError, match="its columns are prose, expected text in 'text'"):
        list(open_text(str(tmp_path)))
    with pytest.raises(TextError, match=r"no file of that name, and it can't be read as a data set"):
        list(open_text("nobody/has-this-data-set"))


def test_windows_are_split_by_their_content():
    windows = [[number, number + 1] for number in range(100)]
    split = split_windows(windows, 0.3, seed=1)
    assert len(split.held_out) == 30
    assert sorted([*split.search, *split.held_out]) == windows
    assert set(map(tuple, split_windows(windows[::-1], 0.3, seed=1).held_out)) == set(map(tuple, split.held_out))
    assert split_windows(windows, 0.3, seed=2).held_out != split.held_out
    assert split_windows(windows, 0).search == tuple(windows)
    few = split_windows(windows[:10], 0.3)
    assert (len(few.search), few.held_out) == (10, ())
    assert f"3 held out, and each part needs {LEAST}" in few.reason


def test_a_laser_run_by_perplexity_needs_no_pairs_and_has_its_verdict_on_other_windows(text, tiny_folder):
    options = {**QUICK, "embedder": "./not-needed"}
    config = LaserConfig(**options, scorer="perplexity", text=text, window=16, samples=24)
    result = laser(tiny_folder, config=config)
    stored = result.results()
    assert (stored["scorer"], stored["unit"]) == ("perplexity", "windows")
    assert len(result.search.baseline.items) + len(result.held_out.base.items) == 24
    assert len(result.held_out.base.items) == 7
    assert stored["held_out"]["pairs"] == 7
    assert stored["held_out"]["split"] == "7 windows; 17 to search on"
    assert "on 7 windows" in result.held_out.summary
    assert stored["generated_tokens"] == 0
    assert result.search.kept and result.search.final.mean > result.search.baseline.mean


def test_a_function_of_ones_own_is_called_with_the_pairs_asked_for(tiny_model, tokenizer, pairs):
    usable = pairs_from_rows(pairs).pairs
    scorer = Scorers(tiny_model, tokenizer, MeasureConfig()).make("tests.planted.shorter_is_better", Material(usable))
    whole = scorer.score(range(4))
    assert whole.values == tuple(map(float, shorter_is_better(tiny_model, tokenizer, usable)))
    assert scorer.score([2, 0]).values == (whole.values[2], whole.values[0])


def test_a_function_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_scorer.py").write_text("def score(model, tokenizer, pairs):\n    return [1.0] * len(pairs)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_function("my_own_scorer.score")(None, None, [1, 2]) == [1.0, 1.0]


def test_a_laser_run_by_a_function_of_ones_own(tiny_folder, pairs):
    config = LaserConfig(**QUICK, scorer="tests.planted.shorter_is_better", include=("layers.0",))
    result = laser(tiny_folder, pairs, config=config)
    assert result.search.baseline.answers == ()
    assert result.results()["scorer"] == "tests.planted.shorter_is_better"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "own: returned 1 scores for 4 pairs"),
        (["good", 1, 2, 3], r"own: expected one number a pair, got \['good'"),
        (None, "own: expected one number a pair, got None"),
    ],
)
def test_what_a_function_returns_is_checked(tiny_model, tokenizer, pairs, returned, message):
    usable = pairs_from_rows(pairs).pairs
    scorer = CallableScorer(lambda model, tokenizer, pairs: returned, tiny_model, tokenizer, usable, "own")
    with pytest.raises(ScorerError, match=message):
        scorer.score(range(4))


def own_search(tiny_model, tokenizer, pairs, candidates, third):
    """A search by a function of one's own that is 1 at first, and `third()` of the second candidate."""
    calls = []

    def function(model, tokenizer, pairs):
        calls.append(1)
        return third(pairs) if len(calls) == 3 else [float(len(calls))] * len(pairs)

    scorer = CallableScorer(function, tiny_model, tokenizer, pairs_from_rows(pairs).pairs, "own")
    return search(Weights(tiny_model), candidates[:3], Judge(scorer))


@pytest.mark.parametrize(
    ("third", "reason"),
    [
        (lambda pairs: 1 / 0, "scorer own: it raised ZeroDivisionError: division by zero."),
        (lambda pairs: [float("nan")] * len(pairs), "scorer own: nan for the pair 'What is the capital of France?'"),
    ],
)
def test_a_candidate_that_breaks_a_function_of_ones_own_fails_alone(
    tiny_model, tokenizer, pairs, candidates, third, reason
):
    found = own_search(tiny_model, tokenizer, pairs, candidates, third)
    assert outcomes(found) == ["kept", "failed", "kept"]
    assert found.trials[1].judgement.reason.startswith(reason)


def test_a_function_that_returns_too_few_scores_or_runs_out_of_memory_ends_the_search(
    tiny_model, tokenizer, pairs, candidates
):
    with pytest.raises(ScorerError, match="returned 1 scores for 4 pairs"):
        own_search(tiny_model, tokenizer, pairs, candidates, lambda pairs: [1.0])

    def out_of_memory(pairs):
        raise MemoryError

    with pytest.raises(MemoryError):
        own_search(tiny_model, tokenizer, pairs, candidates, out_of_memory)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module.score", r"the module no_such_module can't be imported .*run in its folder"),
        ("json.no_such_function", "json has no function 'no_such_function'"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_the_model_is_loaded(path, message, tiny_folder):
    facts = Facts()
    with pytest.raises(ScorerError, match=message):
        laser(str(tiny_folder), EXAMPLE_PAIRS, config=LaserConfig(scorer=path), progress=facts)
    assert facts.facts == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scorer": "semantics"},
            "scorer: got 'semantics', expected one of auto, semantic, margin, perplexity, lm-eval:TASK",
        ),
        ({"scorer": "perplexity"}, "scorer perplexity needs a text: give text FILE"),
        ({"tolerance": 0.0, "accept": "harmless"}, "tolerance 0 with accept harmless: no test can tell"),
        ({"scorer": "perplexity", "text": "t", "held_out": "h"}, "held_out with scorer perplexity: what is held"),
        ({"held_out": "h", "held_out_fraction": 0.5}, "held_out and held_out_fraction: got both"),
        ({"guard": "perplexity:1.02"}, "guard perplexity needs a text: give text FILE"),
        ({"guard": "perplexity"}, "guard: got 'perplexity', expected perplexity:RATIO"),
        ({"guard": "perplexity:0.9", "text": "x"}, "guard: got 'perplexity:0.9'.*at least 1"),
        ({"guard": "margin:-1"}, "guard: got 'margin:-1'.*fall of at least 0"),
        ({"guard": "margin:nan"}, "guard: got 'margin:nan'"),
        ({"guard": "speed:2"}, "guard: got 'speed:2'"),
        ({"guard": "margin:0.1,chosen"}, "guard: got 'chosen', expected"),
        ({"guard": "margin:0.1,margin:0.2"}, "guard: 'margin' stands twice"),
        ({"objective": "compress", "accept": "improve"}, "accept improve with objective compress"),
        ({"objective": "small"}, "objective: got 'small', expected one of quality, compress"),
        ({"tolerance": -0.1}, "tolerance: got -0.1, expected at least 0"),
        ({"tolerance": float("inf")}, "tolerance: got inf, expected a finite number"),
        ({"window": 1}, "window: got 1, expected at least 2"),
    ],
)
def test_options_that_can_not_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LaserConfig(**options)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, ()),
        ({"tolerance": 0.5, "alpha": 0.01, "text": "t", "window": 9}, ("--tolerance", "--alpha", "--text", "--window")),
        ({"accept": "confident", "alpha": 0.01}, ()),
        ({"accept": "confident", "tolerance": 0.5}, ("--tolerance",)),
        ({"objective": "compress", "alpha": 0.01, "tolerance": 0.5, "text": "t", "budget": 0.1}, ()),
        ({"objective": "compress", "candidates": 3, "rank_by": "gradient"}, ("--candidates", "--rank-by")),
        ({"objective": "compress", "candidates": 3, "ranks": "0.5", "calibration_tokens": 9}, ()),
        ({"budget": 0.1, "calibration_tokens": 9}, ("--budget", "--calibration-tokens")),
        ({"reduce": "whitened", "calibration_tokens": 9, "text": "t"}, ()),
        ({"guard": "perplexity:1.02", "text": "t", "window": 9}, ()),
        ({"scorer": "margin", "embedder": "self", "engine": "continuous"}, ("--embedder", "--engine")),
        ({"scorer": "lm-eval:arc_easy", "engine": "transformers"}, ("--engine",)),
        ({"scorer": "margin", "tolerance": 0.5, "text": "t"}, ()),
        ({"scorer": "margin", "tolerance": 0.5, "text": "t", "guard": "none"}, ("--tolerance", "--text")),
        ({"scorer": "margin", "guard": "semantic:0.1", "embedder": "self", "engine": "continuous"}, ()),
    ],
)
def test_flags_that_a_run_does_not_use_are_known(options, flags):
    assert LaserConfig(**options).without_effect == flags


def test_a_run_says_which_flags_have_no_effect(tiny_folder, pairs):
    progress = Facts()
    options = {**QUICK, "candidates": 1, "scorer": "margin", "embedder": LaserConfig().embedder}
    laser(tiny_folder, pairs, config=LaserConfig(**options, alpha=0.1), progress=progress)
    assert ("has no effect", "--alpha, with the other options of this run") in progress.facts


def test_without_pairs_only_perplexity_can_be_searched_by():
    with pytest.raises(ConfigError, match="pairs: none were given; only scorer perplexity and lm-eval:TASK go without"):
        laser("./no-model", config=LaserConfig())


def test_auto_acceptance_follows_the_objective():
    assert LaserConfig().acceptance == "improve"
    assert LaserConfig(objective="compress").acceptance == "harmless"
    assert LaserConfig(accept="confident").acceptance == "confident"


def test_auto_scorers_and_reducers_follow_the_objective():
    quality, compress = LaserConfig(), LaserConfig(objective="compress")
    assert (quality.scored_by, quality.reducer) == ("semantic", "svd")
    assert (compress.scored_by, compress.reducer) == ("margin", "fisher")
    given = LaserConfig(objective="compress", scorer="semantic", reduce="whitened")
    assert (given.scored_by, given.reducer) == ("semantic", "whitened")
    assert compress.tries_budgets and not LaserConfig(objective="compress", ranks="0.5").tries_budgets


@pytest.mark.parametrize("compared", [False, True])
def test_an_engine_is_started_for_the_longest_prompt_with_what_the_template_writes(
    compared, tiny_folder, minilm, monkeypatch
):
    rows = [{"prompt": "the " * count, "chosen": "Yes.", "rejected": "No."} for count in (*range(1, 14), 40)]
    options = {"engine": "vllm", "max_prompt_tokens": 41, "embedder": str(minilm), "device": "cpu"}
    asked = []

    def use(generator, longest, *, url, llm):
        asked.append((generator.prompter, longest))
        raise ModelError("that is enough")

    monkeypatch.setattr(Generator, "use_vllm", use)
    with pytest.raises(ModelError, match="enough"):
        if compared:
            compare([tiny_folder], rows, config=CompareConfig(**options))
        laser(tiny_folder, rows, config=LaserConfig(**options))
    [(prompter, longest)] = asked
    tokens = prompter.tokens([{"role": "user", "content": rows[-1]["prompt"]}])
    assert longest == len(tokens) > options["max_prompt_tokens"]
