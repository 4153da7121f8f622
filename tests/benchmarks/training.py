"""Does it matter which matrices are trained? The chosen half against all of them and against random halves.

    python tests/benchmarks/training.py --pairs FILE --text FILE --measured FILE
        [--model FOLDER] [--by snr_ratio ...] [--modes lora unfrozen] [--tasks sft dpo] [--seeds 3] [--steps 60]

Pairs fall into three parts by their prompts: to train on, to choose each arm's learning rate on, and held out. TRL
trains on the chosen answers (`sft`) or on preferences (`dpo`), LoRA at as many parameters for each arm, or the
matrices themselves (`unfrozen`: as many for all halves, and about twice as many for `all`). A random half is drawn anew
for each seed, which is also that of the order of the data. Measured is what the held-out pairs say, and how much worse
the model predicts a text that it wasn't trained on, which also bounds DPO's learning rate. --measured keeps the
measurements, a line each, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.pairs import Pair, PairSet, load_pairs
from splaser_plugin.data.split import split_by_prompt
from splaser_plugin.data.windows import read_windows
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.integrations.freeze import freeze_all_but
from splaser_plugin.integrations.peft import lora_config
from splaser_plugin.jobs.importance import importances_of_folder
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scanning.scan import scan
from splaser_plugin.scanning.selection import Selection, choose, matched_rank
from splaser_plugin.scoring.margin import ChosenScorer, MarginScorer
from splaser_plugin.scoring.perplexity import PerplexityScorer
from splaser_plugin.statistics import RISK, t_critical
from splaser_plugin.weights.loading import context_length, load_model

ROOT = Path(__file__).parents[2]
LADDER = tuple(float(f"{digit}e{power}") for power in range(-6, 0) for digit in (1, 3))
"""Learning rates, from the lowest."""
RATES = {"lora": (1e-4, 3e-4, 1e-3), "unfrozen": (1e-5, 3e-5, 1e-4)}
"""Where the choice of one begins."""
BETA = 0.1
FORGOTTEN = 0.1
"""Nats a token of the text that DPO's learning rate may cost at most: the larger it is, the larger the margin, until
nothing is left of the model."""
TUNING_SEED = 1000
"""Of the runs that choose the learning rates: none of the seeds that count."""
FIGURES = {"loss": "held-out loss", "margin": "held-out margin", "text_loss": "loss on the text"}
"""In nats a token. Of the loss less is better, of the margin more."""


@dataclass(frozen=True)
class Row:
    """One training, and what was measured after it."""

    task: str
    mode: str
    arm: str
    seed: int
    rate: float
    part: str
    """validation or held-out."""
    parameters: int
    loss: float
    """Mean loss of the chosen answers, in nats a token."""
    margin: float
    text_loss: float
    settings: str = ""
    """The options that all rows of a file have to share."""

    @property
    def place(self) -> tuple[str, str, str, int, float, str]:
        return self.task, self.mode, self.arm, self.seed, self.rate, self.part


def longest(pair: Pair) -> int:
    """Characters of its prompt or of an answer, whichever has more."""
    return max(sum(len(turn["content"]) for turn in pair.messages), len(pair.chosen), len(pair.rejected or ""))


class Study:
    """A model, its scan, and the data to train and to judge on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder = str(arguments.model or prepare_model(ROOT / ".cache"))
        self.scan: Scan = scan(self.folder, output=arguments.measured.with_suffix(".scan.json"))
        pairs = load_pairs(arguments.pairs)
        pairs = replace(pairs, pairs=tuple(pair for pair in pairs if longest(pair) <= arguments.chars))
        outer = split_by_prompt(pairs, 1 / 3)
        inner = split_by_prompt(PairSet(outer.search, pairs.source, {}, len(outer.search)), 1 / 4)
        self.train = inner.search
        self.importances: dict[str, dict[str, float] | None] = {}
        self.parts = {"validation": inner.held_out[: arguments.judged], "held-out": outer.held_out[: arguments.judged]}
        sizes = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        print(f"pairs: {len(self.train)} to train on, {sizes}", file=sys.stderr)

    def selection(self, arm: str, seed: int) -> Selection:
        if arm == "all":
            return choose(self.scan, fraction=1.0)
        config = replace(choose(self.scan, fraction=0.5).config, by=arm, seed=seed if arm == "random" else 0)
        if arm in ("fisher", "gradient"):
            config = replace(config, text=self.arguments.text)
        if arm not in self.importances:
            self.importances[arm] = importances_of_folder(self.folder, config)
        return choose(self.scan, config, importances=self.importances[arm])

    def run(self, task: str, mode: str, arm: str, seed: int, rate: float, part: str) -> Row:
        """Train from the same start, and measure on that part of the pairs."""
        selection, peft = self.selection(arm, seed), None
        set_seed(seed)  # adapters are drawn before the trainer sets its own
        model, tokenizer = load_model(self.folder, device=self.arguments.device, dtype="float32")
        if mode == "lora":
            peft = lora_config(selection, rank=matched_rank(selection, self.arguments.rank))
        else:
            freeze_all_but(model, selection.names)
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(task, model, tokenizer, peft, seed, rate, folder)
            parameters = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
            trainer.train()
        trained = trainer.model.merge_and_unload() if peft else trainer.model
        trained.eval()
        found = self._measure(trained, tokenizer, part)
        settings = settings_of(self.arguments)
        return Row(task, mode, arm, seed, rate, part, parameters, **found, settings=settings)

    def _trainer(self, task: str, model: Any, tokenizer: Any, peft: Any, seed: int, rate: float, folder: str) -> Any:
        import trl
        from datasets import Dataset

        options = {
            "output_dir": folder,
            "max_steps": self.arguments.steps,
            "per_device_train_batch_size": self.arguments.batch,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.arguments.steps // 10,
            "max_length": self.arguments.length,
            "seed": seed,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": self.arguments.device == "cpu",
            "disable_tqdm": True,
        }
        given = {"processing_class": tokenizer, "peft_config": peft}
        rows = Dataset.from_list([_row(task, pair) for pair in self.train])
        if task == "dpo":
            return trl.DPOTrainer(model, args=trl.DPOConfig(beta=BETA, **options), train_dataset=rows, **given)
        return trl.SFTTrainer(model, args=trl.SFTConfig(**options), train_dataset=rows, **given)

    @cached_property
    def untrained_text_loss(self) -> float:
        model, tokenizer = load_model(self.folder, device=self.arguments.device, dtype="float32")
        return self._text_loss(model, tokenizer)

    def _measure(self, model: Any, tokenizer: Any, part: str) -> dict[str, float]:
        prompter = Prompter(tokenizer, "auto", context_length(model))
        pairs, batch = self.parts[part], self.arguments.batch
        chosen = ChosenScorer(model, prompter, pairs, batch_size=batch)
        margins = MarginScorer(model, prompter, pairs, batch_size=batch)
        return {
            "loss": -chosen.score(range(chosen.size)).mean,
            "margin": margins.score(range(margins.size)).mean,
            "text_loss": self._text_loss(model, tokenizer),
        }

    def _text_loss(self, model: Any, tokenizer: Any) -> float:
        settings = self.arguments
        windows = read_windows(settings.text, tokenizer, window=settings.length, count=settings.judged)
        scorer = PerplexityScorer(model, windows, batch_size=settings.batch)
        return -scorer.score(range(scorer.size)).mean


