"""What the card of a lasered model says of its base, and the code on it."""

from __future__ import annotations

import json
import re
import runpy
import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig

from splaser_plugin import LaserConfig, apply, expand, laser
from splaser_plugin.artifacts.base_card import BaseCard, base_card
from splaser_plugin.artifacts.card import PLACE, model_card
from splaser_plugin.artifacts.recipe import Recipe
from tests.builders import EXAMPLE_PAIRS, QUICK

pytestmark = pytest.mark.slow

FRONT_MATTER = """---
license: llama3.2
language: [en, de]
datasets: [HuggingFaceTB/smoltalk, "not an id/of/anything"]
base_model: meta-llama/Llama-3.2-1B
pipeline_tag: text-generation
---
# Mine
"""
CONFIG = AutoConfig.for_model("llama")


def folder_with(folder, card="", **config):
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(card)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "mine"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text(FRONT_MATTER)
    return folder


@pytest.fixture(scope="module")
def lasered(base, tmp_path_factory):
    """A folder for each way to store it, of the same run."""
    folders = {}
    for save in ("dense", "factored"):
        folders[save] = tmp_path_factory.mktemp("lasered") / save
        config = LaserConfig.from_dict({**QUICK, "save": save, "samples": 14, "held_out_fraction": 0.5, "seed": 1})
        laser(str(base), EXAMPLE_PAIRS, config=config, output=folders[save])
    return folders


def test_licence_data_sets_and_languages_come_from_the_base_of_a_run(lasered):
    card = ModelCard.load(lasered["dense"] / "README.md")
    assert card.data.license == "llama3.2"
    assert card.data.datasets == ["HuggingFaceTB/smoltalk"]
    assert card.data.language == ["en", "de"]
    assert card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "Its own files say that it comes from `meta-llama/Llama-3.2-1B`." in card.text
    assert "The licence, `llama3.2`, is that of the base's card." in card.text
    assert ModelCard.load(lasered["factored"] / "README.md").data.library_name == "splaser"


def test_the_verdict_is_in_the_model_index(lasered):
    for folder in lasered.values():
        held_out = json.loads((folder / "results.json").read_text())["held_out"]
        card = ModelCard.load(folder / "README.md")
        score, difference = card.data.eval_results
        assert card.data.model_name == "mine, lasered"
        assert score.metric_value == pytest.approx(held_out["result"]["score"], abs=1e-6)
        assert difference.metric_value == pytest.approx(held_out["difference"], abs=1e-6)
        assert (score.metric_type, difference.metric_type) == ("semantic_score", "semantic_score_difference")
        assert (score.task_type, score.dataset_split) == ("text-generation", "held out")
        assert difference.metric_name.endswith(held_out["verdict"])


def test_a_rebuilt_and_an_expanded_model_have_the_base_of_the_first(lasered, base, tmp_path):
    apply(lasered["dense"] / "recipe.json", str(base), output=tmp_path / "rebuilt")
    expand(str(lasered["factored"]), output=tmp_path / "expanded")
    first = ModelCard.load(lasered["dense"] / "README.md").data.to_dict()
    assert ModelCard.load(tmp_path / "expanded" / "README.md").data.to_dict() == first
    del first["model-index"]
    assert ModelCard.load(tmp_path / "rebuilt" / "README.md").data.to_dict() == first


@pytest.mark.parametrize("save", ["dense", "factored"])
def test_the_code_on_the_card_loads_the_model_and_answers(lasered, save, tmp_path, capsys):
    text = (lasered[save] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert ("splaser_plugin" in code) == (save == "factored")
    script = tmp_path / "card.py"
    script.write_text(code.replace(PLACE, str(lasered[save])))
    left = runpy.run_path(str(script))
    assert type(left["model"]).__name__.endswith("LlamaForCausalLM")
    assert len(left["answer"]) > 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "config", "card", "hub_id"),
    [
        ("mine", {"_name_or_path": "org/model"}, "", "org/model"),
        ("mine", {"_name_or_path": "/home/alice/model"}, "", None),
        ("mine", {"_name_or_path": 3}, "", None),
        ("mine", {}, "---\nbase_model: [org/a, org/b]\n---\n", "org/a"),
        ("mine", {}, "---\nbase_model: ../secret\n---\n", None),
        ("mine", {}, "", None),
        ("models--org--my-model/snapshots/0123abc", {}, "", "org/my-model"),
    ],
)
def test_the_hub_id_of_a_folder(tmp_path, place, config, card, hub_id):
    assert base_card(str(folder_with(tmp_path / place, card, **config)), CONFIG).hub_id == hub_id


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("https://example.org/licence", "https://example.org/licence"),
        ("LICENSE.txt", "https://huggingface.co/org/model/blob/main/LICENSE.txt"),
        ("LICENSE", "LICENSE"),  # it is there, and goes along
        ("javascript:alert(1)", None),
    ],
)
def test_a_licence_of_no_known_name_keeps_its_name_and_link(tmp_path, link, shown):
    card = f"---\nlicense: other\nlicense_name: mine-1\nlicense_link: {link}\n---\n"
    folder = folder_with(tmp_path / "base", card, _name_or_path="org/model")
    (folder / "LICENSE").write_text("All yours.")
    found = base_card(str(folder), CONFIG)
    assert (found.license, found.license_name, found.license_link) == ("other", "mine-1", shown)


@pytest.mark.parametrize(
    "card",
    [
        "no metadata",
        "---\nlicense: [\n---\n",
        "---\nlicense: {a: b}\ndatasets: 3\nlanguage: {}\n---\n",
        "---\nlicense: '<script>'\n---\n",
        "---\n- a list\n---\n",
        "---\nmodel-index: nonsense\n---\n",
        "\udcff",
    ],
)
def test_a_damaged_card_says_nothing_and_stops_nothing(tmp_path, card):
    folder = folder_with(tmp_path / "base")
    (folder / "README.md").write_bytes(card.encode("utf-8", "surrogateescape"))
    assert base_card(str(folder), CONFIG) == BaseCard()


def test_a_model_for_images_too_is_loaded_by_its_own_class(lasered):
    base = base_card("org/model", AutoConfig.for_model("qwen2_5_vl"))
    card = model_card(Recipe.load(lasered["dense"] / "recipe.json"), base=base)
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "from transformers import AutoModelForImageTextToText, AutoTokenizer" in card.text
