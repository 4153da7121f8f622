"""A model's weight matrices, read and changed one at a time, wherever the parameters live."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from splaser_plugin.checkpoints.identity import identity_of, sampled_places
from splaser_plugin.checkpoints.roles import shape_of
from splaser_plugin.distributed import (
    broadcast,
    is_main,
    is_partitioned,
    is_sharded,
    process_count,
    reshard,
    whole,
)
from splaser_plugin.errors import MatrixError, ModelError, RankError
from splaser_plugin.weights.factored import factored_layers, is_factorable, is_smaller
from splaser_plugin.weights.gauge import Gauge, gauge
from splaser_plugin.weights.matrices import Matrix, Skipped, model_matrices, named_parameters
from splaser_plugin.weights.offloaded import OffloadedParameters
from splaser_plugin.weights.reducer import PlainReducer, Reducer
from splaser_plugin.weights.rest import Rest


class Weights:
    """Reads and writes the matrices of one model in place, so that whoever holds its parameters keeps them.

    They may be spread over devices, and offloaded by accelerate's hooks, see `splaser_plugin.weights.offloaded`.
    Raises ModelError when the weights can't be read and changed where they are: quantised, on the meta device without
    such hooks, or of an encoder-decoder model.
    """

    def __init__(self, model: nn.Module, root: nn.Module | None = None, *, rest: Rest | None = None) -> None:
        """root: what `fully_shard` was called on last, where the model is only a part of it. rest: what the model's
        folder has beside it, to be written with it.
        """
        _check(model)
        self.model = model
        self._root = root or model
        reshard(self._root)
        self.parameters: dict[str, nn.Parameter] = named_parameters(model)
        self._offloaded = OffloadedParameters(model)
        self._originals: dict[Matrix, Tensor] | None = None
        self.factors: dict[Matrix, Gauge] | None = None
        """After `keep_factors`: what each matrix, as it is stored, was reduced to."""
        self.reducer: Reducer = PlainReducer()
        """What `reduce` does."""
        self.rest = rest
        """None where the model came from no folder."""

    note = ""
    stored_as = ""

    def matrices(
        self, include: Sequence[str] = (), exclude: Sequence[str] = (), towers: bool = False
    ) -> tuple[list[Matrix], list[Skipped]]:
        """See `splaser_plugin.weights.matrices.model_matrices`. Raises ModelError as `check_dense` does too."""
        self.check_dense()
        return model_matrices(self.model, include=include, exclude=exclude, towers=towers)

    def check_dense(self) -> None:
        """Raise ModelError when the model has factored layers."""
        if factored_layers(self.model):
            raise ModelError(
                f"{type(self.model).__name__} has factored layers, which can't be scanned or reduced again. Use the "
                "dense model: splaser expand FOLDER -o DENSE, or splaser_plugin.expand(model)."
            )

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds only a part, so that reading a matrix takes all of them."""
        return is_sharded(self.model)

    @property
    def is_offloaded(self) -> bool:
        """Whether some of them are outside their modules until these compute."""
        return bool(self._offloaded)

    def effective(self, name: str) -> Tensor:
        """A whole parameter by name, as the model computes with it. Not to be written to."""
        if name in self._offloaded:
            return self._offloaded.read(name)
        return gathered(self.parameters[name])

    @property
    def dtype(self) -> str:
        """That of the model, as recipes call it: `bfloat16`."""
        model: Any = self.model
        return str(model.dtype).removeprefix("torch.")

    @property
    def place(self) -> str:
        """Where they are, for people: `cpu`, `cuda:0 and disk`, `cpu, a part in each of 2 processes`."""
        kept = {self._offloaded.place(name) for name in self.parameters if name in self._offloaded}
        named = {str(parameter.device) for name, parameter in self.parameters.items() if name not in self._offloaded}
        parts = f", a part in each of {process_count()} processes" if self.is_sharded else ""
        return " and ".join([*sorted(named), *sorted(kept)]) + parts

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        distinct = {id(parameter): parameter for parameter in self.parameters.values()}
        return sum(math.prod(shape_of(parameter)) * parameter.element_size() for parameter in distinct.values())

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor] | None:
        """What a plain checkpoint of the model holds, for `save_pretrained`; None where that finds it by itself."""
        if not self.is_sharded:
            return None
        reshard(self._root)
        values: dict[int, Tensor] = {}
        for name, parameter in self.parameters.items():
            if id(parameter) not in values:
                value = self.effective(name)
                values[id(parameter)] = value.cpu() if is_main() else torch.empty(0)
        buffers = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.parameters}
        return {**buffers, **{name: values[id(parameter)] for name, parameter in self.parameters.items()}}

    @torch.no_grad()
    def identity(self) -> str:
        """Which weights these are; see `checkpoints.identity.identity_of`."""

        def sampled(name: str) -> tuple[str, tuple[int, ...], Tensor]:
            whole = self.effective(name)
            values, places = whole.flatten(), sampled_places(whole.numel()).to(whole.device)
            if whole.element_size() == 1:  # torch 2.6 can't index 8-bit floats
                return name, tuple(whole.shape), values.view(torch.uint8)[places].view(whole.dtype)
            return name, tuple(whole.shape), values[places]

        return identity_of(map(sampled, self.parameters))

    @torch.no_grad()
    def identity_of_version_0_1(self) -> str:
        """The digest that recipes of version 0.1 have: with dtypes, and 16 values of each parameter."""
        digest = hashlib.sha256()
        for name in sorted(self.parameters):
            whole = self.effective(name)
            digest.update(f"{name} {tuple(whole.shape)} {whole.dtype}\n".encode())
            places = torch.linspace(0, whole.numel() - 1, 16, dtype=torch.float64).long()
            digest.update(whole.flatten()[places.to(whole.device)].double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def stream(self, mine: Sequence[Matrix], wanted: Sequence[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
        """See `MatrixSource.stream`. Where every process holds only a part, all of them read all that is wanted."""
        kept = frozenset(mine)
        for matrix in wanted if self.is_sharded else mine:
            weight = self.read(matrix)
            if matrix in kept:
                yield matrix, weight

    @torch.no_grad()
    def read(self, matrix: Matrix) -> Tensor:
        """The whole matrix, (rows, columns), in its own dtype on its own device. Not to be written to."""
        return matrix.view(self.effective(matrix.parameter))

    @torch.no_grad()
    def write(self, matrix: Matrix, values: Tensor) -> None:
        """Set the matrix to `values`, (rows, columns), in place. Every process ends with the same bits."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if matrix.parameter in self._offloaded:
            self._write_offloaded(matrix, broadcast(values))
            return
        reshard(self._root)
        parameter = self.parameters[matrix.parameter]
        if not isinstance(parameter, DTensor):
            with whole([parameter], changed=True):
                matrix.view(parameter.detach()).copy_(broadcast(values))
            return
        together = gathered(parameter)
        matrix.view(together).copy_(values)
        placed = distribute_tensor(together, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(placed.to_local())

    @torch.no_grad()
    def reduce(self, matrix: Matrix, rank: int) -> None:
        """Replace the matrix by what its reducer makes of it at that rank, in its own dtype and place.

        After `keep_factors` it is the product of factors, wherever the matrix can be stored so.
        Raises RankError when the rank is not within 1 and the shorter side.
        """
        weight, kept = self.read(matrix), None
        try:
            if self.factors is not None and is_smaller(matrix.shape, rank) and is_factorable(self.model, matrix):
                left, right = self.reducer.factors(matrix, weight, rank)
                kept = gauge(broadcast(left), broadcast(right), weight.dtype)
                reduced = kept.product()
            else:
                reduced = self.reducer.truncated(matrix, weight, rank)
        except RankError as error:
            raise RankError(f"{matrix.name}: {error}") from error
        self.write(matrix, reduced)
        self._set_factors(matrix, kept)

    def reduce_by(self, reducer: Reducer) -> None:
        """From now on `reduce` does what this one makes of a matrix."""
        self.reducer = reducer

    def keep_factors(self) -> None:
        """From now on reduce to factors in the model's dtype, and keep them in `factors`, for a smaller model.

        Raises ModelError when the model is sharded over processes or offloaded, or its folder has tensors that it
        doesn't hold.
        """
        if self.is_offloaded:
            raise ModelError(
                f"{type(self.model).__name__} has offloaded weights, so its matrices can't be kept as factors. Use "
                "--save dense, or a device that has room for the whole model."
            )
        if self.is_sharded:
            raise ModelError(
                f"{type(self.model).__name__} is sharded over processes, so its matrices can't be kept as factors. "
                "Use --save dense, or run splaser laser on the saved model in one process."
            )
        if self.rest and self.rest.tensors:
            raise ModelError(f"a factored model has no place for {self.rest.note}. Use --save dense.")
        self.factors = self.factors or {}

    def _set_factors(self, matrix: Matrix, factors: Gauge | None) -> None:
        if self.factors is not None:
            self.factors.pop(matrix, None)
            if factors is not None:
                self.factors[matrix] = factors

    @contextmanager
    def trying(self, matrix: Matrix) -> Iterator[Attempt]:
        """Change one matrix inside; unless `keep()` was called it is put back bit for bit, whatever happens."""
        attempt = Attempt(self, matrix)
        try:
            yield attempt
        finally:
            attempt.close()

    def remember_originals(self) -> None:
        """From now on keep the first state of every matrix whose change is kept, for `originals`."""
        if self._originals is None:
            self._originals = {}

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Inside, the matrices are as they were at first, the one being tried among them."""
        if self._originals is None:
            raise MatrixError("the original weights were not kept. Call remember_originals() before the first change.")
        changed = {}
        try:
            for matrix, original in self._originals.items():
                changed[matrix] = self.hold(matrix)
                self.put_back(matrix, original)
            yield
        finally:
            for matrix, values in changed.items():
                self.put_back(matrix, values)

    def hold(self, matrix: Matrix) -> Tensor:
        """A copy of what this process stores of the matrix."""
        return self._stored(matrix).clone()

    @torch.no_grad()
    def put_back(self, matrix: Matrix, held: Tensor) -> None:
        """Undo every change since `hold`, bit for bit."""
        if matrix.parameter in self._offloaded:
            self._write_offloaded(matrix, held)
            return
        reshard(self._root)
        self._stored(matrix).copy_(held)

    def _stored(self, matrix: Matrix) -> Tensor:
        from torch.distributed.tensor import DTensor

        if matrix.parameter in self._offloaded:
            return matrix.view(self._offloaded.read(matrix.parameter))
        parameter: Any = self.parameters[matrix.parameter]
        if is_partitioned(parameter):
            stored: Tensor = parameter.ds_tensor
            return stored
        own = parameter.detach()
        return own.to_local() if isinstance(own, DTensor) else matrix.view(own)

    def _write_offloaded(self, matrix: Matrix, values: Tensor) -> None:
        whole = self._offloaded.read(matrix.parameter).clone()
        matrix.view(whole).copy_(values)
        self._offloaded.write(matrix.parameter, whole)


class Attempt:
    """An undecided change of one matrix."""

    def __init__(self, weights: Weights, matrix: Matrix) -> None:
        self._weights = weights
        self._matrix = matrix
        self._held: Tensor | None = weights.hold(matrix)
        self._factors = (weights.factors or {}).get(matrix)
        self._remembered = weights._originals is not None and matrix not in weights._originals
        if weights._originals is not None:
            weights._originals.setdefault(matrix, self._held)

    def reduce(self, rank: int) -> None:
        """See `Weights.reduce`. A second call starts from the undecided state of the first."""
        self._weights.reduce(self._matrix, rank)

    def undo(self) -> None:
        """Put the matrix back bit for bit, undecided as before."""
        if self._held is not None:
            self._weights.put_back(self._matrix, self._held)
            self._weights._set_factors(self._matrix, self._factors)

    def keep(self) -> None:
        """Make the change final."""
        self._held = None

    def close(self) -> None:
        if self._held is None:
            return
        self.undo()
        if self._remembered and self._weights._originals is not None:
            del self._weights._originals[self._matrix]
        self._held = None


def check_generates(model: Any) -> None:
    """Raise ModelError for a model that writes no text."""
    kind = type(model).__name__
    if not hasattr(model, "can_generate"):
        raise ModelError(f"{kind} is no transformers model. Give the transformers model that is inside it.")
    if not model.can_generate():
        raise ModelError(
            f"{kind} writes no text, and only causal language models can be lasered. It can be scanned, and trained in "
            "part (freeze_to='top', when=None)."
        )


def model_name(model: nn.Module) -> str:
    """Where the model came from, as far as it knows: a folder or hub id, else its class."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def _check(model: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    kind = type(model).__name__
    plain = (nn.Parameter, DTensor)
    packed = {type(parameter).__name__ for parameter in model.parameters() if type(parameter) not in plain}
    if packed or getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        of_kind = f" ({min(packed)})" if packed else ""
        raise ModelError(
            f"{kind} has quantised weights{of_kind}, which can't be scanned or reduced. Load it in bfloat16 or "
            "float32; with a QLoRA adapter, train first, and then run `splaser laser BASE --adapter DIR` on the "
            "unquantised base."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder model; only causal language models can be lasered.")


def gathered(parameter: Tensor) -> Tensor:
    """All of a parameter, gathered from every process where it is in parts."""
    from torch.distributed.tensor import DTensor

    if is_partitioned(parameter):
        with whole([parameter]):
            return parameter.detach().clone()
    own = parameter.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own
