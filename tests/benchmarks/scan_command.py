"""The whole command `splaser scan` against its yardstick: Gram matrix by half and `eigvalsh`, one after the other.

    python tests/benchmarks/scan_command.py [--small] [--rounds 2]

What a processor reaches of its arithmetic differs from one to the next, since half of the work of eigenvalues is bound
by memory. So the whole command, on one block of Mistral-7B in bfloat16, is compared with the least that its method
needs, on the same weights and threads in the same run; the best of all rounds counts. The command's start is timed on a
model of a few kilobytes. Processor time is what stays comparable where other programs run beside this one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import MistralConfig, MistralForCausalLM

PANEL = 512
SHAPES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 768, "intermediate_size": 2688, "num_attention_heads": 12, "num_key_value_heads": 3}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
Seconds = tuple[float, float]
"""By the clock, and of the processor."""


def save_block(folder: Path, shapes: dict[str, int]) -> None:
    """A model of one block of random weights."""
    torch.manual_seed(0)
    config = MistralConfig(num_hidden_layers=1, vocab_size=32, dtype=torch.bfloat16, **shapes)
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def scan(folder: Path) -> None:
    command = [sys.executable, "-m", "splaser_plugin", "scan", str(folder), "-q", "-o", str(folder / "scan.json")]
    (folder / "scan.json").unlink(missing_ok=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})


@torch.no_grad()
def yardstick(folder: Path) -> None:
    """Singular values of the block's matrices, unchecked, in float64."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in [name for name in file.keys() if "_proj" in name]:  # noqa: SIM118
            weight = file.get_tensor(name).double()
            upright = weight if weight.shape[0] >= weight.shape[1] else weight.mT
            short = upright.shape[1]
            gram = torch.zeros(short, short, dtype=torch.float64)
            for start in range(0, short, PANEL):
                end = min(start + PANEL, short)
                torch.mm(upright[:, start:end].mT, upright[:, :end], out=gram[start:end, :end])
            torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_()


def timed(run: Callable[[Path], None], folder: Path) -> Seconds:
    def used() -> float:
        spent = os.times()
        return spent.user + spent.system + spent.children_user + spent.children_system

    started, before = time.perf_counter(), used()
    run(folder)
    return time.perf_counter() - started, used() - before


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole scan against Gram by half and eigvalsh.")
    parser.add_argument("--small", action="store_true", help="smaller weights, where the start is most of it")
    parser.add_argument("--rounds", type=int, default=2, help="times each way runs; the best counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        block, tiny = Path(folder) / "block", Path(folder) / "tiny"
        save_block(block, SMALL if arguments.small else SHAPES)
        save_block(tiny, TINY)
        ways = {
            "splaser scan": (scan, block),
            "of it the start": (scan, tiny),
            "Gram by half + eigvalsh": (yardstick, block),
        }
        taken: dict[str, list[Seconds]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, (run, place) in ways.items():
                taken[name].append(timed(run, place))
    best = {name: [min(values) for values in zip(*seconds, strict=True)] for name, seconds in taken.items()}
    least = best["Gram by half + eigvalsh"]
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print("| | seconds | of the yardstick | processor seconds | of the yardstick |\n|---|---:|---:|---:|---:|")
    for name, (clock_s, processor_s) in best.items():
        ratios = clock_s / least[0], processor_s / least[1]
        print(f"| {name} | {clock_s:.2f} | {ratios[0]:.2f} | {processor_s:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
