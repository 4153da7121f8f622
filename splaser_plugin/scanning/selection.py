"""Choose the matrices worth training: those of highest SNR or another measure, so many of each module type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypedDict

from typing_extensions import Unpack

from splaser_plugin.config.stages import Edge, Measure, SelectConfig
from splaser_plugin.errors import ConfigError, MatrixError, RankError, nearest
from splaser_plugin.scanning.chosen import Chosen, chosen_of, experts_together
from splaser_plugin.scanning.measures import CONTROLS, MEASURED, OF_EDGES, best_first, evenly_spaced
from splaser_plugin.scanning.scan import Scan
from splaser_plugin.scanning.spectrum_format import PublishedScan
from splaser_plugin.tables import Table
from splaser_plugin.weights.matrices import compile_pattern, looks_like_embedding

HEADS = frozenset({"lm_head", "embed_out"})


@dataclass(frozen=True)
class Selection(Table):
    """The matrices chosen from one scan, and what they were chosen by."""

    model: str
    """Folder or hub id, as the scan calls it; empty when it doesn't say."""
    source: str
    """The scan, as a reader can find it again: a path, or what the scan calls itself."""
    config: SelectConfig
    edge: Edge
    """Whose figures counted."""
    matrices: tuple[Chosen, ...]
    """Module type by module type, each from the best by `by` to the worst."""
    considered: int
    """How many matrices there were to choose from, a stack of experts' matrices being one."""
    block_sides: int | None
    """Rows + columns, summed over every matrix of the scan inside the blocks: how many parameters LoRA of
    rank 1 on all of them trains. None where the scan has no shapes."""
    tied: tuple[str, ...]
    """Chosen matrices that share their weight with another module."""
    has_experts: bool = False
    """Whether the model has experts, so that PEFT may take names of other modules for theirs."""
    also_meant: tuple[tuple[str, str], ...] = ()
    """A chosen name that ends another's, which isn't chosen, and that other's: PEFT would adapt both."""

    def __repr__(self) -> str:
        return f"Selection({self.model!r}, {len(self.matrices)} of {self.considered} matrices: {self.rule})"

    def rows(self) -> list[dict[str, Any]]:
        """One of each chosen matrix."""
        return [
            {"name": matrix.name, "type": matrix.type, "shape": matrix.shape, self.config.by: matrix.value}
            for matrix in self.matrices
        ]

    @property
    def names(self) -> list[str]:
        """Module names, as `lora_config` and freezing take them."""
        return [matrix.name for matrix in self.matrices]

    @property
    def by_type(self) -> dict[str, list[str]]:
        """The names of each module type."""
        groups: dict[str, list[str]] = {}
        for matrix in self.matrices:
            groups.setdefault(matrix.type, []).append(matrix.name)
        return groups

    def other_types(self, refused: str) -> str:
        """What to choose where a tool trains others than these: attention's types, or those that it doesn't refuse.

        refused: names of modules, or what the tool said of them.
        """
        left = [kind for kind in self.by_type if kind.rpartition(".")[2] not in refused]
        attention = next((kind for kind in left if "att" in kind), "")
        named = [attention.rpartition(".")[0] or attention] if attention else left
        return f"other --types, as {' or '.join(named)}" if named else "other --types"

    @property
    def rule(self) -> str:
        """The choice in words: `top 16 of each module type by snr_ratio (edge iqr)`."""
        config = self.config
        is_control = config.by in CONTROLS
        if config.fraction is None:
            share = f"{config.top}" if is_control else f"top {config.top}"
        else:
            share = f"{'a' if is_control else 'highest'} fraction {config.fraction:g}"
        among = f" among {', '.join(config.types)}" if config.types else ""
        return f"{share} of each module type{among} {_how(config, self.edge)}"


class SelectOptions(TypedDict, total=False):
    """The fields of `SelectConfig` as arguments, which checks them; type checkers know them from here."""

    top: int | None
    fraction: float | None
    by: Measure
    text: str
    seed: int
    edge: Edge | None
    types: Sequence[str]
    include_head: bool
    include_embeddings: bool


