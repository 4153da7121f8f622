"""Ways to search on SmolLM2 and the example pairs, and models side by side: the tables of the README.

    python tests/benchmarks/methods.py [--only METHOD ...] [--no-compare] [--threads N] [--json FILE]

Every way starts from the same model, searches on the same pairs and is judged on the same held-out ones, so that
the rows can be compared, but for compress, which is scored by the margin; minutes are of this run on this machine. The
base, the model that racing leads to and one searched for by perplexity, on the chosen answers of the example pairs, are
compared on held-out pairs and their chosen answers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from splaser_plugin.cli.demo import prepare_embedder, prepare_model
from splaser_plugin.config.stages import CompareConfig, LaserConfig
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.jobs.compare import compare as compare_models
from splaser_plugin.jobs.laser import LaserResult, laser

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "examples" / "data" / "pairs.jsonl"
HELD_OUT = ROOT / "examples" / "data" / "held_out.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "published": {"race": False},
    "racing": {},
    "gradient": {"rank_by": "gradient"},
    "compress": {
        "objective": "compress",
        "scorer": "margin",
        "tolerance": 0.1,
        "ranks": "0.5,0.25",
        "reduce": "svd",
        "candidates": 10,
        "samples": 48,
    },
}
PERPLEXITY: dict[str, Any] = {"scorer": "perplexity", "window": 128, "samples": 48, "held_out": ""}
COMPARED_PAIRS = 36
FORMS = {
    "semantic": ("semantic score", "{:+.4f}", "{:+.4f}"),
    "margin": ("preference margin", "{:+.4f}", "{:+.4f}"),
    "likelier": ("chosen likelier", "{:.0%}", "{:+.0%}"),
    "perplexity": ("perplexity", "{:.3f}", "x{:.3f}"),
    "tokens_per_s": ("tokens a second", "{:.0f}", ""),
}
"""Metric to its name, and the forms of its value and of its change against the first model."""


def settings(**changes: Any) -> LaserConfig:
    """Those of the demo."""
    plain: dict[str, Any] = {
        "embedder": str(prepare_embedder()),
        "held_out": str(HELD_OUT),
        "samples": 24,
        "candidates": 6,
        "max_new_tokens": 48,
        "device": "cpu",
        "batch_size": 24,
    }
    return LaserConfig(**{**plain, **changes})


def measure(model: Path, config: LaserConfig) -> tuple[LaserResult, dict[str, Any]]:
    started = time.perf_counter()
    result = laser(model, PAIRS, config=config)
    minutes = (time.perf_counter() - started) / 60
    found, verdict = result.search, result.held_out
    return result, {
        "scorer": config.scorer,
        "tried": len(found.trials),
        "generated_tokens": found.generated_tokens,
        "minutes": minutes,
        "kept": len({candidate.matrix for candidate in found.kept}),
        "parameters_removed": found.parameters_removed,
        "score": [found.baseline.mean, found.final.mean],
        "held_out": verdict and [verdict.difference, *verdict.interval],
        "verdict": verdict and verdict.verdict,
        "loss_verdict": verdict and verdict.loss_verdict,
        "trials": [
            [trial.candidate.matrix.name, trial.candidate.rank, trial.judgement.outcome] for trial in found.trials
        ],
    }


def chosen_answers(source: Path, folder: Path) -> str:
    """A text file of the chosen answers."""
    text = folder / f"{source.stem}.txt"
    text.write_text("\n\n".join(pair.chosen for pair in load_pairs(source)), encoding="utf-8")
    return str(text)


def compare(model: Path, lasered: Path) -> dict[str, Any]:
    """The base, and the models that perplexity and the semantic score lead to, on pairs and text neither saw."""
    folder = lasered.parent
    print("by perplexity ...", file=sys.stderr, flush=True)
    config = settings(**PERPLEXITY, text=chosen_answers(PAIRS, folder))
    by_perplexity = measure(model, config)[0].save(folder / "by perplexity")
    print("compare ...", file=sys.stderr, flush=True)
    options = CompareConfig(
        embedder=str(prepare_embedder()),
        text=chosen_answers(HELD_OUT, folder),
        window=PERPLEXITY["window"],
        samples=COMPARED_PAIRS,
        max_new_tokens=48,
        device="cpu",
        batch_size=24,
    )
    return compare_models([model, by_perplexity, lasered], HELD_OUT, config=options).to_dict()


def methods_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| method | tried | tokens generated | minutes | matrices kept | parameters removed | held-out difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        difference, low, high = row["held_out"]
        change = f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"
        numbers = f"{row['tried']} | {row['generated_tokens']:,} | {row['minutes']:.1f} | {row['kept']}"
        name += " (margin)" if row["scorer"] == "margin" else ""
        lines.append(f"| {name} | {numbers} | {row['parameters_removed']:,} | {change} |")
    return "\n".join(lines)


def comparison_table(found: dict[str, Any]) -> str:
    names = [Path(model["model"]).name for model in found["models"]]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for key, (called, value, change) in FORMS.items():
        cells = []
        for model in found["models"]:
            figure = model["figures"][key]
            cell, interval = value.format(figure["value"]), figure["interval"]
            if interval:
                parts = [figure.get("ratio", figure.get("difference")), *interval]
                cell += "; " + "{} ({} to {})".format(*map(change.format, parts))
            cells.append(cell)
        lines.append(f"| {called} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to search on SmolLM2, and models side by side.")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS), help="ways to measure")
    parser.add_argument("--no-compare", action="store_true", help="leave out the comparison, which needs racing")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"cores {os.cpu_count()}, threads {torch.get_num_threads()}, torch {torch.__version__}", file=sys.stderr)
    model = prepare_model(ROOT / ".cache")
    rows: dict[str, dict[str, Any]] = {}
    compared = None
    with tempfile.TemporaryDirectory() as folder:
        lasered = Path(folder) / "by semantic score"
        for name in arguments.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            result, rows[name] = measure(model, settings(**METHODS[name]))
            if name == "racing" and not arguments.no_compare:
                result.save(lasered)
            del result
            print(methods_table({name: rows[name]}).splitlines()[-1], file=sys.stderr, flush=True)
        print(methods_table(rows), flush=True)
        if lasered.exists():
            compared = compare(model, lasered)
            print("\n" + comparison_table(compared))
    if arguments.json:
        found = {"methods": rows, "comparison": compared}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
