"""What several processes share. With one process each function is the identity.

Built on torch.distributed as accelerate or the trainer set it up.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from splaser_plugin.errors import ConfigError

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long one process waits for the others to begin with the same work, which may still be saving a checkpoint."""
SAID_AFTER_S = 10.0
"""After how long it says that it waits, and what for."""
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""Words in the errors of devices that have no error class of their own for it."""

_meetings = itertools.count()
_held: list[Any] = []
"""The processes' group, so that DDP is never the last to hold it: DDP destroys it with Python's lock, which gloo's own
thread may be waiting for to let go of a tensor, and then the process never ends. Let go of while Python still runs:
afterwards gloo's thread would end the process by `terminate`."""
atexit.register(_held.clear)
_whole: set[int] = set()
"""DeepSpeed's numbers of the parameters that are inside `whole`."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds only a part of the weights, be they gathered for a while or not."""
    from torch.distributed.tensor import DTensor

    return _has_fsdp(model) or any(
        isinstance(parameter, DTensor) or is_partitioned(parameter) for parameter in model.parameters()
    )


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter in parts, so that it is empty but for a while, and isn't `whole` now."""
    number = getattr(parameter, "ds_id", None)
    return number is not None and number not in _whole


@contextmanager
def whole(parameters: Iterable[Tensor], *, changed: bool = False) -> Iterator[None]:
    """Inside, those of the parameters that ZeRO-3 keeps in parts are whole in every process.

    changed: they are written to, and what the main process wrote is what all have afterwards.
    """
    parts = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    numbers = {part.ds_id for part in parts}  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if changed else None):
        _whole.update(numbers)
        try:
            yield
        finally:
            _whole.difference_update(numbers)


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether the processes compute every forward pass together, so that all of them need the same inputs."""
    from torch.distributed.tensor import DTensor

    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    return bool(meshes) and (not _has_fsdp(model) or any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes))


def reshard(model: nn.Module) -> None:
    """Let a sharded model give up the whole weights that it keeps after a forward pass.

    It would go on computing with them, whatever is written to the parts; and meanwhile they, not the parts, are its
    parameters.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter in model.parameters():
        if is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]


def _has_fsdp(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def join_processes() -> None:
    """Join the processes that `accelerate launch` or `torchrun` started beside this one; alone it does nothing.

    Called once by each command that shares its work, before anything else here. They part at the program's end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _is_on():
        return
    from accelerate import PartialState

    PartialState()
    atexit.register(dist.destroy_process_group)


def meet(what: str) -> None:
    """Wait until every process has come here, as each must that is to share the work.

    what: the call that all have to make; after `SAID_AFTER_S` the first that came says so. Raises ConfigError when some
    don't come within `PATIENCE_S`: they may never.
    """
    if process_count() == 1:
        return
    store = dist.distributed_c10d._get_default_store()  # a barrier of torch's own would wait for ever
    key = f"splaser/{what}/{next(_meetings)}"
    here, began = store.add(key, 1), time.monotonic()
    is_to_be_said = here == 1
    while here < process_count():
        waited = time.monotonic() - began
        if is_to_be_said and waited > SAID_AFTER_S:
            is_to_be_said = False
            logger.warning(
                "waiting until all of %d processes call %s, and %d did, for %.0f s at most. Where that stands in "
                "`if is_main_process`, take it out: all share the work.",
                process_count(),
                what,
                here,
                PATIENCE_S,
            )
        if waited > PATIENCE_S:
            raise ConfigError(
                f"{here} of {process_count()} processes called {what} within {PATIENCE_S:.0f} s, and all have to, as "
                "they share the work. Take it out of `if is_main_process`."
            )
        time.sleep(0.02)
        here = store.add(key, 0)


def process_count() -> int:
    return dist.get_world_size() if _is_on() else 1


def process_index() -> int:
    return dist.get_rank() if _is_on() else 0


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return process_index() == 0


def broadcast(values: Tensor) -> Tensor:
    """The main process's values, in every process, so that all go on with the same bits."""
    if process_count() > 1:
        values = values.contiguous()
        dist.broadcast(values, src=0)
    return values


def add_up(values: Tensor) -> Tensor:
    """The sum of all processes' values, in place, in every process."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def my_part(items: Sequence[_Item]) -> list[_Item]:
    """The items that this process works on."""
    return list(items[process_index() :: process_count()])


def gather(work: Callable[[], list[_Result]]) -> list[_Result]:
    """Do this process's work; every process gets the results of all, one process after the other.

    An error in one process is raised in all of them, so that none waits for ever.
    """
    if process_count() == 1:
        return work()
    mine: list[_Result] | Exception
    try:
        mine = work()
    except Exception as error:  # whatever it is, the other processes have to hear of it
        mine = error
    _held[:] = [dist.group.WORLD]
    parts: list[Any] = [None] * process_count()
    dist.all_gather_object(parts, mine)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    return [result for part in parts for result in part]


def from_main(results: list[_Result]) -> list[_Result]:
    """The main process's results, in every process, so that none decides by other last bits."""
    return gather(lambda: results if is_main() else [])


def in_main(work: Callable[[], None]) -> None:
    """Do something in the main process only. All wait for it, and an error there is raised in all of them."""

    def work_or_not() -> list[None]:
        if is_main():
            work()
        return []

    gather(work_or_not)


def share(
    items: Sequence[_Item], work: Callable[[list[_Item]], list[_Result]], model: nn.Module | None = None
) -> list[_Result]:
    """Give each process its part of the items, and every process all results, in the items' order.

    work: turns a list of items into as many results; a result must be picklable. Every process gets
    equally many items (some twice where the count doesn't divide), since the forward pass of a sharded
    model has to happen equally often everywhere. model: what works; where it is tensor parallel, every process gets
    all items.
    """
    processes = process_count()
    if processes == 1 or not items:
        return work(list(items))
    if model is not None and is_tensor_parallel(model):
        return gather(lambda: work(list(items)) if is_main() else work(list(items))[:0])
    rounds = math.ceil(len(items) / processes)
    mine = [items[(turn * processes + process_index()) % len(items)] for turn in range(rounds)]
    results = gather(lambda: work(mine))
    return [results[(index % processes) * rounds + index // processes] for index in range(len(items))]


def _is_on() -> bool:
    return dist.is_available() and dist.is_initialized()


def best_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    if accelerator.type == "mps":  # there is only one, and it goes by its plain name
        return torch.device("mps")
    return torch.device(accelerator.type, process_index() % torch.accelerator.device_count())


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of a device was too small, in the words of any of them."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in OUT_OF_MEMORY)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first weights are, or where accelerate's hooks bring them."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            hook: Any = getattr(module, "_hf_hook", None)
            if not parameter.is_meta or hook is None:
                return parameter.device
            executing = [inner.execution_device for inner in getattr(hook, "hooks", [hook])]
            return torch.device(next((device for device in executing if device is not None), "cpu"))
    return torch.device("cpu")
