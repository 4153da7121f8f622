"""Where a model's weights come from and go to: options of every stage that loads one."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from splaser_plugin.config.options import Options, stage
from splaser_plugin.errors import ConfigError

DeviceMap: TypeAlias = Literal["none", "auto", "fsdp", "tp"]
MemoryLimits: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]

_LIMIT = re.compile(r"(cpu|mps|\d+)=(\d+(?:\.\d+)?(?:GiB|MiB|KiB|GB|MB|KB))")


@stage
class LoadConfig(Options):
    """How a model's files are read."""

    allow_pickle: bool = False
    """Load weights that are pickled (.bin) if there are no others."""


@stage
class DeviceConfig(LoadConfig):
    """Where it is computed."""

    device: str = "auto"
    """Device to run on: auto, cpu, cuda, cuda:1, mps."""


@stage
class PlaceConfig(DeviceConfig):
    """Where a model is loaded to."""

    device_map: DeviceMap = "none"
    """Spread a model that is larger than one device: auto takes all devices of this process, then the CPU's memory,
    then the disk; fsdp and tp (tensor parallel) take the processes that `accelerate launch` started, a part each."""
    max_memory: MemoryLimits = ()
    """With --device-map auto, the most that weights may take of a device, as DEVICE=SIZE (0=20GiB, cpu=60GiB);
    repeatable. Devices that aren't named get none, once one is."""

    @property
    def place(self) -> dict[str, Any]:
        """Where a model goes, as `load_model` takes it."""
        return {"device": self.device, "device_map": self.device_map, "max_memory": self.max_memory}

    def __post_init__(self) -> None:
        if self.device_map != "none" and self.device != "auto":
            raise ConfigError(
                f"--device {self.device} and --device-map {self.device_map}: the map has a device for every weight. "
                "Give one of the two."
            )
        if self.max_memory and self.device_map != "auto":
            raise ConfigError("--max-memory limits what --device-map auto takes. Give that too, or leave it out.")
        memory_limits(self.max_memory)


def memory_limits(limits: tuple[str, ...]) -> dict[int | str, str]:
    """Sizes by device, as accelerate takes them: `{0: "20GiB", "cpu": "60GiB"}`. Raises ConfigError for a wrong one."""
    found: dict[int | str, str] = {}
    for limit in limits:
        parts = _LIMIT.fullmatch(limit)
        if parts is None:
            raise ConfigError(
                f"--max-memory: got '{limit}', expected DEVICE=SIZE, with the number of a device, cpu or mps, and a "
                "size in GiB, MiB, GB or MB: 0=20GiB, cpu=60GiB."
            )
        device = parts[1]
        found[int(device) if device.isdecimal() else device] = parts[2]
    return found