def _row(task: str, pair: Pair) -> dict[str, Any]:
    def said(text: str | None) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text or ""}]

    prompt = [dict(message) for message in pair.messages]
    if task == "sft":
        return {"prompt": prompt, "completion": said(pair.chosen)}
    return {"prompt": prompt, "chosen": said(pair.chosen), "rejected": said(pair.rejected)}


def merit(row: Row, untrained_text_loss: float) -> float:
    """What its learning rate is chosen by; more is better."""
    if row.task == "sft":
        return -row.loss
    return row.margin if row.text_loss <= untrained_text_loss + FORGOTTEN else -math.inf


def tuned(merit_of: Callable[[float], float], rates: Sequence[float]) -> float:
    """The learning rate of most merit; one beyond it is tried while it is the lowest or the highest of those tried."""
    merits = {rate: merit_of(rate) for rate in sorted(rates)}
    while True:
        best = max(merits, key=merits.__getitem__)
        place = LADDER.index(best)
        beyond = [rate for rate in LADDER[max(0, place - 1) : place + 2] if rate not in merits]
        if not beyond:
            return best
        merits |= {rate: merit_of(rate) for rate in beyond}


def interval(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, at least 2. Source: Student 1908."""
    values = np.asarray(differences, dtype=np.float64)
    spread = values.std(ddof=1) / math.sqrt(len(values)) * t_critical(math.log(RISK / 2), len(values) - 1)
    return float(values.mean() - spread), float(values.mean() + spread)


def table(rows: Sequence[Row]) -> str:
    """For each task and mode a line of each arm: its mean, and its difference to random halves, paired by seed."""
    shown = []
    held_out = [row for row in rows if row.part == "held-out"]
    for task, mode in sorted({(row.task, row.mode) for row in held_out}):
        mine = [row for row in held_out if (row.task, row.mode) == (task, mode)]
        shown += [f"{task}, {mode}:", "", "| arm | parameters | rate | " + " | ".join(FIGURES.values()) + " |"]
        shown += ["| --- | ---: | ---: |" + " ---: |" * len(FIGURES)]
        random = {row.seed: row for row in mine if row.arm == "random"}
        for arm in dict.fromkeys(row.arm for row in mine):
            of_arm = [row for row in mine if row.arm == arm]
            cells = [_cell(of_arm, random if arm != "random" else {}, name) for name in FIGURES]
            parameters = round(np.mean([row.parameters for row in of_arm]))
            shown.append(f"| {arm} | {parameters:,} | {of_arm[0].rate:g} | " + " | ".join(cells) + " |")
        shown.append("")
    return "\n".join(shown) or "nothing is measured on held-out pairs yet"


def _cell(rows: Sequence[Row], random: dict[int, Row], name: str) -> str:
    mean = f"{np.mean([getattr(row, name) for row in rows]):.4f}"
    differences = [getattr(row, name) - getattr(random[row.seed], name) for row in rows if row.seed in random]
    if len(differences) < 2:
        return mean
    low, high = interval(differences)
    return f"{mean}, {np.mean(differences):+.4f} ({low:+.4f} to {high:+.4f})"


def settings_of(arguments: argparse.Namespace) -> str:
    """What a measurement depends on, apart from its place in the table."""
    names = ("model", "pairs", "text", "steps", "batch", "length", "chars", "judged", "rank")
    return ", ".join(f"--{name} {getattr(arguments, name)}" for name in names)


def read(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training the chosen half of the matrices, all, and random halves.")
    parser.add_argument("--pairs", required=True, help="preference pairs, in any format that splaser reads")
    parser.add_argument("--text", required=True, help="general text, UTF-8, for what is forgotten")
    parser.add_argument("--measured", type=Path, required=True, help="file that keeps the measurements")
    parser.add_argument("--model", default="", help="folder or hub id; else SmolLM2-135M-Instruct")
    parser.add_argument("--by", nargs="+", default=["snr_ratio"], help="how halves are chosen, beside random")
    parser.add_argument("--modes", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--tasks", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row and of a window of text")
    parser.add_argument("--chars", type=int, default=1024, help="pairs with a longer prompt or answer are left out")
    parser.add_argument("--judged", type=int, default=96, help="most pairs of a part, and windows, to measure on")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA on all matrices; halves get as many parameters")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        choices=LADDER,
        help="learning rates to begin with, in place of each mode's; more are tried while the best is at an end",
    )
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    others = {row.settings for row in read(arguments.measured)} - {settings_of(arguments)}
    if others:
        raise SystemExit(f"{arguments.measured}: measured with {others.pop()}. Give these options, or another file.")
    rows = {row.place: row for row in read(arguments.measured)}
    study = Study(arguments)

    def measured(*place: Any) -> Row:
        if place not in rows:
            rows[place] = study.run(*place)
            with arguments.measured.open("a") as file:
                file.write(json.dumps(asdict(rows[place])) + "\n")
        return rows[place]

    found = []  # not what was measured at other rates
    for task, mode in itertools.product(arguments.tasks, arguments.modes):
        best = {}
        for arm in (arms := ["random", *arguments.by, "all"]):

            def merit_of(rate: float, at: tuple[Any, ...] = (task, mode, arm, TUNING_SEED)) -> float:
                return merit(measured(*at, rate, "validation"), study.untrained_text_loss)

            best[arm] = tuned(merit_of, arguments.rates or RATES[mode])
        for seed, arm in itertools.product(range(arguments.seeds), arms):
            found.append(measured(task, mode, arm, seed, best[arm], "held-out"))
    print(table(found))


if __name__ == "__main__":
    main()
