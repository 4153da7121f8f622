from __future__ import annotations

import math
import random
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin.errors import ConfigError, MatrixError, RankError
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scanning.selection import (
    choose,
    is_embedding,
    is_head,
    is_norm,
    lora_targets,
    matched_rank,
    top_by_type,
    trained_parameters,
)
from splaser_plugin.scanning.spectrum_format import published_from_dict
from splaser_plugin.weights.matrices import Skipped
from tests.builders import SHAPES, blocks, entry, fit, scan_of

SNR = st.one_of(st.none(), st.floats(min_value=0, max_value=100), st.sampled_from([1.0, 2.0]))


@settings(deadline=None, max_examples=60)
@given(
    snrs=st.dictionaries(st.sampled_from(sorted(SHAPES)), st.lists(SNR, min_size=1, max_size=12), min_size=1),
    share=st.decimals(min_value="0.01", max_value=1, places=2),
    seed=st.integers(0, 100),
)
def test_the_highest_of_each_type_are_chosen_whatever_the_order_of_the_file(snrs, share, seed):
    matrices = blocks(snrs)
    selection = choose(scan_of(*matrices), fraction=float(share))
    shuffled = random.Random(seed).sample(matrices, len(matrices))
    assert choose(scan_of(*shuffled), fraction=float(share)) == selection

    for kind, values in snrs.items():
        names = selection.by_type[kind]
        assert len(names) == math.ceil(share * Decimal(len(values)))
        strength = {f"model.layers.{i}.{kind}": math.inf if snr is None else snr for i, snr in enumerate(values)}
        left = [strength[name] for name in strength if name not in names]
        assert min(strength[name] for name in names) >= max(left, default=-1)
        assert [strength[name] for name in names] == sorted((strength[name] for name in names), reverse=True)


def test_seven_hundredths_of_a_hundred_are_seven_not_eight():
    assert math.ceil(0.07 * 100) == 8
    selection = choose(scan_of(*blocks({"mlp.down_proj": [float(n) for n in range(100)]})), fraction=0.07)
    assert selection.names == [f"model.layers.{n}.mlp.down_proj" for n in range(99, 92, -1)]


def test_top_takes_all_of_a_type_that_has_fewer():
    selection = choose(scan_of(*blocks({"mlp.down_proj": [1.0, 2.0], "self_attn.q_proj": [1.0, 2.0, 3.0]})), top=2)
    assert {kind: len(names) for kind, names in selection.by_type.items()} == {
        "mlp.down_proj": 2,
        "self_attn.q_proj": 2,
    }
    assert selection.considered == 5


def test_among_matrices_without_noise_the_farther_above_the_threshold_wins():
    near = entry("model.layers.0.mlp.down_proj", None, smallest=1.1)
    far = entry("model.layers.1.mlp.down_proj", None, smallest=3.0)
    finite = entry("model.layers.2.mlp.down_proj", 1e9)
    assert choose(scan_of(near, far, finite), top=2).names == [far.name, near.name]
    assert choose(scan_of(finite, far, near), top=2).names == [far.name, near.name]


def test_by_and_edge_say_which_figure_counts():
    first = entry("model.layers.0.mlp.down_proj", 1.0, iqr=fit(1.0, scale=9.0), mp=fit(5.0, rank=1))
    second = entry("model.layers.1.mlp.down_proj", 2.0, iqr=fit(2.0, scale=1.0), mp=fit(4.0, rank=8))
    scan = scan_of(first, second)
    assert choose(scan, top=1).names == [first.name]
    assert choose(scan, top=1, by="snr").names == [second.name]
    assert choose(scan, top=1, by="snr", edge="mp").names == [first.name]
    by_rank = choose(scan, top=1, by="rank", edge="mp")
    assert (by_rank.names, by_rank.matrices[0].value, by_rank.matrices[0].rank) == ([second.name], 8, 8)
    assert by_rank.rule == "top 1 of each module type by rank (edge mp)"


def test_types_are_matched_by_whole_segments():
    scan = scan_of(*blocks({"self_attn.q_proj": [1.0], "mlp.down_proj": [2.0]}))
    assert choose(scan, top=1, types=["mlp"]).names == ["model.layers.0.mlp.down_proj"]
    assert choose(scan, top=1, types=["q_proj"]).names == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(MatrixError, match=r"types: 'down' matches no module type .*nearest: mlp\.down_proj"):
        choose(scan, top=1, types=["down"])


