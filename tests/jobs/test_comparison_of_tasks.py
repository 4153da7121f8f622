"""Models side by side on tasks of lm-evaluation-harness, without pairs."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from splaser_plugin.cli.terminal import comparison_tables
from splaser_plugin.config.stages import CompareConfig
from splaser_plugin.errors import ConfigError, TaskError
from splaser_plugin.jobs.compare import UNDEFINED, WHOLE, compare
from splaser_plugin.progress import Progress
from splaser_plugin.statistics import paired_bootstrap
from tests.builders import tiny_llama
from tests.task_files import (
    CHOICES,
    answered_rows,
    greedy,
    metrics,
    right_choices,
    save_answers,
    save_choices,
    save_task,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder, tokenizer):
    """Two models, and a folder with a task of each type; the second model's answers are right in one of them."""
    other, tasks = tmp_path_factory.mktemp("models") / "other", tmp_path_factory.mktemp("tasks")
    model = tiny_llama(seed=1)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    f1 = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    rows = [{**row, "choices": row["choices"][:2], "label": row["label"] % 2} for row in CHOICES]
    save_choices(tasks)
    save_choices(tasks, "pairs_of_colours", rows, metric_list=[*metrics("acc"), *f1])
    save_answers(tasks, answered_rows(model, tokenizer))
    return tiny_folder, other, tasks


@pytest.fixture(scope="module")
def compared(folders):
    tiny, other, tasks = folders
    names = "colours, answers, pairs_of_colours"
    return compare([tiny, other], config=CompareConfig(tasks=names, tasks_path=str(tasks), device="cpu", seed=3))


def test_figures_and_intervals_are_those_computed_by_hand(compared, folders, tokenizer):
    tiny, other, tasks = folders
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny, other)]
    acc, acc_norm = zip(*(right_choices(model, tokenizer) for model in models), strict=True)
    rows = [json.loads(line) for line in (tasks / "answers.jsonl").read_text().splitlines()]
    matches = [
        [float(greedy(model, tokenizer, f"Question: {row['question']}\nAnswer:") == row["answer"]) for row in rows]
        for model in models
    ]
    first, second = compared.figures()
    for name, values in (("colours:acc", acc), ("colours:acc_norm", acc_norm), ("answers:exact_match", matches)):
        assert first[f"lm-eval:{name}"].value == np.mean(values[0])
        assert first[f"lm-eval:{name}"].change is None
        differences = np.subtract(values[1], values[0])
        found = second[f"lm-eval:{name}"]
        assert (found.value, found.change) == (np.mean(values[1]), np.mean(differences))
        if np.count_nonzero(differences) >= 6:
            assert found.interval == paired_bootstrap(differences, risk=0.05, seed=3)
        else:
            assert "expected at least 6 for an interval" in found.reason
    assert second["lm-eval:answers:exact_match"].interval is not None
    assert second["lm-eval:answers:exact_match"].change == 0.5


def test_a_metric_of_all_documents_together_has_no_interval(compared):
    first, second = (figures["lm-eval:pairs_of_colours:f1"] for figures in compared.figures())
    assert second.change == second.value - first.value
    assert (second.interval, second.reason) == (None, WHOLE)


class Told(Progress):
    def __init__(self):
        self.models = []

    def fact(self, label, value):
        if label == "model":
            self.models.append(value)


def test_a_figure_that_a_text_has_not_is_undefined(folders, tmp_path):
    tiny, other, _ = folders
    kind = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    both = [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]
    save_task(tmp_path, "unspaced", 4 * [{"text": 12 * "漢字仮名交じり文"}], **kind, metric_list=both)
    config = CompareConfig(tasks="unspaced", tasks_path=str(tmp_path), device="cpu")
    figures = compare([tiny, other], config=config).figures()[1]
    words = figures["lm-eval:unspaced:word_perplexity"]
    assert (words.value, words.reason) == (None, UNDEFINED)
    assert figures["lm-eval:unspaced:bits_per_byte"].value > 0


