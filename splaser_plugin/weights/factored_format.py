"""How config.json says which layers of a model are factored.

    "quantization_config": {"quant_method": "splaser", "layers": {"model.layers.0.self_attn.q_proj":
        {"form": "rows", "rank": 5}, ...}}

The form says which tensors the layer has, see `splaser_plugin.weights.factored_layers`. splaser 0.1 wrote
`"splaser_factored": {"model.layers.0.self_attn.q_proj": 5, ...}`, where every layer has the form `two factors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splaser_plugin.errors import CheckpointError
from splaser_plugin.files.text import shown

METHOD = "splaser"
OLD_KEY = "splaser_factored"
TWO_FACTORS = "two factors"
FORMS = ("rows", "columns", TWO_FACTORS)


@dataclass(frozen=True)
class Stored:
    """How one layer is stored."""

    form: str
    """One of `FORMS`."""
    rank: int


def written(layers: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    """The layers as config.json has them."""
    return {name: asdict(stored) for name, stored in layers.items()}


def stored_layers(config: Mapping[str, Any], folder: Path) -> dict[str, Stored]:
    """The factored layers that a config.json lists, by their names; {} for a dense model.

    Raises CheckpointError, naming the folder's config.json, when it is no such list.
    """
    if OLD_KEY in config:
        ranks = config[OLD_KEY]
        if not isinstance(ranks, dict) or not all(_is_rank(rank) for rank in ranks.values()):
            raise CheckpointError(
                f"{folder / 'config.json'}: {OLD_KEY} is {shown(ranks)}, expected module names to ranks of at least 1."
            )
        return {name: Stored(TWO_FACTORS, rank) for name, rank in ranks.items()}
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return {}
    layers = quantization.get("layers")
    if not isinstance(layers, dict) or not all(map(_is_stored, layers.values())):
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config: layers is {shown(layers)}, expected module names, each "
            f"with a form ({', '.join(FORMS)}) and a rank of at least 1."
        )
    return {name: Stored(**stored) for name, stored in layers.items()}


def _is_stored(value: object) -> bool:
    is_complete = isinstance(value, dict) and value.keys() == {"form", "rank"}
    return is_complete and value["form"] in FORMS and _is_rank(value["rank"])  # type: ignore[index]


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0
