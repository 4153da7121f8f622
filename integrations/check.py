"""What a training configuration would train, checked on the model's own class without its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splaser_plugin.errors import CheckpointError, MatrixError
from splaser_plugin.files.text import first_line_of

if TYPE_CHECKING:
    from splaser_plugin.integrations.configs.plan import Plan
    from splaser_plugin.scanning.selection import Selection


def empty_model_of(model: str) -> Any | None:
    """The model in a local folder, or in the hub's cache, on the meta device; None where there is none to look at."""
    from splaser_plugin.checkpoints.skeleton import empty_model, model_config

    folder = _local(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    with suppress(CheckpointError):
        return empty_model(model_config(folder), folder)
    return None


def check_plan(plan: Plan) -> None:
    """Raise MatrixError unless exactly the chosen matrices are trained, in the plan's mode; see the two below."""
    from splaser_plugin.integrations.configs.axolotl import unfrozen_patterns
    from splaser_plugin.scanning.selection import lora_targets

    model = plan.model or plan.selection.model
    if plan.mode == "unfrozen":
        check_unfrozen(plan.selection, model, unfrozen_patterns(plan.selection))
    else:
        check_adapters(plan.selection, model, task_type="CAUSAL_LM", target_modules=lora_targets(plan.selection))


def check_adapters(selection: Selection, model: str, **values: Any) -> None:
    """Raise MatrixError unless LoRA with these targets adapts exactly the chosen matrices, by PEFT itself.

    model: folder or hub id; where it isn't on this machine, or PEFT isn't, nothing is checked. values: of
    `LoraConfig`.
    """
    empty = empty_model_of(model)
    if empty is None:
        return
    names = [name for name, _ in empty.named_modules()]
    _refuse_unknown(selection.names, names, model)
    try:
        import torch
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return
    plain = {key: value for key, value in values.items() if key not in ("peft_type", "base_model_name_or_path")}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            adapted = get_peft_model(empty, LoraConfig(**plain))
    except Exception as error:  # whatever PEFT says here it would say in training
        raise MatrixError(
            f"{model}: PEFT can't adapt the chosen matrices ({first_line_of(error)}). Choose other --types, as "
            "self_attn, or train in mode unfrozen."
        ) from error
    _compare(set(selection.names), _adapted(adapted), model, "PEFT")


def check_unfrozen(selection: Selection, model: str, patterns: Sequence[str]) -> None:
    """Raise MatrixError unless Axolotl's rule for `unfrozen_parameters` finds exactly the chosen matrices.

    The rule: a parameter is trained when a pattern matches from its name's beginning.
    """
    empty = empty_model_of(model)
    if empty is None:
        return
    parameters = [name for name, _ in empty.named_parameters()]
    _refuse_unknown([f"{name}.weight" for name in selection.names], parameters, model)
    compiled = [re.compile(pattern.replace(".", r"\.")) for pattern in patterns]
    trained = {name for name in parameters if any(pattern.match(name) for pattern in compiled)}
    _compare({f"{name}.weight" for name in selection.names}, trained, model, "the trainer")


def _local(model: str) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True, allow_patterns=["config.json"]))
    except Exception:  # a path that is gone, a name that is none, or nothing in the cache: there is nothing to look at
        return None


def _adapted(model: Any) -> set[str]:
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    return {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def _refuse_unknown(names: Sequence[str], known: Collection[str], model: str) -> None:
    absent = [name for name in names if name not in set(known)]
    if absent:
        raise MatrixError(
            f"{absent[0]} is not in the model that is loaded from {model}, as {len(absent)} of {len(names)} chosen "
            "ones: its names there are others. Scan that model with this version of splaser."
        )


def _compare(wanted: set[str], trained: set[str], model: str, tool: str) -> None:
    for what, wrong in (("train", trained - wanted), ("not train", wanted - trained)):
        if wrong:
            raise MatrixError(
                f"{model}: {tool} would {what} {min(wrong)}, as {len(wrong)} in all, against the choice of "
                f"{len(wanted)} matrices. Choose other --types, as self_attn, or train in mode unfrozen."
            )
