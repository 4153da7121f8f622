"""How an emitted configuration describes the data, for each stage and format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from splaser_plugin.errors import OutputError, PairsError
from tests.integrations.emitting import MESSAGES, PAIR, TURNS, emit


def test_dataset_info_describes_the_same_file_for_each_stage(folder):
    emit("llamafactory --stage dpo --dataset pairs.jsonl -o dpo.yml")
    emit("llamafactory --dataset pairs.jsonl -o sft.yml")
    assert json.loads(Path("dataset_info.json").read_text()) == {
        "pairs_dpo": {
            "file_name": "pairs.jsonl",
            "ranking": True,
            "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        },
        "pairs_sft": {"file_name": "pairs.jsonl", "columns": {"prompt": "prompt", "response": "chosen"}},
    }
    assert yaml.safe_load(Path("dpo.yml").read_text())["dataset"] == "pairs_dpo"


def test_dataset_info_keeps_its_other_entries_and_is_not_changed_behind_ones_back(folder):
    Path("run").mkdir()
    Path("run/dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "a.json"}, "pairs_sft": {"file_name": "b"}})
    )
    with pytest.raises(OutputError, match=r"dataset_info\.json: describes pairs_sft in another way"):
        emit("llamafactory --dataset pairs.jsonl -o run/sft.yml")
    assert not Path("run/sft.yml").exists()
    emit("llamafactory --dataset pairs.jsonl -o run/sft.yml --overwrite")
    info = json.loads(Path("run/dataset_info.json").read_text())
    assert info["mine"] == {"file_name": "a.json"}
    assert info["pairs_sft"]["file_name"] == "../pairs.jsonl"
    assert yaml.safe_load(Path("run/sft.yml").read_text())["dataset_dir"] == "run"


def rows(path: Path, row: object) -> Path:
    path.write_text(json.dumps(row) + "\n")
    return path


AXOLOTL_DATA = [
    ("dpo", PAIR, {"type": "chat_template.default", "field_messages": "prompt", "field_chosen": "chosen"}),
    ("dpo", {"question": "a", "chosen": "b", "rejected": "c"}, {"field_messages": "question"}),
    ("dpo", {"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, {"type": "chatml.default"}),
    ("dpo", {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]}, {"field_messages": "prompt"}),
    ("dpo", {"prompt": "a", "chosen_response": "b", "rejected_response": "c"}, {"field_chosen": "chosen_response"}),
    ("dpo", {"messages": MESSAGES[:1], "chosen": MESSAGES[1], "rejected": MESSAGES[1]}, {"field_messages": "messages"}),
    ("sft", {"messages": MESSAGES}, {"type": "chat_template", "field_messages": "messages", "ds_type": "json"}),
    ("sft", {"conversations": TURNS}, {"message_property_mappings": {"role": "from", "content": "value"}}),
    ("sft", {"instruction": "a", "input": "", "output": "b"}, {"type": "alpaca"}),
]


@pytest.mark.parametrize(("stage", "row", "expected"), AXOLOTL_DATA)
def test_axolotls_data_set_is_described_by_its_columns(stage, row, expected, folder):
    rows(Path("data.jsonl"), row)
    rl = "--rl dpo" if stage == "dpo" else ""
    emit(f"axolotl {rl} --dataset data.jsonl --top 1 -o c.yml")
    entry = yaml.safe_load(Path("c.yml").read_text())["datasets"][0]
    assert expected.items() <= entry.items()
    assert (entry["path"], entry["split"]) == ("data.jsonl", "train")


ROLE_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


LLAMAFACTORY_DATA = [
    (
        "dpo",
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]},
        {
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
    ),
    (
        "dpo",
        {"prompt": MESSAGES[:1], "chosen": MESSAGES[1], "rejected": MESSAGES[1]},
        {
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"},
            "tags": ROLE_TAGS,
        },
    ),
    (
        "dpo",
        {"system": "s", "question": "a", "chosen": "b", "rejected": "c"},
        {
            "ranking": True,
            "columns": {"prompt": "question", "system": "system", "chosen": "chosen", "rejected": "rejected"},
        },
    ),
    (
        "dpo",
        {"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"},
        {
            "ranking": True,
            "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
        },
    ),
    ("sft", {"messages": MESSAGES}, {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": ROLE_TAGS}),
    ("sft", {"conversations": TURNS}, {"formatting": "sharegpt", "columns": {"messages": "conversations"}}),
    ("sft", {"prompt": "a", "completion": "b"}, {"columns": {"prompt": "prompt", "response": "completion"}}),
    (
        "sft",
        {"instruction": "a", "input": "", "output": "b"},
        {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
    ),
]


@pytest.mark.parametrize(("stage", "row", "expected"), LLAMAFACTORY_DATA)
def test_llamafactorys_data_set_is_described_by_its_columns(stage, row, expected, folder):
    rows(Path("my data.jsonl"), row)
    emit(f"llamafactory --stage {stage} --top 1 -o c.yml", "--dataset", "my data.jsonl")
    info = json.loads(Path("dataset_info.json").read_text())
    assert info == {f"my_data_{stage}": {"file_name": "my data.jsonl", **expected}}


@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("axolotl --rl dpo", {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]}),
        ("axolotl --rl dpo", {"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"}),
        ("axolotl --rl dpo", {"text": "a"}),
        ("axolotl", {"text": "a"}),
        ("llamafactory --stage dpo", {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]}),
        ("llamafactory --stage dpo", {"messages": MESSAGES}),
        ("llamafactory", {"text": "a"}),
    ],
)
def test_data_the_tool_has_no_format_for_is_refused(command, row, folder):
    rows(Path("data.jsonl"), row)
    with pytest.raises(PairsError, match=r"data\.jsonl: (Axolotl|LLaMA-Factory) can't train .* --base"):
        emit(f"{command} --dataset data.jsonl -o c.yml")
    assert not Path("c.yml").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_without_a_data_set_none_is_made_up_and_that_is_said_aloud(stage, folder):
    printed = emit(f"axolotl {'--rl dpo' if stage == 'dpo' else ''} -o axolotl.yml")
    assert "NO DATA SET: nothing trains before you add datasets to it, or pass --dataset FILE" in printed
    printed = emit(f"llamafactory --stage {stage} -o llamafactory.yml")
    assert "NO DATA SET: nothing trains before you add dataset to it, or pass --dataset FILE" in printed
    axolotl, llamafactory = Path("axolotl.yml").read_text(), Path("llamafactory.yml").read_text()
    assert "no --dataset was given, so nothing trains before you add `datasets`." in axolotl
    assert "datasets" not in yaml.safe_load(axolotl)
    assert yaml.safe_load(axolotl).get("rl", "sft") == stage
    assert "no --dataset was given, so nothing trains before you add `dataset`." in llamafactory
    assert "dataset" not in yaml.safe_load(llamafactory)
    assert yaml.safe_load(llamafactory)["stage"] == stage
