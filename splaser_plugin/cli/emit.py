"""`splaser emit`: training configurations from a scan. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splaser_plugin.errors import ConfigError, OutputError, printable

if TYPE_CHECKING:
    from splaser_plugin.integrations.configs.plan import Plan
    from splaser_plugin.scanning.selection import Selection

app = typer.Typer(
    help="Training configurations that train exactly the matrices of highest SNR.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

DEFAULT_TOP = 16

ScanFile = Annotated[
    Path, typer.Argument(metavar="SCAN", help="scan.json of splaser, or the JSON that Spectrum or laserRMT publish.")
]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Edge = Annotated[str | None, typer.Option(help="Whose figures count: iqr, mp or gavish-donoho; else the scan's.")]
Model = Annotated[str, typer.Option(help="Folder or hub id of the model; else the one that was scanned.")]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which matrices: see `selection.choose`."""

    top: Annotated[int | None, typer.Option(help=f"Matrices per module type; {DEFAULT_TOP} without --fraction.")] = None
    fraction: Annotated[float | None, typer.Option(help="Share of each module type, rounded up.")] = None
    by: Annotated[str, typer.Option(help="What ranks them: snr_ratio, snr or rank.")] = "snr_ratio"
    edge: Edge = None
    types: Annotated[
        list[str], typer.Option(help="Only these module types, as mlp.down_proj or self_attn; repeatable.")
    ] = dataclasses.field(default_factory=list)
    include_head: Annotated[bool, typer.Option("--include-head", help="The output head, too.")] = False
    include_embeddings: Annotated[bool, typer.Option("--include-embeddings", help="The embeddings, too.")] = False

    def carry_out(self, scan: Path) -> Selection:
        from splaser_plugin.scanning.selection import choose
        from splaser_plugin.scanning.spectrum_format import load_scan

        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        if self.top is None and self.fraction is None:
            values["top"] = DEFAULT_TOP
        return choose(load_scan(scan), source=str(scan), **values)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The adapters' rank: see `plan.choose_rank`."""

    lora_rank: Annotated[str | None, typer.Option(help="A number, or auto; 32 if not given.")] = None
    match_rank: Annotated[int, typer.Option(help="With auto: as many parameters as this rank on every matrix.")] = 32


@dataclass(frozen=True, kw_only=True)
class Training(Rank):
    """How, on what and to where: see `plan.Plan`."""

    mode: Annotated[str, typer.Option(help="lora, qlora, or unfrozen: full fine-tuning of the chosen ones.")] = "lora"
    base: Annotated[Path | None, typer.Option(help="Your own YAML: the targets are set in it, all else stays.")] = None
    model: Model = ""
    dataset: Annotated[Path | None, typer.Option(help="Training data: a json, jsonl, csv or parquet file.")] = None
    output_dir: Annotated[str, typer.Option(help="Folder that the training run writes to.")] = ""

    def plan(self, selection: Selection, stage: str) -> Plan:
        from splaser_plugin.integrations.configs.plan import Plan, choose_rank

        rank, reason = choose_rank(selection, self.lora_rank, self.match_rank)
        return Plan(
            selection=selection,
            mode=self.mode,
            stage=stage,
            model=self.model,
            dataset=self.dataset,
            output_dir=self.output_dir,
            rank=rank,
            rank_reason=reason,
        )


def _flags(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each field of these dataclasses, passed to it as one argument each."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def flat(**arguments: Any) -> None:
            for name, group in groups.items():
                arguments[name] = group(**{each.name: arguments.pop(each.name) for each in dataclasses.fields(group)})
            command(**arguments)

        own = [
            each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name not in groups
        ]
        flags = [flag for group in groups.values() for flag in _parameters(group)]
        flat.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        flat.__annotations__ = {each.name: each.annotation for each in [*own, *flags]}
        flat.__name__, flat.__doc__ = command.__name__, command.__doc__
        return flat

    return decorate


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default if each.default is not dataclasses.MISSING else [],
            annotation=hints[each.name],
        )
        for each in dataclasses.fields(group)
    ]


@app.command()
@_flags(choice=Choice, training=Training)
def axolotl(
    *,
    scan: ScanFile,
    output: OutputFile,
    rl: Annotated[str | None, typer.Option(help="dpo: train on preferences.")] = None,
    plugin: Annotated[
        bool, typer.Option("--plugin", help="Have splaser's plugin choose when training starts, naming no matrices.")
    ] = False,
    laser: Annotated[
        str | None, typer.Option(help="With --plugin: laser the model before or after training, on --dataset.")
    ] = None,
    choice: Choice,
    training: Training,
    overwrite: Overwrite = False,
) -> None:
    """A configuration for `axolotl train`."""
    from splaser_plugin.integrations.configs.axolotl import axolotl_yaml

    if rl not in (None, "dpo"):
        raise ConfigError(f"--rl: got '{rl}', expected dpo.")
    selection = choice.carry_out(scan)
    run = f"axolotl train {shlex.quote(str(output))}"
    plan = training.plan(selection, rl or "sft")
    text = axolotl_yaml(plan, base=training.base, run=run, plugin=plugin, laser=laser)
    _write(output, text, overwrite=overwrite)
    _tell(selection, output, run)


