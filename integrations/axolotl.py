"""The Axolotl plugin: scan the model, train only its matrices of highest SNR, and laser it if asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from splaser_plugin.config.stages import LaserConfig, SelectConfig
from splaser_plugin.errors import ConfigError
from splaser_plugin.integrations.check import check_plan, empty_model_of, named_for_peft
from splaser_plugin.integrations.configs.axolotl import (
    FUSED_KERNELS,
    NOT_WITH_LORA,
    NOT_WITH_UNFROZEN,
    SPECTRUM,
    adapter_targets,
    refuse_plugins,
    targets,
    unfrozen_patterns,
)
from splaser_plugin.integrations.configs.plan import Plan
from splaser_plugin.integrations.freeze import check_trained
from splaser_plugin.jobs.importance import importances_of_folder
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scanning.selection import Selection, choose

LOG = get_logger("axolotl.splaser")  # Axolotl shows INFO of no others

NOT_CHOSEN_YET = "chosen-by-splaser"
"""Stands for the targets until the scan is done: with it nothing is trained, without it everything might be."""


class LaserSection(BaseModel):
    """`splaser.laser`: reduce the noisy matrices before or after training. Other keys: see `LaserConfig`."""

    model_config = ConfigDict(extra="allow")

    when: Literal["before", "after"] = "after"
    pairs: str
    """Preference pairs: a file, or one of the data sets that splaser knows."""

    @model_validator(mode="after")
    def _known_options(self) -> LaserSection:
        try:
            self.config("iqr")
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def config(self, edge: str) -> LaserConfig:
        """The laser's options. edge: its own, unless one is given."""
        return LaserConfig.from_dict({"edge": edge, **(self.model_extra or {})})


class SPLaserSection(BaseModel):
    """`splaser`: which matrices are trained, how, and whether the model is lasered. Other keys: see `SelectConfig`."""

    model_config = ConfigDict(extra="allow")

    mode: Literal["unfrozen", "lora"]
    scan: str | None = None
    """A scan.json, or a published one; without it `base_model` is scanned from disk."""
    laser: LaserSection | None = None

    @property
    def select(self) -> SelectConfig:
        """Which matrices are trained. Raises ConfigError when the section doesn't say."""
        config = SelectConfig.from_dict(self.model_extra or {})
        if (config.top is None) == (config.fraction is None):
            raise ConfigError("give one of top and fraction")
        return config

    @model_validator(mode="after")
    def _known_choice(self) -> SPLaserSection:
        try:
            _ = self.select
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class SPLaserArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    splaser: SPLaserSection | None = None


