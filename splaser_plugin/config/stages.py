"""The options of each stage: every name, default, meaning and range is here, once.

Nothing heavy is imported.
"""

from __future__ import annotations

import math
import re
import typing
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from splaser_plugin.config.guards import AUTO, parse_guards
from splaser_plugin.config.options import Options, stage
from splaser_plugin.config.placement import DeviceConfig, PlaceConfig
from splaser_plugin.config.tasks import parse_tasks, task_of
from splaser_plugin.config.template_kwargs import parse_template_kwargs
from splaser_plugin.errors import ConfigError

Edge: TypeAlias = Literal["iqr", "mp", "gavish-donoho"]
Precision: TypeAlias = Literal["auto", "float32", "float64", "svd"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
EngineName: TypeAlias = Literal["auto", "transformers", "continuous", "vllm"]
Measure: TypeAlias = Literal["snr_ratio", "snr", "rank", "kappa", "fisher", "gradient", "random", "uniform"]
OptionalPath: TypeAlias = Annotated[Path | None, Field(strict=False)]
Patterns: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]

EDGES: tuple[Edge, ...] = typing.get_args(Edge)
SCORERS = ("semantic", "margin", "perplexity")
AFTER_PROMPTS = frozenset({"margin", "chosen"})
"""Scorers and guards that read given answers to the pairs' prompts."""
MAX_PROMPT_TOKENS, MAX_ANSWER_TOKENS = 2048, 1024
"""Longer ones are rare in published preference data: see docs/choosing.md."""
LARGEST_TOLERANCE = 700.0
"""Nats a token, of which a ratio of perplexities is still a number."""
DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"

DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@stage
class ApplyConfig(PlaceConfig):
    """How a recipe is applied."""


@stage
class ScanConfig(DeviceConfig):
    """How a scan is done. A loaded model is scanned where it is, whatever `device` says."""

    edge: Edge = "iqr"
    """Where signal ends and noise begins."""
    include: Patterns = ()
    """Only matrices that match this pattern of dotted segments; repeatable."""
    exclude: Patterns = ()
    """Leave out matrices that match this pattern; repeatable."""
    towers: bool = False
    """Those for images or sound of a multimodal model, too, not only its language model."""
    precision: Precision = "auto"
    """Arithmetic of the singular values."""


@stage
class SelectConfig(Options):
    """Which matrices of a scan to train: so many of each module type, those of highest `by`."""

    top: int | None = Field(default=None, ge=1)
    """Matrices per module type."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of each module type, rounded up."""
    by: Measure = "snr_ratio"
    """What ranks them: snr_ratio as published; random and uniform (evenly spaced by depth) are controls."""
    text: str = ""
    """Text that fisher and gradient are measured on: a file, or a hub data set as NAME or NAME:SUBSET."""
    seed: int = Field(default=0, ge=0)
    """Of random."""
    edge: Edge | None = None
    """Whose figures count; else the scan's edge."""
    types: Patterns = ()
    """Only these module types, as mlp.down_proj or self_attn; repeatable."""
    include_head: bool = False
    """The output head, too."""
    include_embeddings: bool = False
    """The embeddings, too."""

    def __post_init__(self) -> None:
        if self.text and self.by not in ("fisher", "gradient"):
            raise ConfigError(f"--text goes with --by fisher or gradient, and this is --by {self.by}. Leave it out.")


@stage
class RankConfig(Options):
    """The rank of LoRA adapters."""

    lora_rank: str | None = None
    """A number, or auto; 32 if not given."""
    match_rank: int = 32
    """With auto: as many parameters as this rank on every matrix."""


@stage
class TrainingConfig(RankConfig):
    """A training run to write a configuration for: how, on what and to where."""

    mode: Literal["unfrozen", "lora", "qlora"] = "lora"
    """Full fine-tuning of the chosen matrices (unfrozen), adapters on them, or adapters on 4-bit weights."""
    base: OptionalPath = None
    """Your own YAML: the targets are set in it, all else stays."""
    model: str = ""
    """Folder or hub id of the model; else the one that was scanned."""
    dataset: OptionalPath = None
    """Training data: a json, jsonl, csv or parquet file."""
    output_dir: str = ""
    """Folder that the training run writes to."""