def test_norms_are_chosen_only_when_their_type_is_named():
    norm = entry("model.layers.0.input_layernorm", None, shape=(1, 16))
    scan = scan_of(norm, *blocks({"mlp.down_proj": [1.0]}))
    assert choose(scan, top=1).names == ["model.layers.0.mlp.down_proj"]
    selection = choose(scan, top=1, types=["input_layernorm"])
    assert trained_parameters(selection) == ["model.layers.0.input_layernorm.weight"]
    with pytest.raises(MatrixError, match=r"model\.layers\.0\.input_layernorm is a norm"):
        lora_targets(selection)


HEAD = Skipped("lm_head", "outside the blocks (a head or a projection of the embeddings)")
EMBEDDING = Skipped("model.embed_tokens", "an embedding")
TIED_HEAD = Skipped("lm_head", "shares its weight with model.embed_tokens", "model.embed_tokens")
TIED_EMBEDDING = Skipped("model.embed_tokens", "shares its weight with lm_head", "lm_head")


def test_head_and_embeddings_come_only_when_asked_for_ranked_or_not():
    down = blocks({"mlp.down_proj": [1.0]})
    ranked = scan_of(*down, entry("lm_head", 2.0), skipped=(EMBEDDING,))
    for scan in (ranked, scan_of(*down, skipped=(HEAD, EMBEDDING))):
        assert choose(scan, top=1).names == ["model.layers.0.mlp.down_proj"]
        selection = choose(scan, top=1, include_head=True, include_embeddings=True)
        assert selection.names == ["model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens"]
        assert selection.tied == ()
        assert lora_targets(selection) == (selection.names, [])


def test_of_an_old_scan_what_is_tied_is_known_by_its_reason():
    scan = scan_of(*blocks({"mlp.down_proj": [1.0, 2.0]}), skipped=(TIED_HEAD, EMBEDDING))
    stored = scan.to_dict()
    for skipped in stored["skipped"]:
        del skipped["tied_to"]
    assert Scan.from_dict(stored).skipped == scan.skipped


@pytest.mark.parametrize("skipped", [(TIED_HEAD, TIED_EMBEDDING), (TIED_EMBEDDING,)])
def test_a_tied_head_is_refused_and_tied_embeddings_for_lora(skipped):
    scan = scan_of(*blocks({"mlp.down_proj": [1.0]}), skipped=skipped)
    with pytest.raises(MatrixError, match=r"include_head: lm_head shares its weight with the embeddings"):
        choose(scan, top=1, include_head=True)
    selection = choose(scan, top=1, include_embeddings=True)
    assert trained_parameters(selection)[-1] == "model.embed_tokens.weight"
    with pytest.raises(MatrixError, match=r"model\.embed_tokens shares its weight .* merging a LoRA adapter"):
        lora_targets(selection)


def test_a_published_scan_gives_equal_figures_away_as_one_weight():
    published = published_from_dict(
        {
            "model.layers.0.mlp.down_proj": {"snr": 1.0, "type": "mlp.down_proj"},
            "lm_head": {"snr": 2.2547, "type": "lm_head"},
            "model.embed_tokens": {"snr": 2.2547, "type": "model.embed_tokens"},
        },
        "some.json",
    )
    assert choose(published, top=1).names == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(MatrixError, match="include_head: lm_head shares its weight"):
        choose(published, top=1, include_head=True)


def test_an_absent_head_is_refused():
    with pytest.raises(MatrixError, match="include_head: none is found in the scan of a/model"):
        choose(scan_of(*blocks({"mlp.down_proj": [1.0]})), top=1, include_head=True)


