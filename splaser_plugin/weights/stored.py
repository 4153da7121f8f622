"""A checkpoint's weight matrices, as its loader would have them: named, and read from disk one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from splaser_plugin.checkpoints.checkpoint import Checkpoint, read_groups
from splaser_plugin.checkpoints.header import EXPONENTS, StoredTensor
from splaser_plugin.checkpoints.identity import identity_of, sampled_places
from splaser_plugin.checkpoints.quantised import quantised_weights, stored_as, with_weights
from splaser_plugin.checkpoints.roles import Role
from splaser_plugin.checkpoints.skeleton import (
    Skeleton,
    Source,
    skeleton_of,
)
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.matrices import (
    Candidate,
    Matrix,
    Skipped,
    choose_matrices,
    looks_like_embedding,
    named_parameters,
    other_of,
    sharers,
)

if TYPE_CHECKING:
    from torch import Tensor

CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Families whose checkpoints store linear weights as (inputs, outputs)."""
CPU = torch.device("cpu")
NOT_IN_MODEL = "transformers leaves it out when it loads this model"
BESIDE_WEIGHTS = "a scale of what a quantised layer takes or gives"


class StoredWeights:
    """The weights of a folder, known by its config.json as the loaded model knows them.

    Without a config.json, or with one that transformers makes no such model of, names and shapes on disk decide.
    Quantised weights are dequantised as they are read, in float32. Raises CheckpointError when they are quantised in a
    way that isn't understood.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device = CPU) -> None:
        """device: where `stream` brings the matrices."""
        self.checkpoint = checkpoint
        self._device = device
        self._quantised = quantised_weights(checkpoint)
        self.stored_as = stored_as(self._quantised.values())
        self._weights = with_weights(checkpoint, self._quantised)
        self.skeleton: Skeleton | None = None
        self.note = ""
        """Why names are those on disk; empty where they are the loaded model's."""
        if not checkpoint.config:
            self.note = "those on disk, as there is no config.json"
        else:
            try:
                skeleton = skeleton_of(self._weights)
            except CheckpointError as error:
                self.note = f"those on disk: {error}"
            else:
                if skeleton.problem is None or skeleton.lacks_only_its_head:
                    self.skeleton = skeleton
                else:
                    self.note = f"those on disk: config.json is of another model than the weights, {skeleton.problem}"
        self._sources: dict[str, Source] = {} if self.skeleton is None else dict(self.skeleton.sources)

    def matrices(
        self, include: Sequence[str] = (), exclude: Sequence[str] = (), towers: bool = False
    ) -> tuple[list[Matrix], list[Skipped]]:
        """As `matrices.model_matrices` gives them for the loaded model; `Matrix.stored` has the names on disk.

        They come in the files' order, which is the one to read them in. What is on disk and not in the model is
        among those left out.
        """
        candidates = _by_name(self._weights) if self.skeleton is None else self._candidates(self.skeleton)
        candidates = [replace(matrix, stored=self._on_disk(matrix.stored)) for matrix in candidates]
        matrices, skipped = choose_matrices(candidates, include=include, exclude=exclude, towers=towers)
        if self.skeleton is not None:
            skipped += [Skipped(name, NOT_IN_MODEL) for name in self.skeleton.unexpected]
        else:
            skipped += [
                Skipped(name, f"{str(stored.dtype).removeprefix('torch.')}, so it holds no weights")
                for name, stored in self._weights.tensors.items()
                if not _holds_numbers(stored)
            ]
        beside = {part.name for weight in self._quantised.values() for part in weight.beside}
        skipped += [Skipped(name, BESIDE_WEIGHTS) for name in sorted(beside)]
        places = {name: place for place, name in enumerate(self.checkpoint.tensors)}
        first: dict[str, int] = {}
        for matrix in matrices:
            first.setdefault(matrix.parameter, min(places[name] for name in matrix.stored))
        matrices.sort(key=lambda matrix: (first[matrix.parameter], matrix.parameter, matrix.expert or 0))
        return matrices, skipped

    def identity(self) -> str:
        """Which weights these are: as `in_memory.Weights.identity` of the model that they are loaded into.

        Quantised weights have one of their own, of the codes and scales on disk.
        """
        if self.skeleton is None or self._quantised:
            return self.checkpoint.identity()
        parameters = named_parameters(self.skeleton.model)
        shared: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            shared.setdefault(id(parameter), []).append(name)
        sources = {name: self._source_of(name, shared[id(parameter)]) for name, parameter in parameters.items()}
        plain = {
            name: source.stored[0] for name, source in sources.items() if source is not None and not source.conversion
        }
        values = self.checkpoint.sampled(plain.values())

        def sampled(name: str) -> Tensor:
            source = sources[name]
            if name in plain:
                return values[plain[name]]
            return torch.empty(0) if source is None else self._sampled_of_converted(name, source)

        return identity_of((name, tuple(parameter.shape), sampled(name)) for name, parameter in parameters.items())

    def _sampled_of_converted(self, name: str, source: Source) -> Tensor:
        """Of a parameter that is made of several tensors; of a stack, only the experts that are sampled are read."""
        assert source.conversion is not None and self.skeleton is not None
        shape = self.skeleton.model.get_parameter(name).shape
        places = sampled_places(shape.numel())
        size = math.prod(shape[1:] if len(shape) == 3 else shape)
        found = []
        for index in (places // size).unique().tolist():
            inside = places[places // size == index]
            of_expert = source.conversion.expert(index, shape[0]) if len(shape) == 3 else None
            names = of_expert or source.stored
            tensors = next(read_groups(self.checkpoint, [[self.checkpoint.tensors[stored] for stored in names]]))
            made = source.conversion.of(dict(zip(names, tensors, strict=True)), self.skeleton.model)[name]
            found.append(made.flatten()[inside - index * size if of_expert else inside])
        return torch.cat(found)

    def stream(self, mine: Sequence[Matrix], wanted: Sequence[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
        """Each of `mine` with its weights, (rows, columns), on the device, in the order given; see `read_groups`."""
        groups = [self._parts(matrix) for matrix in mine]
        order = iter(mine)

        def made(tensors: list[Tensor]) -> tuple[Matrix, Tensor]:
            matrix = next(order)
            return matrix, self._made(matrix, tensors).to(self._device)

        return map(made, read_groups(self.checkpoint, groups))  # a loop would keep the last tensor alive

    def _candidates(self, skeleton: Skeleton) -> list[Candidate]:
        from splaser_plugin.checkpoints.roles import roles

        found = roles(skeleton.model)
        shared = {key: self._tied(names) for key, names in sharers(found).items()}
        candidates = []
        for role in found:
            names = shared[id(role.parameter)]
            other = other_of(role.name, names) if role.name in names else None
            source = self._source_of(role.name, names if other is not None else ())
            if source is not None:
                candidates.append(Candidate(role, other, source.stored))
        return candidates

    def _source_of(self, name: str, shared_by: Sequence[str]) -> Source | None:
        """What a parameter is made of: of its own tensors, else of those of a name that shares its weight."""
        return next((self._sources[other] for other in (name, *shared_by) if other in self._sources), None)

    def _tied(self, names: Sequence[str]) -> Sequence[str]:
        """Those of the names that share one weight once they are loaded: none where the files have different ones."""
        there = [self._on_disk(self._sources[name].stored[:1]) for name in names if name in self._sources]
        if len({len(parts) for parts in there}) > 1:
            return ()
        return names if len(there) < 2 or all(map(self.checkpoint.are_equal, zip(*there, strict=True))) else ()

    def _parts(self, matrix: Matrix) -> list[StoredTensor]:
        """What is to be read for one matrix."""
        tensors = self.checkpoint.tensors
        source = self._source(matrix)
        if source.conversion is None:
            if quantised := self._quantised.get(source.stored[0]):
                return quantised.parts(matrix.expert)
            stored = tensors[source.stored[0]]
            if matrix.expert is None:
                return [stored]
            if len(stored.shape) == 3:
                return [stored.expert(matrix.expert)]
            return [stored.rows(matrix.expert * matrix.shape[0], (matrix.expert + 1) * matrix.shape[0])]
        return [tensors[name] for name in self._on_disk(self._taken(matrix, source))]

    def _made(self, matrix: Matrix, tensors: list[Tensor]) -> Tensor:
        source = self._source(matrix)
        if source.conversion is None or self.skeleton is None:
            (weights,) = self._dequantised(source.stored, tensors)
            is_whole = matrix.expert is not None and weights.numel() > matrix.shape[0] * matrix.shape[1]
            return matrix.view(weights) if is_whole else weights.view(matrix.shape)
        names = self._taken(matrix, source)
        named = dict(zip(names, self._dequantised(names, tensors), strict=True))
        made = source.conversion.of(named, self.skeleton.model)[matrix.parameter]
        if len(names) < len(source.stored):
            return made[0]
        return matrix.view(made)

    def _on_disk(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names of the stored tensors that weights of these names are made of."""
        quantised = self._quantised
        return tuple(
            stored
            for name in names
            for stored in ([part.name for part in quantised[name].parts(None)] if name in quantised else [name])
        )

    def _dequantised(self, names: Sequence[str], tensors: list[Tensor]) -> list[Tensor]:
        """The weights of these names. tensors: what was read for them."""
        left = iter(tensors)
        quantised = self._quantised
        return [
            quantised[name].weights(*islice(left, len(quantised[name].parts(None))))
            if name in quantised
            else next(left)
            for name in names
        ]

    def _taken(self, matrix: Matrix, source: Source) -> tuple[str, ...]:
        """Of the tensors that a conversion takes, those that this matrix is made of."""
        if matrix.expert is None or source.conversion is None or self.skeleton is None:
            return source.stored
        shape = self.skeleton.model.get_parameter(matrix.parameter).shape
        return source.conversion.expert(matrix.expert, shape[0]) or source.stored

    def _source(self, matrix: Matrix) -> Source:
        return self._sources.get(matrix.parameter) or Source((matrix.parameter,))


def _by_name(checkpoint: Checkpoint) -> list[Candidate]:
    """What names and shapes alone tell."""
    config = checkpoint.config
    transposed = config.get("model_type") in CONV1D_MODEL_TYPES
    tied = config.get("tie_word_embeddings", False)
    embedding = next((name for name in checkpoint.tensors if name.split(".")[-2:-1] == ["embed_tokens"]), None)
    candidates = []
    for name, stored in checkpoint.tensors.items():
        if not _holds_numbers(stored):
            continue
        is_head = name.split(".")[-2:-1] == ["lm_head"]
        other = "lm_head.weight" if name == embedding else embedding if is_head else None
        reason, experts, by_name = _role_by_name(name, stored.shape)
        is_turned = transposed and len(stored.shape) == 2 and reason is None
        role = Role(name, stored.shape, name, reason, experts, is_turned, by_name)
        candidates.append(Candidate(role, other if tied else None, (name,)))
    return candidates


def _holds_numbers(stored: StoredTensor) -> bool:
    """Whether it may be a weight, by its dtype."""
    return stored.dtype.is_floating_point and stored.dtype != EXPONENTS


def _role_by_name(name: str, shape: tuple[int, ...]) -> tuple[str | None, int | None, bool]:
    """(reason, experts, by_name) as in `Role`."""
    if name.endswith("bias"):
        return "a bias", None, False
    if 0 in shape:
        return "empty", None, False
    if len(shape) == 1:
        return "a vector (norm or scale)", None, True
    if len(shape) == 3:
        return (
            (None, shape[0], False) if "experts" in name.split(".") else ("3-D, and no stack of experts", None, False)
        )
    if len(shape) != 2:
        return f"{len(shape)}-D", None, False
    if looks_like_embedding(name):
        return "an embedding", None, True
    return None, None, False
