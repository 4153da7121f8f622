"""Parameters that accelerate's hooks keep outside their modules, in the CPU's memory or on disk, until they compute.

Meanwhile the module has an empty parameter on the meta device, a new one after every forward pass. The hook takes the
numbers from its store each time, so what is written there is what the model computes with, and what is saved.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from splaser_plugin.errors import ModelError, OutputError


class OffloadedParameters:
    """Reads and writes what hooks keep of a model's parameters, by the parameters' names in the state dict.

    Raises ModelError when a parameter is on the meta device and no hook has its numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: dict[str, tuple[AlignDevicesHook, str]] = {}
        self._folder: Path | None = None
        self._numbers = itertools.count()
        self._files: dict[str, set[Path]] = {}
        """Of each changed parameter: the file in use, and older ones that are still to be removed."""
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    full_name = f"{path}.{name}" if path else name
                    self._hooks[full_name] = _hook_of(model, module, full_name), name

    def __contains__(self, name: str) -> bool:
        return name in self._hooks

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def place(self, name: str) -> str:
        """Where the numbers are kept, for people."""
        store, key = self._store(name)
        is_on_disk = isinstance(store, OffloadedWeightsLoader) and key not in store.state_dict
        return "disk" if is_on_disk else "the CPU's memory"

    def read(self, name: str) -> Tensor:
        """The numbers, on the device that the hook brings them to. Not to be written to."""
        hook, key = self._hooks[name]
        value: Tensor = hook.weights_map[key].detach()
        return value if hook.execution_device is None else value.to(hook.execution_device)

    def write(self, name: str, values: Tensor) -> None:
        """Put new numbers in the place of the old ones, of the same shape and dtype.

        Raises OutputError when they can't be written to disk.
        """
        store, key = self._store(name)
        if isinstance(store, OffloadedWeightsLoader):
            if key not in store.state_dict:
                store.index[key] = self._on_disk(key, values)
                return
            store = store.state_dict
        store[key].copy_(values)

    def _store(self, name: str) -> tuple[Any, str]:
        """What holds the numbers, and under which key."""
        hook, key = self._hooks[name]
        store: Any = hook.weights_map
        while isinstance(store, PrefixedDataset):
            store, key = store.dataset, f"{store.prefix}{key}"
        return store, key

    def _on_disk(self, key: str, values: Tensor) -> dict[str, str]:
        """Write a new file and return what accelerate's index says of it.

        The files of the model's own folder are never touched. Who still has the old numbers mapped keeps them, and
        where that keeps their file from being removed, as on Windows, it goes with a later one.
        """
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="splaser-", ignore_cleanup_errors=True)
            weakref.finalize(self._model, folder.cleanup)  # the model goes on without this object
            self._folder = Path(folder.name)
        file = self._folder / f"{key}.{next(self._numbers)}.safetensors"
        old = self._files.setdefault(key, set())
        try:
            save_file({key: values.cpu().contiguous()}, file)
        except (OSError, SafetensorError) as error:
            old.add(file)
            raise OutputError(
                f"{file.parent}: the changed {key} can't be written there ({error}). Make room, or set TMPDIR to a "
                "folder that has some."
            ) from error
        for path in tuple(old):
            with suppress(OSError):
                path.unlink(missing_ok=True)
                old.discard(path)
        old.add(file)
        return {"safetensors_file": str(file), "weight_name": key, "dtype": str(values.dtype).removeprefix("torch.")}


def _hook_of(model: nn.Module, holder: nn.Module, name: str) -> AlignDevicesHook:
    for hook in _hooks_on(holder):
        if isinstance(hook, AlignDevicesHook) and hook.offload and hook.weights_map is not None:
            return hook
    raise ModelError(
        f"{type(model).__name__} has {name} on the meta device, without numbers, so that it can't be read or changed. "
        "Load the model with its weights, as `from_pretrained(..., device_map='auto')` does."
    )


def _hooks_on(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from hook.hooks if isinstance(hook, SequentialHook) else [hook]
