"""A run that keeps nothing has results, and writes no copy of the base unless it is asked to."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from splaser_plugin import LaserConfig, laser
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.model_source import find_model
from tests.builders import FLAGS, QUICK, THREE_PAIRS, changed, save_rows, states

pytestmark = pytest.mark.slow

NOTHING = {"accept": "confident", "candidates": 1}
"""On three pairs nothing is sure, so nothing is kept."""
WITHOUT_MODEL = {"recipe.json", "report.html", "results.json", "run.yaml", "scan.json"}


def test_a_run_that_keeps_nothing_writes_no_model_and_says_so(splaser, tiny_folder, tmp_path, monkeypatch):
    pairs, out = save_rows(tmp_path / "pairs.jsonl", THREE_PAIRS), tmp_path / "out"
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("something was pushed"))
    run = ["laser", tiny_folder, "--pairs", pairs, *FLAGS, "--accept", "confident", "--candidates", 1, "-o", out]
    code, _, stderr = splaser(*run, "--push-to-hub", "alice/mine")
    assert code == 0, stderr
    assert "model  none was written: nothing was kept" in stderr and "--write-unchanged writes it" in stderr
    assert "not pushed  there is no model to push" in stderr
    assert {path.name for path in out.iterdir()} == WITHOUT_MODEL
    assert json.loads((out / "results.json").read_text())["candidates"][0]["verdict"] == "restored"
    with pytest.raises(CheckpointError, match=r"kept nothing, so it wrote no model\. Give the base"):
        find_model(out)
    code, _, stderr = splaser("report", out, "-o", tmp_path / "report.html")
    assert code == 0, stderr
    code, _, stderr = splaser(*run, "--overwrite", "--write-unchanged")
    assert code == 0 and f"model  {out}" in stderr
    base, copy = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(out)
    assert not changed(states(base), states(copy))


def test_a_model_that_is_nowhere_else_is_written_even_if_nothing_was_kept(tiny_folder, tmp_path):
    config = LaserConfig(**{**QUICK, **NOTHING}, dtype="bfloat16")
    result = laser(tiny_folder, THREE_PAIRS, config=config, output=tmp_path / "run")
    assert result.is_unchanged and not result.is_copy
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.bfloat16


def test_in_python_an_explicit_save_writes_the_model(tiny_folder, tmp_path):
    result = laser(tiny_folder, THREE_PAIRS, config=LaserConfig(**{**QUICK, **NOTHING}), output=tmp_path / "run")
    assert result.is_unchanged
    assert {path.name for path in (tmp_path / "run").iterdir()} == WITHOUT_MODEL
    assert (result.save(tmp_path / "saved") / "model.safetensors").is_file()
