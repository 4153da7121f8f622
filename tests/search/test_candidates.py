from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin import LaserConfig, laser
from splaser_plugin.artifacts.recipe import Recipe, Step, carry_out
from splaser_plugin.config.stages import EDGES, parse_ranks
from splaser_plugin.data.pairs import pairs_from_rows
from splaser_plugin.errors import ConfigError, MatrixError
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.generation.teacher_forcing import forced_means
from splaser_plugin.jobs import stages
from splaser_plugin.jobs.apply import apply
from splaser_plugin.progress import Progress
from splaser_plugin.scanning.scan import scan_source
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.candidates import Candidate, by_prediction, by_size, choose_candidates
from splaser_plugin.search.judge import Judge
from splaser_plugin.search.prediction import sensitivities
from splaser_plugin.search.search import Trial, search
from splaser_plugin.weights.in_memory import Weights
from tests.builders import tiny_llama

RANKS = st.lists(st.sampled_from([*EDGES, *(place / 20 for place in range(1, 20))]), min_size=1, unique=True)


@pytest.fixture(scope="module")
def scanned():
    weights = Weights(tiny_llama())
    return scan_source(weights), weights.matrices()[0]


@given(RANKS, st.sampled_from([",", ", ", " ,"]))
def test_ranks_are_read_as_they_were_written(ranks, comma):
    text = comma.join(map(str, ranks))
    assert parse_ranks(text) == tuple(ranks)
    assert LaserConfig(ranks=text).ranks == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iqr,mpp", r"ranks: 'mpp' in 'iqr,mpp' is neither an edge \(iqr, mp, gavish-donoho\) nor a fraction"),
        ("0.5,1.5", "'1.5' in '0.5,1.5' is neither"),
        ("0", "'0' in '0' is neither"),
        ("1", "'1' in '1' is neither"),
        ("nan", "'nan' in 'nan' is neither"),
        ("iqr,,mp", "'' in 'iqr,,mp' is neither"),
        ("0.5,mp,0.50", "'0.50' stands twice in '0.5,mp,0.50'"),
    ],
)
def test_ranks_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        LaserConfig(ranks=text)


def test_without_ranks_each_matrix_has_its_edges_rank():
    assert parse_ranks("") == parse_ranks(" ") == ()
    with pytest.raises(ConfigError, match="rank_by: got 'luck', expected one of snr, gradient"):
        LaserConfig(rank_by="luck")


@settings(deadline=None)
@given(ranks=RANKS)
def test_each_matrix_comes_from_gentle_to_hard_and_matrices_by_snr(scanned, ranks):
    scan, matrices = scanned
    chosen = choose_candidates(scan, matrices, ranks)
    places = {found.name: place for place, found in enumerate(scan.ranked("snr"))}
    keys = [(places[candidate.matrix.name], -candidate.rank) for candidate in chosen]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys), "no rank of a matrix twice"
    assert all(1 <= candidate.rank < min(candidate.matrix.shape) for candidate in chosen)
    by_name = {found.name: found for found in scan.matrices}
    for candidate in chosen:
        edges = by_name[candidate.matrix.name].edges
        if candidate.edge in EDGES:
            assert (candidate.rank, candidate.threshold) == (
                max(1, edges[candidate.edge].rank),
                edges[candidate.edge].threshold,
            )
        else:
            assert candidate.rank == max(1, round(float(candidate.edge) * min(candidate.matrix.shape)))
            assert candidate.threshold is None
        assert candidate.snr == edges[scan.edge].snr
        assert candidate.predicted is None


def test_the_scans_edge_alone_is_the_published_order(scanned):
    scan, matrices = scanned
    assert choose_candidates(scan, matrices, ["iqr"]) == choose_candidates(scan, matrices)


def test_ranks_that_remove_nothing_are_refused():
    model = tiny_llama()
    weights = Weights(model)
    for matrix in weights.matrices()[0]:
        weights.write(matrix, torch.eye(*matrix.shape))
    with pytest.raises(MatrixError, match=r"ranks keeps every singular value of all 14 matrices.*lower rank"):
        choose_candidates(scan_source(weights), weights.matrices()[0], ["iqr"])