def test_an_aggregation_that_fails_is_told_before_the_next_model(folders, tmp_path):
    tiny, other, _ = folders
    (tmp_path / "utils.py").write_text("def whole(items):\n    return 1 / 0\n")
    path = save_choices(tmp_path)
    path.write_text(path.read_text().replace("aggregation: mean", "aggregation: !function utils.whole", 1))
    config, progress = CompareConfig(tasks="colours", tasks_path=str(tmp_path), device="cpu"), Told()
    with pytest.raises(TaskError, match=r"its acc of all documents can't be computed \(ZeroDivisionError"):
        compare([tiny, other], config=config, progress=progress)
    assert progress.models == [str(tiny)]


def test_without_pairs_only_what_was_measured_is_told(compared):
    figures = compared.figures()[1]
    assert [name for name in figures if not name.startswith("lm-eval:")] == ["parameters", "file_bytes"]
    stored = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
    assert stored["tasks"]["colours"] == {"used": 16, "available": 16}
    assert stored["pairs"]["used"] == 0
    of_second = stored["models"][1]
    assert np.mean(of_second["per_document"]["colours"]["acc"]) == figures["lm-eval:colours:acc"].value
    assert of_second["per_document"]["pairs_of_colours"].keys() == {"acc"}
    printed = io.StringIO()
    Console(file=printed, width=80).print(*comparison_tables(["a", "b"], compared.figures()))
    assert "colours acc_norm" in printed.getvalue()
    assert "+0.5000" in printed.getvalue()


@pytest.mark.slow
def test_tasks_stand_beside_pairs(folders, pairs, minilm):
    tiny, _, tasks = folders
    options = {"tasks": "colours", "tasks_path": str(tasks), "samples": 4, "device": "cpu", "max_new_tokens": 5}
    found = compare([tiny], pairs, config=CompareConfig(**options, embedder=str(minilm)))
    assert {"semantic", "margin", "lm-eval:colours:acc"} < found.figures()[0].keys()
    assert found.to_dict()["tasks"]["colours"] == {"used": 4, "available": 16}


@pytest.mark.slow
def test_the_command_takes_tasks_alone(splaser, folders, tmp_path):
    tiny, other, tasks = folders
    out = tmp_path / "table.json"
    code, printed, stderr = splaser(
        "compare", tiny, other, "--tasks", "colours", "--tasks-path", tasks, "--device", "cpu", "-o", out, "--json"
    )
    assert code == 0, stderr
    assert json.loads(printed) == json.loads(out.read_text())
    assert "colours: 16 of 16 documents" in stderr
    assert "colours acc_norm" in stderr


def test_something_has_to_be_measured(splaser, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="nothing to measure the models with"):
        compare([tiny_folder])
    with pytest.raises(ConfigError, match="tasks_path has the files of tasks, and there are none"):
        CompareConfig(tasks_path="somewhere")
    with pytest.raises(ConfigError, match="'a' stands twice in 'a,b,a'"):
        compare([tiny_folder], config=CompareConfig(tasks="a,b,a"))
    code, _, stderr = splaser("compare", tiny_folder, "--tasks", "x", "--tasks-path", "./gone", "-o", tmp_path / "o")
    assert code == 1
    assert stderr.splitlines()[-1] == "TaskError: --tasks-path ./gone: there is no such folder. Check the path."


@pytest.mark.real
def test_smollm2_knows_what_it_can_choose(smollm2, whole_tokenizer, tmp_path):
    facts = [("Paris", "France", "Peru"), ("Rome", "Italy", "Chad"), ("Tokyo", "Japan", "Cuba")]
    rows = [
        {"question": f"In which country lies {city}?", "choices": [right, wrong], "label": 0}
        for city, right, wrong in facts
    ]
    save_choices(tmp_path, rows=rows)
    config = CompareConfig(tasks="colours", tasks_path=str(tmp_path), device="cpu")
    found = compare([smollm2], config=config).figures()[0]
    acc, acc_norm = right_choices(AutoModelForCausalLM.from_pretrained(smollm2).eval(), whole_tokenizer, rows)
    assert (found["lm-eval:colours:acc"].value, found["lm-eval:colours:acc_norm"].value) == (
        np.mean(acc),
        np.mean(acc_norm),
    )
    assert sum(acc) >= 2
