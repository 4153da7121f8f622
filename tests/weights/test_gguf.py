"""GGUF files that can't be loaded are refused in one line with what is wrong."""

from __future__ import annotations

import pytest
import torch

from splaser_plugin import scan
from splaser_plugin.config.stages import ScanConfig
from splaser_plugin.errors import CheckpointError

gguf = pytest.importorskip("gguf")
HIDDEN, INNER, WORDS = 32, 64, 100
SHAPES = {
    "token_embd.weight": (WORDS, HIDDEN),
    "output.weight": (WORDS, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    **{f"blk.0.attn_{which}.weight": (HIDDEN, HIDDEN) for which in ("q", "k", "v", "output")},
    **{f"blk.0.ffn_{which}.weight": (INNER, HIDDEN) for which in ("gate", "up")},
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
    **{f"blk.0.{which}_norm.weight": (HIDDEN,) for which in ("attn", "ffn")},
}


def written(path, *, shapes=SHAPES, words=WORDS):
    """A one-block Llama of random weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    if words:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{place}" for place in range(words)])
        writer.add_token_scores([0.0] * words)
        writer.add_token_types([1] * words)
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_file_is_scanned(tmp_path):
    found = scan(written(tmp_path / "tiny-00001-of-00001.gguf"), config=ScanConfig(include=["q_proj"]))
    assert [matrix.name for matrix in found.matrices] == ["model.layers.0.self_attn.q_proj"]


def test_a_part_of_a_split_file_is_refused_with_how_to_merge_it(tmp_path):
    path = written(tmp_path / "tiny-00002-of-00003.gguf")
    with pytest.raises(CheckpointError, match=r"a part of a split file, .*Merge its parts first"):
        scan(path)
    first = {name: shape for name, shape in SHAPES.items() if "blk" not in name}
    with pytest.raises(CheckpointError, match=r"no weights for .* as for 9 in all.* metadata asks for more"):
        scan(written(tmp_path / "renamed.gguf", shapes=first))


def test_tensors_of_other_shapes_than_the_metadata_says_are_refused(tmp_path):
    shapes = SHAPES | {"blk.0.ffn_up.weight": (INNER + 8, HIDDEN)}
    with pytest.raises(CheckpointError, match="its tensors have other shapes than its metadata says"):
        scan(written(tmp_path / "tiny.gguf", shapes=shapes))


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: its tokenizer can't be loaded"):
        scan(written(tmp_path / "tiny.gguf", words=0))
