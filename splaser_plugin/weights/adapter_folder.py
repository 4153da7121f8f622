"""A PEFT adapter's folder, and how it is merged into a loaded model."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from splaser_plugin.checkpoints.header import StoredTensor
from splaser_plugin.checkpoints.trust import ADAPTER, ADAPTER_CONFIG, check_adapter_folder
from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import first_line_of, shown

OF_BASE = "Give the base model that the adapter was trained on."


def find_adapter(folder: Path, allow_pickle: bool) -> list[StoredTensor] | None:
    """The adapter's tensors; None where they are pickled. Raises CheckpointError when it isn't to be loaded."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"--adapter {folder}: there is no {ADAPTER_CONFIG}. Give a folder that PEFT saved.")
    return check_adapter_folder(folder, allow_pickle=allow_pickle)


def merge(model: Any, folder: Path, tensors: list[StoredTensor] | None, *, vocabulary: int, of_base: int) -> Any:
    """The model with the adapter's changes in its own weights.

    tensors: the adapter's, None where they are pickled. vocabulary: tokens of the tokenizer that it is used with.
    of_base: tokens of the base model's own, which may be more than it has embeddings (Gemma 3's are).
    Raises CheckpointError when they don't belong together, or no merged model can say what the adapted one does.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        _fit_vocabulary(model, folder, tensors or [], vocabulary, of_base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are missing, which ends in an error below
            adapted = PeftModel.from_pretrained(model, str(folder))
        _check_tied(folder, adapted.get_base_model())
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        merged = adapted.merge_and_unload()
    except library_errors() as error:
        raise CheckpointError(
            f"--adapter {folder}: can't be merged into this model ({first_line_of(error)}). {OF_BASE}"
        ) from error
    if tensors is not None:
        _check_adapted(folder, {tensor.name for tensor in tensors}, set(expected))
    return merged


def _fit_vocabulary(model: Any, folder: Path, tensors: list[StoredTensor], vocabulary: int, of_base: int) -> None:
    """Give the model as many embeddings as the adapter has, where tokens were added before it was trained."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    rows = len(embeddings.weight)
    stored = {tensor.name: tensor.shape[0] for tensor in tensors if tensor.shape}

    def stored_rows(module: Any) -> int:
        return next((n for name, n in stored.items() if name.endswith(f".{names[id(module)]}.weight")), rows)

    wanted = stored_rows(embeddings)
    of_head = wanted if head is None or head.weight is embeddings.weight else stored_rows(head)
    if vocabulary > max(rows, of_base) and min(wanted, of_head) < vocabulary:
        raise CheckpointError(
            f"--adapter {folder}: it was trained with a vocabulary of {vocabulary}, the base model's is {rows}, and it "
            "doesn't hold the embeddings and head of the added tokens. Save it with save_embedding_layers=True."
        )
    if wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)


def _check_tied(folder: Path, base: Any) -> None:
    sharers: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        sharers.setdefault(id(parameter), []).append(name)
    for names in sharers.values():
        adapted = next((name for name in names if ".base_layer." in name), None)
        if adapted is not None and len(names) > 1:
            other = next(name for name in names if name != adapted)
            raise CheckpointError(
                f"--adapter {folder}: {adapted.replace('.base_layer', '')} has an adapter and is the same weight as "
                f"{other}, so that no merged model can hold both. Train without that target, or untie the two before."
            )


def _check_adapted(folder: Path, stored: set[str], expected: set[str]) -> None:
    absent, homeless = expected - stored, {name for name in stored - expected if ".lora_" in name}
    if absent or homeless:
        what = f"{shown(min(absent))} is missing" if absent else f"{shown(min(homeless))} has no place in this model"
        raise CheckpointError(f"{folder / ADAPTER}: tensor {what}. {OF_BASE}")


def library_errors() -> tuple[type[Exception], ...]:
    """What transformers, gguf and PEFT raise for damaged files: they check little of them before use."""
    from huggingface_hub.errors import StrictDataclassError

    of_wrong_values = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError)
    return (OSError, EOFError, RuntimeError, ImportError, UnpicklingError, struct.error, *of_wrong_values)
