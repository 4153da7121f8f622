"""The report: one page, complete in itself, of what a scan found and what a laser run did.

The page is templates/report.html (what doesn't move, escaped by Jinja2), report.css and `SCRIPT` (charts, drawn
with Plotly from one block of JSON). It loads nothing, and its content security policy allows no other script.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from splaser_plugin.artifacts.measurement import answer_counts, measurement
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.results import Exchange, Results
from splaser_plugin.config.stages import EDGES
from splaser_plugin.errors import RecipeError, SplaserError
from splaser_plugin.files.output import check_file, whole_file
from splaser_plugin.files.sources import looks_like_path, path_of
from splaser_plugin.files.text import visible
from splaser_plugin.integrations.configs.axolotl import axolotl_yaml
from splaser_plugin.integrations.configs.llamafactory import llamafactory_yaml
from splaser_plugin.integrations.configs.plan import Plan
from splaser_plugin.scanning.agreement import agreements
from splaser_plugin.scanning.records import MatrixScan, Scan
from splaser_plugin.scanning.selection import Selection, choose
from splaser_plugin.spectra.edges import EdgeFit, mp_density

MARK = 'name="generator" content="splaser report'
"""Stands near the top of each report, by which an earlier one is known."""
CURVE_POINTS = 65
SPECTRUM_VALUES = 200_000
"""Most singular values of all spectra together: a scan of thousands of experts draws each from fewer."""
LEAST_POINTS = 16
TRAINED_PER_TYPE = 16
EXCHANGES = 1000
"""Most prompts of a part, held out or searched on, whose answers stand side by side."""

SCRIPT = ("page.js", "heat_map.js", "spectrum.js", "verdict.js", "lists.js", "answers.js", "controls.js")
"""Parts of the page's own script, in the order in which they need each other."""
TARGETS = (
    ("Axolotl", "axolotl", "--rl", axolotl_yaml),
    ("LLaMA-Factory", "llamafactory", "--stage", llamafactory_yaml),
)
"""A tool, its command, the option that asks for DPO, and what writes its YAML."""


def report(source: str | Path, output: str | Path = "report.html") -> Path:
    """Write the report of a laser run's folder, or of a scan.json; gives the file's path.

    Raises RecipeError when the source can't be read or is damaged, OutputError when the output can't be written
    or is a file of somebody else's.
    """
    check_file(output, replaceable=MARK)
    path = path_of(source)
    if not path.is_dir():
        write_report(output, Scan.load(path), scan_name=path.name)
    else:
        if not (path / "scan.json").is_file():
            raise RecipeError(f"{source}: has no scan.json. Give the output folder of splaser laser, or a scan.json.")
        results, recipe = path / "results.json", path / "recipe.json"
        write_report(
            output,
            Scan.load(path / "scan.json"),
            Results.load(results) if results.is_file() else None,
            settings=Recipe.load(recipe).settings if recipe.is_file() else {},
            output=path,
        )
    return Path(output)


def write_report(
    file: str | Path,
    scan: Scan,
    run: Results | None = None,
    *,
    settings: Mapping[str, Any] = MappingProxyType({}),
    output: Path | None = None,
    scan_name: str = "scan.json",
) -> None:
    """Write the page, whole or not at all.

    Args:
        file: The page.
        scan: Where the noise is.
        run: What a search did.
        settings: The options of that run, as far as they are known.
        output: Folder of the lasered model.
        scan_name: What the page's commands call the scan.

    Raises:
        OutputError: The file can't be written.
    """
    page = render(scan, run, settings=settings, output=output, scan_name=scan_name)
    with whole_file(file) as opened:
        opened.write(page)