@settings(deadline=None)
@given(ranks=RANKS, seed=st.integers(0, 99))
def test_predicted_candidates_come_best_first(scanned, ranks, seed):
    plain = choose_candidates(*scanned, ranks)
    values = torch.randint(-3, 3, (len(plain),), generator=torch.Generator().manual_seed(seed)).double().tolist()
    ordered = by_prediction(plain, values)
    predicted = {(candidate.matrix, candidate.rank): value for candidate, value in zip(plain, values, strict=True)}
    assert [candidate.predicted for candidate in ordered] == sorted(values, reverse=True)
    assert all(candidate.predicted == predicted[candidate.matrix, candidate.rank] for candidate in ordered)
    places = {(candidate.matrix, candidate.rank): place for place, candidate in enumerate(plain)}
    keys = [
        (-predicted[candidate.matrix, candidate.rank], places[candidate.matrix, candidate.rank])
        for candidate in ordered
    ]
    assert keys == sorted(keys), "equals stay in the published order"


class Wanted:
    """A scorer whose score rises with every wanted (name, rank) of the model, and falls with any other."""

    name, size = "wanted", 2

    def __init__(self, weights, wanted):
        self.weights = weights
        self.before = {matrix: weights.hold(matrix) for matrix in weights.matrices()[0]}
        self.wanted = wanted

    def score(self, items, like=None):
        value = 0.0
        for matrix, before in self.before.items():
            if not torch.equal(self.weights.read(matrix), before):
                rank = int(torch.linalg.matrix_rank(self.weights.read(matrix).double(), rtol=1e-5))
                value += 32 - rank if (matrix.name, rank) in self.wanted else -100
        return Scores(tuple(items), tuple(value for _ in items))


def tried(candidates, wanted, limit=None):
    """(place of the matrix, rank, kept) of each trial, and what is needed to look further."""
    model = tiny_llama()
    weights = Weights(model)
    matrices = weights.matrices()[0]
    chosen = [
        Candidate(matrices[place], rank, rank / min(matrices[place].shape), None, None, predicted)
        for place, rank, predicted in candidates
    ]
    scorer = Wanted(weights, {(matrices[place].name, rank) for place, rank in wanted})
    found = search(weights, chosen, Judge(scorer), limit=limit)
    return [(matrices.index(trial.candidate.matrix), trial.candidate.rank, trial.kept) for trial in found.trials], found


def test_a_harder_rank_is_tried_only_after_the_gentler_one_was_kept():
    candidates = [(place, rank, None) for place in (0, 4) for rank in (16, 8, 4)]
    trials, _ = tried(candidates, {(0, 16), (0, 8), (4, 4)})
    assert trials == [(0, 16, True), (0, 8, True), (0, 4, False), (4, 16, False)]


def test_with_predictions_nothing_gentler_than_what_was_kept_is_tried_and_nothing_else_is_left_out():
    candidates = [(0, 8, 0.5), (4, 4, 0.4), (0, 16, 0.3), (0, 4, 0.2), (4, 16, 0.1), (4, 8, 0.0)]
    trials, _ = tried(candidates, {(0, 8), (0, 4), (4, 8)})
    assert trials == [(0, 8, True), (4, 4, False), (0, 4, True), (4, 16, False), (4, 8, True)]


def test_no_more_candidates_are_tried_than_allowed_and_those_passed_over_are_not_counted():
    candidates = [(place, rank, None) for place in (0, 4, 7) for rank in (16, 8)]
    trials, _ = tried(candidates, {(0, 16), (0, 8), (7, 16)}, limit=4)
    assert trials == [(0, 16, True), (0, 8, True), (4, 16, False), (7, 16, True)]


