from __future__ import annotations

import types

import pytest
from accelerate import Accelerator

from splaser_plugin.errors import ModelError
from splaser_plugin.integrations.training import check_sharding
from tests.conftest import tiny_llama


def test_deepspeed_is_refused_for_the_laser_alone():
    Accelerator(cpu=True)
    arguments = types.SimpleNamespace(deepspeed={"zero_optimization": {"stage": 2}})
    with pytest.raises(ModelError, match=r"DeepSpeed keeps its own fp32 copies.*splaser laser.*--adapter DIR"):
        check_sharding(arguments, tiny_llama(vocabulary=64), lasers=True)
    check_sharding(arguments, tiny_llama(vocabulary=64), lasers=False)