def choose(
    scan: Scan | PublishedScan,
    config: SelectConfig | None = None,
    *,
    source: str = "",
    importances: Mapping[str, float] | None = None,
    **options: Unpack[SelectOptions],
) -> Selection:
    """The matrices that are best by `by` of each module type: `top` of them, or the `fraction`, rounded up.

    Best are the highest; of `kappa`, the condition number, the lowest. `fisher` and `gradient` need `importances`.
    Types are every one but norms, unless the configuration names some; head and embeddings are each alone of
    their type. Experts whose matrices are stacked in one parameter are chosen together, by their mean. Ties are never
    broken by the order of the file: see `Scan.ranked`.

    Args:
        scan: What was scanned, by splaser or as it is published.
        config: Which matrices; one of `top` and `fraction` has to be there.
        source: How the result names the scan; else by its model.
        importances: What `splaser_plugin.importances` measured, by the same `by`.
        **options: Fields of `SelectConfig`, instead of a whole one or to change some of it.

    Returns:
        The chosen matrices, and what they were chosen by.

    Raises:
        ConfigError: Both or none of `top` and `fraction` are there, or the scan has no such figures.
        MatrixError: A type matches nothing, or a head or an embedding is asked for that the model doesn't have of
            its own.
    """
    changes: Mapping[str, Any] = {**options}
    config = replace(config or SelectConfig(), **changes)
    by, edge = config.by, config.edge or scan.edge
    count_of = _count(config)
    ranked = [
        chosen_of(*found, edge) for found in best_first(scan, by, edge, seed=config.seed, importances=importances)
    ]
    together = experts_together(ranked, scan, by)
    wanted = [matrix for matrix in together if not (is_head(matrix.name) or is_embedding(matrix.name))]
    if config.types:
        wanted = _of_types(wanted, config.types)
    else:
        wanted = [matrix for matrix in wanted if not is_norm(matrix.name)]
    if not wanted:
        raise MatrixError(f"{source or scan.model}: no matrix to choose from. Scan more, or give other --types.")

    chosen = [matrix for group in _best(wanted, count_of, is_spaced=by == "uniform").values() for matrix in group]
    tied: list[str] = []
    for asked, flag, belongs in (
        (config.include_head, "--include-head", is_head),
        (config.include_embeddings, "--include-embeddings", is_embedding),
    ):
        if asked:
            outside, shared = _outside_blocks(scan, ranked, flag, belongs)
            chosen += outside
            tied += shared
    return Selection(
        model=scan.model,
        source=source or scan.model,
        config=config,
        edge=edge,
        matrices=tuple(chosen),
        considered=len(wanted),
        block_sides=_block_sides(scan),
        tied=tuple(tied),
        has_experts=any(
            getattr(matrix, "stack", "") or "experts" in matrix.name.split(".")
            for matrix in (*scan.matrices, *scan.skipped)
        ),
        also_meant=_also_meant({matrix.name for matrix in chosen}, (*scan.matrices, *scan.skipped)),
    )


def top_by_type(scan: Scan | PublishedScan, count: int = 16) -> dict[str, list[str]]:
    """Module type to the names of its `count` matrices of highest snr_ratio: the published scanner's top.json."""
    config = SelectConfig(top=count)
    ranked = [chosen_of(*found, scan.edge) for found in best_first(scan, config.by, scan.edge)]
    best = _best(ranked, _count(config))
    return {kind: [matrix.name for matrix in group] for kind, group in best.items()}


