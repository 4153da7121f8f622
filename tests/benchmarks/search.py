"""A candidate's score and a whole search on SmolLM2: ratios measured in one run, as tables and as JSON.

    python tests/benchmarks/search.py [--quick] [--only PART ...] [--threads N] [--json FILE]

The published way answers one prompt at a time without a cache and embeds both references again each time. It is
run on a few pairs, each in the middle of as many others by the length of its answer, and its time is scaled to all
pairs. Ours knows the lengths of the answers before, as a candidate's does in a search, and embeds every answer anew.
The floor is two operations for each weight and token, at the best rate that a square matrix product reached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from splaser_plugin.cli.demo import prepare_embedder, prepare_model
from splaser_plugin.data.pairs import Pair, load_pairs
from splaser_plugin.generation.evaluation import plain_generation
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scanning.scan import scan_source
from splaser_plugin.scoring.embedding import SentenceEmbedder
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.scoring.semantic import SemanticScorer
from splaser_plugin.search.acceptance import Acceptance, Confident, Improve
from splaser_plugin.search.candidates import Candidate, choose_candidates
from splaser_plugin.search.judge import Judge
from splaser_plugin.search.racing import Race
from splaser_plugin.search.search import SearchResult, Trial, search
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import context_length, load_model

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "examples" / "data" / "pairs.jsonl"


@dataclass(frozen=True)
class Size:
    """How many pairs, the longest answer in tokens, and on how many pairs the published way is run."""

    pairs: int
    tokens: int
    published_pairs: int = 0


@dataclass(frozen=True)
class Sizes:
    """Of all parts of this benchmark."""

    score: Size
    long: Size
    search: Size
    candidates: int
    processes: Size


FULL = Sizes(Size(32, 64, 8), Size(128, 512, 4), Size(128, 24), 15, Size(32, 32))
QUICK = Sizes(Size(4, 32, 2), Size(4, 96, 1), Size(32, 8), 4, Size(8, 16))
PARTS = ("score", "long", "improve", "confident", "processes")
EDITED = ("model.layers.26.self_attn.o_proj", "model.layers.7.self_attn.q_proj")
EDITED_RANK = 100


class Bench:
    """SmolLM2, its tokenizer, the pairs and the embedder."""

    def __init__(self) -> None:
        self.model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
        self.prompter = Prompter(tokenizer, context=context_length(self.model))
        self.embedder = SentenceEmbedder(str(prepare_embedder()), torch.device("cpu"))

    def pairs(self, count: int) -> Sequence[Pair]:
        return load_pairs(PAIRS, samples=count).pairs

    def scorer(self, size: Size, batch_size: int = 32) -> SemanticScorer:
        generator = Generator(self.model, self.prompter, max_new_tokens=size.tokens, batch_size=batch_size)
        return SemanticScorer(generator, self.embedder, self.pairs(size.pairs))

    def published(self, pair: Pair, tokens: int) -> tuple[str, float]:
        """Answer and score of one pair, the published way."""
        prompt = torch.tensor([self.prompter.tokens(pair.messages)])
        with torch.no_grad(), plain_generation(self.model):
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=False,
                eos_token_id=2,
                pad_token_id=2,
            )
        answer = self.prompter.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        said, chosen, rejected = (self.embedder.embed([text])[0] for text in (answer, pair.chosen, pair.rejected or ""))
        return answer, float(cosine_similarity(said, chosen, 0) - cosine_similarity(said, rejected, 0))

    def operations(self, scorer: SemanticScorer, scores: Scores) -> float:
        """Of the matrix products that any way needs which reads each token once."""
        config = self.model.config
        head = config.vocab_size * config.hidden_size
        body = sum(parameter.numel() for parameter in self.model.parameters()) - head
        said = sum(len(answer.tokens) for answer in scores.answers)
        read = sum(map(len, scorer.prompts)) + said - len(scores.items)
        return 2 * (body * read + head * said)


def matmul_rate(side: int = 2048) -> float:
    """Operations a second of a square float32 matrix product: the best of five."""
    factor = torch.randn(side, side)
    return max(2 * side**3 / seconds(lambda: factor @ factor)[0] for _ in range(5))


def seconds(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure_score(bench: Bench, size: Size) -> dict[str, Any]:
    """One candidate's score in our way on all pairs, and in the published way on some."""
    scorer = bench.scorer(size)
    items = range(size.pairs)
    lengths = [len(answer.tokens) for answer in scorer.answers(items)]
    rate = matmul_rate()
    ours_s, scores = seconds(
        lambda: scorer.scored(items, scorer.generator.answer([scorer.prompts[item] for item in items], lengths))
    )
    rate = max(rate, matmul_rate())
    pairs = bench.pairs(size.pairs)
    apart = size.pairs // size.published_pairs
    some = sorted(items, key=lambda item: lengths[item])[apart // 2 :: apart]
    published_s, published = seconds(lambda: [bench.published(pairs[place], size.tokens) for place in some])
    scaled_s = published_s * size.pairs / size.published_pairs
    floor_s = bench.operations(scorer, scores) / rate
    return {
        "pairs": size.pairs,
        "max_new_tokens": size.tokens,
        "mean_answer_tokens": sum(lengths) / len(lengths),
        "published_s": scaled_s,
        "published_pairs": size.published_pairs,
        "ours_s": ours_s,
        "times_faster": scaled_s / ours_s,
        "same_texts": sum(scores.answers[place].text == text for place, (text, _) in zip(some, published, strict=True)),
        "largest_difference": max(
            abs(scores.values[place] - value) for place, (_, value) in zip(some, published, strict=True)
        ),
        "matmul_gflops": rate / 1e9,
        "floor_s": floor_s,
        "share_of_floor": floor_s / ours_s,
    }


class Replayed:
    """Answers with the scores that one candidate after the other got in an earlier search."""

    name = "replayed"

    def __init__(self, trials: Sequence[Trial], size: int) -> None:
        self.size = size
        self._recorded = [trial.judgement.scores for trial in trials if trial.judgement.scores]
        self.now = 0

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        return self._recorded[self.now].on(items)


def replay(found: SearchResult, size: int, acceptance: Acceptance, seed: int) -> tuple[int, bool]:
    """Tokens that a racing search with this order of the pairs generates, and whether it keeps the same."""
    scorer, race, best = Replayed(found.trials, size), Race(size, seed=seed), found.baseline
    tokens = best.generated_tokens
    for scorer.now, trial in enumerate(found.trials):
        scores = race.run(scorer, best, acceptance)
        tokens += scores.generated_tokens
        if trial.kept and len(scores.items) < size:
            return tokens, False
        best = scores if trial.kept else best
    return tokens, True


def noisiest(bench: Bench, count: int) -> tuple[Weights, list[Candidate]]:
    weights = Weights(bench.model)
    return weights, choose_candidates(scan_source(weights), weights.matrices()[0])[:count]


def timed_search(weights: Weights, candidates: Sequence[Candidate], judge: Judge) -> tuple[float, SearchResult]:
    """Seconds and result; the model is afterwards as before."""
    held = {candidate.matrix: weights.hold(candidate.matrix) for candidate in candidates}
    took_s, found = seconds(lambda: search(weights, candidates, judge))
    for matrix, values in held.items():
        weights.put_back(matrix, values)
    return took_s, found


def measure_search(bench: Bench, size: Size, count: int, acceptance: Acceptance) -> dict[str, Any]:
    """A search without racing, and what racing makes of its candidates in many orders of the pairs."""
    weights, candidates = noisiest(bench, count)
    took_s, found = timed_search(weights, candidates, Judge(bench.scorer(size), acceptance=acceptance))
    raced = [replay(found, size.pairs, acceptance, seed) for seed in range(200)]
    saved = [1 - tokens / found.generated_tokens for tokens, same in raced if same]
    return {
        "pairs": size.pairs,
        "max_new_tokens": size.tokens,
        "candidates": count,
        "seconds": took_s,
        "generated_tokens": found.generated_tokens,
        "kept": [candidate.matrix.name for candidate in found.kept],
        "changes": [trial.judgement.scores.mean - trial.judgement.best_before for trial in found.trials],
        "racing_orders": len(raced),
        "racing_keeps_the_same": len(saved) / len(raced),
        "racing_saves": sum(saved) / max(1, len(saved)),
    }


def measure_processes(size: Size) -> dict[str, Any]:
    """The same search by one process of one thread, and by two of them."""
    found: dict[int, dict[str, Any]] = {}
    for processes in (1, 2):
        print(f"search by {processes} processes of one thread ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "found.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            worker = [__file__, "--worker", str(output), str(size.pairs), str(size.tokens)]
            subprocess.run([*command, *worker], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[processes] = json.loads(output.read_text())
    return {
        "pairs": size.pairs,
        "max_new_tokens": size.tokens,
        "candidates": len(EDITED),
        "one_s": found[1]["seconds"],
        "two_s": found[2]["seconds"],
        "times_faster": found[1]["seconds"] / found[2]["seconds"],
        "same_recipe": found[1]["kept"] == found[2]["kept"],
        "kept": found[1]["kept"],
    }


def work(output: Path, size: Size) -> None:
    """What one of the processes does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    bench = Bench()
    weights = Weights(bench.model)
    candidates = [
        Candidate(matrix, EDITED_RANK, "iqr", 0.0, None) for matrix in weights.matrices()[0] if matrix.name in EDITED
    ]
    judge = Judge(bench.scorer(size, batch_size=max(1, size.pairs // 2)))
    torch.distributed.barrier()
    took_s, found = seconds(lambda: search(weights, candidates, judge))
    if torch.distributed.get_rank() == 0:
        kept = [candidate.matrix.name for candidate in found.kept]
        output.write_text(json.dumps({"seconds": took_s, "kept": kept}), encoding="utf-8")
    torch.distributed.destroy_process_group()


def table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([row(head), rule, *(row(line) for line in lines)])


def score_line(found: dict[str, Any]) -> list[str]:
    return [
        str(found["pairs"]),
        str(found["max_new_tokens"]),
        f"{found['mean_answer_tokens']:.0f}",
        f"{found['published_s']:.0f} s ({found['published_pairs']} pairs)",
        f"{found['ours_s']:.1f} s",
        f"{found['times_faster']:.1f}",
        f"{found['same_texts']} of {found['published_pairs']}",
        f"{found['largest_difference']:.0e}",
        f"{found['share_of_floor']:.0%} of {found['matmul_gflops']:.0f} GFLOP/s",
    ]


def search_line(rule: str, found: dict[str, Any]) -> list[str]:
    return [
        rule,
        str(found["candidates"]),
        str(found["pairs"]),
        str(found["max_new_tokens"]),
        f"{found['seconds']:.0f} s",
        str(found["generated_tokens"]),
        str(len(found["kept"])),
        f"{found['racing_saves']:.0%}",
        f"{found['racing_keeps_the_same']:.0%} of {found['racing_orders']} orders",
    ]


def processes_line(found: dict[str, Any]) -> list[str]:
    return [
        *(str(found[name]) for name in ("pairs", "max_new_tokens", "candidates")),
        f"{found['one_s']:.1f} s",
        f"{found['two_s']:.1f} s",
        f"{found['times_faster']:.2f}",
        "same" if found["same_recipe"] else "DIFFERS",
    ]


def show(results: dict[str, Any]) -> str:
    blocks = []
    scores = [results[part] for part in ("score", "long") if part in results]
    if scores:
        head = ["pairs", "limit", "answer", "published way", "ours", "faster", "same text", "difference", "floor"]
        blocks.append(table(head, [score_line(found) for found in scores]))
    searches = [part for part in ("improve", "confident") if part in results]
    if searches:
        head = ["accept", "candidates", "pairs", "limit", "time", "tokens", "kept", "racing saves", "keeps the same"]
        blocks.append(table(head, [search_line(part, results[part]) for part in searches]))
    if "processes" in results:
        head = ["pairs", "limit", "candidates", "one process", "two", "faster", "recipe"]
        blocks.append(table(head, [processes_line(results["processes"])]))
    return "\n\n".join(blocks)


def machine() -> dict[str, object]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores and searches on SmolLM2, as ratios.")
    parser.add_argument("--quick", action="store_true", help="few pairs and short answers: a few minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        output, pairs, tokens = arguments.worker
        work(Path(output), Size(int(pairs), int(tokens)))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = QUICK if arguments.quick else FULL
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)
    bench = Bench()
    measures = {
        "score": lambda: measure_score(bench, sizes.score),
        "long": lambda: measure_score(bench, sizes.long),
        "improve": lambda: measure_search(bench, sizes.search, sizes.candidates, Improve()),
        "confident": lambda: measure_search(bench, sizes.search, sizes.candidates, Confident(0.05, sizes.candidates)),
        "processes": lambda: measure_processes(sizes.processes),
    }
    results: dict[str, Any] = {}
    for part in arguments.only:
        print(f"{part} ...", file=sys.stderr, flush=True)
        results[part] = measures[part]()
    print(show(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, **results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
