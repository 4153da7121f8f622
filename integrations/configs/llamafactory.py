"""LLaMA-Factory: configurations that train exactly the chosen matrices, and the entry for their data set."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from pprint import pformat
from typing import Any

from splaser_plugin.data.formats import recognise
from splaser_plugin.errors import ConfigError, MatrixError, OutputError
from splaser_plugin.files.json import read_json
from splaser_plugin.integrations.configs.plan import DEFAULT_RANK, Plan, first_row, header, unusable
from splaser_plugin.integrations.configs.yaml_text import base_values, comment, merged_yaml, new_yaml
from splaser_plugin.scanning.selection import lora_targets, trained_parameters

# What else in a user's file would train something more, or something else.
NOT_WITH_LORA = (
    "additional_target",
    "use_llama_pro",
    "freeze_trainable_layers",
    "freeze_trainable_modules",
    "freeze_extra_modules",
)
NOT_WITH_UNFROZEN = (
    *NOT_WITH_LORA,
    *("lora_alpha", "lora_dropout", "lora_rank", "lora_target", "loraplus_lr_ratio", "use_rslora", "use_dora"),
    *("pissa_init", "pissa_iter", "pissa_convert", "quantization_bit", "quantization_method"),
)
REFUSED = {
    "adapter_name_or_path": "continues an adapter, whose targets can't be changed",
    "resize_vocab": "trains the embeddings, too",
}

RUNNER = '''\
"""Full fine-tuning of the matrices below, the rest frozen. LLaMA-Factory's YAML can freeze whole blocks only.

Options as in LLaMA-Factory's own files; `key=value` on the command line changes one. On several GPUs, start
it with torchrun.
"""

from llamafactory.train.tuner import run_exp
from omegaconf import OmegaConf

from splaser_plugin.integrations.freeze import FreezeCallback

TRAINED = {trained}

OPTIONS = {options}

if __name__ == "__main__":
    options = OmegaConf.merge(OPTIONS, OmegaConf.from_cli())
    run_exp(OmegaConf.to_container(options), callbacks=[FreezeCallback(TRAINED)])
'''

DATASET = "dataset"
"""The key that names the data, left out where the user named none."""


def llamafactory_yaml(
    plan: Plan,
    *,
    base: Path | None = None,
    dataset_dir: Path = Path(),
    run: str = "llamafactory-cli train CONFIG.yml",
) -> str:
    """The configuration as YAML: complete, or the user's file `base` with the targets set in it.

    dataset_dir: the folder of the dataset_info.json that has the data set's entry.
    Raises ConfigError, MatrixError or PairsError when the plan can't be carried out in LLaMA-Factory.
    """
    if plan.mode == "unfrozen":
        raise ConfigError("--mode unfrozen: LLaMA-Factory's YAML can freeze whole blocks only. Write a runner script.")
    lines = header(plan, run, base=base, dataset_key=DATASET)
    if base is None:
        return new_yaml(llamafactory_config(plan, dataset_dir), lines)
    values, without = _base_changes(plan, base, dataset_dir)
    if without:
        lines.append(f"Taken out of {base.name}: {', '.join(without)}.")
    return merged_yaml(base, values, lines, without=without)


def runner_script(
    plan: Plan, *, base: Path | None = None, dataset_dir: Path = Path(), run: str = "python RUNNER.py"
) -> str:
    """A Python script that trains the chosen matrices whole, which no YAML of LLaMA-Factory can say."""
    values = llamafactory_config(plan, dataset_dir) if base is None else base_values(base)
    if base is not None:
        changes, without = _base_changes(plan, base, dataset_dir)
        values = {key: value for key, value in values.items() if key not in without} | changes
    trained = [name.removesuffix(".weight") for name in trained_parameters(plan.selection)]
    body = RUNNER.format(trained=_literal(trained), options=_literal(values))
    return comment(header(plan, run, base=base, dataset_key=DATASET)) + body


def llamafactory_config(plan: Plan, dataset_dir: Path = Path()) -> dict[str, Any]:
    """A complete configuration, as LLaMA-Factory's keys and values."""
    preference = {"pref_beta": 0.1, "pref_loss": "sigmoid"} if plan.stage == "dpo" else {}
    return {
        "model_name_or_path": plan.base_model,
        "stage": plan.stage,
        "do_train": True,
        **targets(plan, {}),
        **preference,
        **(_data(plan.dataset, plan.stage, dataset_dir) if plan.dataset else {}),
        "cutoff_len": 2048,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 1.0,
        "learning_rate": _learning_rate(plan),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "report_to": "none",
        "output_dir": plan.output_dir or "outputs/splaser",
    }


