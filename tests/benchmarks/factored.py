"""What storing reduced matrices as factors saves on SmolLM2: parameters, bytes and time, as a table.

    python tests/benchmarks/factored.py [--threads N] [--json FILE] [--layers] [--rounding]

Each case reduces some matrices of the base model to a part of their components, saves the same model dense and
factored, and loads both; a third has two plain factors, r (n + m) numbers, in place of each factored layer. They take
turns, and the best of the rounds counts, so that what else the machine does touches all alike. How good the answers
still are is not measured here. --layers measures single layers instead: a forward pass by pivot rows or columns against
one through two plain factors. --rounding measures what bfloat16 costs either way. Times are of the processor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.spectra import spectrum
from splaser_plugin.weights.factored import factored_layers
from splaser_plugin.weights.factored_folder import load, save_model
from splaser_plugin.weights.factored_layers import GaugeLinear, TwoFactorLinear
from splaser_plugin.weights.gauge import gauge
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model

ROOT = Path(__file__).parents[2]
CASES = {
    "q_proj and o_proj, 18 % of the components": (("q_proj", "o_proj"), 0.18),
    "every matrix of the blocks, 25 %": ((), 0.25),
}
WAYS = ("dense", "factored", "two plain factors")
ROUNDS = 3
FORWARD = (2, 256)
"""Sequences and tokens of the forward pass."""
GENERATED = (1, 24)
"""Prompts and new tokens of each; a prompt has 32 tokens."""
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048))
"""Outputs and inputs of SmolLM2's matrices, and of a larger model's."""
SHARES = (0.25, 0.5, 0.75)
"""Ranks of single layers, as shares of the full one."""
TOKENS = (1, 8, 64, 512)
ROUNDED_BLOCK = 15
ROUNDED_SHARES = (0.1, 0.5, 0.9)
"""Ranks that are rounded, as shares of the full one."""
LAYER_ROUNDS = 30


@dataclass(frozen=True)
class Measured:
    """One way to store one model."""

    parameters: int
    file_bytes: int | None
    """None for what isn't written."""
    forward_tokens_per_s: float
    generated_tokens_per_s: float


def reduced(names: tuple[str, ...], fraction: float) -> tuple[Weights, int]:
    """The base model with the matrices reduced, as factors, and how many they are."""
    weights = Weights(load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")[0])
    weights.keep_factors()
    matrices, _ = weights.matrices(names)
    for matrix in matrices:
        weights.reduce(matrix, max(1, round(fraction * min(matrix.shape))))
    return weights, len(matrices)


@torch.no_grad()
def forward_s(model: Any) -> float:
    ids = torch.randint(1000, 40000, FORWARD, generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    model(ids)
    return time.process_time() - started


def generation_s(model: Any) -> float:
    prompts, tokens = GENERATED
    ids = torch.randint(1000, 40000, (prompts, 32), generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
        pad_token_id=0,
    )  # fmt: skip
    return time.process_time() - started


def best_of(models: list[Any], seconds: Callable[[Any], float]) -> list[float]:
    """The shortest time of each model; they take turns."""
    rounds = [[seconds(model) for model in models] for _ in range(ROUNDS + 1)]
    return [min(times) for times in zip(*rounds[1:], strict=True)]


def with_two_factors(folder: Path) -> Any:
    """The model of a folder, each of its layers that are stored by rows or columns made one of two plain factors."""
    model = load(folder)
    for name, layer in factored_layers(model).items():
        left, right = layer.factors()
        plain = TwoFactorLinear(layer.in_features, layer.out_features, layer.rank, bias=layer.bias is not None)
        plain.weight.data, plain.right_factor.data, plain.bias = left.contiguous(), right.contiguous(), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    return model


def measure(names: tuple[str, ...], fraction: float) -> tuple[int, list[Measured]]:
    """How many matrices were reduced, and the model stored in each of WAYS."""
    weights, count = reduced(names, fraction)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / "dense", Path(temporary) / "factored"]
        lasered: Any = weights.model
        lasered.save_pretrained(folders[0])
        save_model(weights, folders[1], None)
        models = [*(load(folder) for folder in folders), with_two_factors(folders[1])]
        sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders]
    times = zip(models, [*sizes, None], best_of(models, forward_s), best_of(models, generation_s), strict=True)
    return count, [
        Measured(
            model.num_parameters(), size, FORWARD[0] * FORWARD[1] / forward, GENERATED[0] * GENERATED[1] / generation
        )
        for model, size, forward, generation in times
    ]


