"""The command `splaser`. Heavy libraries are imported only by the command that needs them."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from splaser_plugin import __version__
from splaser_plugin.cli.lines import fitted
from splaser_plugin.cli.options import options
from splaser_plugin.cli.summaries import show_comparison, show_laser, show_scan
from splaser_plugin.cli.systems import warn_of_system
from splaser_plugin.cli.threads import fit_threads
from splaser_plugin.config.stages import ApplyConfig, CompareConfig, LaserConfig, ScanConfig
from splaser_plugin.errors import ConfigError, SplaserError, on_command_line
from splaser_plugin.files.text import first_line_of, printable

if TYPE_CHECKING:
    from splaser_plugin.progress import Progress

CLICK: Any = sys.modules[typer.BadParameter.__module__]
"""click's exceptions, or those of the copy that newer versions of typer have of it."""
STOPPED = 130
"""Exit code after Ctrl-C or SIGTERM."""
RESUMED = ("scan", "laser")
"""Commands that go on where they were stopped."""


class Commands(TyperGroup):
    """Ctrl-C and SIGTERM end every command alike: one line that says how to go on, and the exit code `STOPPED`."""

    def invoke(self, ctx: Any) -> Any:
        stop_on_sigterm()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resumed = ctx.invoked_subcommand in RESUMED
            next_step = "What is finished is kept; go on with" if resumed else "Start again with"
            launched = ", under the launcher of this run" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
            if _is_first():
                print(_stopped(f"stopped. {next_step}{launched}:", ["splaser", *sys.argv[1:]]), file=sys.stderr)
            raise typer.Exit(STOPPED) from None


def _is_first() -> bool:
    """Whether this is the only process, or the first of those that were launched, before they join."""
    return os.environ.get("RANK", "0") == "0"


def stop_on_sigterm() -> None:
    """Have SIGTERM raise KeyboardInterrupt in the main thread, as Ctrl-C does. In another thread it does nothing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


app = typer.Typer(
    cls=Commands,
    help="Find the weight matrices worth training, and reduce the noisy ones where that makes answers better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"splaser {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make `--version` an option of the program itself. The help's first line is that of `app`."""


Model = Annotated[str, typer.Argument(help="Model folder, .gguf file or hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not exist or be empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier run.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what came out, and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more: options, versions, time and tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON to stdout.")]


