"""Which parameters of a model are weight matrices, and how each one is called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from splaser_plugin.checkpoints.naming import block_index, type_in_block, types_and_blocks
from splaser_plugin.errors import MatrixError, ModelError, nearest
from splaser_plugin.files.validation import NO_OTHER_KEYS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splaser_plugin.checkpoints.roles import Role

SHARES = "shares its weight with "
OUTSIDE = "outside the blocks (a head or a projection of the embeddings)"


@dataclass(frozen=True)
class Matrix:
    """One weight matrix: a whole parameter, or one expert's slice of a stacked one."""

    name: str
    """Module name, as in `model.layers.3.mlp.down_proj`; an expert's ends in its index: `...down_proj[5]`."""
    parameter: str
    """Name of the parameter that holds it, as in the state dict."""
    type: str
    """Module name inside its block, without expert numbers: `mlp.down_proj`; see `naming.types_and_blocks`."""
    block: int | None
    """Index of the transformer block; None outside the blocks."""
    shape: tuple[int, int]
    """(rows, columns) as stored."""
    expert: int | None = None
    """Its place in a stacked parameter."""
    transposed: bool = False
    """Stored as (inputs, outputs), the other way round from a linear layer (GPT-2's Conv1D)."""
    tower: str = ""
    """The part of a composite model that it stands in; empty for the language model."""
    stored: tuple[str, ...] = field(default=(), compare=False)
    """Names on disk of the tensors it is made of; none where the model was scanned in memory."""

    def view(self, parameter: Tensor) -> Tensor:
        """This matrix's part of its parameter: no copy, (rows, columns)."""
        if self.expert is None:
            return parameter.view(self.shape)
        return (parameter if parameter.ndim == 3 else parameter.view(-1, *self.shape))[self.expert].view(self.shape)


