"""A few architectures of the sweep, others every day, and each that has ever failed."""

from __future__ import annotations

import datetime

import pytest

from tests.architectures.sweep import model_types, run

pytestmark = pytest.mark.slow

A_DAY = 3
ONCE_FAILED = (
    "blt",
    "ctrl",
    "deepseek_v3",
    "exaone",
    "granitemoe",
    "got_ocr2",
    "hrm_text",
    "inkling_mm_model",
    "mamba",
    "mixtral",
    "zamba",
)

ENCODER_DECODERS = frozenset({"florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"})
WITHOUT_MATRICES = frozenset({"diffusion_gemma"})
"""All that is left of its language model shares its weights with another part."""
REFUSED = {"unfrozen": WITHOUT_MATRICES, "reduce": WITHOUT_MATRICES | ENCODER_DECODERS}
"""Which types, of the columns in which nearly every type works; in docs/models.md they have their reasons."""


def todays() -> list[str]:
    """Of all model types in turn, the day's."""
    kinds = model_types("all")
    start = datetime.date.today().toordinal() * A_DAY
    return [kinds[(start + place) % len(kinds)] for place in range(A_DAY)]


@pytest.mark.parametrize("kind", sorted({*ONCE_FAILED, *todays()}))
def test_the_architecture_is_known_as_its_loader_knows_it(kind):
    found = run(kind)
    if found["built"] != "ok":
        pytest.skip(found["built"])
    assert {found[column] for column in ("scan", "unfrozen", "reduce") if kind not in REFUSED.get(column, ())} == {"ok"}
    assert all(said.startswith(("ok", "refused: ", "can't run: ", "left whole: ")) for said in found.values()), found