@app.command()
@options(config=ScanConfig)
def scan(
    *,
    model: Model,
    config: ScanConfig,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the scan goes.")] = Path("scan.json"),
    top: Annotated[int, typer.Option(min=1, help="Names of highest snr_ratio per module type in --top-json.")] = 16,
    top_json: Annotated[Path | None, typer.Option(help="Also write module type to names, as JSON.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Singular values of every weight matrix, split into signal and noise; nothing is changed."""
    progress = _progress(quiet, verbose, "scanning.scan", transformers=model.endswith(".gguf") or config.allow_pickle)
    from splaser_plugin.distributed import is_main, join_processes
    from splaser_plugin.files.json import check_names_file, write_json
    from splaser_plugin.scanning.scan import scan as run_scan
    from splaser_plugin.scanning.selection import top_by_type

    if top_json is not None:
        check_names_file(top_json)
    join_processes()
    found = run_scan(model, config=config, output=output, progress=progress)
    if not is_main():
        return
    if top_json is not None:
        write_json(top_json, top_by_type(found, top))
    if as_json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    show_scan(found, output, progress)


@app.command()
@options(config=LaserConfig)
def laser(
    *,
    model: Model,
    pairs: Annotated[
        str, typer.Option(help="Preference pairs: a json, jsonl, csv or parquet file, or a data set.")
    ] = "",
    output: Output,
    config: LaserConfig,
    overwrite: Overwrite = False,
    write_unchanged: Annotated[
        bool, typer.Option("--write-unchanged", help="Write the model even if nothing was kept: a copy of the base.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say what the run will cost and what its held-out pairs can show, and stop there."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    push_to_hub: Annotated[
        str, typer.Option(metavar="REPO", help="Also upload it to this repository of the hub; a new one is private.")
    ] = "",
    report_to: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACKER", help="Also log the run to tensorboard, wandb or mlflow; repeatable."),
    ] = None,
) -> None:
    """Reduce the noisiest matrices, one at a time, and keep what makes the model's own answers better."""
    progress = _progress(quiet, verbose, "jobs.laser")
    from splaser_plugin.artifacts.hub import check_repo
    from splaser_plugin.artifacts.hub import push_to_hub as push_model
    from splaser_plugin.artifacts.trackers import check_trackers, track
    from splaser_plugin.distributed import is_main, join_processes
    from splaser_plugin.jobs.laser import laser as run_laser
    from splaser_plugin.jobs.laser import plan as plan_laser

    unused = {"--report-to": report_to, "--push-to-hub": push_to_hub, "--write-unchanged": write_unchanged}
    for name in [name for name in unused if plan and unused[name]]:
        raise ConfigError(f"{name} with --plan: a plan writes nothing. Leave one of the two out.")
    if push_to_hub:
        check_repo(push_to_hub)
    check_trackers(report_to or [])
    join_processes()
    if plan:
        cost = plan_laser(model, pairs, config=config, output=output, overwrite=overwrite, progress=progress)
        if as_json and is_main():
            print(json.dumps(cost.to_dict(), allow_nan=False))
        return
    result = run_laser(
        model,
        pairs,
        config=config,
        output=output,
        overwrite=overwrite,
        write_unchanged=write_unchanged,
        progress=progress,
    )
    if not is_main():
        return
    if as_json:
        print(json.dumps(result.results(), allow_nan=False))
    has_model = write_unchanged or not result.is_copy
    show_laser(result, output, progress, has_model=has_model, mend="; --write-unchanged writes it")
    if report_to:
        try:
            track(report_to, result.record, result.config, output.expanduser().resolve())
            progress.result("reported to", ", ".join(report_to))
        except Exception as error:  # whatever a tracker raises, the run is finished and saved
            progress.result("not reported", f"{type(error).__name__}: {first_line_of(error)}")
    if push_to_hub and not has_model:
        progress.result("not pushed", "there is no model to push")
    elif push_to_hub:
        progress.result("on the hub", push_model(output, push_to_hub))


@app.command()
def push(
    *,
    folder: Annotated[Path, typer.Argument(help="Output folder of laser.")],
    repo: Annotated[str, typer.Argument(help="Repository of the hub, OWNER/NAME; a new one is private.")],
) -> None:
    """Upload a lasered model as laser --push-to-hub does: without the texts of the pairs and paths of this machine."""
    from splaser_plugin.artifacts.hub import check_repo, push_to_hub

    check_repo(repo)
    _progress(False, False, "artifacts.hub", transformers=False, computes=False).result(
        "on the hub", push_to_hub(folder, repo)
    )


@app.command()
@options(config=ApplyConfig)
def apply(
    *,
    recipe: Annotated[Path, typer.Argument(help="recipe.json of a laser run.")],
    model: Model,
    output: Output,
    config: ApplyConfig,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rebuild a lasered model from its recipe and the base model."""
    progress = _progress(quiet, verbose, "jobs.apply")
    from splaser_plugin.jobs.apply import apply as run_apply

    result = run_apply(recipe, model, config=config, output=output, overwrite=overwrite, progress=progress)
    progress.result("reduced", f"{len(result.recipe.steps)} matrices")
    progress.result("model", str(output))


@app.command()
@options(config=CompareConfig)
def compare(
    *,
    models: Annotated[list[str], typer.Argument(help="Model folders, .gguf files or hub ids; the first is the base.")],
    pairs: Annotated[
        str, typer.Option(help="Preference pairs, as laser takes them; not needed with --tasks or --text.")
    ] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the comparison goes, as JSON.")],
    config: CompareConfig,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure models on the same pairs, text and tasks, each against the first with 95 % intervals."""
    from splaser_plugin.jobs.compare import compare as run_compare

    progress = _progress(quiet, verbose, "jobs.compare")
    found = run_compare(models, pairs, config=config, output=output, progress=progress)
    if as_json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    show_comparison(found, output)


@app.command()
def report(
    *,
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_SCAN", help="Output folder of laser, or a scan.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("report.html"),
) -> None:
    """One page to look at: where the noise is, what the search did, whether it is better, what to train."""
    from splaser_plugin.artifacts.report import report as write

    progress = _progress(False, False, "artifacts.report", transformers=False, computes=False)
    progress.result("report", str(write(source, output)))


@app.command()
def expand(
    *,
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model saved with --save factored.")],
    output: Output,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn a model that was saved with --save factored into a plain one, bit for bit the one that was scored."""
    from splaser_plugin.files.output import check_output

    check_output(output, overwrite=overwrite, inputs=(model,))  # before anything heavy is imported
    progress = _progress(quiet, verbose, "jobs.expand")
    from splaser_plugin.jobs.expand import expand as run_expand

    run_expand(model, output=output, overwrite=overwrite, progress=progress)
    progress.result("model", str(output))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("splaser-demo"),
    cache: Annotated[Path, typer.Option(help="Where the converted model is kept.")] = Path(".cache"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The whole job on SmolLM2-135M and the example pairs, without a model hub."""
    from splaser_plugin.cli.demo import run_demo

    progress = _progress(quiet, verbose, "jobs.laser")
    result = run_demo(output, cache, overwrite=overwrite, progress=progress)
    show_laser(result, output, progress, has_model=not result.is_copy)


@app.command(hidden=True)
def models(
    cache: Annotated[Path, typer.Option(help="Where the converted model is kept.")] = Path(".cache"),
) -> None:
    """Prepare the demo's models and print their folders."""
    from splaser_plugin.cli.demo import prepare_embedder, prepare_model

    print(prepare_model(cache))
    print(prepare_embedder())


def _progress(quiet: bool, verbose: bool, module: str, *, transformers: bool = True, computes: bool = True) -> Progress:
    """What shows a run: only the main process's.

    module: what the command needs and takes seconds to import, for which there is a sign of life. transformers:
    whether the run will use it, so that it is silenced. computes: whether it will compute, on threads.
    Raises ConfigError when both quiet and verbose are asked for.
    """
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose: got both, expected one of the two.")
    from rich.console import Console

    from splaser_plugin.cli.terminal import Level, TerminalProgress
    from splaser_plugin.progress import SILENT

    level = Level(verbose - quiet)
    progress = TerminalProgress(Console(stderr=True, emoji=False), level) if _is_first() else SILENT
    with progress.phase("starting", 1):
        importlib.import_module(f"splaser_plugin.{module}")
        if transformers:
            from transformers.utils import logging

            logging.disable_progress_bar()
            logging.set_verbosity_error()
        if computes:
            importlib.import_module("torch")
    if computes:
        warn_of_system(progress)
        fit_threads(progress)
    return progress


def _stopped(sentence: str, command: Sequence[str]) -> str:
    """The sentence and the command, which can be copied from a terminal however it had to be wrapped."""
    words = [printable(shlex.quote(word)) for word in command]
    if not sys.stderr.isatty():
        return f"{sentence} {' '.join(words)}"
    unbroken = " ".join(word.replace(" ", "\0") for word in words)
    return f"{fitted(sentence)}\n" + fitted(unbroken, mark=" \\").replace("\0", " ")


def _command_of(error: Any) -> str:
    """Which command was used wrongly; click doesn't say it of an option without its value, or with one too many."""
    if error.ctx:
        return str(error.ctx.command_path)
    command: Any = typer.main.get_command(app)
    path = ["splaser"]
    for word in sys.argv[1:]:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return " ".join(path)


def main() -> None:
    """Entry point: one line for each error on purpose, exit 2 for wrong usage and 1 for the rest."""
    from splaser_plugin.cli.emit import app as emit

    app.add_typer(emit, name="emit")
    with on_command_line():
        try:
            sys.exit(app(prog_name="splaser", standalone_mode=False) or 0)
        except SplaserError as error:
            print(fitted(f"{type(error).__name__}: {printable(str(error))}"), file=sys.stderr)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
        except CLICK.UsageError as error:
            if not isinstance(error, getattr(CLICK, "NoArgsIsHelpError", ())):  # that has shown the help
                said = printable(error.format_message())
                said += "" if said.endswith((".", "?")) else "."
                print(fitted(f"ConfigError: {said} See {_command_of(error)} --help."), file=sys.stderr)
            sys.exit(error.exit_code)
