"""How exactly float32 matrix products are computed."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm}


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.precisions = []
        """Of each product: its dtype, and what is set for float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            self.precisions.append((args[0].dtype, *float32_settings()))
        return func(*args, **(kwargs or {}))


def float32_settings():
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if not hasattr(backends[0], "fp32_precision"):  # torch before 2.9
        return (torch.get_float32_matmul_precision().replace("highest", "ieee"),)
    return tuple(backend.fp32_precision for backend in backends)


@contextmanager
def coarse_products():
    """Inside, the user has asked for bfloat16: by autocast, and by the setting of float32. Yields what `_Seen` sees."""
    torch.set_float32_matmul_precision("medium")
    try:
        before = float32_settings()
        assert "ieee" not in before
        with torch.autocast("cpu", dtype=torch.bfloat16), _Seen() as seen:
            yield seen.precisions
        assert float32_settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def are_exact(precisions):
    return bool(precisions) and all(
        dtype == torch.float64 or (dtype == torch.float32 and set(set_to) == {"ieee"}) for dtype, *set_to in precisions
    )
