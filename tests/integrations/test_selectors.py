"""Every measure that matrices are chosen by, wherever they are chosen."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from types import ModuleType
from typing import get_args

import pytest
from transformers import Trainer

from splaser_plugin import LaserCallback, LaserConfig, ScanConfig, choose, importances, scan
from splaser_plugin.config.stages import Measure
from splaser_plugin.scanning.measures import MEASURED
from splaser_plugin.weights.loading import load_model
from tests.builders import ROOT
from tests.integrations.emitting import emit
from tests.integrations.trainings import training_arguments


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's module, where Axolotl isn't installed: tests/tools/ run it in Axolotl itself."""
    base, log = ModuleType("axolotl.integrations.base"), ModuleType("axolotl.utils.logging")
    base.BasePlugin, log.get_logger = object, logging.getLogger
    for module in (base, log):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for package in ("axolotl", "axolotl.integrations", "axolotl.utils"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    name = "splaser_plugin.integrations.axolotl"
    yield importlib.import_module(name)
    del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("by", get_args(Measure))
def test_python_emit_the_callback_and_the_plugin_choose_alike(by, plugin, tiny_folder, tokenizer, tmp_path):
    path, text = tmp_path / "scan.json", str(ROOT / "README.md") if by in MEASURED else ""
    found = scan(tiny_folder, config=ScanConfig(precision="svd"), output=path)
    model, _ = load_model(tiny_folder, device="cpu")
    values = importances(model, tokenizer, by=by, text=text) if text else None
    names = choose(found, top=1, by=by, text=text, importances=values).names

    written = tmp_path / "adapter_config.json"
    measured_on = ("--text", text) if text else ()
    emit("peft --top 1", "--by", by, *measured_on, "-o", str(written), scan=str(path))
    assert json.loads(written.read_text())["target_modules"] == names

    section = plugin.SPLaserSection(mode="lora", top=1, by=by, scan=str(path), **({"text": text} if text else {}))
    assert plugin.select(section, str(tiny_folder)).names == names

    callback = LaserCallback(when=None, freeze_to="top", top=1, by=by, config=LaserConfig(text=text, precision="svd"))
    arguments = training_arguments(tmp_path / "out")
    Trainer(model=model, args=arguments, train_dataset=[], processing_class=tokenizer, callbacks=[callback])
    assert callback.selection.names == names
