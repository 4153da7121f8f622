"""`splaser emit`: training configurations from a scan. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splaser_plugin.cli.lines import fitted
from splaser_plugin.cli.options import options
from splaser_plugin.config.stages import EDGES, RankConfig, SelectConfig, TrainingConfig
from splaser_plugin.errors import ConfigError, OutputError
from splaser_plugin.files.output import whole_file
from splaser_plugin.files.sources import path_of
from splaser_plugin.files.text import printable

if TYPE_CHECKING:
    from splaser_plugin.integrations.configs.plan import Plan
    from splaser_plugin.scanning.selection import Selection

app = typer.Typer(
    help="Training configurations that train exactly the matrices of highest SNR.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

DEFAULT_TOP = 16


def _at_home(path: Path | None) -> Path | None:
    return None if path is None else path_of(path)


ScanFile = Annotated[
    Path,
    typer.Argument(
        metavar="SCAN", help="scan.json of splaser, or the JSON that Spectrum or laserRMT publish.", callback=_at_home
    ),
]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="File to write.", callback=_at_home)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Edge = Annotated[
    str | None,
    typer.Option(help=f"Whose figures count: {', '.join(EDGES)}; else the scan's.", autocompletion=lambda: EDGES),
]
Model = Annotated[str, typer.Option(help="Folder or hub id of the model; else the one that was scanned.")]


def _chosen(scan: Path, select: SelectConfig, model: str) -> Selection:
    """model: where it is, if not where the scan says."""
    from rich.console import Console

    from splaser_plugin.cli.terminal import TerminalProgress
    from splaser_plugin.jobs.importance import importances_of_folder
    from splaser_plugin.scanning.agreement import agreements, in_words
    from splaser_plugin.scanning.selection import choose
    from splaser_plugin.scanning.spectrum_format import load_scan

    if select.top is None and select.fraction is None:
        select = dataclasses.replace(select, top=DEFAULT_TOP)
    found = load_scan(scan)
    progress = TerminalProgress(Console(stderr=True, emoji=False))
    importances = importances_of_folder(model or found.model, select, progress=progress)
    selection = choose(found, select, source=str(scan), importances=importances)
    for sentence in in_words(agreements(found, selection)):
        print(fitted(printable(sentence)), file=sys.stderr)
    return selection


def _plan(selection: Selection, training: TrainingConfig, stage: str, empty: Any | None) -> Plan:
    from splaser_plugin.integrations.check import named_for_peft
    from splaser_plugin.integrations.configs.plan import Plan, choose_rank

    if training.mode != "unfrozen":
        selection = named_for_peft(selection, empty)
    rank, reason = choose_rank(selection, training.lora_rank, training.match_rank)
    return Plan(
        selection=selection,
        mode=training.mode,
        stage=stage,
        model=training.model,
        dataset=training.dataset,
        output_dir=training.output_dir,
        rank=rank,
        rank_reason=reason,
    )


@app.command()
@options(select=SelectConfig, training=TrainingConfig)
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
    select: SelectConfig,
    training: TrainingConfig,
    overwrite: Overwrite = False,
) -> None:
    """A configuration for `axolotl train`."""
    from splaser_plugin.integrations.check import check_plan, empty_model_of
    from splaser_plugin.integrations.configs.axolotl import DATASET, axolotl_yaml
    from splaser_plugin.integrations.configs.plan import lacks_dataset

    if rl not in (None, "dpo"):
        raise ConfigError(f"--rl: got '{rl}', expected dpo.")
    training = dataclasses.replace(training, base=_at_home(training.base), dataset=_at_home(training.dataset))
    selection = _chosen(scan, select, training.model)
    run = f"axolotl train {shlex.quote(str(output))}"
    empty = empty_model_of(training.model or selection.model)
    plan = _plan(selection, training, rl or "sft", empty)
    text = axolotl_yaml(plan, base=training.base, run=run, plugin=plugin, laser=laser)
    is_checked = plugin or check_plan(plan, empty)  # the plugin checks where it trains
    _write(output, text, overwrite=overwrite)
    _tell(selection, output, run, is_checked=is_checked, lacks=DATASET if lacks_dataset(plan, training.base) else "")


@app.command()
@options(select=SelectConfig, training=TrainingConfig)
def llamafactory(
    *,
    scan: ScanFile,
    output: OutputFile,
    stage: Annotated[str, typer.Option(help="sft, or dpo on preferences.")] = "sft",
    select: SelectConfig,
    training: TrainingConfig,
    overwrite: Overwrite = False,
) -> None:
    """A configuration for `llamafactory-cli train`, with its data set's entry in dataset_info.json beside it.

    With --mode unfrozen a Python script, since LLaMA-Factory's YAML can freeze whole blocks only.
    """
    from splaser_plugin.integrations.check import check_plan, empty_model_of
    from splaser_plugin.integrations.configs import llamafactory as tool
    from splaser_plugin.integrations.configs.plan import lacks_dataset

    is_script = training.mode == "unfrozen"
    if is_script != (output.suffix == ".py"):
        wanted = "a script: its name has to end in .py" if is_script else "YAML: its name can't end in .py"
        raise ConfigError(f"--output {output}: --mode {training.mode} is written as {wanted}.")
    training = dataclasses.replace(training, base=_at_home(training.base), dataset=_at_home(training.dataset))
    selection = _chosen(scan, select, training.model)
    empty = empty_model_of(training.model or selection.model)
    plan = _plan(selection, training, stage, empty)
    run = f"{'python' if is_script else 'llamafactory-cli train'} {shlex.quote(str(output))}"
    write = tool.runner_script if is_script else tool.llamafactory_yaml
    text = write(plan, base=training.base, dataset_dir=output.parent, run=run)
    is_checked = check_plan(plan, empty)
    if training.dataset is not None:
        info = output.parent / "dataset_info.json"
        entry = tool.dataset_info(training.dataset, stage, output.parent)
        entries = tool.merged_dataset_info(info, entry, overwrite=overwrite)
        _check_file(output, text, overwrite=overwrite)
        _write(info, entries, overwrite=True)
    _write(output, text, overwrite=overwrite)
    _tell(
        selection, output, run, is_checked=is_checked, lacks=tool.DATASET if lacks_dataset(plan, training.base) else ""
    )


@app.command()
@options(select=SelectConfig, ranks=RankConfig)
def peft(
    *,
    scan: ScanFile,
    output: OutputFile = Path("adapter_config.json"),
    select: SelectConfig,
    ranks: RankConfig,
    rank_pattern: Annotated[
        bool,
        typer.Option("--rank-pattern", help="Give each matrix a rank in proportion to that above the edge."),
    ] = False,
    model: Model = "",
    overwrite: Overwrite = False,
) -> None:
    """A LoRA configuration for PEFT, as adapter_config.json."""
    from splaser_plugin.integrations.check import check_adapters, empty_model_of, named_for_peft
    from splaser_plugin.integrations.configs.adapter import adapter_config
    from splaser_plugin.integrations.configs.plan import DEFAULT_RANK, choose_rank

    selection = _chosen(scan, select, model)
    empty = empty_model_of(model or selection.model)
    selection = named_for_peft(selection, empty)
    rank, _ = choose_rank(selection, ranks.lora_rank, ranks.match_rank)
    values = adapter_config(selection, rank=rank or DEFAULT_RANK, rank_pattern=rank_pattern, model=model)
    is_checked = check_adapters(selection, model or selection.model, empty, **values)
    _write(output, _json(values), overwrite=overwrite)
    _tell(selection, output, f'LoraConfig.from_pretrained("{output.parent}")', is_checked=is_checked)


@app.command()
def spectrum(
    *,
    scan: ScanFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write; else where Axolotl's Spectrum plugin looks.", callback=_at_home
        ),
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
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror}). Choose another --output.") from error
    with whole_file(path) as file:
        file.write(text)


def _check_file(path: Path, text: str, *, overwrite: bool) -> None:
    """Raise OutputError when `path` can't take `text`: a folder, or a file of other content (unless `overwrite`)."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder. Give a file's name with --output.")
    if path.exists() and not overwrite and path.read_bytes() != text.encode():
        raise OutputError(f"{path}: exists. Choose another --output, or pass --overwrite.")


def _tell(selection: Selection, output: Path, run: str, *, is_checked: bool, lacks: str = "") -> None:
    """is_checked: whether the targets are those of the model's class. lacks: the key of a data set that is missing."""
    for kind, names in selection.by_type.items():
        print(f"{printable(kind)}: {len(names)}", file=sys.stderr)
    print(f"written: {printable(str(output))}", file=sys.stderr)
    if not is_checked:
        line = "targets: not checked on the model's class, since that or PEFT isn't on this machine"
        print(fitted(line), file=sys.stderr)
    if lacks:
        line = f"NO DATA SET: nothing trains before you add {lacks} to it, or pass --dataset FILE"
        print(fitted(line), file=sys.stderr)
    print(f"next: {printable(run)}", file=sys.stderr)
