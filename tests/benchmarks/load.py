"""Peak memory where there is much of everything: matrices, rows of pairs, candidates. A table, one process a row.

    python tests/benchmarks/load.py [--only scan pairs search] [--rows 1000000] [--candidates 500]

scan: 10,000 experts of a mixture (`scan_memory.py --experts`), above an import of the model's class. pairs: a file of
so many rows in each format, of which only the last 128 can be used, above the import of the reader. search: that many
candidates of a tiny model of 72 blocks, and a tenth of them, above the import of the program.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.scan_memory import MEGABYTE, measure, write_experts
from tests.builders import ROOT, tiny_llama

USABLE = 128

# Not getrusage: what that gives a process begins with the peak of the one it was forked from.
PEAK = """
    def peak_bytes():
        status = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
"""
PAIRS = """
    import sys
    from splaser_plugin.data.pairs import load_pairs
    if sys.argv[1].endswith(".parquet"):
        import pyarrow.parquet
    before = peak_bytes()
    found = load_pairs(sys.argv[1], samples=int(sys.argv[2]))
    print(found.rows_read, len(found), peak_bytes() - before)
"""
SEARCH = """
    import sys
    import torch, transformers
    from splaser_plugin.cli import app
    from splaser_plugin.jobs import laser
    before = peak_bytes()
    try:
        app.main()
    except SystemExit as end:
        assert not end.code, end.code
    print(peak_bytes() - before)
"""


def run(code: str, *arguments: object) -> tuple[list[str], float]:
    """What a process printed at its end, and how many seconds it took."""
    started = time.perf_counter()
    command = [sys.executable, "-c", textwrap.dedent(PEAK + code), *map(str, arguments)]
    ended = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return ended.stdout.splitlines()[-1].split(), time.perf_counter() - started


def rows(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        chosen = f"The answer to question {number} is {number * 7919 % 1000}."
        rejected = chosen if number < count - USABLE else "I don't know."
        yield {"prompt": f"What is the answer to question {number}?", "chosen": chosen, "rejected": rejected}


def write_pairs(file: Path, count: int) -> None:
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows(count))), file)
        return
    with file.open("w", encoding="utf-8") as opened:
        if file.suffix == ".csv":
            opened.write("prompt,chosen,rejected\n")
        for row in rows(count):
            opened.write((",".join(row.values()) if file.suffix == ".csv" else json.dumps(row)) + "\n")


def measure_scan(folder: Path) -> Iterator[str]:
    model = folder / "model"
    model.mkdir()
    row = measure("experts", model, write_experts(model, 256, 512, torch.bfloat16), folder / "scan.json")
    what = f"scan of {row.matrices:,} matrices, {row.checkpoint_bytes / MEGABYTE:,.0f} MB"
    yield f"| {what} | {row.peak_bytes / MEGABYTE:.0f} MB | {row.elapsed_s:.0f} s |"


def measure_pairs(folder: Path, count: int) -> Iterator[str]:
    for suffix in (".jsonl", ".csv", ".parquet"):
        file = folder / f"pairs{suffix}"
        write_pairs(file, count)
        (read, kept, peak_bytes), elapsed_s = run(PAIRS, file, USABLE)
        if (int(read), int(kept)) != (count, USABLE):
            raise SystemExit(f"{file.name}: {read} rows read, {kept} pairs kept")
        what = f"pairs{suffix}: {count:,} rows, {file.stat().st_size / MEGABYTE:,.0f} MB"
        yield f"| {what} | {int(peak_bytes) / MEGABYTE:.0f} MB | {elapsed_s:.0f} s |"
        file.unlink()


def measure_search(folder: Path, candidates: int) -> Iterator[str]:
    from transformers import AutoTokenizer

    from splaser_plugin.cli.demo import prepare_model

    model, pairs = folder / "tiny", folder / "pairs.jsonl"
    tiny_llama(num_hidden_layers=72).save_pretrained(model)
    AutoTokenizer.from_pretrained(prepare_model(ROOT / ".cache")).save_pretrained(model)
    pairs.write_text("".join(json.dumps({**row, "rejected": "No."}) + "\n" for row in rows(2)))
    for count in (candidates // 10, candidates):
        arguments = ["laser", model, "--pairs", pairs, "-o", folder / f"out{count}", "--candidates", count]
        quick = ["--embedder", "self", "--max-new-tokens", 2, "--device", "cpu", "--edge", "mp"]
        (peak_bytes,), elapsed_s = run(SEARCH, *arguments, *quick)
        tried = len(json.loads((folder / f"out{count}" / "results.json").read_text())["candidates"])
        yield f"| search of {tried} candidates | {int(peak_bytes) / MEGABYTE:.0f} MB | {elapsed_s:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of scan, pairs and search where there is much of all.")
    parser.add_argument("--only", nargs="+", choices=("scan", "pairs", "search"), default=["scan", "pairs", "search"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--candidates", type=int, default=500)
    arguments = parser.parse_args()
    measures = {
        "scan": measure_scan,
        "pairs": lambda folder: measure_pairs(folder, arguments.rows),
        "search": lambda folder: measure_search(folder, arguments.candidates),
    }
    print("| what | peak memory | time |\n| --- | ---: | ---: |")
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="splaser-load-") as temporary:
            for line in measures[name](Path(temporary)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
