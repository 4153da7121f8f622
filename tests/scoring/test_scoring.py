from __future__ import annotations

import json
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch

from splaser_plugin.checkpoints.trust import check_embedder_folder
from splaser_plugin.data.pairs import pairs_from_rows
from splaser_plugin.errors import EmbedderError
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scoring.embedding import SelfEmbedder, SentenceEmbedder
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.scoring.semantic import References, SemanticScorer
from splaser_plugin.weights.in_memory import Weights
from tests.builders import hub_snapshot, save_rows
from tests.tiny_models import CAUSAL, build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sentences(minilm):
    return SentenceEmbedder(str(minilm), CPU)


def cosine(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def scorer_of(model, tokenizer, embedder, pairs):
    generator = Generator(model, Prompter(tokenizer, context=512), max_new_tokens=8, batch_size=2)
    return SemanticScorer(generator, embedder, pairs_from_rows(pairs).pairs)


@pytest.mark.real
def test_a_score_is_the_difference_of_the_two_cosines(tiny_model, tokenizer, sentences, minilm, pairs):
    from sentence_transformers import SentenceTransformer

    scores = scorer_of(tiny_model, tokenizer, sentences, pairs).score(range(len(pairs)))
    plain = SentenceTransformer(str(minilm), device="cpu")
    for row, answer, value in zip(pairs, scores.answers, scores.values, strict=True):
        said, chosen, rejected = (plain.encode(text) for text in (answer.text, row["chosen"], row["rejected"]))
        assert value == pytest.approx(cosine(said, chosen) - cosine(said, rejected), abs=1e-5)
    assert scores.mean == pytest.approx(sum(scores.values) / len(pairs))


@pytest.mark.real
def test_without_a_rejected_answer_only_the_first_cosine_counts(tiny_model, tokenizer, sentences):
    rows = [{"instruction": "Say hello.", "input": "", "output": "Hello!"}]
    scores = scorer_of(tiny_model, tokenizer, sentences, rows).score([0])
    said, chosen = sentences.embed([scores.answers[0].text, "Hello!"])
    assert scores.values[0] == pytest.approx(cosine(said, chosen), abs=1e-5)


def test_self_embedding_is_the_mean_of_the_last_hidden_states(tiny_model, tokenizer):
    texts = ["Hello there", "A much longer sentence about nothing at all", ""]
    vectors = SelfEmbedder(Weights(tiny_model), tokenizer, batch_size=2).embed(texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = tokenizer(text)["input_ids"] or [tokenizer.bos_token_id]
        with torch.no_grad():
            mean = tiny_model.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_a_model_of_several_streams_says_why_it_does_not_embed_itself(tokenizer):
    """Gemma 3n's hidden states are (streams, texts, tokens, width)."""
    vocabulary = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 49152)
    model = build("gemma3n_text", CAUSAL["gemma3n_text"] | vocabulary)
    with pytest.raises(EmbedderError, match=r"'self': Gemma3nForCausalLM has several streams .* Give embedder a sent"):
        SelfEmbedder(Weights(model), tokenizer, batch_size=2).embed(["Hello"])


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError, AssertionError])
def test_what_a_models_code_raises_as_it_embeds_is_one_line(error, tiny_model, tokenizer, monkeypatch):
    def fails(*_, **__):
        raise error("shapes\ndiffer")

    monkeypatch.setattr(tiny_model, "forward", fails)
    with pytest.raises(EmbedderError, match=r"fails at its hidden states \(shapes.* Give embedder") as refusal:
        SelfEmbedder(Weights(tiny_model), tokenizer, batch_size=2).embed(["Hello"])
    assert "\n" not in str(refusal.value)


def test_the_self_embedder_does_not_change_with_the_model(tiny_model, tokenizer):
    weights = Weights(tiny_model)
    embedder = SelfEmbedder(weights, tokenizer, batch_size=4)
    before = embedder.embed(["Hello there"])
    kept, tried = weights.matrices()[0][:2]
    with weights.trying(kept) as attempt:
        attempt.reduce(1)
        attempt.keep()
    with weights.trying(tried) as attempt:
        attempt.reduce(1)
        assert torch.equal(embedder.embed(["Hello there"]), before)


def test_reference_answers_are_embedded_once(tiny_model, tokenizer, pairs):
    embedder = SelfEmbedder(Weights(tiny_model), tokenizer, batch_size=4)
    embedded = []
    plain = embedder.embed
    embedder.embed = lambda texts: embedded.append(len(texts)) or plain(texts)
    scorer = scorer_of(tiny_model, tokenizer, embedder, pairs)
    assert scorer.score(range(4)) == scorer.score(range(4))
    assert embedded == [8, 4, 4]


def assert_same(scores, expected):
    assert scores.items == expected.items
    assert [answer.tokens for answer in scores.answers] == [answer.tokens for answer in expected.answers]
    assert scores.values == pytest.approx(expected.values, abs=1e-6)


def test_a_part_of_the_pairs_is_scored_as_in_the_whole(tiny_model, tokenizer, pairs):
    embedder = SelfEmbedder(Weights(tiny_model), tokenizer, batch_size=4)
    scorer = scorer_of(tiny_model, tokenizer, embedder, pairs)
    whole = scorer.score(range(4))
    part = scorer.score([1, 3])
    assert_same(part, whole.on([3, 1]))
    assert_same(part.joined(scorer.score([0, 2])), whole)