def render(
    scan: Scan,
    run: Results | None = None,
    *,
    settings: Mapping[str, Any] = MappingProxyType({}),
    output: Path | None = None,
    scan_name: str = "scan.json",
) -> str:
    """The page as HTML; see `write_report`."""
    environment = _environment()
    scripts = [Markup(text) for text in (get_plotlyjs(), "\n".join(map(_template_file, SCRIPT)))]
    selection = _selection(scan, scan_name)
    chosen = _chosen(scan, selection)
    trained = _trained(run, settings, output)
    return environment.get_template("report.html").render(
        scan=scan,
        title=_title(scan.model),
        run=run,
        edges=EDGES,
        blocks=len({matrix.block for matrix in scan.matrices if matrix.block is not None}),
        measurement=measurement(run, settings) if run else (),
        answer_counts=answer_counts(run) if run else (),
        answers=_answers(run) if run else (),
        most_answers=EXCHANGES,
        changes_axis=_axis([found.interval for found in run.compared if found.interval]) if run else None,
        per_type=TRAINED_PER_TYPE,
        trained=trained,
        expand=_expand(output, trained) if trained and output and _is_factored(settings) else "",
        chosen=chosen,
        agreements=() if isinstance(selection, SplaserError) else agreements(scan, selection),
        targets=_targets(selection, run, scan_name, trained),
        chart_data=_chart_data(scan, run, selection),
        style=Markup(_template_file("report.css")),
        scripts=scripts,
        script_hashes=[_sha256(script) for script in scripts],
        mark=Markup(MARK),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("splaser_plugin.artifacts"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def _title(model: str) -> str:
    """A hub id as it is, a folder's or file's own name of a path."""
    return PurePath(model.replace("\\", "/")).name or model if looks_like_path(model) else model


def _template_file(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _answers(run: Results) -> list[tuple[str, str, tuple[Exchange, ...]]]:
    """Those to held-out prompts and those that were searched on: an id, a title, and what is shown, if there is any."""
    parts = [("held-out", "Held out", True), ("searched", "Searched on", False)]
    found = [(key, title, run.exchanges(is_held_out=is_held_out)) for key, title, is_held_out in parts]
    return [part for part in found if part[2]]


def _selection(scan: Scan, scan_name: str) -> Selection | SplaserError:
    """The matrices to train, or why there are none."""
    try:
        return choose(scan, top=TRAINED_PER_TYPE, source=scan_name)
    except SplaserError as error:
        return error


def _chosen(scan: Scan, selection: Selection | SplaserError) -> list[tuple[str, list[dict[str, Any]]]]:
    """By module type the matrices to train, as they come in the model, and which edges choose each."""
    if isinstance(selection, SplaserError):
        return []
    by_edge = {edge: set(choose(scan, selection.config, edge=edge).names) for edge in EDGES}
    fits = {matrix.name: matrix.edges[selection.edge] for matrix in scan.matrices}
    place = {matrix.trained_as: place for place, matrix in enumerate(scan.matrices)}
    rows: dict[str, list[dict[str, Any]]] = {}
    for matrix in sorted(selection.matrices, key=lambda matrix: place[matrix.name]):
        edges = [edge for edge in EDGES if matrix.name in by_edge[edge]]
        rows.setdefault(matrix.type, []).append({"matrix": matrix, "fit": fits.get(matrix.name), "edges": edges})
    return sorted(rows.items())


def _is_factored(settings: Mapping[str, Any]) -> bool:
    return settings.get("save") == "factored"


def _trained(run: Results | None, settings: Mapping[str, Any], output: Path | None) -> str:
    """The folder of the model to train: the lasered one, as a plain model; empty where the search changed nothing."""
    if run is None or output is None or not (run.kept or run.kept_budget):
        return ""
    return f"{output.resolve()}{'-plain' if _is_factored(settings) else ''}"


def _expand(output: Path, trained: str) -> str:
    """The command that makes the plain model to train of the factored one in `output`."""
    return shlex.join(["splaser", "expand", str(output.resolve()), "-o", trained])


def _targets(
    selection: Selection | SplaserError, run: Results | None, scan_name: str, trained: str
) -> list[dict[str, str]]:
    """For each tool its name, the command, and the YAML or why there is none.

    They train on the run's own pairs, where these are a file that is still there, and DPO where pairs were rejected.
    """
    dataset = _file(run.pairs.source) if run else None
    is_dpo = run is not None and any(pair.rejected is not None for pair in (*run.texts.search, *run.texts.held_out))
    found = []
    for tool, command, dpo, write in TARGETS:
        words = ["splaser", "emit", command, scan_name, *(["--model", trained] if trained else [])]
        words += [*([dpo, "dpo"] if is_dpo else []), *(["--dataset", str(dataset)] if dataset else [])]
        target = {"tool": tool, "command": shlex.join([*words, "-o", f"{command}.yml"]), "yaml": "", "error": ""}
        try:
            if isinstance(selection, SplaserError):
                raise selection
            stage = "dpo" if is_dpo else "sft"
            target["yaml"] = write(Plan(selection=selection, mode="lora", stage=stage, model=trained, dataset=dataset))
        except SplaserError as error:
            target["error"] = str(error)
        found.append(target)
    return found


def _file(name: str) -> Path | None:
    """The file of that name, if there is one."""
    with suppress(OSError):  # a name that no file can have
        return Path(name) if Path(name).is_file() else None
    return None


def _axis(intervals: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """The range that all intervals and zero lie in; None where there is none."""
    ends = [0.0, *(end for interval in intervals for end in interval)]
    low, high = min(ends), max(ends)
    return {"low": low, "span": high - low} if high > low else None


def _chart_data(scan: Scan, run: Results | None, selection: Selection | SplaserError) -> dict[str, Any]:
    """What the script draws from. Numbers are rounded to 4 digits, texts made visible."""
    types = sorted({matrix.type for matrix in scan.matrices})
    shapes = {matrix.shape for matrix in scan.matrices}
    tried: dict[str, str] = {}
    for candidate in run.candidates if run else ():
        if tried.get(candidate.name) != "kept":
            tried[candidate.name] = candidate.outcome
    verdict = run.verdict if run else None
    chosen = set() if isinstance(selection, SplaserError) else set(selection.names)
    points = max(LEAST_POINTS, SPECTRUM_VALUES // len(scan.matrices))
    return {
        "edges": EDGES,
        "edge": scan.edge,
        "types": [visible(kind) for kind in types],
        "matrices": [
            {
                **_matrix(matrix, types.index(matrix.type), tried.get(matrix.name), points),
                "chosen": matrix.trained_as in chosen,
            }
            for matrix in scan.matrices
        ],
        "noise": {f"{rows}x{columns}": _noise_curve((rows, columns)) for rows, columns in shapes},
        "verdict": verdict
        and {
            "unit": run.unit if run else "",
            "difference": _short(verdict.difference),
            "interval": [_short(end) for end in verdict.interval],
            "differences": [_short(difference) for difference in verdict.differences],
            "prompts": [visible(pair.prompt) for pair in run.texts.held_out] if run else [],
        },
    }


def _matrix(matrix: MatrixScan, kind: int, outcome: str | None, points: int) -> dict[str, Any]:
    stored = matrix.spectrum
    places = np.linspace(0, len(stored) - 1, min(points, len(stored))).round().astype(int).tolist()
    return {
        "name": visible(matrix.name),
        "type": kind,
        "block": matrix.block,
        "shape": matrix.shape,
        "tried": outcome and visible(outcome),
        "edges": [_fit(matrix.edges[edge]) for edge in EDGES],
        "spectrum": [_short(stored[place]) for place in places],
    }


def _fit(fit: EdgeFit) -> list[Any]:
    return [_short(fit.sigma), _short(fit.threshold), fit.rank, _short(fit.snr), fit.reason and visible(fit.reason)]


def _noise_curve(shape: tuple[int, int]) -> list[list[float]]:
    """Singular values of pure noise with entries of standard deviation 1, and their density there.

    The points crowd at the ends, where the curve is steep.
    """
    rows, columns = shape
    squares = rows + columns + 2 * np.sqrt(rows * columns) * np.cos(np.linspace(np.pi, 0, CURVE_POINTS))
    values = np.sqrt(np.clip(squares, 0, None))
    curve = np.stack([values, mp_density(values, shape, 1.0)])
    return [[float(f"{number:.4g}") for number in part] for part in curve.tolist()]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