def show(title: str, count: int, found: list[Measured]) -> str:
    dense, factored, two = found
    rows = {
        "parameters": [f"{way.parameters:,}" for way in found],
        "bytes on disk": [f"{dense.file_bytes:,}", f"{factored.file_bytes:,}", ""],
        "tokens/s, forward pass": [f"{way.forward_tokens_per_s:.0f}" for way in found],
        "tokens/s, generation": [f"{way.generated_tokens_per_s:.0f}" for way in found],
    }
    forward = factored.forward_tokens_per_s / two.forward_tokens_per_s
    generation = factored.generated_tokens_per_s / two.generated_tokens_per_s
    return "\n".join(
        [
            f"| {title}: {count} matrices | " + " | ".join(WAYS) + " |",
            "| --- | ---: | ---: | ---: |",
            *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()),
            f"factored over two plain factors: {forward:.2f} of the tokens a second in a forward pass, "
            f"{generation:.2f} in generation",
        ]
    )


@torch.no_grad()
def layer_times(outputs: int, inputs: int, rank: int) -> list[tuple[float, float]]:
    """Processor seconds of a call of the layer with fewer numbers, and of two plain factors, for each of TOKENS."""
    random = torch.Generator().manual_seed(0)
    left, right = torch.randn(outputs, rank, generator=random), torch.randn(rank, inputs, generator=random)
    two = TwoFactorLinear(inputs, outputs, rank, bias=False)
    two.weight.data, two.right_factor.data = left, right
    layers = [GaugeLinear.of(gauge(left, right, torch.float32)), two]
    found = []
    for tokens in TOKENS:
        read = torch.randn(1, tokens, inputs, generator=random)
        repeats = max(1, 64 // tokens)
        rounds = []
        for _ in range(LAYER_ROUNDS):
            rounds.append([])
            for layer in layers:
                started = time.process_time()
                for _ in range(repeats):
                    layer(read)
                rounds[-1].append((time.process_time() - started) / repeats)
        own, plain = (min(times) for times in zip(*rounds, strict=True))
        found.append((own, plain))
    return found


def layers_table() -> str:
    lines = [
        "| outputs, inputs, rank | " + " | ".join(f"{tokens} tokens" for tokens in TOKENS) + " |",
        "| --- |" + " ---: |" * len(TOKENS),
    ]
    for outputs, inputs in SHAPES:
        for share in SHARES:
            rank = round(share * min(outputs, inputs))
            cells = [f"{own / plain:.2f}" for own, plain in layer_times(outputs, inputs, rank)]
            lines.append(f"| {outputs}, {inputs}, {rank} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rounding_table() -> str:
    """What bfloat16 does to the matrices of a block, each of its best approximations of some ranks stored in it."""
    weights = Weights(load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")[0])
    lines = [
        "| matrix, rank | pivots | two plain factors | the matrix itself |",
        "| --- | ---: | ---: | ---: |",
    ]
    for matrix in (matrix for matrix in weights.matrices()[0] if matrix.block == ROUNDED_BLOCK):
        for share in ROUNDED_SHARES:
            left, right = spectrum.factors(weights.read(matrix), round(share * min(matrix.shape)))
            exact = left.double() @ right.double()
            stored = (
                gauge(left, right, torch.bfloat16).product(),
                left.bfloat16().double() @ right.bfloat16().double(),
                exact.bfloat16(),
            )
            cells = [f"{float((one.double() - exact).norm() / exact.norm()):.2%}" for one in stored]
            lines.append(f"| {matrix.type}, {left.shape[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Dense against factored models on SmolLM2.")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--layers", action="store_true", help="single layers against two plain factors")
    parser.add_argument("--rounding", action="store_true", help="errors of bfloat16, of single matrices")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.layers:
        print("time of a call, over that of two plain factors:", layers_table(), sep="\n")
        return
    if arguments.rounding:
        print("error of bfloat16, of the matrix's norm:", rounding_table(), sep="\n")
        return
    results = {}
    for title, (names, fraction) in CASES.items():
        count, found = measure(names, fraction)
        print(show(title, count, found), end="\n\n", flush=True)
        results[title] = {"matrices": count, **dict(zip(WAYS, map(asdict, found), strict=True))}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