def test_a_matrix_that_was_reduced_twice_is_rebuilt_bit_for_bit(tmp_path):
    trials, found = tried([(0, 16, None), (4, 20, None), (0, 8, None)], {(0, 16), (4, 20), (0, 8)})
    assert [kept for _, _, kept in trials] == [True] * 3
    original = Weights(tiny_llama())
    steps = tuple(
        Step(candidate.matrix.name, candidate.rank, candidate.edge, candidate.threshold, candidate.matrix.shape)
        for candidate in found.kept
    )
    Recipe("tiny", original.identity(), "float32", steps, {}, LaserConfig(), {}).save(tmp_path / "recipe.json")
    again, expected = tiny_llama(), tiny_llama()
    carry_out(Recipe.load(tmp_path / "recipe.json"), Weights(again))
    by_hand = Weights(expected)
    for place, rank in ((0, 16), (4, 20), (0, 8)):
        by_hand.reduce(by_hand.matrices()[0][place], rank)
    for mine, theirs in zip(again.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_planted_harmful_component_is_predicted_best(whole_tokenizer, pairs):
    """One matrix of low rank gets one more, small component, along which the margin falls most steeply."""
    model = tiny_llama(vocabulary=len(whole_tokenizer))
    weights = Weights(model)
    scorer = MarginScorer(model, Prompter(whole_tokenizer, "chatml", 512), pairs_from_rows(pairs).pairs, batch_size=4)
    matrix = next(matrix for matrix in weights.matrices()[0] if matrix.name == "model.layers.1.mlp.up_proj")
    weights.reduce(matrix, 16)
    left, values, right = torch.linalg.svd(weights.read(matrix), full_matrices=False)
    healthy = scorer.score(range(4)).mean
    margin = torch.zeros(())
    for prompt, (chosen, rejected) in zip(scorer.prompts, scorer.answers, strict=True):
        margin = margin + forced_means(model, [prompt], [chosen]) - forced_means(model, [prompt], [rejected])
    (gradient,) = torch.autograd.grad(margin.sum(), weights.parameters[matrix.parameter])
    outside = torch.eye(64) - left[:, :16] @ left[:, :16].mT, torch.eye(32) - right[:16].mT @ right[:16]
    up, _, down = torch.linalg.svd(outside[0] @ gradient @ outside[1])
    weights.write(matrix, weights.read(matrix) - 0.9 * values[15] * torch.outer(up[:, 0], down[0]))
    assert scorer.score(range(4)).mean < healthy - 0.02
    scan = scan_source(weights)
    chosen = choose_candidates(scan, weights.matrices()[0], [0.5])
    found = sensitivities(weights, scorer, weights.matrices()[0])
    best = by_prediction(chosen, [found[candidate.matrix].predicted(candidate.rank) for candidate in chosen])[0]
    assert best.matrix == matrix
    assert best.predicted > 0


QUICK = {"embedder": "self", "max_new_tokens": 4, "candidates": 7, "device": "cpu", "held_out_fraction": 0}


@pytest.mark.slow
@pytest.mark.parametrize("rank_by", ["snr", "gradient"])
def test_a_run_with_several_ranks_says_what_was_predicted_and_can_be_rebuilt(rank_by, tiny_folder, pairs, tmp_path):
    config = LaserConfig(**QUICK, rank_by=rank_by, ranks="mp,0.75,0.4")
    result = laser(tiny_folder, pairs, config=config)
    trials = result.results()["candidates"]
    assert len(trials) == 7
    assert {trial["edge"] for trial in trials} <= {"mp", "0.75", "0.4"}
    predicted = [trial["predicted"] for trial in trials]
    if rank_by == "snr":
        assert predicted == [None] * 7
    else:
        assert predicted == sorted(predicted, reverse=True)
    assert result.recipe.config.ranks == "mp,0.75,0.4"
    result.recipe.save(tmp_path / "recipe.json")
    rebuilt = apply(tmp_path / "recipe.json", tiny_folder).model
    assert any(step.threshold is None for step in result.recipe.steps), "this run has to keep a fraction"
    card = (result.save(tmp_path / "saved") / "README.md").read_text()
    assert "| edge or share kept | threshold |" in card
    for name, value in result.model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value), name


def test_a_gradient_without_pairs_is_refused(tiny_folder, tmp_path):
    (tmp_path / "text.txt").write_text("Some text. " * 200)
    config = LaserConfig(scorer="perplexity", text=str(tmp_path / "text.txt"), rank_by="gradient")
    with pytest.raises(ConfigError, match=r"none were given.*not with rank_by gradient"):
        laser(tiny_folder, None, config=config)