def targets(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say what is trained. given: what the user's own file has."""
    if plan.mode == "unfrozen":
        return {"finetuning_type": "full"}
    values: dict[str, Any] = {"finetuning_type": "lora"}
    if plan.mode == "qlora":
        values |= {"quantization_bit": 4, "quantization_method": "bnb"}
    if plan.rank or "lora_rank" not in given:
        rank = plan.rank or DEFAULT_RANK
        values |= {"lora_rank": rank, "lora_alpha": 2 * rank}
    modules, parameters = lora_targets(plan.selection)
    if parameters:
        raise MatrixError(
            f"{parameters[0]}: PEFT has to be told it as a parameter, and LLaMA-Factory has no key for that. Use "
            f"--mode unfrozen, {plan.selection.other_types(' '.join(parameters))}, or train in Axolotl."
        )
    return values | {"lora_target": ",".join(modules)}


def dataset_name(dataset: Path, stage: str) -> str:
    """What the data set is called in dataset_info.json; a file is described differently for each stage."""
    return re.sub(r"[^\w-]+", "_", dataset.stem) + f"_{stage}"


def dataset_info(dataset: Path, stage: str, dataset_dir: Path = Path()) -> dict[str, Any]:
    """The entry of dataset_info.json for a local file, read off its first row: {name: description}.

    Raises PairsError when LLaMA-Factory has no format for such rows.
    """
    row = first_row(dataset)
    file_name = os.path.relpath(dataset, dataset_dir)
    entry = _preference_entry(dataset, row) if stage == "dpo" else _sft_entry(dataset, row)
    return {dataset_name(dataset, stage): {"file_name": Path(file_name).as_posix(), **entry}}


def merged_dataset_info(path: Path, entry: Mapping[str, Any], *, overwrite: bool = False) -> str:
    """The text of the dataset_info.json at `path`, if there is one, with this entry in it and its others as they were.

    Raises ConfigError when it is damaged, OutputError when it has another entry of that name (unless `overwrite`).
    """
    known = read_json(path, ConfigError) if path.exists() else {}
    if not isinstance(known, dict):
        raise ConfigError(f"{path}: holds {type(known).__name__}, expected data sets by name.")
    for name, description in entry.items():
        if known.get(name, description) != description and not overwrite:
            raise OutputError(f"{path}: describes {name} in another way. Rename the data set, or pass --overwrite.")
    return json.dumps({**known, **entry}, indent=2, ensure_ascii=False) + "\n"


def _base_changes(plan: Plan, base: Path, dataset_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """(values to set, keys to take out) in the user's own file."""
    given = base_values(base)
    for key, reason in REFUSED.items():
        if given.get(key):
            raise ConfigError(f"--base {base}: {key} {reason}. Take it out of the file.")
    values = targets(plan, given)
    if plan.stage == "dpo":
        values["stage"] = "dpo"
    if plan.model:
        values["model_name_or_path"] = plan.model
    if plan.dataset:
        values |= _data(plan.dataset, plan.stage, dataset_dir)
    if plan.output_dir:
        values["output_dir"] = plan.output_dir
    unwanted = NOT_WITH_UNFROZEN if plan.mode == "unfrozen" else NOT_WITH_LORA
    without = [key for key in given if key in unwanted]
    if plan.mode == "lora":
        without += [key for key in ("quantization_bit", "quantization_method") if key in given]
    return values, without


def _data(dataset: Path, stage: str, dataset_dir: Path) -> dict[str, Any]:
    return {"dataset": dataset_name(dataset, stage), "dataset_dir": str(dataset_dir)}


def _learning_rate(plan: Plan) -> float:
    if plan.stage == "dpo":
        return 5e-6 if plan.mode != "unfrozen" else 5e-7
    return 1e-4 if plan.mode != "unfrozen" else 1e-5


def _preference_entry(dataset: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    form = recognise(row)
    wanted = "a prompt with chosen and rejected, each one text or one message"
    if form is None or form.prompt is None or form.rejected is None:
        raise unusable(dataset, row, "LLaMA-Factory", "dpo", wanted)
    columns = {"chosen": form.chosen, "rejected": form.rejected}
    answers = [row[column] for column in columns.values()]
    if isinstance(row[form.prompt], list) and all(isinstance(answer, Mapping) for answer in answers):
        messages = {"columns": {"messages": form.prompt, **columns}, **_tags(answers[0])}
        return {"ranking": True, "formatting": "sharegpt", **messages}
    if isinstance(row[form.prompt], str) and all(isinstance(answer, str) for answer in answers):
        return {"ranking": True, "columns": {"prompt": form.prompt, **_beside_prompt(row, form.prompt), **columns}}
    raise unusable(dataset, row, "LLaMA-Factory", "dpo", wanted)


def _sft_entry(dataset: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    turns = next((row[column] for column in ("messages", "conversations") if isinstance(row.get(column), list)), None)
    if turns and isinstance(turns[0], Mapping) and "chosen" not in row:
        column = "messages" if turns is row.get("messages") else "conversations"
        return {"formatting": "sharegpt", "columns": {"messages": column}, **_tags(turns[0])}
    form = recognise(row)
    prompt, answer = (str(form.prompt), form.chosen) if form else ("prompt", "completion")
    if not isinstance(row.get(prompt), str) or not isinstance(row.get(answer), str):
        wanted = "messages, conversations, or a prompt with an answer as texts"
        raise unusable(dataset, row, "LLaMA-Factory", "sft", wanted)
    return {"columns": {"prompt": prompt, **_beside_prompt(row, prompt), "response": answer}}


def _beside_prompt(row: Mapping[str, Any], prompt: str) -> dict[str, str]:
    """The other columns that belong to the prompt."""
    known = {"query": "input", "history": "history"} if prompt == "instruction" else {}
    return {part: column for part, column in {**known, "system": "system"}.items() if column in row}


def _tags(message: Mapping[str, Any]) -> dict[str, Any]:
    """How a message names its role and text, where that isn't the way LLaMA-Factory expects: from and value."""
    if "role" not in message:
        return {}
    roles = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    return {"tags": {"role_tag": "role", "content_tag": "content", **roles}}


def _literal(value: Any) -> str:
    return pformat(value, width=116, sort_dicts=False)
