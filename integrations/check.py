"""What a training configuration would train, checked on the model's own class without its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splaser_plugin.errors import CheckpointError, MatrixError
from splaser_plugin.files.text import first_line_of

if TYPE_CHECKING:
    from splaser_plugin.integrations.configs.plan import Plan
    from splaser_plugin.scanning.selection import Selection


TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Ends of modules' names that PEFT, since 0.18, turns into experts' parameters in some models, and not in others."""


def empty_model_of(model: str) -> Any | None:
    """The model in a local folder, or in the hub's cache, on the meta device; None where there is none to look at."""
    from splaser_plugin.checkpoints.skeleton import empty_model, model_config

    folder = _local(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    with suppress(CheckpointError):
        return empty_model(model_config(folder), folder)
    return None


def check_plan(plan: Plan, empty: Any | None) -> bool:
    """Raise MatrixError unless exactly the chosen matrices are trained, in the plan's mode; see the two below.

    empty: of `empty_model_of` the plan's model; adapters change it.

    Returns whether it was checked.
    """
    from splaser_plugin.integrations.configs.axolotl import unfrozen_patterns
    from splaser_plugin.scanning.selection import lora_targets

    model = plan.model or plan.selection.model
    if plan.mode == "unfrozen":
        return check_unfrozen(plan.selection, model, empty, unfrozen_patterns(plan.selection))
    modules, parameters = lora_targets(plan.selection)
    packed = [matrix.name for matrix in plan.selection.matrices if matrix.parameter and matrix.experts == 1]
    if plan.mode == "qlora" and packed:
        raise MatrixError(
            f"{packed[0]}: PEFT can adapt it alone only where its weight isn't packed into 4 bits. Use --mode lora, or "
            f"choose {plan.selection.other_types(' '.join(packed))}."
        )
    targets = {"target_modules": modules, "target_parameters": parameters}
    return check_adapters(plan.selection, model, empty, task_type="CAUSAL_LM", **targets)


def named_for_peft(selection: Selection, empty: Any | None) -> Selection:
    """The selection with the parameter's name of each matrix whose module's name PEFT would take for others.

    Since 0.18 PEFT reads gate_proj, up_proj, down_proj and gate of some models of experts, at the end of any name, as
    all the experts of all blocks, which older versions of transformers had under these names.

    empty: of `empty_model_of`, left as it is; without it, or without PEFT, the selection is given back as it is.
    """
    if empty is None:
        return selection
    ends = {matrix.name.rpartition(".")[2] for matrix in selection.matrices if not matrix.parameter}
    taken = {end for end in ends if _takes_for_experts(empty, end)}
    matrices = (
        replace(matrix, parameter=f"{matrix.name}.weight")
        if not matrix.parameter and matrix.name.rpartition(".")[2] in taken
        else matrix
        for matrix in selection.matrices
    )
    return replace(selection, matrices=tuple(matrices))


def check_adapters(selection: Selection, model: str, empty: Any | None, **values: Any) -> bool:
    """Raise MatrixError unless LoRA with these targets adapts exactly the chosen matrices, by PEFT itself.

    model: folder or hub id. empty: of `empty_model_of`, which is given the adapters; without it, or without PEFT,
    nothing is checked, and names that PEFT may take for experts are refused. values: of `LoraConfig`. Returns whether
    it was checked.
    """
    if empty is None:
        _refuse_unchecked(selection, model)
        return False
    names = [name for name, _ in empty.named_modules()] + [name for name, _ in empty.named_parameters()]
    _refuse_unknown([matrix.parameter or matrix.name for matrix in selection.matrices], names, model)
    try:
        import torch
        from peft import LoraConfig, get_peft_model
    except ImportError:
        _refuse_unchecked(selection, model)
        return False
    plain = {key: value for key, value in values.items() if key not in ("peft_type", "base_model_name_or_path")}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            adapted = get_peft_model(empty, LoraConfig(**plain))
    except Exception as error:  # whatever PEFT says here it would say in training
        raise MatrixError(
            f"{model}: PEFT can't adapt the chosen matrices ({first_line_of(error)}). Choose "
            f"{selection.other_types(str(error))}, or train in mode unfrozen."
        ) from error
    layers = adapted_layers(adapted.get_base_model())
    _compare(selection, set(selection.names), set(layers), model, "PEFT")
    for matrix in selection.matrices:
        count = getattr(layers[matrix.name], "num_experts", 1)
        if count != matrix.experts:
            raise MatrixError(
                f"{model}: PEFT would adapt {matrix.name} as {count} matrices, and it holds {matrix.experts} experts. "
                f"Choose {selection.other_types(matrix.name)}, or train in mode unfrozen."
            )
    return True


def check_unfrozen(selection: Selection, model: str, empty: Any | None, patterns: Sequence[str]) -> bool:
    """Raise MatrixError unless Axolotl's rule for `unfrozen_parameters` finds exactly the chosen matrices.

    The rule: a parameter is trained when a pattern matches from its name's beginning. model: folder or hub id. empty:
    of `empty_model_of`. Returns whether it was checked: not without it.
    """
    from splaser_plugin.scanning.selection import trained_parameters

    if empty is None:
        return False
    parameters = [name for name, _ in empty.named_parameters()]
    wanted = trained_parameters(selection)
    _refuse_unknown(wanted, parameters, model)
    compiled = [re.compile(pattern.replace(".", r"\.")) for pattern in patterns]
    trained = {name for name in parameters if any(pattern.match(name) for pattern in compiled)}
    _compare(selection, set(wanted), trained, model, "the trainer")
    return True


def _local(model: str) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True, allow_patterns=["config.json"]))
    except Exception:  # a path that is gone, a name that is none, or nothing in the cache: there is nothing to look at
        return None


