"""The options of each stage: every name, default, meaning and range is here, once.

The command line and the documentation are made from these classes. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from splaser_plugin.errors import ConfigError, nearest

EDGES = ("iqr", "mp", "gavish-donoho")
PRECISIONS = ("auto", "float32", "float64")
TEMPLATES = ("auto", "chatml", "instruct")
SCORERS = ("semantic", "margin", "perplexity")
OBJECTIVES = ("quality", "compress")
ACCEPTANCES = ("auto", "improve", "confident", "harmless")
SCREENS = ("none", "margin")
RANKINGS = ("snr", "gradient")
SAVES = ("dense", "factored")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"

DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

_Config = TypeVar("_Config", bound="Options")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: int | float | None = None,
    maximum: int | float | None = None,
) -> Any:
    """A dataclass field with its one-line meaning, and what values it may have."""
    checks = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=checks)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the configurations of all stages have in common."""

    allow_pickle: bool = option(False, "Load weights that are pickled (.bin) if there are no others.")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            check_value(each, getattr(self, each.name))

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """A configuration from plain values. Raises ConfigError when a key is not known."""
        known = {each.name for each in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"option '{key}' is not known; {nearest(str(key), known)}.")
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)

    @property
    def changes(self) -> dict[str, Any]:
        """The options that aren't at their defaults."""
        fields = dataclasses.fields(self)
        return {each.name: getattr(self, each.name) for each in fields if getattr(self, each.name) != each.default}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a JSON or YAML file."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class ScanConfig(Options):
    """How a scan is done."""

    edge: str = option("iqr", "Where signal ends and noise begins.", choices=EDGES)
    include: tuple[str, ...] = option((), "Only matrices that match this pattern of dotted segments; repeatable.")
    exclude: tuple[str, ...] = option((), "Leave out matrices that match this pattern; repeatable.")
    precision: str = option("auto", "Arithmetic of the singular values.", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(Options):
    """How a model is measured: the pairs, the answers, the text and the scores."""

    samples: int = option(
        128, "Pairs to read: the first usable ones, held-out ones among them; as many windows of --text.", minimum=1
    )
    max_prompt_chars: int = option(512, "Pairs with a longer prompt are dropped.", minimum=1)
    max_answer_chars: int = option(512, "Pairs with a longer answer are dropped.", minimum=1)
    max_new_tokens: int = option(512, "Longest answer the model may generate, in tokens.", minimum=1)
    text: str = option("", "Text for perplexity: a file, or a hub data set with a text column, as NAME or NAME:SUBSET.")
    window: int = option(384, "Tokens in one window of --text; windows don't overlap.", minimum=2)
    embedder: str = option(DEFAULT_EMBEDDER, "Sentence-transformers model (folder or id), or 'self'.")
    template: str = option("auto", "Prompt format; auto is the tokenizer's own chat template.", choices=TEMPLATES)
    batch_size: int = option(32, "Prompts generated for at once; 0 finds it by measurement.", minimum=0)
    device: str = option("auto", "Device to run on: auto, cpu, cuda, cuda:1, mps.")
    dtype: str = option("auto", "Weights' dtype; auto is the checkpoint's own.", choices=DTYPES)
    seed: int = option(0, "Seed of everything random.", minimum=0)

    @property
    def pair_limits(self) -> dict[str, Any]:
        """Which pairs are read, as `read_pairs_from` takes it."""
        return {
            "samples": self.samples,
            "max_prompt_chars": self.max_prompt_chars,
            "max_answer_chars": self.max_answer_chars,
        }


@dataclass(frozen=True, kw_only=True)
class CompareConfig(MeasureConfig):
    """How models are compared with each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedder == "self":
            raise ConfigError(
                "--embedder self: each model would be its own ruler. Give a sentence-transformers model (folder or id)."
            )


@dataclass(frozen=True, kw_only=True)
class LaserConfig(ScanConfig, MeasureConfig):
    """How a laser run is done: what is measured, and the search."""

    held_out_fraction: float = option(
        0.3, "Part of the pairs kept for the verdict at the end; 0 searches on all.", minimum=0, maximum=0.9
    )
    held_out: str = option("", "File or data set for the verdict instead of a fraction, at most --samples of it.")
    candidates: int = option(15, "Most truncations to try, one matrix each unless --ranks gives several.", minimum=1)
    rank_by: str = option(
        "snr", "Which to try first: lowest SNR, or best predicted by a gradient over some pairs.", choices=RANKINGS
    )
    ranks: str = option("", "Ranks to try of each matrix: edges and fractions, as in iqr,mp,0.5,0.1; empty: --edge.")
    adapter: str = option("", "LoRA adapter folder to merge into the model first.")
    scorer: str = option(
        "semantic",
        f"What is made better: {', '.join(SCORERS)}, or the dotted path of a function of your own "
        "(package.module.function): it gets (model, tokenizer, pairs) and returns one number a pair, higher is better.",
    )
    guard: str = option(
        "",
        "Keep nothing that is worse than the base by more than this: perplexity:1.02 allows a perplexity 2 % higher, "
        "margin:0.05 or semantic:0.05 a mean score that much lower.",
    )
    objective: str = option(
        "quality", "Make the score better, or remove parameters while it stays as good.", choices=OBJECTIVES
    )
    accept: str = option(
        "auto",
        "What is kept: any better mean, only a significantly better one, or what a test calls no worse than the base "
        "by --tolerance or more; auto is improve, and harmless with --objective compress.",
        choices=ACCEPTANCES,
    )
    tolerance: float = option(
        0.02, "Loss of the mean score that --accept harmless takes for none, in the score's unit.", minimum=0
    )
    alpha: float = option(
        0.05,
        "Chance that --accept confident keeps anything of no use, or harmless anything that loses --tolerance; heavy "
        "losses on a few pairs can go unseen.",
        minimum=1e-6,
        maximum=0.5,
    )
    race: bool = option(True, "Stop scoring a candidate that can't win any more.")
    screen: str = option("none", "Cheap score that rules out candidates before any answer.", choices=SCREENS)
    save: str = option("dense", "Reduced matrices on disk: whole, or as two factors where smaller.", choices=SAVES)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_ranks(self.ranks)
        if self.scorer not in SCORERS and not DOTTED_PATH.fullmatch(self.scorer):
            raise ConfigError(
                f"--scorer: got '{self.scorer}', expected one of {', '.join(SCORERS)}, or the dotted path of your own "
                "function, package.module.function."
            )
        if self.objective == "compress" and self.accept not in ("auto", "harmless"):
            raise ConfigError(
                f"--accept {self.accept} with --objective compress: removing parameters makes no score better. "
                "Leave --accept out, or give --accept harmless."
            )
        self._refuse_contradictions()
        asked = {"--scorer perplexity": self.scorer, "--guard perplexity": self.guard_scorer}
        for flag in [flag for flag, scorer in asked.items() if scorer == "perplexity" and not self.text]:
            raise ConfigError(f"{flag} needs a text: give --text FILE, or a hub data set's name.")

    def _refuse_contradictions(self) -> None:
        if self.screen != "none" and self.acceptance == "harmless":
            asked = "--accept harmless" if self.accept == "harmless" else "--objective compress"
            raise ConfigError(
                f"--screen {self.screen} with {asked}: the screen drops what is worse than the best so far, even far "
                "within --tolerance. Leave --screen out."
            )
        if self.screen == self.scorer:
            raise ConfigError(f"--screen {self.screen}: it is the scorer itself, and rules out nothing before it.")
        if self.tolerance == 0 and self.acceptance == "harmless":
            raise ConfigError(
                "--tolerance 0 with --accept harmless: no test can tell a loss from none, so nothing would be kept. "
                "Give --tolerance more than 0."
            )
        if self.held_out and self.scorer == "perplexity":
            raise ConfigError(
                "--held-out with --scorer perplexity: what is held out are windows of --text. Use --held-out-fraction."
            )
        if self.held_out and "held_out_fraction" in self.changes:
            raise ConfigError("--held-out and --held-out-fraction: got both, expected one of the two.")

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Flags that were given, and that this run doesn't use."""
        reads_text = "perplexity" in self.scorers
        unused = {
            "tolerance": self.acceptance != "harmless",
            "alpha": self.acceptance == "improve",
            "text": not reads_text,
            "window": not reads_text,
            "embedder": "semantic" not in self.scorers,
        }
        return tuple(f"--{name.replace('_', '-')}" for name in unused if unused[name] and name in self.changes)

    @property
    def acceptance(self) -> str:
        """`accept`, with `auto` told."""
        if self.accept != "auto":
            return self.accept
        return "harmless" if self.objective == "compress" else "improve"

    @property
    def unit(self) -> str:
        """What is scored: `pairs`, or `windows` of text."""
        return "windows" if self.scorer == "perplexity" else "pairs"

    @property
    def needs_pairs(self) -> bool:
        """Whether anything that is measured takes preference pairs."""
        guarded = self.guard_scorer not in ("", "perplexity")
        return self.unit == "pairs" or self.screen == "margin" or self.rank_by == "gradient" or guarded

    @property
    def scorers(self) -> set[str]:
        """Names of all that the model is measured by."""
        margin = self.screen == "margin" or self.rank_by == "gradient"
        return {self.scorer, self.guard_scorer, "margin" if margin else self.scorer} - {""}

    @property
    def guard_scorer(self) -> str:
        """Name of the guard's scorer; empty for none."""
        return _guard(self.guard)[0]

    @property
    def guard_limit(self) -> float:
        """Largest ratio of perplexities, candidate to base, or largest fall of the mean score."""
        return _guard(self.guard)[1]


def parse_ranks(text: str) -> tuple[str | float, ...]:
    """The rungs of `--ranks`: names of edges, and fractions of a matrix's components to keep.

    Raises ConfigError for a part that is neither, and for one that is given twice.
    """
    rungs: list[str | float] = []
    for part in text.split(",") if text.strip() else ():
        rung = part.strip()
        value = rung if rung in EDGES else _fraction(rung)
        if value is None:
            raise ConfigError(
                f"--ranks: '{rung}' in '{text}' is neither an edge ({', '.join(EDGES)}) nor a fraction between 0 and 1."
            )
        if value in rungs:
            raise ConfigError(f"--ranks: '{rung}' stands twice in '{text}'. Leave one out.")
        rungs.append(value)
    return tuple(rungs)


def _fraction(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < 1 else None


def _guard(text: str) -> tuple[str, float]:
    if not text:
        return "", 0.0
    scorer, _, number = text.partition(":")
    least = 1.0 if scorer == "perplexity" else 0.0
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if scorer not in SCORERS or not least <= limit < math.inf:
        raise ConfigError(
            f"--guard: got '{text}', expected perplexity:RATIO with a ratio of at least 1 (perplexity:1.02), or "
            "margin:FALL or semantic:FALL with a fall of at least 0 (margin:0.05)."
        )
    return scorer, limit


def check_value(each: dataclasses.Field[Any], value: Any) -> None:
    """Raises ConfigError when the option `each` can't have this value."""
    limits = each.metadata
    flag = "--" + each.name.replace("_", "-")
    expected: type = type(each.default)
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (expected is not bool and isinstance(value, bool)):
        kind = "a list of text" if expected is tuple else expected.__name__
        raise ConfigError(f"{flag}: got {value!r}, expected {kind}.")
    if isinstance(value, tuple) and not all(isinstance(part, str) for part in value):
        raise ConfigError(f"{flag}: got {list(value)!r}, expected a list of text.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{flag}: got {value}, expected a finite number.")
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(f"{flag}: got '{value}', expected one of {', '.join(limits['choices'])}.")
    if limits["minimum"] is not None and not value >= limits["minimum"]:
        raise ConfigError(f"{flag}: got {value}, expected at least {limits['minimum']}.")
    if limits["maximum"] is not None and not value <= limits["maximum"]:
        raise ConfigError(f"{flag}: got {value}, expected at most {limits['maximum']}.")
