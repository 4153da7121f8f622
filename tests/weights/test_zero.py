from __future__ import annotations

import pytest

from splaser_plugin.errors import ModelError
from splaser_plugin.weights.zero import check_deepspeed


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 0}, "DeepSpeed without ZeRO"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "offload_param was never tried"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer was never tried"),
        ({"stage": 2, "cpu_offload": True}, "cpu_offload was never tried"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size was never tried"),
    ],
)
def test_only_plain_zero_of_deepspeed_is_taken(zero, said):
    with pytest.raises(ModelError, match=rf"{said}.*splaser laser.*--adapter DIR"):
        check_deepspeed({"zero_optimization": zero})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plain_zero_of_deepspeed_is_taken(stage):
    check_deepspeed({"zero_optimization": {"stage": stage, "offload_param": {"device": "none"}, "mics_shard_size": -1}})