def adapted_layers(base: Any) -> dict[str, Any]:
    """PEFT's LoRA layers in a base model, by the names of the modules and of the stacks that they adapt."""
    from peft.tuners.lora import LoraLayer

    from splaser_plugin.checkpoints.roles import plain_name
    from splaser_plugin.weights.matrices import module_name

    found = {}
    for path, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            own = getattr(layer, "parameter_name", "weight")
            found[module_name(str(plain_name(f"{path}.{own}")))] = layer
    return found


def _takes_for_experts(empty: Any, end: str) -> bool:
    """Whether PEFT turns a module's name that ends so into experts' parameters, or refuses it alone."""
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # there is no PEFT, or a version that takes names as they are
        return False
    config = LoraConfig(target_modules=[end])
    try:
        convert_peft_config_for_transformers(config, model=empty, conversions=None)
    except ValueError:  # gate_proj without up_proj
        return True
    return end not in (config.target_modules or ())


def _refuse_unchecked(selection: Selection, model: str) -> None:
    plain = [matrix.name for matrix in selection.matrices if not matrix.parameter]
    doubtful = [name for name in plain if name.rpartition(".")[2] in TAKEN_FOR_EXPERTS]
    if selection.has_experts and doubtful:
        raise MatrixError(
            f"{doubtful[0]}: PEFT takes such a name for experts in some models, so {len(doubtful)} of "
            f"{len(selection.matrices)} targets can only be checked where the model {model or 'itself'} and PEFT are: "
            f"run emit there, or choose {selection.other_types(' '.join(doubtful))}."
        )


def _refuse_unknown(names: Sequence[str], known: Collection[str], model: str) -> None:
    absent = [name for name in names if name not in set(known)]
    if absent:
        raise MatrixError(
            f"{absent[0]} is not in the model that is loaded from {model}, as {len(absent)} of {len(names)} chosen "
            "ones: its names there are others. Scan that model with this version of splaser."
        )


def _compare(selection: Selection, wanted: set[str], trained: set[str], model: str, tool: str) -> None:
    for what, wrong in (("train", trained - wanted), ("not train", wanted - trained)):
        if wrong:
            raise MatrixError(
                f"{model}: {tool} would {what} {min(wrong)}, as {len(wrong)} in all, against the choice of "
                f"{len(wanted)} matrices. Choose {selection.other_types(' '.join(wrong))}, or train in mode unfrozen."
            )