class StopsAfterTwo(Progress):
    seen = 0

    def event(self, event):
        self.seen += isinstance(event, Trial)
        if self.seen == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["svd", "fisher"])
def test_a_stopped_run_goes_on_in_the_predicted_order(reduce, tiny_folder, pairs, tmp_path, monkeypatch):
    config = LaserConfig(**QUICK, rank_by="gradient", ranks="mp,0.4", reduce=reduce)
    whole = laser(tiny_folder, pairs, config=config)
    predicted = [trial.candidate.predicted for trial in whole.search.trials]
    assert predicted == sorted(predicted, reverse=True)
    with pytest.raises(KeyboardInterrupt):
        laser(tiny_folder, pairs, config=config, output=tmp_path / "out", progress=StopsAfterTwo())
    monkeypatch.setattr(stages, "sensitivities", None)  # What was predicted once is not predicted again.
    resumed = laser(tiny_folder, pairs, config=config, output=tmp_path / "out")
    assert [trial.candidate for trial in resumed.search.trials] == [trial.candidate for trial in whole.search.trials]
    assert resumed.recipe == whole.recipe


def test_compressing_tries_the_matrices_that_may_lose_the_most_first(scanned):
    scan, matrices = scanned
    candidates = choose_candidates(scan, matrices, (0.9, 0.4, 0.2))
    ordered = by_size(candidates)
    assert set(ordered) == {candidate for candidate in candidates if candidate.parameters_removed}
    most = {
        candidate.matrix: max(other.parameters_removed for other in ordered if other.matrix == candidate.matrix)
        for candidate in ordered
    }
    assert [most[candidate.matrix] for candidate in ordered] == sorted(
        (most[candidate.matrix] for candidate in ordered), reverse=True
    )
    for matrix in most:
        ranks = [candidate.rank for candidate in ordered if candidate.matrix == matrix]
        assert ranks == sorted(ranks, reverse=True)


def test_with_predictions_the_least_loss_a_parameter_comes_first(scanned):
    scan, matrices = scanned
    candidates = choose_candidates(scan, matrices, (0.4, 0.2))
    predicted = torch.randn(len(candidates), generator=torch.Generator().manual_seed(0)).tolist()
    ordered = by_size(by_prediction(candidates, predicted))
    losses = [max(0.0, -candidate.predicted) / candidate.parameters_removed for candidate in ordered]
    assert losses == sorted(losses)
    harmless = [candidate.parameters_removed for candidate in ordered if candidate.predicted >= 0]
    assert len(harmless) > 2
    assert (
        harmless
        == [candidate.parameters_removed for candidate in ordered[: len(harmless)]]
        == sorted(harmless, reverse=True)
    )


def test_compressing_is_refused_where_nothing_can_be_stored_as_factors(scanned):
    whole = [replace(choose_candidate, is_factorable=False) for choose_candidate in choose_candidates(*scanned, (0.9,))]
    with pytest.raises(MatrixError, match=r"none of the 14 candidates can be stored as factors: embeddings .*include"):
        by_size(whole)


def test_what_is_stored_whole_counts_as_no_parameters_removed(tokenizer, pairs, tmp_path):
    options = {
        "device": "cpu",
        "candidates": 6,
        "include": ("embed_tokens", "o_proj"),
        "ranks": "0.1",
        "scorer": "margin",
        "tolerance": 100.0,
    }
    config = LaserConfig.from_dict({**options, "accept": "harmless", "save": "factored"})
    result = laser(
        tiny_llama(tie_word_embeddings=False), pairs, config=config, tokenizer=tokenizer, output=tmp_path / "out"
    )
    kept = {candidate.matrix.name: candidate.parameters_removed for candidate in result.search.kept}
    assert kept["model.embed_tokens"] == 0
    before, after = result.parameters
    assert before - after == result.search.parameters_removed == sum(kept.values()) > 0
    only = LaserConfig.from_dict({**options, "include": ("embed_tokens",), "objective": "compress"})
    with pytest.raises(MatrixError, match="none of the 1 candidates can be stored as factors"):
        laser(tiny_llama(tie_word_embeddings=False), pairs, config=only, tokenizer=tokenizer)
