"""A model stored in factors."""

from __future__ import annotations

import pytest

from splaser_plugin.weights.factored_folder import save_model
from tests.weights.factored_models import lasered, small_llama


@pytest.fixture
def saved(tmp_path):
    """A model whose first block is factored, and the folder it was saved to."""
    weights = lasered(small_llama())
    save_model(weights, tmp_path / "factored", None)
    return weights, tmp_path / "factored"