@app.command()
@_flags(choice=Choice, training=Training)
def llamafactory(
    *,
    scan: ScanFile,
    output: OutputFile,
    stage: Annotated[str, typer.Option(help="sft, or dpo on preferences.")] = "sft",
    choice: Choice,
    training: Training,
    overwrite: Overwrite = False,
) -> None:
    """A configuration for `llamafactory-cli train`, with its data set's entry in dataset_info.json beside it.

    With --mode unfrozen a Python script, since LLaMA-Factory's YAML can freeze whole blocks only.
    """
    from splaser_plugin.integrations.configs import llamafactory as tool

    is_script = training.mode == "unfrozen"
    if is_script != (output.suffix == ".py"):
        wanted = "a script: its name has to end in .py" if is_script else "YAML: its name can't end in .py"
        raise ConfigError(f"--output {output}: --mode {training.mode} is written as {wanted}.")
    selection = choice.carry_out(scan)
    plan = training.plan(selection, stage)
    run = f"{'python' if is_script else 'llamafactory-cli train'} {shlex.quote(str(output))}"
    write = tool.runner_script if is_script else tool.llamafactory_yaml
    text = write(plan, base=training.base, dataset_dir=output.parent, run=run)
    if training.dataset is not None:
        info = output.parent / "dataset_info.json"
        entry = tool.dataset_info(training.dataset, stage, output.parent)
        entries = tool.merged_dataset_info(info, entry, overwrite=overwrite)
        _check_file(output, text, overwrite=overwrite)
        _write(info, entries, overwrite=True)
    _write(output, text, overwrite=overwrite)
    _tell(selection, output, run)


@app.command()
@_flags(choice=Choice, ranks=Rank)
def peft(
    *,
    scan: ScanFile,
    output: OutputFile = Path("adapter_config.json"),
    choice: Choice,
    ranks: Rank,
    rank_pattern: Annotated[
        bool,
        typer.Option("--rank-pattern", help="Give each matrix a rank in proportion to that above the edge."),
    ] = False,
    model: Model = "",
    overwrite: Overwrite = False,
) -> None:
    """A LoRA configuration for PEFT, as adapter_config.json."""
    from splaser_plugin.integrations.configs.adapter import adapter_config
    from splaser_plugin.integrations.configs.plan import DEFAULT_RANK, choose_rank

    selection = choice.carry_out(scan)
    rank, _ = choose_rank(selection, ranks.lora_rank, ranks.match_rank)
    values = adapter_config(selection, rank=rank or DEFAULT_RANK, rank_pattern=rank_pattern, model=model)
    _write(output, _json(values), overwrite=overwrite)
    _tell(selection, output, f'LoraConfig.from_pretrained("{output.parent}")')


@app.command()
def spectrum(
    *,
    scan: ScanFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; else where Axolotl's Spectrum plugin looks.")
    ] = None,
    edge: Edge = None,
    model: Model = "",
    overwrite: Overwrite = False,
) -> None:
    """The scan as Spectrum publishes it, which makes Axolotl's own Spectrum plugin work for any model."""
    from splaser_plugin.scanning.scan import Scan
    from splaser_plugin.scanning.spectrum_format import published_dict, published_name

    found = Scan.load(scan)
    path = output or Path("model_snr_results") / published_name(model or found.model)
    _write(path, _json(published_dict(found, edge=edge)), overwrite=overwrite)
    print(f"written: {printable(str(path))}", file=sys.stderr)


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str, *, overwrite: bool) -> None:
    _check_file(path, text, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror}). Choose another --output.") from error


def _check_file(path: Path, text: str, *, overwrite: bool) -> None:
    """Raise OutputError when `path` can't take `text`: a folder, or a file of other content (unless `overwrite`)."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder. Give a file's name with --output.")
    if path.exists() and not overwrite and path.read_bytes() != text.encode():
        raise OutputError(f"{path}: exists. Choose another --output, or pass --overwrite.")


def _tell(selection: Selection, output: Path, run: str) -> None:
    for kind, names in selection.by_type.items():
        print(f"{printable(kind)}: {len(names)}", file=sys.stderr)
    print(f"written: {printable(str(output))}\nnext: {printable(run)}", file=sys.stderr)
