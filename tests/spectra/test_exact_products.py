"""Products in full float32, whatever the user set."""

from __future__ import annotations

import threading

import numpy as np
import torch

from splaser_plugin.spectra.spectrum import exact_products, singular_values
from tests import reference
from tests.products import float32_settings


def test_reduced_float32_products_are_switched_off_and_on_again() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("medium")
    try:
        values = singular_values(weight, precision="float32")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_allclose(values, reference.singular_values(weight), rtol=1e-4)


def test_full_float32_products_last_until_the_last_thread_leaves() -> None:
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first() -> None:
        with exact_products(torch.device("cpu"), torch.float32):
            first_is_in.set()
            second_is_in.wait(60)
        first_is_out.set()

    torch.set_float32_matmul_precision("medium")
    try:
        before, thread = float32_settings(), threading.Thread(target=first)
        thread.start()
        first_is_in.wait(60)
        with exact_products(torch.device("cpu"), torch.float32):
            second_is_in.set()
            first_is_out.wait(60)
            seen += float32_settings()
        thread.join()
        assert set(seen) == {"ieee"} and float32_settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