@stage
class MeasureConfig(PlaceConfig):
    """How a model is measured: the pairs, the answers, the text and the scores."""

    samples: int = Field(default=128, ge=1)
    """Pairs to read: the first usable ones, held-out ones among them; as many windows of --text, and as many documents
    of a task."""
    max_prompt_tokens: int = Field(default=MAX_PROMPT_TOKENS, ge=1)
    """Pairs with a longer prompt are dropped; all its turns count, the chat template doesn't."""
    max_answer_tokens: int = Field(default=MAX_ANSWER_TOKENS, ge=1)
    """Pairs with a longer chosen or rejected answer are dropped."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer the model may generate, in tokens."""
    text: str = ""
    """Text for perplexity: a file, or a hub data set with a text column, as NAME or NAME:SUBSET."""
    window: int = Field(default=384, ge=2)
    """Tokens in one window of --text; windows don't overlap."""
    tasks_path: str = ""
    """Folder of your own task files (YAML) of lm-evaluation-harness, beside the tasks that it has."""
    embedder: str = DEFAULT_EMBEDDER
    """Sentence-transformers model (folder or id), or 'self'."""
    template: Literal["auto", "chatml", "instruct"] = "auto"
    """Prompt format; auto is the tokenizer's own chat template."""
    template_kwargs: Patterns = ()
    """A variable of the chat template, as KEY=VALUE (enable_thinking=false); repeatable."""
    batch_size: int = Field(default=32, ge=0)
    """Prompts generated for at once; 0 finds it by measurement."""
    engine: EngineName = "auto"
    """What writes the answers: a loop over transformers' generate, its continuous batching, or vLLM; auto is the loop,
    and in a long `laser` in float32 the one of those installed that a warm-up finds fastest."""
    engine_url: str = ""
    """Address of a vLLM server that is to write the answers, as http://localhost:8000; goes with --engine vllm.
    Its key, if it has one, is read from VLLM_API_KEY or OPENAI_API_KEY."""
    dtype: Dtype = "auto"
    """Weights' dtype; auto is the checkpoint's own."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""

    def __post_init__(self) -> None:
        PlaceConfig.__post_init__(self)
        parse_template_kwargs(self.template_kwargs)
        if self.engine_url and self.engine != "vllm":
            raise ConfigError(f"--engine-url goes with --engine vllm, and this is --engine {self.engine}.")
        if self.engine_url and not re.match(r"https?://[^/]", self.engine_url):
            raise ConfigError(f"--engine-url: got '{self.engine_url}', expected one like http://localhost:8000.")


@stage
class CompareConfig(MeasureConfig):
    """How models are compared with each other."""

    tasks: str = ""
    """Tasks of lm-evaluation-harness, with commas: its own (arc_easy), or those of --tasks-path."""

    def __post_init__(self) -> None:
        MeasureConfig.__post_init__(self)
        if self.tasks_path and not parse_tasks(self.tasks):
            raise ConfigError("--tasks-path has the files of --tasks, and there are none. Give --tasks NAME too.")
        if self.embedder == "self":
            raise ConfigError(
                "--embedder self: each model would measure itself. Give a sentence-transformers model (folder or id)."
            )


@stage
class LaserConfig(ScanConfig, MeasureConfig):
    """How a laser run is done: what is measured, and the search."""

    scan: str = ""
    """scan.json of these weights, from disk or in memory, to be used instead of a new scan."""
    held_out_fraction: float = Field(default=0.3, ge=0, le=0.9)
    """Part of the pairs kept for the verdict at the end; 0 searches on all."""
    held_out: str = ""
    """File or data set for the verdict instead of a fraction, at most --samples of it."""
    candidates: int = Field(default=15, ge=1)
    """Most truncations to try, one matrix each unless --ranks gives several."""
    rank_by: Literal["snr", "gradient"] = "snr"
    """Which to try first: lowest SNR, or best predicted by a gradient over some pairs."""
    ranks: str = ""
    """Ranks to try of each matrix: edges and fractions, as in iqr,mp,0.5,0.1; empty: --edge."""
    adapter: str = ""
    """LoRA adapter folder to merge into the model first."""
    scorer: str = "auto"
    """What is measured: semantic, margin, perplexity, a task of lm-evaluation-harness (lm-eval:TASK), or the dotted
    path of a function of your own (package.module.function): it gets (model, tokenizer, pairs) and returns one number a
    pair, higher is better. auto is semantic, and margin with --objective compress."""
    guard: str = "auto"
    """Keep nothing that is worse than the base by more than this: perplexity:1.02 allows a perplexity 2 % higher,
    margin:0.05, semantic:0.05, chosen:0.05 (the log-probability of the chosen answers alone) or lm-eval:TASK:0.05 a
    mean that much lower; several with commas, or none. auto watches what a search by margin doesn't see: the chosen
    answers, and --text if given, each within --tolerance."""
    objective: Literal["quality", "compress"] = "quality"
    """Make the score better, or remove parameters while it stays as good."""
    accept: Literal["auto", "improve", "confident", "harmless"] = "auto"
    """What is kept: any better mean, only a significantly better one, or what a test calls no worse than the base
    by --tolerance or more; auto is improve, and harmless with --objective compress."""
    reduce: Literal["auto", "svd", "whitened", "fisher"] = "auto"
    """How a matrix is brought to a lower rank: by its own singular values (svd), by what it does to its inputs
    (whitened), or by what that does to the model's predictions (fisher); auto is svd, and fisher with --objective
    compress."""
    budget: float = Field(default=0.2, gt=0, lt=1)
    """Largest share of the blocks' parameters that --objective compress removes, in steps of 2 %."""
    calibration_tokens: int = Field(default=24_000, ge=1)
    """Tokens that whitened and fisher are measured on: of the pairs and of --text, never of what is held out."""
    tolerance: float = Field(default=0.02, ge=0)
    """Loss of the mean score that --accept harmless takes for none, in the score's unit."""
    alpha: float = Field(default=0.05, ge=1e-6, le=0.5)
    """Chance that --accept confident keeps anything of no use, or harmless anything that loses --tolerance; heavy
    losses on a few pairs can go unseen."""
    race: bool = True
    """Stop scoring a candidate that can't win any more."""
    save: Literal["dense", "factored"] = "dense"
    """Reduced matrices on disk: whole, or as factors, which are smaller at every rank."""

    def __post_init__(self) -> None:
        MeasureConfig.__post_init__(self)
        parse_ranks(self.ranks)
        known = self.scorer in ("auto", *SCORERS) or task_of(self.scorer)
        if not known and not DOTTED_PATH.fullmatch(self.scorer):
            raise ConfigError(
                f"--scorer: got '{self.scorer}', expected one of auto, {', '.join(SCORERS)}, lm-eval:TASK, or the "
                "dotted path of your own function, package.module.function."
            )
        if self.objective == "compress" and self.accept not in ("auto", "harmless"):
            raise ConfigError(
                f"--accept {self.accept} with --objective compress: removing parameters makes no score better. "
                "Leave --accept out, or give --accept harmless."
            )
        self._refuse_contradictions()
        asked = {"--scorer": self.scored_by == "perplexity", "--guard": "perplexity" in self.guards}
        for flag in [f"{flag} perplexity" for flag in asked if asked[flag] and not self.text]:
            raise ConfigError(f"{flag} needs a text: give --text FILE, or a hub data set's name.")

    def _refuse_contradictions(self) -> None:
        if self.tolerance == 0 and self.acceptance == "harmless":
            raise ConfigError(
                "--tolerance 0 with --accept harmless: no test can tell a loss from none, so nothing would be kept. "
                "Give --tolerance more than 0."
            )
        if self.held_out and self.unit != "pairs":
            whose = "windows of --text" if self.unit == "windows" else "documents of the task"
            raise ConfigError(
                f"--held-out with --scorer {self.scored_by}: what is held out are {whose}. Use --held-out-fraction."
            )
        if self.held_out and "held_out_fraction" in self.changes:
            raise ConfigError("--held-out and --held-out-fraction: got both, expected one of the two.")

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Flags that were given, and that this run doesn't use."""
        reads_text = "perplexity" in self.scorers or self.judges_text
        unused = {
            "budget": not self.tries_budgets,
            "candidates": self.tries_budgets,
            "rank_by": self.tries_budgets,
            "calibration_tokens": self.reducer == "svd",
            "tolerance": self.acceptance != "harmless" and not (self.guard == AUTO and self.guards),
            "alpha": self.acceptance == "improve",
            "text": not reads_text,
            "window": not reads_text,
            "embedder": "semantic" not in self.scorers,
            "engine": "semantic" not in self.scorers,
            "engine_url": "semantic" not in self.scorers,
            "tasks_path": not self.tasks_used,
        }
        return tuple(f"--{name.replace('_', '-')}" for name in unused if unused[name] and name in self.changes)

    @property
    def acceptance(self) -> str:
        """`accept`, with `auto` resolved."""
        if self.accept != "auto":
            return self.accept
        return "harmless" if self.objective == "compress" else "improve"

    @property
    def scored_by(self) -> str:
        """`scorer`, with `auto` resolved."""
        if self.scorer != "auto":
            return self.scorer
        return "margin" if self.objective == "compress" else "semantic"

    @property
    def reducer(self) -> Literal["svd", "whitened", "fisher"]:
        """`reduce`, with `auto` resolved."""
        if self.reduce != "auto":
            return self.reduce
        return "fisher" if self.objective == "compress" else "svd"

    @property
    def tries_budgets(self) -> bool:
        """Whether whole models are tried, one a budget, instead of one matrix after the other."""
        return self.objective == "compress" and not self.ranks

    @property
    def orders_by_gradient(self) -> bool:
        """Whether a gradient says which candidates are tried first."""
        return self.rank_by == "gradient" and not self.tries_budgets

    @property
    def judges_text(self) -> bool:
        """Whether windows of text have a say, and a verdict, beside what the scorer measures."""
        return bool(self.text) and self.scored_by != "perplexity" and (self.tries_budgets or self.reducer != "svd")

    @property
    def unit(self) -> str:
        """What is scored: `pairs`, `windows` of text, or `documents` of a task."""
        if task_of(self.scored_by):
            return "documents"
        return "windows" if self.scored_by == "perplexity" else "pairs"

    @property
    def needs_pairs(self) -> bool:
        """Whether anything that is measured takes preference pairs."""
        if self.unit == "documents" and self.reducer != "svd" and not self.text:
            return True  # a reduction that is measured needs something to be measured on
        guards = {guard for guard in self.guards if guard != "perplexity" and not task_of(guard)}
        return self.unit == "pairs" or self.orders_by_gradient or bool(guards)

    @property
    def tasks_used(self) -> tuple[str, ...]:
        """The tasks of lm-evaluation-harness that it is measured by."""
        return tuple(sorted({task_of(name) for name in self.scorers} - {""}))

    @property
    def scorers(self) -> set[str]:
        """Names of all that the model is measured by."""
        margin = "margin" if self.orders_by_gradient else ""
        return {self.scored_by, *self.guards, margin} - {""}

    @property
    def reads_prompts(self) -> bool:
        """Whether any of them takes the pairs' prompts, by the chat template."""
        return bool(self.scorers & {"semantic", *AFTER_PROMPTS})

    @property
    def guards(self) -> dict[str, float]:
        """The guards' scorers and their limits, with `auto` resolved: see `parse_guards`.

        The margin rises where rejected answers lose more than chosen ones, though both lose, and a text with them.
        """
        if self.guard != AUTO:
            return parse_guards(self.guard)
        if self.scored_by != "margin":
            return {}
        guards_text = self.text and not self.tries_budgets  # those test the text by themselves
        ratio = math.exp(min(self.tolerance, LARGEST_TOLERANCE))
        return {"chosen": self.tolerance} | ({"perplexity": ratio} if guards_text else {})


def parse_ranks(text: str) -> tuple[Edge | float, ...]:
    """What `--ranks` asks for: names of edges, and fractions of a matrix's components to keep.

    Raises ConfigError for a part that is neither, and for one that is given twice.
    """
    ranks: list[Edge | float] = []
    for part in text.split(",") if text.strip() else ():
        name = part.strip()
        value = edge_or_fraction(name)
        if value is None:
            raise ConfigError(
                f"--ranks: '{name}' in '{text}' is neither an edge ({', '.join(EDGES)}) nor a fraction between 0 and 1."
            )
        if value in ranks:
            raise ConfigError(f"--ranks: '{name}' stands twice in '{text}'. Leave one out.")
        ranks.append(value)
    return tuple(ranks)


def edge_or_fraction(text: str) -> Edge | float | None:
    """The edge of that name, or a number between 0 and 1; None for anything else."""
    for edge in EDGES:
        if text == edge:
            return edge
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < 1 else None
