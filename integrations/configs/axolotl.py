"""Axolotl: configurations that train exactly the chosen matrices. The plugin is in `integrations.axolotl`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splaser_plugin.data.formats import recognise
from splaser_plugin.errors import ConfigError
from splaser_plugin.integrations.configs.plan import DEFAULT_RANK, Plan, first_row, header, unusable
from splaser_plugin.integrations.configs.yaml_text import base_values, merged_yaml, new_yaml
from splaser_plugin.scanning.selection import Selection, is_embedding, is_head, lora_targets, trained_parameters

CHATML_USER = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"

# What else in a user's file would train something more, or something else.
NOT_WITH_LORA = (
    "unfrozen_parameters",
    "lora_target_linear",
    "lora_target_parameters",
    "lora_exclude_modules",
    "lora_modules_to_save",
    "peft_layers_to_transform",
    "peft_layers_pattern",
    "peft_layer_replication",
    "peft_trainable_token_indices",
)
FUSED_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
NOT_WITH_UNFROZEN = (
    *FUSED_KERNELS,
    "adapter",
    "load_in_4bit",
    "load_in_8bit",
    "relora",
    "lora_embedding_kernel",
)
SPECTRUM, SPLASER = "SpectrumPlugin", "SPLaserPlugin"
PLUGIN = f"splaser_plugin.integrations.axolotl.{SPLASER}"
LASER = ("before", "after")
DATASET = "datasets"
"""The key that names the data, left out where the user named none."""
PREFERENCES = {"rl": "dpo", "chat_template": "tokenizer_default"}


def axolotl_yaml(
    plan: Plan,
    *,
    base: Path | None = None,
    run: str = "axolotl train CONFIG.yml",
    plugin: bool = False,
    laser: str | None = None,
) -> str:
    """The configuration as YAML: complete, or the user's file `base` with the targets set in it.

    plugin: let the plugin choose the matrices when training starts, instead of naming them. laser: have it
    laser the model `before` or `after` training too, on the data set's preference pairs.
    Raises ConfigError, MatrixError or PairsError when the plan can't be carried out in Axolotl.
    """
    if laser is not None and (laser not in LASER or not plugin or plan.dataset is None):
        raise ConfigError(f"--laser: got '{laser}', expected {' or '.join(LASER)}, with --plugin and --dataset.")
    lines = header(plan, run, base=base, dataset_key=DATASET)
    if plugin:
        lines.append("The plugin makes this choice itself, and logs 'splaser: training ... matrices'.")
        lines.append("Where that line is missing from the log it isn't installed, and everything is trained.")
    given = {} if base is None else base_values(base)
    values = plugin_targets(plan, given, laser) if plugin else targets(plan, given)
    if base is None:
        values = axolotl_config(plan, values)
        return new_yaml(values, lines + _notes(values))
    _refuse_base(base, given)
    if plan.model:
        values["base_model"] = plan.model
    if plan.stage == "dpo":
        values["rl"] = "dpo"
    if plan.dataset:
        values |= _data(plan.dataset, plan.stage if plan.stage == "dpo" else given.get("rl", "sft"))
    if plan.output_dir:
        values["output_dir"] = plan.output_dir
    unwanted = {
        "unfrozen": NOT_WITH_UNFROZEN,
        "lora": (*NOT_WITH_LORA, "load_in_4bit"),
        "qlora": (*NOT_WITH_LORA, "load_in_8bit"),
    }[plan.mode]
    if plugin:
        unwanted += ("unfrozen_parameters", "lora_target_modules")
    without = [key for key in given if key in unwanted and key not in values]
    if without:
        lines.append(f"Taken out of {base.name}: {', '.join(without)}.")
    return merged_yaml(base, values, lines + _notes(values), without=without)


def axolotl_config(plan: Plan, what: Mapping[str, Any]) -> dict[str, Any]:
    """A complete configuration, as Axolotl's keys and values. what: those that say what is trained."""
    return {
        "base_model": plan.base_model,
        **what,
        **(_data(plan.dataset, plan.stage) if plan.dataset else PREFERENCES if plan.stage == "dpo" else {}),
        "val_set_size": 0.0,
        "sequence_len": 2048,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "learning_rate": _learning_rate(plan),
        "warmup_ratio": 0.1,
        "bf16": "auto",
        "attn_implementation": "sdpa",
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "saves_per_epoch": 1,
        "output_dir": plan.output_dir or "./outputs/splaser",
    }