class MatrixSource(Protocol):
    """Where a scan gets its matrices from: a loaded model (`in_memory.Weights`) or files (`stored.StoredWeights`)."""

    note: str
    """What is to be said of the names; empty for nothing."""
    stored_as: str
    """How files hold the weights, where it is by codes and scales; else empty."""

    def matrices(
        self, include: Sequence[str] = (), exclude: Sequence[str] = (), towers: bool = False
    ) -> tuple[list[Matrix], list[Skipped]]:
        """The matrices in the order to read them in, and what is left out, with reasons; see `model_matrices`."""

    def identity(self) -> str:
        """Which weights these are; see `checkpoints.identity.identity_of`."""

    def stream(self, mine: Sequence[Matrix], wanted: Sequence[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
        """Each of `mine` with its weights, (rows, columns), in order. wanted: those of all processes together."""


def overview(matrices: Sequence[Matrix]) -> str:
    """How much that is, for people."""
    blocks = len({(matrix.tower, matrix.block) for matrix in matrices if matrix.block is not None})
    entries = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    return f"{blocks} block{'s' if blocks != 1 else ''}, {len(matrices):,} matrices of {entries:,} entries"


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not among the matrices, and why."""

    __pydantic_config__ = NO_OTHER_KEYS

    name: str
    reason: str
    tied_to: str | None = None
    """Another module that has the same weight."""


@dataclass(frozen=True)
class Candidate:
    """A parameter that may be a matrix."""

    role: Role
    tied_to: str | None = None
    stored: Sequence[str] = ()
    """Names on disk of what it is made of."""


def model_matrices(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = (), towers: bool = False
) -> tuple[list[Matrix], list[Skipped]]:
    """Weight matrices of a loaded model, in the model's order, and the parameters left out, with reasons.

    A matrix is the weight of a linear layer, or one expert of a stacked parameter.
    include: patterns of dotted segments (`mlp.down_proj`, `layers.3`, `*` inside a segment); only what
    matches one of them is kept. Embeddings, heads and norms are kept only if a pattern without `*` names
    them. exclude: patterns to leave out. towers: those of a composite model too, not only its language model.

    Raises MatrixError when a pattern matches nothing, when a tied weight is asked for by name, or when
    nothing is left; ModelError when the weights are quantised.
    """
    from splaser_plugin.checkpoints.roles import roles

    found = roles(model)
    for role in found:
        if not role.parameter.dtype.is_floating_point:
            raise ModelError(
                f"{role.name} is {role.parameter.dtype}: quantised weights can't be scanned or reduced. "
                "Load the model in bfloat16 or float32."
            )
    shared = sharers(found)
    candidates = [Candidate(role, other_of(role.name, shared[id(role.parameter)])) for role in found]
    return choose_matrices(candidates, include=include, exclude=exclude, towers=towers)


def sharers(found: Iterable[Role]) -> dict[int, list[str]]:
    """Names of the parameters by the identity of what they are."""
    names: dict[int, list[str]] = {}
    for role in found:
        names.setdefault(id(role.parameter), []).append(role.name)
    return names


def other_of(name: str, names: Iterable[str]) -> str | None:
    """The first of the names that is another one."""
    return next((other for other in names if other != name), None)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its name, tied ones under each of theirs. Under PEFT: by the base model's own names."""
    from splaser_plugin.checkpoints.roles import plain_name, tied_parameter

    plain = ((plain_name(name), parameter) for name, parameter in model.named_parameters(remove_duplicate=False))
    return {name: tied_parameter(model, name, parameter) for name, parameter in plain if name is not None}


def choose_matrices(
    candidates: Sequence[Candidate], *, include: Sequence[str], exclude: Sequence[str], towers: bool
) -> tuple[list[Matrix], list[Skipped]]:
    """The matrices among the parameters, and the others with reasons; see `model_matrices`."""
    names = {candidate.role.name: module_name(candidate.role.name) for candidate in candidates}
    patterns = {pattern: compile_pattern(pattern) for pattern in (*include, *exclude)}
    for pattern, regex in patterns.items():
        if not any(regex.search(name) for name in names.values()):
            raise MatrixError(
                f"pattern '{pattern}' matches no parameter of this model; {nearest(pattern, names.values())}."
            )
    types = types_and_blocks(
        {names[candidate.role.name]: candidate.role.tower for candidate in candidates if candidate.role.reason is None}
    )
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    for candidate in candidates:
        role, name = candidate.role, names[candidate.role.name]
        wanted = not include or any(patterns[pattern].search(name) for pattern in include)
        by_name = [pattern for pattern in include if "*" not in pattern and patterns[pattern].search(name)]
        kind, block = types.get(name) or (type_in_block(name), block_index(name))
        reason = _reason_to_skip(candidate, block, named=bool(by_name), with_tower=_asked(role, by_name, towers))
        if wanted and by_name and candidate.tied_to and role.name.endswith("weight"):
            raise MatrixError(
                f"{name} shares its weight with {module_name(candidate.tied_to)}, so a change to one changes "
                "both. Tied weights are neither scanned nor reduced: leave it out of --include."
            )
        if reason is None and not wanted:
            reason = "not in --include"
        if reason is None and any(patterns[pattern].search(name) for pattern in exclude):
            reason = "in --exclude"
        if reason is None:
            matrices.extend(_matrices_in(candidate, name, kind, block))
        elif not role.name.endswith("bias"):
            other = candidate.tied_to
            skipped.append(Skipped(name, reason, module_name(other) if other else None))
    if not matrices:
        raise MatrixError(f"no weight matrix is left of {len(names)} parameters{_why_none(skipped, patterns)}")
    return matrices, skipped


def _why_none(skipped: Sequence[Skipped], patterns: Collection[str]) -> str:
    """Why nothing is left: by the options, or by what the model is."""
    if patterns:
        return ". Loosen --include and --exclude."
    reasons = Counter("shares its weight with another" if one.tied_to else one.reason for one in skipped)
    listed = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
    return f" ({listed}). Give another model, or --towers for the parts beside its language model."


def _asked(role: Role, patterns: Sequence[str], towers: bool) -> bool:
    return towers or not role.tower or any(role.tower in pattern.split(".") for pattern in patterns)


def _reason_to_skip(candidate: Candidate, block: int | None, *, named: bool, with_tower: bool) -> str | None:
    """Why this parameter is no matrix to work on; None when it is one."""
    role = candidate.role
    if candidate.tied_to is not None:
        return SHARES + module_name(candidate.tied_to)
    if role.reason is not None and not (role.by_name and named):
        return role.reason
    if not with_tower:
        return f"in {role.tower}, beside the language model (--towers takes it in)"
    if block is None and not named:
        return OUTSIDE
    return None


def _matrices_in(candidate: Candidate, name: str, kind: str, block: int | None) -> list[Matrix]:
    role = candidate.role
    common: dict[str, Any] = {"tower": role.tower, "stored": tuple(candidate.stored)}
    if role.experts is not None:
        rows, columns = role.shape[-2] if len(role.shape) == 3 else role.shape[0] // role.experts, role.shape[-1]
        return [
            Matrix(f"{name}[{index}]", role.name, kind, block, (rows, columns), expert=index, **common)
            for index in range(role.experts)
        ]
    rows, columns = role.shape if len(role.shape) == 2 else (1, role.shape[0])
    return [Matrix(name, role.name, kind, block, (rows, columns), transposed=role.transposed, **common)]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression for whole dotted segments: `layers.1` never matches `layers.11`.

    Raises MatrixError when the pattern is empty or has an empty segment.
    """
    segments = pattern.strip().split(".")
    if not all(segments):
        raise MatrixError(f"pattern '{pattern}' has an empty segment. Write it like mlp.down_proj or layers.3.")
    body = r"\.".join(re.escape(segment).replace(r"\*", r"[^.]*") for segment in segments)
    return re.compile(rf"(?:^|\.){body}(?=$|\.|\[)")


def by_name(matrices: Iterable[Matrix]) -> Mapping[str, Matrix]:
    """Matrices by their name. Raises MatrixError when a name occurs twice."""
    named: dict[str, Matrix] = {}
    for matrix in matrices:
        if matrix.name in named:
            raise MatrixError(f"{matrix.name} occurs twice in this model, so its name doesn't tell which is meant.")
        named[matrix.name] = matrix
    return named


def module_name(parameter_name: str) -> str:
    """The name of the module whose weight this is; of another parameter its own."""
    return parameter_name.removesuffix(".weight")


def looks_like_embedding(name: str) -> bool:
    """For checkpoints, where module classes aren't known: by the module's own name."""
    module = module_name(name).rpartition(".")[2]
    return module in {"wte", "wpe"} or "embed" in module.split("_") or module.startswith("embed")
