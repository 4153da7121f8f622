"""The scan of a 7B's shapes, one score and one search on a device, against Spectrum's way and plain `generate`.

    python tests/benchmarks/gpu.py [--device cuda] [--quick] [--json FILE]

Every way runs in the same process, one after the other, after a run that isn't counted; the device is waited for before
each clock is read. Spectrum's way is `torch.linalg.svdvals` of each weight in float32 on the device. SmolLM2 and the
embedder come from `make models`. Seconds are of this device alone: compare ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from spectra import MISTRAL_BLOCK, SMALL_BLOCK, table, trained_like

from splaser_plugin import LaserConfig, laser
from splaser_plugin.cli.demo import prepare_embedder, prepare_model
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.spectra.spectrum import singular_values
from splaser_plugin.weights.loading import load_model

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "examples" / "data" / "pairs.jsonl"


class Clock:
    """Seconds that work on a device takes, from an idle device to an idle device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started


def scan_seconds(device: torch.device, clock: Clock, *, quick: bool) -> dict[str, float]:
    """Of the matrices of one block, on the device already, in bfloat16."""
    found = {"scan of a block": 0.0, "Spectrum's way": 0.0}
    for shape, count in (SMALL_BLOCK if quick else MISTRAL_BLOCK).items():
        weight = trained_like(*shape).to(device)
        ways: dict[str, Callable[[], object]] = {
            "scan of a block": lambda weight=weight: singular_values(weight),  # type: ignore[misc]
            "Spectrum's way": lambda weight=weight: torch.linalg.svdvals(weight.float()),  # type: ignore[misc]
        }
        for name, work in ways.items():
            work()
            found[name] += count * clock.seconds(work)
    return found


def answer_seconds(model: Any, tokenizer: Any, clock: Clock, *, prompts: int, tokens: int) -> dict[str, float]:
    """Of the greedy answers to the example prompts: by the generator, and by `generate` of all at once."""
    prompter = Prompter(tokenizer)
    asked = [prompter.tokens(pair.messages) for pair in load_pairs(PAIRS, samples=prompts).pairs]
    generator = Generator(model, prompter, max_new_tokens=tokens, batch_size=0)
    texts = [tokenizer.decode(ids) for ids in asked]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    ways: dict[str, Callable[[], object]] = {
        "answers of one score": lambda: generator.answer(asked),
        "plain generate": lambda: model.generate(
            **batch, max_new_tokens=tokens, do_sample=False, eos_token_id=generator.end_tokens
        ),
    }
    for work in ways.values():
        work()
    return {name: clock.seconds(work) for name, work in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Scan, score and search on a device.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="smaller weights, fewer prompts")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    clock = Clock(device)
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    prompts, tokens = (4, 8) if arguments.quick else (64, 128)

    found = scan_seconds(device, clock, quick=arguments.quick)
    folder, embedder = prepare_model(ROOT / ".cache"), prepare_embedder()
    model, tokenizer = load_model(folder, device=arguments.device, dtype=dtype)
    found |= answer_seconds(model, tokenizer, clock, prompts=prompts, tokens=tokens)
    config = LaserConfig(
        device=arguments.device, dtype=dtype, samples=prompts, max_new_tokens=tokens, embedder=str(embedder),
        candidates=2 if arguments.quick else 15, batch_size=0, scorer="semantic",
    )  # fmt: skip
    found["one search, loading and scan included"] = clock.seconds(lambda: laser(folder, PAIRS, config=config))

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, SmolLM2 in {dtype}, {prompts} prompts, at most {tokens} tokens\n")
    print(table(["what", "seconds"], [[what, f"{seconds:.2f}"] for what, seconds in found.items()]))
    if arguments.json:
        content = {"device": name, "torch": torch.__version__, "dtype": dtype, "seconds": found}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