def test_experts_cannot_be_trained_alone():
    name = "model.layers.0.mlp.experts.down_proj[3]"
    expert = entry(name, 1.0, kind="mlp.experts.down_proj")
    selection = choose(scan_of(expert, *blocks({"self_attn.q_proj": [1.0]})), top=1)
    for use in (lora_targets, trained_parameters):
        with pytest.raises(MatrixError, match=r"down_proj\[3\] is one expert.*types"):
            use(selection)
    attention = choose(scan_of(expert, *blocks({"self_attn.q_proj": [1.0]})), top=1, types=["self_attn"])
    assert lora_targets(attention) == (["model.layers.0.self_attn.q_proj"], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "top, fraction: got None and None, expected one of the two"),
        ({"top": 1, "fraction": 0.5}, "top, fraction: got 1 and 0.5, expected one of the two"),
        ({"top": 0}, "top: got 0, expected at least 1"),
        ({"top": True}, "top: got True"),
        ({"fraction": 0.0}, "fraction: got 0.0, expected more than 0"),
        ({"fraction": 1.1}, "fraction: got 1.1"),
        ({"fraction": math.nan}, "fraction: got nan"),
        ({"top": 1, "by": "sigma"}, "by: got 'sigma', expected one of snr_ratio, snr, rank"),
        ({"top": 1, "edge": "mpp"}, "edge: got 'mpp', expected one of iqr, mp, gavish-donoho"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        choose(scan_of(*blocks({"mlp.down_proj": [1.0]})), **options)


def test_a_published_scan_has_one_figure_only():
    published = published_from_dict({"a.0.b": {"snr": 1.0, "type": "b"}}, "some.json")
    with pytest.raises(ConfigError, match=r"by snr edge iqr: some\.json holds only snr_ratio at edge iqr"):
        choose(published, top=1, by="snr")
    with pytest.raises(ConfigError, match="edge mp"):
        choose(published, top=1, edge="mp")


def test_top_by_type_is_the_published_scanners_file():
    scan = scan_of(*blocks({"mlp.down_proj": [1.0, 3.0, 2.0], "self_attn.q_proj": [None, 1.0, 5.0]}))
    assert top_by_type(scan, 2) == {
        "mlp.down_proj": ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"],
        "self_attn.q_proj": ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"],
    }
    assert top_by_type(scan, 2) == choose(scan, top=2).by_type


def lora_parameters(shapes: list[tuple[int, int]], rank: int) -> int:
    return sum(rank * rows + columns * rank for rows, columns in shapes)


def test_the_matched_rank_trains_as_many_parameters_as_the_rank_on_all_matrices():
    matrices = [
        entry(f"model.layers.{block}.{kind}", float(block), shape=shape)
        for kind, shape in {"self_attn.k_proj": (192, 576), "mlp.up_proj": (1536, 576)}.items()
        for block in range(30)
    ]
    selection = choose(scan_of(*matrices), top=16)
    rank = matched_rank(selection, 32)
    every = lora_parameters([matrix.shape for matrix in matrices], 32)
    chosen = [matrix.shape for matrix in selection.matrices if matrix.shape]
    difference = {candidate: abs(lora_parameters(chosen, candidate) - every) for candidate in range(1, 200)}
    assert rank == min(difference, key=difference.__getitem__) == 60


def test_the_matched_rank_counts_only_matrices_inside_the_blocks():
    matrices = blocks({"mlp.down_proj": [1.0, 2.0]})
    norm = entry("model.layers.0.input_layernorm", None, shape=(1, 4000))
    with_head = scan_of(*matrices, entry("lm_head", 2.0, shape=(4000, 16)), norm)
    assert matched_rank(choose(with_head, top=1), 4) == 8


def test_a_matched_rank_that_does_not_fit_is_refused_with_one_that_does():
    selection = choose(scan_of(*blocks({"mlp.down_proj": [float(n) for n in range(10)]})), top=1)
    message = r"down_proj: rank 320 .*its shape \(16, 24\) allows at most 16\. .*lower match_rank to 1"
    with pytest.raises(RankError, match=message):
        matched_rank(selection, 32)
    assert matched_rank(selection, 1) == 10


def test_a_matched_rank_needs_shapes():
    published = published_from_dict({"a.0.b": {"snr": 1.0, "type": "b"}}, "some.json")
    with pytest.raises(MatrixError, match=r"some\.json: it has no shape for a\.0\.b\. Give lora_rank a number"):
        matched_rank(choose(published, top=1), 32)
    with pytest.raises(ConfigError, match="match_rank: got 0"):
        matched_rank(choose(scan_of(*blocks({"mlp.down_proj": [1.0]})), top=1), 0)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lm_head", "head"),
        ("embed_out", "head"),
        ("model.embed_tokens", "embedding"),
        ("transformer.wte", "embedding"),
        ("gpt_neox.embed_in", "embedding"),
        ("model.norm", "norm"),
        ("model.layers.3.post_attention_layernorm", "norm"),
        ("model.layers.3.self_attn.q_norm", "norm"),
        ("transformer.h.3.ln_1", "norm"),
        ("transformer.ln_f", "norm"),
        ("model.layers.3.self_attn.q_proj", "matrix"),
        ("transformer.h.3.attn.c_attn", "matrix"),
    ],
)
def test_what_a_name_stands_for(name, role):
    roles = {"head": is_head(name), "embedding": is_embedding(name), "norm": is_norm(name)}
    assert [name for name, holds in roles.items() if holds] == ([] if role == "matrix" else [role])