class SPLaserPlugin(BasePlugin):
    """Add `splaser_plugin.integrations.axolotl.SPLaserPlugin` to `plugins`, and a section `splaser`.

    What it does shows in the log as `splaser: training 112 of 210 matrices ...`. What it can't do stops the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selection: Selection | None = None

    def get_input_args(self) -> str:
        return f"{SPLaserArgs.__module__}.{SPLaserArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Check the section against the rest, and set what has to be set before Axolotl's own checks."""
        section = read_section(cfg.get("splaser"))
        check_rest(section, cfg)
        if section.mode == "unfrozen":
            cfg["unfrozen_parameters"] = [NOT_CHOSEN_YET]
            # with frozen weights below, reentrant checkpointing loses the gradients
            kwargs = dict(cfg.get("gradient_checkpointing_kwargs") or {})
            cfg["gradient_checkpointing_kwargs"] = {**kwargs, "use_reentrant": False}
        else:
            cfg["lora_target_modules"] = [NOT_CHOSEN_YET]
            for kernel in FUSED_KERNELS:
                cfg[kernel] = False

    def pre_model_load(self, cfg: Any) -> None:
        """Scan and choose; called a second time for the reference model of a DPO run."""
        section = read_section(cfg["splaser"])
        if self.selection is None:
            self.selection = checked(select(section, cfg["base_model"]), section.mode, cfg)
            _log(self.selection)
        if section.mode == "unfrozen":
            cfg["unfrozen_parameters"] = unfrozen_patterns(self.selection)
        else:
            cfg.update(adapter_targets(self.selection))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Make sure that exactly the chosen matrices are trained; add the laser where it was asked for."""
        section = read_section(cfg["splaser"])
        if self.selection is None:
            raise ConfigError("splaser: the model was loaded without a scan. Report this, with the configuration.")
        check_trained(trainer.model, self.selection.names)
        LOG.info("splaser: exactly these %d matrices are trained", len(self.selection.names))
        if section.laser is None:
            return []
        from splaser_plugin import LaserCallback

        config = section.laser.config(self.selection.edge)
        laser = section.laser
        return [LaserCallback(when=laser.when, pairs=laser.pairs, config=config, trainer=trainer)]


def read_section(values: Any) -> SPLaserSection:
    """The section, checked. Raises ConfigError that names the key."""
    if not isinstance(values, Mapping):
        raise ConfigError("splaser: the section is missing. Add it, as in splaser: {mode: lora, top: 16}.")
    plain = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    try:
        return SPLaserSection(**plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["splaser", *map(str, first["loc"])])
        raise ConfigError(f"{key}: {first['msg'].rstrip('.')}. Mend the configuration.") from error


def check_rest(section: SPLaserSection, cfg: Mapping[str, Any]) -> None:
    """Raise ConfigError for other keys that would train something more, or something else."""
    adapter = cfg.get("adapter")
    if section.mode == "lora" and adapter not in ("lora", "qlora"):
        raise ConfigError(f"splaser.mode is lora, but adapter is {adapter!r}. Set adapter: lora or qlora.")
    refuse_plugins(cfg, "plugins", SPECTRUM)
    unwanted = (*NOT_WITH_LORA, "lora_target_modules", "lora_model_dir")
    if section.mode == "unfrozen":
        unwanted = (*NOT_WITH_UNFROZEN, "unfrozen_parameters")
    for key in unwanted:
        if cfg.get(key):
            raise ConfigError(
                f"splaser.mode is {section.mode}, which doesn't go with {key}: {cfg[key]!r}. Take that out."
            )
    if section.mode == "unfrozen" and (cfg.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        raise ConfigError("splaser.mode is unfrozen: set use_reentrant in gradient_checkpointing_kwargs to false.")


def select(section: SPLaserSection, base_model: str) -> Selection:
    """The matrices to train, from the given scan or a new one of the model on disk."""
    from splaser_plugin.scanning.spectrum_format import load_scan

    if section.scan is not None:
        scan, source = load_scan(section.scan), section.scan
    else:
        scan, source = _scan_from_disk(base_model), f"scan of {base_model}"
    return choose(scan, section.select, source=source, importances=importances_of_folder(base_model, section.select))


def checked(selection: Selection, mode: str, cfg: Mapping[str, Any]) -> Selection:
    """The selection by the names that PEFT takes, checked on the model's class before its weights are loaded.

    Raises MatrixError unless exactly the chosen matrices would be trained, and ConfigError for dropout with experts.
    """
    plan = Plan(selection=selection, mode="unfrozen" if mode == "unfrozen" else cfg["adapter"], model=cfg["base_model"])
    empty = empty_model_of(plan.model)
    if mode == "lora":
        plan = replace(plan, selection=named_for_peft(selection, empty))
        targets(plan, cfg)
    check_plan(plan, empty)
    return plan.selection


def _scan_from_disk(base_model: str) -> Scan:
    from splaser_plugin.scanning.scan import scan

    LOG.info("splaser: scanning %s", base_model)
    return scan(base_model)


def _log(selection: Selection) -> None:
    LOG.info("splaser: training %d of %d matrices: %s", len(selection.names), selection.considered, selection.rule)
    for kind, names in selection.by_type.items():
        LOG.info("splaser: %s: %s", kind, ", ".join(names))
