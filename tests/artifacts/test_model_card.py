"""README.md of a lasered model, and what goes to the hub."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from splaser_plugin.artifacts.card import PLACE, code, model_card, public_name
from splaser_plugin.artifacts.hub import check_repo, push_to_hub
from splaser_plugin.artifacts.recipe import Recipe, Step
from splaser_plugin.artifacts.results import Results
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import ConfigError, OutputError
from splaser_plugin.files.json import write_json
from tests.report_data import made_up_results, made_up_scan, replaced

SCAN = made_up_scan(4)
RUN = Results.from_dict(made_up_results(SCAN))
STEPS = tuple(Step(matrix.name, 5, "iqr", 3.25, matrix.shape) for matrix in SCAN.matrices[:2])
RECIPE = Recipe(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    weights_identity="0123456789abcdef" * 4,
    dtype="float32",
    steps=STEPS,
    scores={"baseline": 0.2, "final": 0.25},
    config=LaserConfig(embedder="/home/alice/minilm", samples=24),
    versions={"splaser_plugin": "0.1.0", "torch": "2.13.0"},
)


def metadata(card):
    return yaml.safe_load(str(card).split("---\n")[1])


def test_the_hub_finds_what_it_looks_for():
    card = metadata(model_card(RECIPE, RUN))
    assert {key: value for key, value in card.items() if key != "model-index"} == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": ["Intel/orca_dpo_pairs"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["splaser", "laser", "low-rank"],
    }


def test_a_card_says_what_was_done_and_how_good_it_is():
    text = model_card(RECIPE, RUN).text
    for step in STEPS:
        assert f"| `{step.name}` | {step.shape[0]} x {step.shape[1]} | 5 | `iqr` | 3.25 |" in text
    assert "2 of its weight matrices" in text
    assert "| 20 pairs that the search used | +0.2000 | +0.2500 |" in text
    assert f"| 8 pairs held out | {RUN.verdict.base.score:+.4f} | {RUN.verdict.result.score:+.4f} |" in text
    assert "On pairs that the search never saw: **better**. Mean difference" in text
    assert "(95 % interval +0.0500 to +0.1500): 8 better, 0 worse, 0 equal." in text
    assert "splaser apply recipe.json HuggingFaceTB/SmolLM2-135M-Instruct -o rebuilt" in text
    assert "`torch` `2.13.0`" in text


def test_a_card_without_a_verdict_says_why():
    stored = made_up_results(SCAN)
    unsplit = Results.from_dict({**stored, "held_out": {**stored["held_out"], "verdict": None}})
    assert "Nothing was held out, so there is no verdict." in model_card(RECIPE, unsplit).text
    assert "stands in the card of the run that made the recipe" in model_card(RECIPE).text
    assert "datasets" not in metadata(model_card(RECIPE))


def test_where_nothing_was_kept_the_card_says_so():
    text = model_card(replace(RECIPE, steps=()), RUN).text
    assert "unchanged: splaser found no weight matrix" in text
    assert "Nothing was kept." in text


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model-7B_v0.1", "org/model-7B_v0.1"),
        ("/home/alice/secret/my-model", "my-model"),
        ("/home/alice/secret/my-model/", "my-model"),
        ("../models/my-model", "my-model"),
        ("./my-model", "my-model"),
        ("~/my-model", "my-model"),
        (r"C:\Users\alice\my-model.gguf", "my-model.gguf"),
        ("https://user:hf_token@host/my-model", "my-model"),
        ("LlamaForCausalLM", "LlamaForCausalLM"),
        ("", ""),
    ],
)
def test_of_a_path_only_its_last_part_is_public(name, public):
    assert public_name(name) == public


def test_a_local_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("models/mine") == "models/mine"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert public_name("models/mine") == "mine"


def test_nothing_of_the_machine_is_on_the_card():
    stored = replaced(made_up_results(SCAN), "Intel/orca_dpo_pairs", "/home/alice/private/pairs.jsonl")
    card = model_card(replace(RECIPE, model="/home/alice/models/mine"), Results.from_dict(stored))
    assert "alice" not in str(card) and "/home" not in str(card)
    assert "base_model" not in metadata(card)
    assert "datasets" not in metadata(card)
    assert "That is the last part of the base's name where this was made: a folder, a file or a model" in card.text
    assert "names a model on the hub, so `base_model` is left out." in card.text
    assert "`BASE_MODEL` is your copy of `mine`." in card.text
    assert "base_model" not in metadata(model_card(replace(RECIPE, model="alice/some--model")))


@pytest.mark.parametrize(
    "planted", ["<script>", "a|b", "`x`", "``` \n# title", "[x](http://y)", "a\x1b[31m", "*x* _y_"]
)
def test_names_are_text_in_markdown(planted):
    named = replace(STEPS[0], name=f"model{planted}")
    stored = replaced(made_up_results(SCAN), "Intel/orca_dpo_pairs", f"set{planted}")
    card = model_card(replace(RECIPE, model=f"m{planted}", steps=(named,)), Results.from_dict(stored))
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", card.text)
    assert not any(part in outside for part in ("<", "[x]", "*x*", "\x1b", "# title"))
    row = next(line for line in card.text.splitlines() if "3.25" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert metadata(card)["library_name"] == "transformers"


def test_code_spans_hold_any_backticks():
    assert code("a`b") == "``a`b``"
    assert code("`a`") == "`` `a` ``"
    assert code("") == "` `"


@pytest.fixture
def finished(tmp_path):
    """A finished run of a user whose paths are nobody's business."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    recipe = replace(RECIPE, model="/home/alice/models/mine")
    recipe.save(folder / "recipe.json")
    replace(SCAN, model="/home/alice/models/mine").save(folder / "scan.json")
    write_json(folder / "results.json", made_up_results(SCAN))
    (folder / "report.html").write_text("<html>")
    model_card(recipe, RUN).save(folder / "README.md")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """The hub up to the network: what it was asked for, and the files as they would go up."""
    asked = SimpleNamespace(repos=[], uploads=[], files={})

    def create_repo(self, repo_id, **options):
        asked.repos.append((repo_id, options))
        return SimpleNamespace(repo_id=f"alice/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        asked.uploads.append((repo_id, options))
        asked.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    return asked


def test_a_new_repository_is_private_and_gets_one_commit(hub, finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    push_to_hub(finished, "mine-lasered")
    assert hub.repos == [("mine-lasered", {"private": True, "exist_ok": True})]
    assert [repo for repo, _ in hub.uploads] == ["alice/mine-lasered"]
    assert hub.files.keys() == {"model.safetensors", "recipe.json", "scan.json", "README.md"}
    assert hub.files["model.safetensors"] == b"weights"
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    assert list(finished.parent.iterdir()) == [finished]


def test_no_path_and_no_token_goes_up_and_the_recipe_stays_whole(hub, finished, tmp_path):
    push_to_hub(finished, "alice/mine")
    for name, content in hub.files.items():
        assert b"/home" not in content and b"hf_planted" not in content, name
    (tmp_path / "recipe.json").write_bytes(hub.files["recipe.json"])
    pushed = Recipe.load(tmp_path / "recipe.json")
    assert pushed.config == LaserConfig(embedder="minilm", samples=24)
    assert pushed == replace(RECIPE, model="mine", config=pushed.config)
    assert json.loads(hub.files["scan.json"])["model"] == "mine"
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert 'place = "alice/alice/mine"' in card.text
    assert f'place = "{PLACE}"' in (finished / "README.md").read_text()


def test_without_hard_links_the_files_are_copied(hub, finished, monkeypatch):
    def refuse(self, target):
        raise OSError("not supported")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    push_to_hub(finished, "mine")
    assert hub.files["model.safetensors"] == b"weights"


def test_a_hub_that_refuses_or_is_out_of_reach_is_one_line_and_the_model_stays(hub, finished, monkeypatch):
    def refuse(self, repo_id, **options):
        raise OSError("403 Forbidden\nmany more lines")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(
        OutputError, match=r"^push_to_hub mine: 403 Forbidden\. The model is whole in .*splaser push "
    ) as failed:
        push_to_hub(finished, "mine")
    assert str(failed.value).endswith(shlex.join(["splaser", "push", str(finished), "mine"]))
    assert (finished / "model.safetensors").is_file()
    monkeypatch.undo()
    with pytest.raises(OutputError, match=r"push_to_hub mine: .*offline"):  # HF_HUB_OFFLINE is set by conftest
        push_to_hub(finished, "mine")


def test_the_command_that_pushes_later_uploads_the_same(hub, finished, splaser):
    push_to_hub(finished, "mine")
    uploaded = hub.files
    hub.files = {}
    code, _, stderr = splaser("push", finished, "mine")
    assert code == 0 and "on the hub" in stderr
    assert hub.files == uploaded and "results.json" not in uploaded


def test_a_folder_without_a_lasered_model_is_not_pushed(hub, finished, splaser):
    (finished / "README.md").unlink()
    code, _, stderr = splaser("push", finished, "mine")
    assert code == 1 and "there is no lasered model. Give the output folder of splaser laser." in stderr
    assert not hub.repos


def test_what_cannot_be_pushed_to_is_known_before_the_work(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    check_repo("alice/mine")
    for repo in ("a/b/c", "has space", "-x"):
        with pytest.raises(ConfigError, match=r"push_to_hub: got '.*', expected NAME or OWNER/NAME"):
            check_repo(repo)
    monkeypatch.setattr("splaser_plugin.artifacts.hub.get_token", lambda: None)
    with pytest.raises(OutputError, match=r"no token of the hub is found\. Run hf auth login"):
        check_repo("alice/mine")
