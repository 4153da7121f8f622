"""Types and blocks of modules, from their names: what may be compared with what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

ROOTS = frozenset({"model", "transformer", "base_model", "backbone"})
"""Modules that hold the whole model and so tell nothing."""


def types_and_blocks(towers: Mapping[str, str]) -> dict[str, tuple[str, int | None]]:
    """Module name to (type, index of its block), the index None outside the blocks.

    towers: module name to the tower it stands in, empty for the language model. The type is the name inside the
    block, as in `mlp.down_proj`; in front of it stands the tower, and where one tower has blocks of several kinds
    (encoder and decoder) what tells them apart. Numbers inside a block stay, but an expert's.
    """
    stacks: dict[str, set[tuple[str, ...]]] = {}
    for name, tower in towers.items():
        before, index, _ = _split(name)
        if index is not None:
            stacks.setdefault(tower, set()).add(before)
    kinds = {tower: _told_apart(found) for tower, found in stacks.items()}

    types: dict[str, tuple[str, int | None]] = {}
    for name, tower in towers.items():
        before, index, inside = _split(name)
        if index is None:
            types[name] = name, None
        else:
            kind = [*filter(None, [tower]), *kinds[tower][before], *without_expert_numbers(inside)]
            types[name] = ".".join(kind), index
    return types


def block_index(name: str) -> int | None:
    """The number of the block that a module stands in: the first in its name; None outside the blocks."""
    return _split(name)[1]


def type_in_block(name: str) -> str:
    """A module's name without what stands before and at its block's number, and without expert numbers."""
    _, index, inside = _split(name)
    return name if index is None else ".".join(without_expert_numbers(inside))


def without_expert_numbers(segments: Sequence[str]) -> list[str]:
    """`mlp.experts.3.up_proj` is an `mlp.experts.up_proj`; other numbers tell what differs."""
    return [
        segment
        for place, segment in enumerate(segments)
        if not (segment.isdecimal() and place and "expert" in segments[place - 1])
    ]


def _split(name: str) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """What stands before the block's number, the number, and what stands behind; a last number is no block's."""
    segments = tuple(name.split("."))
    for place, segment in enumerate(segments[:-1]):
        if segment.isdecimal():
            return segments[:place], int(segment), segments[place + 1 :]
    return segments, None, ()


def _told_apart(stacks: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Of several names, each without what all begin and end with; of one alone, nothing."""
    stacks = list(stacks)
    rest = {stack: list(stack) for stack in stacks}
    if len(stacks) == 1:
        return {stacks[0]: ()}
    for end in (0, -1):
        while all(rest.values()) and len({left[end] for left in rest.values()}) == 1:
            for left in rest.values():
                del left[end]
    return {stack: tuple(left) for stack, left in rest.items()}