def test_answers_that_the_best_model_gives_too_are_not_embedded_again(tiny_model, tokenizer, pairs):
    weights = Weights(tiny_model)
    embedder = SelfEmbedder(weights, tokenizer, batch_size=4)
    scorer = scorer_of(tiny_model, tokenizer, embedder, pairs)
    best = scorer.score(range(4))
    again = replace(best, values=(0.5, 0.25, 0.125, 1.0))
    assert scorer.score([0, 2], like=again) == again.on([0, 2])
    with weights.trying(weights.matrices()[0][0]) as attempt:
        attempt.reduce(8)
        plain, compared = scorer.score(range(4)), scorer.score(range(4), like=best)
    assert plain.answers != best.answers
    assert_same(compared, plain)


def test_differences_are_taken_on_the_same_items():
    best = Scores((0, 1, 2), (0.5, 0.25, 1.0))
    assert Scores((0, 2), (0.75, 0.5)).differences(best) == [0.25, -0.5]


@pytest.mark.parametrize("name", ["./no-such-folder", "nobody/no-such-embedder"])
def test_an_unknown_embedder_is_refused(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EmbedderError, match=r"embedder .*no-such.*'self'"):
        SentenceEmbedder(name, CPU)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, minilm):
    """A cache of the hub that holds all-MiniLM-L6-v2, as links to where it is, and no way to the hub itself."""
    hub_snapshot(tmp_path, "sentence-transformers/all-MiniLM-L6-v2").symlink_to(minilm)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.real
@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_an_embedder_in_the_hubs_cache_needs_no_hub(name, hub_cache, minilm):
    named = SentenceEmbedder(name, CPU).embed(["Paris."])
    assert torch.equal(named, SentenceEmbedder(str(minilm), CPU).embed(["Paris."]))


@pytest.mark.parametrize("name", ["org/absent", "absent"])
def test_an_embedder_that_is_nowhere_is_refused_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EmbedderError, match=f"'{name}': no such folder here, and as a hub id it is neither in the"):
        SentenceEmbedder(name, CPU)


def test_an_embedder_from_the_hub_is_checked_like_a_folder(tmp_path, monkeypatch):
    snapshot = hub_snapshot(tmp_path, "org/pickled")
    snapshot.mkdir()
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EmbedderError, match="pickled weights can run code"):
        SentenceEmbedder("org/pickled", CPU)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "rng_state.pth", "rng_state_11.pth"])
def test_what_a_trainer_left_beside_an_embedder_is_no_weight(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    check_embedder_folder(tmp_path)
    (tmp_path / f"other_{name}").write_bytes(b"")
    with pytest.raises(EmbedderError, match=f"other_{name}: pickled weights can run code"):
        check_embedder_folder(tmp_path)


CHINESE = "把锅里的水烧开然后放两勺小苏打静置一小时再用软海绵轻轻擦掉烧焦的部分" * 14


@pytest.mark.real
def test_texts_longer_than_the_embedder_reads_are_counted(sentences, minilm):
    from sentence_transformers import SentenceTransformer

    texts = ["Short.", "word " * 253, "word " * 254, "word " * 255, CHINESE]
    limit = SentenceTransformer(str(minilm), device="cpu").max_seq_length
    assert limit == 256
    assert sentences.cut(texts) == [False, False, False, True, True]  # two of the tokens are [CLS] and [SEP]
    ends = sentences.embed(["word " * 254 + "one", "word " * 254 + "two"])
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=0)


@pytest.mark.real
def test_pairs_that_differ_only_where_nothing_is_read_are_counted_and_it_is_said(
    splaser, tiny_folder, minilm, tmp_path
):
    rows = [{"prompt": f"Question {n}?", "chosen": CHINESE + " yes", "rejected": CHINESE + " no"} for n in range(12)]
    flags = ["--embedder", minilm, "--max-new-tokens", 4, "--candidates", 1, "--json", "--max-answer-tokens", 4096]
    source = save_rows(tmp_path / "rows.jsonl", rows)
    code, printed, stderr = splaser("laser", tiny_folder, "--pairs", source, "-o", tmp_path / "out", *flags)
    assert code == 0, stderr
    found = json.loads(printed)
    assert found["references"] == {"texts": 24, "half_read": 24, "pairs": 12, "alike": 12}
    assert found["baseline"]["per_pair"] == pytest.approx([0.0] * len(found["baseline"]["per_pair"]), abs=1e-5)
    said = " ".join(stderr.split())
    assert "24 of 24 reference answers are longer than the embedder reads; 12 of 12 pairs score 0 whatever" in said


def test_answers_longer_than_the_embedder_reads_are_counted(tiny_model, tokenizer, pairs):
    embedder = SelfEmbedder(Weights(tiny_model), tokenizer, batch_size=4)
    scorer = scorer_of(tiny_model, tokenizer, embedder, pairs)
    assert scorer.references == References(texts=8, half_read=0, pairs=4, alike=0)
    assert scorer.references.warning == ""
    assert scorer.score(range(4)).half_read_answers == 0
    tiny_model.config.max_position_embeddings = 3
    scores = scorer.score(range(4))
    lengths = [len(tokenizer(answer.text)["input_ids"]) for answer in scores.answers]
    assert max(lengths) > 3
    assert [answer.is_half_read for answer in scores.answers] == [length > 3 for length in lengths]
    assert scores.half_read_warning.startswith(f"{scores.half_read_answers} of 4 answers are longer")
