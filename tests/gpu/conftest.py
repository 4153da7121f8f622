"""Where these tests run: each on the CPU, in the ordinary suite, and again on a CUDA device where there is one."""

from __future__ import annotations

import pytest
import torch

ON_CUDA = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there `make test-gpu` runs it"),
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_CUDA)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=ON_CUDA)])
def cuda(request) -> torch.device:
    """For what no CPU can show."""
    return torch.device(request.param)


@pytest.fixture
def unsynchronised(device):
    """Inside `with unsynchronised():` a copy to the host, or any other wait for the device, is an error."""
    from contextlib import contextmanager

    @contextmanager
    def inside():
        if device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return inside