def lora_targets(selection: Selection) -> tuple[list[str], list[str]]:
    """Full names for LoRA, in the selection's order: (modules, parameters), for PEFT's target_modules and
    target_parameters.

    Raises MatrixError when one of them can't have an adapter of its own: a tied weight (merging it would
    change the other module too), a norm, a single expert, or one whose name is the end of another's.
    """
    for name, other in selection.also_meant:
        raise MatrixError(f"{name} is the end of {other}, and PEFT would adapt both. Choose both or use mode unfrozen.")
    if selection.tied:
        raise MatrixError(
            f"{selection.tied[0]} shares its weight with another module, and merging a LoRA adapter would change "
            "both. Leave it out, or train it in mode unfrozen."
        )
    for matrix in selection.matrices:
        _refuse_expert(matrix)
        if is_norm(matrix.name):
            raise MatrixError(f"{matrix.name} is a norm, which LoRA can't adapt. Leave it out of --types.")
    modules = [matrix.name for matrix in selection.matrices if not matrix.parameter]
    return modules, [matrix.parameter for matrix in selection.matrices if matrix.parameter]


def trained_parameters(selection: Selection) -> list[str]:
    """Names of the parameters that full fine-tuning of the selection trains, in the selection's order.

    Raises MatrixError when a single expert is among them, since it can't be trained alone.
    """
    for matrix in selection.matrices:
        _refuse_expert(matrix)
    return [matrix.parameter or f"{matrix.name}.weight" for matrix in selection.matrices]


