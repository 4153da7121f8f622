"""Does lasering help? Ways to search a model, each judged on held-out pairs that none of them saw.

    python tests/benchmarks/lasering.py --pairs FILE [FILE ...] --output FOLDER [--model FOLDER]
        [--rows NAME ...] [--searched 200] [--held-out 200] [--candidates 15] [--max-new-tokens 64] [--device cpu]

Every row starts from the same model, searches on some of the first pairs of all files together and is judged on the
others of these. FOLDER keeps each row's result, and what a stopped search has measured: run the command again to go on.
Rows are named by what is measured (`margin`, `semantic`, or `preferred`, the share of pairs whose chosen answer is the
likelier one, as a task of lm-evaluation-harness), and by how: `improve`, `confident`, or `compress` (a tenth of the
parameters at most).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from splaser_plugin.cli.demo import prepare_embedder, prepare_model
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.data.sources import open_source
from splaser_plugin.jobs.laser import laser

ROOT = Path(__file__).parents[2]
ROWS: dict[str, dict[str, Any]] = {
    f"{scorer} {way}": {"scorer": scorer, **options}
    for scorer in ("margin", "semantic", "preferred")
    for way, options in {
        "improve": {"accept": "improve"},
        "confident": {"accept": "confident"},
        "compress": {"objective": "compress", "budget": 0.1, "tolerance": 0.1},
    }.items()
}
PREFERRED = {
    "task": "preferred",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}\n",
    "doc_to_choice": "{{[chosen, rejected]}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
"""Task of lm-evaluation-harness, but for its data."""


@dataclass(frozen=True)
class Row:
    """What one search came to."""

    name: str
    tried: int
    kept: int
    searched: int
    held_out: int
    score_before: float
    score_after: float
    """On the pairs searched on."""
    difference: float
    """Of the means on the held-out pairs, result minus base, in the score's unit."""
    low: float
    high: float
    """Ends of its 95 % interval."""
    verdict: str
    settings: str
    """The options that all rows of a folder have to share."""


def measure(name: str, arguments: argparse.Namespace) -> Row:
    """Search as that row says."""
    options = dict(ROWS[name])
    if options["scorer"] == "semantic":
        options |= {
            "embedder": arguments.embedder or str(prepare_embedder()),
            "max_new_tokens": arguments.max_new_tokens,
        }
    elif options["scorer"] == "preferred":
        options |= {
            "scorer": "lm-eval:preferred",
            "tasks_path": str(write_task(arguments.pairs, arguments.output / "task")),
        }
    if "objective" not in options:
        options["candidates"] = arguments.candidates
    share = arguments.held_out / (arguments.searched + arguments.held_out)
    samples = arguments.searched + arguments.held_out
    config = LaserConfig(samples=samples, held_out_fraction=share, device=arguments.device, **options)
    model = arguments.model or str(prepare_model(ROOT / ".cache"))
    rows = chain.from_iterable(open_source(file)[1] for file in arguments.pairs)
    result = laser(model, rows, config=config, output=arguments.output / name.replace(" ", "-"))
    found, verdict = result.search, result.held_out
    if verdict is None:
        raise SystemExit(f"{' '.join(arguments.pairs)}: too few pairs for a verdict. Give more of them.")
    return Row(
        name=name,
        tried=len(found.budgets or found.trials),
        kept=int(bool(found.kept_budget)) if found.budgets else len(found.kept),
        searched=len(result.split.search),
        held_out=len(verdict.base.items),
        score_before=found.baseline.mean,
        score_after=found.final.mean,
        difference=verdict.difference,
        low=verdict.interval[0],
        high=verdict.interval[1],
        verdict=verdict.verdict,
        settings=settings_of(arguments),
    )


def write_task(files: Iterable[str], folder: Path) -> Path:
    """Write the task `preferred` and its documents, the pairs of these files, into a folder; return the folder."""
    folder.mkdir(exist_ok=True)
    data = folder / "pairs.jsonl"
    pairs = chain.from_iterable(load_pairs(file) for file in files)
    documents = ({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs)
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    task = PREFERRED | {"dataset_kwargs": {"data_files": {"test": str(data.resolve())}}}
    (folder / "preferred.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def table(rows: Iterable[Row]) -> str:
    lines = ["| search | tried | kept | pairs searched on | change on these | held out | change there | verdict |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        change = f"{row.difference:+.4f} ({row.low:+.4f} to {row.high:+.4f})"
        gain = f"{row.score_after - row.score_before:+.4f}"
        numbers = f"{row.tried} | {row.kept} | {row.searched} | {gain} | {row.held_out} | {change}"
        lines.append(f"| {row.name} | {numbers} | {row.verdict} |")
    return "\n".join(lines)


def settings_of(arguments: argparse.Namespace) -> str:
    names = ("model", "searched", "held_out", "candidates", "max_new_tokens", "embedder")
    options = ", ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in names)
    return f"--pairs {' '.join(arguments.pairs)}, {options}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ways to search a model, judged on held-out pairs.")
    parser.add_argument("--pairs", nargs="+", required=True, help="preference pairs, in any format that splaser reads")
    parser.add_argument("--output", type=Path, required=True, help="folder that keeps the results")
    parser.add_argument("--model", default="", help="folder or hub id; else SmolLM2-135M-Instruct")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--searched", type=int, default=200, help="pairs to search on")
    parser.add_argument("--held-out", type=int, default=200, help="pairs for the verdict")
    parser.add_argument("--candidates", type=int, default=15)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--embedder", default="", help="for semantic; else all-MiniLM-L6-v2")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    arguments.output.mkdir(parents=True, exist_ok=True)
    measured = arguments.output / "rows.jsonl"
    rows = [Row(**json.loads(line)) for line in measured.read_text().splitlines()] if measured.exists() else []
    others = {row.settings for row in rows} - {settings_of(arguments)}
    if others:
        raise SystemExit(f"{measured}: measured with {others.pop()}. Give these options, or another folder.")
    by_name = {row.name: row for row in rows}
    for name in arguments.rows:
        if name not in by_name:
            by_name[name] = measure(name, arguments)
            with measured.open("a") as file:
                file.write(json.dumps(asdict(by_name[name])) + "\n")
    print(table(by_name[name] for name in arguments.rows))


if __name__ == "__main__":
    main()