def targets(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say what is trained. given: what the user's own file has."""
    if plan.mode == "unfrozen":
        kwargs = given.get("gradient_checkpointing_kwargs") or {}
        return {
            "unfrozen_parameters": unfrozen_patterns(plan.selection),
            # with frozen weights below, reentrant checkpointing loses the gradients
            "gradient_checkpointing_kwargs": {**kwargs, "use_reentrant": False},
        }
    parameters = lora_targets(plan.selection)[1]
    if given.get("lora_dropout") and parameters:
        raise ConfigError(
            f"lora_dropout {given['lora_dropout']}: PEFT has no dropout for experts. Set it to 0, or choose "
            f"{plan.selection.other_types(' '.join(parameters))}."
        )
    return {
        **_adapter(plan, given),
        **adapter_targets(plan.selection),
        # these are for blocks in which every projection has an adapter
        **dict.fromkeys(FUSED_KERNELS, False),
    }


def adapter_targets(selection: Selection) -> dict[str, Any]:
    """Axolotl's keys for the targets of adapters."""
    modules, parameters = lora_targets(selection)
    return {"lora_target_modules": modules, **({"lora_target_parameters": parameters} if parameters else {})}


def plugin_targets(plan: Plan, given: Mapping[str, Any], laser: str | None) -> dict[str, Any]:
    """As `targets`, with the plugin that finds them: the section `splaser` has the same choice."""
    selection = plan.selection
    section: dict[str, Any] = {"mode": "unfrozen" if plan.mode == "unfrozen" else "lora"}
    config = selection.config
    section |= {"top": config.top} if config.fraction is None else {"fraction": config.fraction}
    section |= {"by": config.by, "edge": selection.edge}
    section |= {"text": config.text} if config.text else {}
    section |= {"seed": config.seed} if config.by == "random" else {}
    if config.types:
        section["types"] = list(config.types)
    if any(map(is_head, selection.names)):
        section["include_head"] = True
    if any(map(is_embedding, selection.names)):
        section["include_embeddings"] = True
    if laser is not None:
        section["laser"] = {"when": laser, "pairs": str(plan.dataset)}
    plugins = [plugin for plugin in given.get("plugins") or [] if plugin != PLUGIN]
    adapter = {} if plan.mode == "unfrozen" else _adapter(plan, given)
    return {**adapter, "plugins": [*plugins, PLUGIN], "splaser": section}


def _adapter(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"adapter": plan.mode}
    if plan.mode == "qlora":
        values["load_in_4bit"] = True
    if plan.rank or "lora_r" not in given:
        rank = plan.rank or DEFAULT_RANK
        values |= {"lora_r": rank, "lora_alpha": 2 * rank}
    if "lora_dropout" not in given:
        values["lora_dropout"] = 0.0
    return values


def unfrozen_patterns(selection: Selection) -> list[str]:
    """Patterns for `unfrozen_parameters`: Axolotl makes each dot literal itself, so none is escaped here."""
    return [f"^{name}$" for name in trained_parameters(selection)]


def _learning_rate(plan: Plan) -> float:
    if plan.stage == "dpo":
        return 5e-6 if plan.mode != "unfrozen" else 5e-7
    return 2e-4 if plan.mode != "unfrozen" else 2e-5


def refuse_plugins(given: Mapping[str, Any], where: str, *classes: str) -> None:
    """Raise ConfigError when the configuration has one of these plugins, which choose what is trained, too."""
    for plugin in given.get("plugins") or []:
        if str(plugin).rpartition(".")[2] in classes:
            raise ConfigError(f"{where}: plugin {plugin} chooses what is trained, too. Take it out.")


def _refuse_base(base: Path, given: Mapping[str, Any]) -> None:
    refuse_plugins(given, f"--base {base}", SPECTRUM)
    if "splaser" in given:
        raise ConfigError(f"--base {base}: it has a section splaser already. Change that, or take it out.")
    if given.get("lora_model_dir"):
        raise ConfigError(
            f"--base {base}: lora_model_dir continues an adapter, whose targets can't be changed. "
            "Take it out, or merge that adapter into the model first."
        )


def _notes(values: Mapping[str, Any]) -> list[str]:
    if any(isinstance(dataset.get("type"), dict) for dataset in values.get("datasets", ())):
        return ["The data set's format is ChatML: change it for a model with another chat template."]
    return []


def _data(dataset: Path, stage: str) -> dict[str, Any]:
    """The data set's part of the configuration, read off its first row."""
    row = first_row(dataset)
    if stage == "dpo":
        return {**PREFERENCES, "datasets": [_dpo_dataset(dataset, row)]}
    if stage != "sft":
        raise ConfigError(f"--dataset: rl is '{stage}' in the file given with --base. Name its data set there.")
    return {"datasets": [_sft_dataset(dataset, row)]}


def _dpo_dataset(dataset: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": str(dataset), "split": "train"}
    form = recognise(row)
    if form is None or form.prompt in (None, "conversations") or form.rejected is None:
        wanted = "a prompt column (prompt, question or instruction) with chosen and rejected"
        raise unusable(dataset, row, "Axolotl", "dpo", wanted)
    if row.get("system") or (form.prompt == "instruction" and row.get("input")):
        texts = all(isinstance(row[column], str) for column in form.columns)
        if form.prompt == "instruction" or not texts:
            raise unusable(dataset, row, "Axolotl", "dpo", "prompt, chosen and rejected, with no input beside them")
        # the only type that reads a system column
        return {**entry, "type": "chatml.default"}
    return {
        **entry,
        "type": "chat_template.default",
        "field_messages": form.prompt,
        "field_chosen": form.chosen,
        "field_rejected": form.rejected,
    }


def _sft_dataset(dataset: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": str(dataset), "ds_type": _file_type(dataset), "split": "train"}
    if isinstance(row.get("messages"), list):
        return {**entry, "type": "chat_template", "field_messages": "messages"}
    if isinstance(row.get("conversations"), list) and "chosen" not in row:
        mapping = {"role": "from", "content": "value"}
        return {
            **entry,
            "type": "chat_template",
            "field_messages": "conversations",
            "message_property_mappings": mapping,
        }
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return {**entry, "type": "alpaca"}
    form = recognise(row)
    prompt, answer = (form.prompt, form.chosen) if form else ("prompt", "completion")
    if not isinstance(row.get(str(prompt)), str) or not isinstance(row.get(answer), str):
        wanted = "messages, conversations, instruction and output, or prompt with completion or chosen as texts"
        raise unusable(dataset, row, "Axolotl", "sft", wanted)
    format = {"format": CHATML_USER, "no_input_format": CHATML_USER}
    return {**entry, "type": {"field_instruction": prompt, "field_output": answer, **format}}


def _file_type(dataset: Path) -> str:
    return {".csv": "csv", ".parquet": "parquet"}.get(dataset.suffix.lower(), "json")
