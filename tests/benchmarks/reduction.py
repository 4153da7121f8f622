"""Ways to reduce SmolLM2 at several budgets: loss on unseen text, margin on unseen pairs, size, speed, seconds, memory.

    python tests/benchmarks/reduction.py --text FILE --measured FILE.jsonl [--methods NAME ...] [--budgets SHARE ...]
        [--pairs FILE] [--speed] [--singles N] [--calibration-tokens N] [--samples N] [--judged-tokens N]
        [--against FILE.jsonl] [--threads N]

The text's first half is what the reductions are calibrated on, its second half what they are judged on. Each row is
one model, measured once and kept in the file of measurements: run the command again to go on where it was stopped.
The statistics are kept beside it, in FILE.pt, what the base scores in FILE.base.json, and the options that all of them
share in FILE.settings. `--singles`
truncates one matrix at a time, to ranks whose predicted costs span a hundredfold, and sets them beside the divergence
(KL) that is measured on one window of the judging half; those are kept in FILE.singles.jsonl. `--against` takes
measurements with other options on as many judged tokens, and compares them window by window.
Ranks are `uniform` (each matrix loses the same share) or `allocated` over all matrices at once: by predicted nats for
`fisher`, by the share of the lost output or weight energy of the matrix for the others. `gauge` stores r (n + m - r)
numbers for a rank, the rest r (n + m). Bytes are those of the blocks' matrices in the model's dtype.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.data.windows import open_text
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.reduction.allocation import Storage, allocate, curve, gauge_storage, plain_storage
from splaser_plugin.reduction.calibration import window_rows
from splaser_plugin.reduction.moments import Moments, measure
from splaser_plugin.reduction.truncation import Decomposition, decompose_by_moments, decompose_plainly
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.scoring.perplexity import PerplexityScorer
from splaser_plugin.weights.factored_layers import FactoredLinear, GaugeLinear, TwoFactorLinear
from splaser_plugin.weights.gauge import gauge
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import context_length, load_model
from splaser_plugin.weights.matrices import Matrix
from tests.benchmarks.reduction_rows import Row, compared, hold_to, predictions, read, table

ROOT = Path(__file__).parents[2]
WINDOW = 512
ROUNDS = 3
FORWARD = (2, 256)
"""Sequences and tokens of the forward pass whose time is taken."""
SINGLE_COSTS = (0.001, 0.1)
"""Least and largest predicted cost of a single truncation, in nats a token."""


@dataclass(frozen=True)
class Method:
    """A row of the table at each budget."""

    reduce: str
    is_allocated: bool = True
    storage: Storage = plain_storage


METHODS = {
    "svd uniform": Method("svd", is_allocated=False),
    "svd allocated": Method("svd"),
    "whitened uniform": Method("whitened", is_allocated=False),
    "whitened allocated": Method("whitened"),
    "fisher allocated": Method("fisher"),
    "fisher allocated gauge": Method("fisher", storage=gauge_storage),
}


class Study:
    """SmolLM2, its statistics, and the text to judge on."""

    def __init__(
        self,
        text: str,
        pairs: str,
        measured: Path,
        calibration_tokens: int,
        samples: int,
        judged_tokens: int,
        takes_time: bool,
    ) -> None:
        self.takes_time = takes_time
        self.statistics = measured.with_suffix(".pt")
        self.samples = samples
        self.model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
        self.weights = Weights(self.model)
        self.matrices = self.weights.matrices()[0]
        self.originals = {matrix: self.weights.read(matrix).clone() for matrix in self.matrices}
        self.dense = sum(math.prod(matrix.shape) for matrix in self.matrices)
        tokens = tokenizer("".join(open_text(text)), add_special_tokens=False, verbose=False)["input_ids"]
        half = len(tokens) // 2
        self.calibration = windows(tokens[:half], calibration_tokens)
        self.judge = PerplexityScorer(self.model, windows(tokens[half:], judged_tokens), batch_size=1)
        prompter = Prompter(tokenizer, "auto", context_length(self.model))
        found = load_pairs(pairs).pairs if pairs else ()
        self.pairs = MarginScorer(self.model, prompter, found, batch_size=16) if pairs else None
        self.seconds: dict[str, float] = {}
        self.base, self.base_margins = self._base_scores(measured.with_suffix(".base.json"))
        self._base_logs: Tensor | None = None
        self._moments: dict[Matrix, Moments] = {}
        self._decomposed: tuple[str, dict[Matrix, Decomposition]] = ("", {})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started
        print(f"{stage}: {self.seconds[stage]:.0f} s", file=sys.stderr)

    def losses(self) -> np.ndarray:
        """Of each judged window, in nats a token."""
        return -np.array(self.judge.score(range(self.judge.size)).values)

    def margins(self) -> np.ndarray | None:
        """Of each pair, in nats a token."""
        return np.array(self.pairs.score(range(self.pairs.size)).values) if self.pairs else None

    def _base_scores(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Losses of the judged windows and margins of the pairs, none without pairs."""
        if not path.exists():
            with self.timed("judging the base"):
                margins = self.margins()
                found = self.losses().tolist(), [] if margins is None else margins.tolist()
            path.write_text(json.dumps(found))
        losses, margins = json.loads(path.read_text())
        return np.array(losses), np.array(margins)

    def decompositions(self, reduce: str) -> dict[Matrix, Decomposition]:
        if reduce != "svd" and not self._moments:
            if not self.statistics.exists():
                self._measure_moments()
            self._moments, self.seconds["statistics"] = torch.load(self.statistics, weights_only=False)
        if self._decomposed[0] != reduce:
            self._decomposed = ("", {})
            with self.timed(f"decomposition ({reduce})"):
                self._decomposed = (reduce, {matrix: self._decompose(matrix, reduce) for matrix in self.matrices})
        return self._decomposed[1]

    def _measure_moments(self) -> None:
        with self.timed("statistics"):
            found = dict(measure(self.weights, self.matrices, window_rows(self.calibration), samples=self.samples))
        torch.save((found, self.seconds["statistics"]), self.statistics)

    def _decompose(self, matrix: Matrix, reduce: str) -> Decomposition:
        weight = self.originals[matrix]
        if reduce == "svd":
            return decompose_plainly(weight)
        return decompose_by_moments(weight, self._moments[matrix], with_gradients=reduce == "fisher")

    def measure(self, name: str, budget: float) -> Row:
        method = METHODS[name]
        found = self.decompositions(method.reduce)
        with self.timed("allocation"):
            ranks, predicted = self._ranks(found, method, budget)
        with self.timed("reduction"):
            for matrix, rank in ranks.items():
                self.weights.write(matrix, found[matrix].truncated(self.originals[matrix], rank))
        with self.timed("judging"):
            change, margins = self.losses() - self.base, self.margins()
        for matrix in ranks:
            self.weights.write(matrix, self.originals[matrix])
        moved = margins - self.base_margins if margins is not None else None
        speed = self._speed(found, ranks, method.storage) if self.takes_time else None
        stored = sum(stored_numbers(matrix, rank, method.storage) for matrix, rank in ranks.items())
        stages = ["allocation", "reduction", f"decomposition ({method.reduce})"]
        stages += ["statistics"] if method.reduce != "svd" else []
        import resource  # not on Windows

        return Row(
            name,
            budget,
            1 - stored / self.dense,
            float(change.mean()),
            standard_error(change),
            predicted,
            stored * self.originals[self.matrices[0]].element_size(),
            {stage: round(self.seconds[stage], 2) for stage in stages},
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            float(moved.mean()) if moved is not None else None,
            standard_error(moved) if moved is not None else None,
            speed,
            change.tolist(),
        )

    @torch.no_grad()
    def _speed(self, found: dict[Matrix, Decomposition], ranks: dict[Matrix, int], storage: Storage) -> float:
        """By processor time: the model with factored layers and the dense one take turns; the best round counts."""
        reduced = {matrix: rank for matrix, rank in ranks.items() if rank < min(matrix.shape)}
        dense = {matrix.name: self.model.get_submodule(matrix.name) for matrix in reduced}
        factored = {
            matrix.name: layer(*found[matrix].factors(self.originals[matrix], rank), storage)
            for matrix, rank in reduced.items()
        }
        ids = torch.randint(1000, 40000, FORWARD, generator=torch.Generator().manual_seed(0))
        best = {"dense": math.inf, "factored": math.inf}
        for _ in range(ROUNDS + 1):  # the first warms up, and is hardly ever the best
            for name, layers in (("factored", factored), ("dense", dense)):
                for place, module in layers.items():
                    parent, _, child = place.rpartition(".")
                    setattr(self.model.get_submodule(parent), child, module)
                started = time.process_time()
                self.model(ids)
                best[name] = min(best[name], time.process_time() - started)
        return best["dense"] / best["factored"]

    def singles(self, count: int) -> Iterator[tuple[Matrix, int, float]]:
        """Matrices from all over the model, each with a rank and its predicted cost in nats a token."""
        found = self.decompositions("fisher")
        wanted = np.geomspace(*SINGLE_COSTS, count)
        np.random.default_rng(0).shuffle(wanted)
        for place, cost in enumerate(wanted):
            matrix = self.matrices[len(self.matrices) * place // count]
            costs = found[matrix].costs[1:-1]
            rank = 1 + int(np.argmin(np.abs(np.log(np.maximum(costs, 1e-12) / cost))))
            yield matrix, rank, float(costs[rank - 1])

    @torch.no_grad()
    def divergence(self, matrix: Matrix, rank: int) -> float:
        """KL(model || model with that matrix truncated), in nats a token, on one window of the judging half."""
        original = self.originals[matrix]
        ids = torch.tensor(self.judge.windows[:1])
        if self._base_logs is None:
            self._base_logs = self.model(ids).logits.log_softmax(-1)
        self.weights.write(matrix, self.decompositions("fisher")[matrix].truncated(original, rank))
        logs = self.model(ids).logits.log_softmax(-1)
        self.weights.write(matrix, original)
        return float(nn.functional.kl_div(logs, self._base_logs, log_target=True, reduction="sum")) / ids.numel()

    def _ranks(
        self, found: dict[Matrix, Decomposition], method: Method, budget: float
    ) -> tuple[dict[Matrix, int], float | None]:
        if not method.is_allocated:
            return {matrix: uniform_rank(matrix, method.storage, budget) for matrix in self.matrices}, None
        in_nats = method.reduce == "fisher"
        curves = [
            curve(matrix.shape, found[matrix].costs / (1 if in_nats else found[matrix].costs[0]), method.storage)
            for matrix in self.matrices
        ]
        allocation = allocate(curves, int((1 - budget) * self.dense))
        return dict(zip(self.matrices, allocation.ranks, strict=True)), allocation.cost if in_nats else None


def layer(left: Tensor, right: Tensor, storage: Storage) -> FactoredLinear:
    """A factored layer of left @ right, in float32 as the model is."""
    left, right = left.float(), right.float()
    if storage is gauge_storage:
        return GaugeLinear.of(gauge(left, right, left.dtype))
    made = TwoFactorLinear(right.shape[1], *left.shape, bias=False)
    made.weight.data, made.right_factor.data = left.contiguous(), right.contiguous()
    return made


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def windows(tokens: Sequence[int], count: int) -> list[list[int]]:
    """Whole windows, evenly spaced over the tokens, of about `count` tokens together."""
    available = len(tokens) // WINDOW
    wanted = min(available, max(2, count // WINDOW))
    places = [available * place // wanted for place in range(wanted)]
    return [list(tokens[place * WINDOW : (place + 1) * WINDOW]) for place in places]


def stored_numbers(matrix: Matrix, rank: int, storage: Storage) -> int:
    return storage(*matrix.shape, rank) if rank < min(matrix.shape) else math.prod(matrix.shape)


def uniform_rank(matrix: Matrix, storage: Storage, budget: float) -> int:
    """The highest rank that stores at most the share of the matrix's own numbers that is to stay."""
    room = (1 - budget) * math.prod(matrix.shape)
    return max(rank for rank in range(1, min(matrix.shape)) if rank == 1 or storage(*matrix.shape, rank) <= room)


def settings_of(arguments: argparse.Namespace) -> str:
    """What a measurement depends on, apart from its place in the table."""
    names = ("text", "pairs", "speed", "calibration_tokens", "samples", "judged_tokens")
    return ", ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in names)


def measured_singles(path: Path, study: Callable[[], Study], count: int) -> str:
    """Predicted costs and measured divergences of single truncations: their rank correlation and the ratio."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len(rows) < count:
        for matrix, rank, predicted in list(study().singles(count))[len(rows) :]:
            rows.append([matrix.name, rank, predicted, study().divergence(matrix, rank)])
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    predicted, measured = np.array([row[2:] for row in rows]).T
    ratios = np.quantile(measured / predicted, [0.1, 0.5, 0.9])
    return (
        f"{len(rows)} single truncations: rank correlation {spearmanr(predicted, measured).statistic:.3f}, measured "
        f"over predicted {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f} for four of five)"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ways to reduce SmolLM2 at several budgets, as a table.")
    parser.add_argument("--text", required=True, help="UTF-8 file: one half to calibrate on, the other to judge on")
    parser.add_argument("--pairs", default="", help="pairs to measure the margin on; nothing is calibrated on them")
    parser.add_argument("--measured", type=Path, required=True, help="file that keeps the measurements")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.3], help="shares to remove")
    parser.add_argument("--speed", action="store_true", help="also take the time of forward passes in factored layers")
    parser.add_argument("--singles", type=int, default=0, help="single truncations to compare with their predictions")
    parser.add_argument("--calibration-tokens", type=int, default=12_288)
    parser.add_argument("--samples", type=int, default=1, help="labels drawn for each calibration token")
    parser.add_argument("--judged-tokens", type=int, default=8_192)
    parser.add_argument("--against", type=Path, help="measurements to compare these with")
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args(words)
    hold_to(settings_of(arguments), arguments.measured)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = arguments.measured
    measured = read(path)

    @cache
    def study() -> Study:
        tokens = arguments.calibration_tokens, arguments.samples, arguments.judged_tokens
        return Study(arguments.text, arguments.pairs, path, *tokens, arguments.speed)

    for name, budget in itertools.product(arguments.methods, arguments.budgets):
        if (name, budget) in measured:
            continue
        row = measured[name, budget] = study().measure(name, budget)
        with path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    print(table(measured, list(METHODS)))
    print(predictions(measured))
    if arguments.against:
        print(compared(measured, read(arguments.against)))
    if arguments.singles:
        print(measured_singles(path.with_suffix(".singles.jsonl"), study, arguments.singles))


if __name__ == "__main__":
    main()