def matched_rank(selection: Selection, match_rank: int) -> int:
    """The LoRA rank at which the selection trains as many parameters as `match_rank` on all matrices.

    A matrix of n x m has r (n + m) LoRA parameters, and so has each one in a stack, so the rank is match_rank times
    the sum of n + m over all matrices inside the blocks, divided by that over the chosen ones, to the nearest whole
    number.
    Raises RankError when a chosen matrix is too small for it, MatrixError when shapes aren't known.
    """
    if match_rank < 1:
        raise ConfigError(f"--match-rank: got {match_rank}, expected at least 1.")
    shapes = known_shapes(selection)
    if selection.block_sides is None:
        raise MatrixError(f"{selection.source}: it has no shapes, so no rank can be matched. {_GIVE_RANK}")
    chosen_sides = adapter_sides(selection)
    rank = round(match_rank * selection.block_sides / chosen_sides)
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        fitting = max(1, min(shape) * chosen_sides // selection.block_sides)
        raise RankError(
            f"{name}: rank {rank} (to match rank {match_rank} on all matrices), but its shape {shape} allows at "
            f"most {min(shape)}. Choose more matrices, or lower --match-rank to {fitting}."
        )
    return rank


_GIVE_RANK = "Give --lora-rank a number, or scan the model with splaser scan."


def known_shapes(selection: Selection) -> dict[str, tuple[int, int]]:
    """Shapes by name. Raises MatrixError when the scan doesn't have them all."""
    shapes = {}
    for matrix in selection.matrices:
        if matrix.shape is None:
            raise MatrixError(f"{selection.source}: it has no shape for {matrix.name}. {_GIVE_RANK}")
        shapes[matrix.name] = matrix.shape
    return shapes


def adapter_sides(selection: Selection) -> int:
    """How many parameters LoRA of rank 1 on the chosen matrices trains. Raises MatrixError as `known_shapes`."""
    shapes = known_shapes(selection)
    return sum(matrix.experts * sum(shapes[matrix.name]) for matrix in selection.matrices)


def is_head(name: str) -> bool:
    return name.rpartition(".")[2] in HEADS


def is_embedding(name: str) -> bool:
    return not is_head(name) and looks_like_embedding(name)


def is_norm(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.endswith("norm") or last.startswith(("ln_", "norm")) or last.endswith("_ln")


def _count(config: SelectConfig) -> Callable[[int], int]:
    """How many to take of so many."""
    top, fraction = config.top, config.fraction
    if (top is None) == (fraction is None):
        raise ConfigError(f"--top, --fraction: got {top} and {fraction}, expected one of the two.")
    if fraction is None:
        return lambda total: min(top or 0, total)
    # as written, so that 0.07 of 100 is 7 and not the 8 that binary rounding would make of it
    share = Fraction(str(fraction))
    return lambda total: math.ceil(share * total)


def _how(config: SelectConfig, edge: str) -> str:
    if config.by in OF_EDGES:
        return f"by {config.by} (edge {edge})"
    if config.by in MEASURED:
        return f"by {config.by} (measured on {config.text or 'a text'})"
    return {
        "kappa": "by kappa, lowest first",
        "random": f"at random (seed {config.seed})",
        "uniform": "evenly spaced by depth",
    }[config.by]


def _of_types(matrices: Sequence[Chosen], types: Sequence[str]) -> list[Chosen]:
    known = sorted({matrix.type for matrix in matrices})
    patterns = [compile_pattern(pattern) for pattern in types]
    for pattern, regex in zip(types, patterns, strict=True):
        if not any(regex.search(kind) for kind in known):
            raise MatrixError(f"--types: '{pattern}' matches no module type of this scan; {nearest(pattern, known)}.")
    return [matrix for matrix in matrices if any(regex.search(matrix.type) for regex in patterns)]


def _best(
    ranked: Iterable[Chosen], count_of: Callable[[int], int], *, is_spaced: bool = False
) -> dict[str, list[Chosen]]:
    """The first of each module type, or those evenly spaced over all of it."""
    groups: dict[str, list[Chosen]] = {}
    for matrix in ranked:
        groups.setdefault(matrix.type, []).append(matrix)
    best = {}
    for kind, group in sorted(groups.items()):
        count = count_of(len(group))
        places = evenly_spaced(count, len(group)) if is_spaced else range(count)
        best[kind] = [group[place] for place in places]
    return best


def _outside_blocks(
    scan: Scan | PublishedScan,
    ranked: Iterable[Chosen],
    flag: str,
    belongs: Callable[[str], bool],
) -> tuple[list[Chosen], list[str]]:
    """The head or the embeddings, ranked or not, and the names of those whose weight is shared."""
    by_name = {matrix.name: matrix for matrix in ranked}
    chosen = [by_name[matrix.name] for matrix in scan.matrices if belongs(matrix.name)]
    skipped = [left_out.name for left_out in scan.skipped if belongs(left_out.name) and left_out.name not in by_name]
    chosen += [Chosen(name, name, None, None, None) for name in skipped]
    shared = sorted(name for name in _tied_names(scan) if belongs(name))
    if shared and belongs is is_head:
        raise MatrixError(
            f"{flag}: {shared[0]} shares its weight with the embeddings, so training it changes both. "
            "Leave it out, or use --include-embeddings in mode unfrozen, which trains that one weight."
        )
    if not chosen:
        raise MatrixError(f"{flag}: none is found in the scan of {scan.model}. Leave the option out.")
    return chosen, shared


def _also_meant(chosen: Set[str], scanned: Iterable[Any]) -> tuple[tuple[str, str], ...]:
    others = [matrix.name.split(".") for matrix in scanned if matrix.name not in chosen]
    ends = ((".".join(name[first:]), ".".join(name)) for name in others for first in range(1, len(name)))
    return tuple(pair for pair in ends if pair[0] in chosen)


def _tied_names(scan: Scan | PublishedScan) -> set[str]:
    if isinstance(scan, PublishedScan):
        return set(scan.tied)
    names: set[str] = set()
    for left_out in scan.skipped:
        if left_out.tied_to is not None:
            names |= {left_out.name, left_out.tied_to}
    return names


def _block_sides(scan: Scan | PublishedScan) -> int | None:
    if isinstance(scan, PublishedScan):
        return None
    return sum(sum(matrix.shape) for matrix in scan.matrices if matrix.block is not None and not is_norm(matrix.name))


def _refuse_expert(matrix: Chosen) -> None:
    """By its name, since published scans and those of old versions have nothing else to tell it by."""
    name = matrix.name
    if not matrix.parameter and (name.endswith("]") or "experts" in name.split(".")):
        raise MatrixError(
            f"{name} is one expert: transformers keeps all experts of a block in one parameter, so that it can't "
            "be trained alone. Leave experts out, as with --types self_attn, or scan the model with this version."
        )
