"""Embedders: texts to unit vectors, by which answers are compared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splaser_plugin.checkpoints.folder import HUB_FILES, reaching_hub
from splaser_plugin.checkpoints.trust import PICKLES, check_embedder_folder
from splaser_plugin.distributed import input_device, share
from splaser_plugin.errors import EmbedderError
from splaser_plugin.files.sources import looks_like_path, path_of
from splaser_plugin.files.text import first_line_of, shown
from splaser_plugin.generation.evaluation import MODEL_ERRORS, evaluating
from splaser_plugin.generation.long_rope import batches, turning_point
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import context_length

USUAL_OWNER = "sentence-transformers"
"""The owner of a hub model that is named without one."""
OTHER_RUNTIMES = ["onnx/*", "openvino/*"]


class Embedder(Protocol):
    """Anything that turns texts into unit vectors."""

    name: str

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(texts, dimensions) float32 on the CPU, each row of length 1."""

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Of each text, whether it is longer than what is read of it."""


class SentenceEmbedder:
    """A sentence-transformers model.

    model: folder or hub id. allow_pickle: load weights that are pickled, if there are no others. Code that comes
    with it never runs. Raises EmbedderError when it can't be loaded.
    """

    def __init__(self, model: str, device: torch.device, *, allow_pickle: bool = False) -> None:
        logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
        from sentence_transformers import SentenceTransformer

        self.name = model
        folder = find_embedder(model, allow_pickle=allow_pickle)
        only_safetensors = {} if allow_pickle else {"use_safetensors": True}
        try:
            self._model = SentenceTransformer(
                str(folder), device=str(device), trust_remote_code=False, model_kwargs=only_safetensors
            )
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
            raise EmbedderError(
                f"embedder '{model}' can't be loaded ({first_line_of(error)}). Give --embedder a folder or hub "
                "id of a sentence-transformers model, or 'self'."
            ) from error

    def embed(self, texts: Sequence[str]) -> Tensor:
        return torch.stack(share(texts, self._embed_here))

    def _embed_here(self, texts: list[str]) -> list[Tensor]:
        vectors = self._model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        return list(vectors.float().cpu())

    def cut(self, texts: Sequence[str]) -> list[bool]:
        limit, tokenizer = self._model.max_seq_length, self._model.tokenizer
        if limit is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
            return [False] * len(texts)
        name = self._model.default_prompt_name
        prefix = (self._model.prompts[name] if name else None) or ""
        ids = tokenizer([prefix + text for text in texts], truncation=False, verbose=False)["input_ids"]
        return [len(tokens) > limit for tokens in ids]


def find_embedder(model: str, *, allow_pickle: bool = False) -> Path:
    """The folder of a sentence-transformers model, once what is there was checked; nothing is loaded.

    Args:
        model: A folder, or a hub id, which is downloaded or completed where the hub can be reached.
        allow_pickle: Take weights that are pickled, if there are no others.

    Raises:
        EmbedderError: When it isn't there, or isn't to be loaded.
    """
    folder = _embedder_folder(model, allow_pickle)
    check_embedder_folder(folder, allow_pickle=allow_pickle)
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise EmbedderError(
            f"embedder {shown(model)}: it has neither a modules.json nor a config.json. Give --embedder the folder of "
            "a sentence-transformers model, or 'self'."
        )
    return folder


def _embedder_folder(model: str, allow_pickle: bool) -> Path:
    folder = path_of(model)
    if folder.is_dir():
        return folder
    if looks_like_path(model):
        raise EmbedderError(f"embedder {model}: there is no such folder. Check --embedder, or use 'self'.")
    wanted = [*HUB_FILES, *(f"*{ending}" for ending in PICKLES if allow_pickle)]
    name = model if "/" in model else f"{USUAL_OWNER}/{model}"
    advice = "Give --embedder the folder of a sentence-transformers model, or 'self'."
    with reaching_hub(f"embedder {shown(model)}", EmbedderError, advice):
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=OTHER_RUNTIMES))


class SelfEmbedder:
    """The language model's own last hidden states, averaged over a text's tokens.

    They are taken with the original weights, so that the embedder stays the same while the model is changed.
    """

    name = "self"

    def __init__(self, weights: Weights, tokenizer: Any, batch_size: int) -> None:
        weights.remember_originals()
        self._weights = weights
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def cut(self, texts: Sequence[str]) -> list[bool]:
        limit = context_length(self._weights.model)
        return [limit is not None and len(tokens) > limit for tokens in self._tokens(texts)]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        model: Any = self._weights.model
        device = input_device(model)
        tokens = self._tokens(texts)
        limit = context_length(model)
        tokens = [row[:limit] for row in tokens]
        vectors: dict[int, Tensor] = {}
        with self._weights.originals(), evaluating(model):
            for batch in batches([len(row) for row in tokens], self._batch_size, turning_point(model)):
                rows = [torch.tensor(tokens[index]) for index in batch]
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
                lengths = torch.tensor([len(row) for row in rows], device=device)
                mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
                hidden = self._hidden(ids, mask.long())
                mean = (hidden.float() * mask[..., None]).sum(1) / lengths[:, None]
                vectors.update(zip(batch, torch.nn.functional.normalize(mean, dim=-1).cpu(), strict=True))
        return torch.stack([vectors[index] for index in range(len(tokens))])

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        start = self._tokenizer.bos_token_id or self._tokenizer.eos_token_id or 0
        return [self._tokenizer(text, add_special_tokens=False)["input_ids"] or [start] for text in texts]

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last hidden states, (texts, tokens, width). Raises EmbedderError when the model has none."""
        model: Any = self._weights.model
        advice = "Give --embedder a sentence-transformers model."
        try:
            found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            hidden: Tensor = found.hidden_states[-1]
        except MODEL_ERRORS as error:
            raise EmbedderError(
                f"embedder 'self': the model fails at its hidden states ({first_line_of(error)}). {advice}"
            ) from error
        if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            raise EmbedderError(
                f"embedder 'self': {type(model).__name__} has several streams of hidden states {tuple(hidden.shape)}, "
                f"and not one vector a token. {advice}"
            )
        return hidden
