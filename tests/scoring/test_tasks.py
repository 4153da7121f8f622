"""Tasks of lm-evaluation-harness: each figure against one computed token by token, and every refusal."""

from __future__ import annotations

import copy

import pytest
import torch

from splaser_plugin.errors import MissingExtraError, ModelError, ScoreError, TaskError
from splaser_plugin.scoring import tasks
from splaser_plugin.scoring.harness import Harness
from splaser_plugin.scoring.tasks import load_tasks
from tests.builders import states, tiny_llama
from tests.task_files import CHOICES, answered_rows, greedy, metrics, right_choices, save_answers, save_choices


@pytest.fixture
def harness(tiny_model, tokenizer):
    return Harness(tiny_model, tokenizer, batch_size=4)


def load(folder, *names, count=100):
    return load_tasks(names, str(folder), count=count)


def test_choices_are_scored_as_their_summed_log_probabilities_say(harness, tiny_model, tokenizer, tmp_path):
    save_choices(tmp_path)
    [task] = load(tmp_path, "colours")
    found = task.by_mean(harness.measure(task, range(len(task))))
    acc, acc_norm = right_choices(tiny_model, tokenizer)
    assert (found["acc"], found["acc_norm"]) == (acc, acc_norm)
    assert 0 < sum(acc) < len(acc) == len(CHOICES)


def test_answers_are_those_of_the_likeliest_token_after_the_other(harness, tiny_model, tokenizer, tmp_path):
    rows = answered_rows(tiny_model, tokenizer)
    save_answers(tmp_path, rows)
    [task] = load(tmp_path, "answers")
    found = task.by_mean(harness.measure(task, range(len(task))))
    said = [greedy(tiny_model, tokenizer, f"Question: {row['question']}\nAnswer:") for row in rows]
    assert found == {"exact_match": [float(text == row["answer"]) for text, row in zip(said, rows, strict=True)]}
    assert sum(found["exact_match"]) == len(rows) / 2


def test_a_document_is_asked_the_same_alone_and_among_others(harness, tmp_path):
    few_shot = {"num_fewshot": 2, "fewshot_split": "train"}
    path = save_choices(tmp_path, **few_shot)
    train = tmp_path / "train.jsonl"
    train.write_text((tmp_path / "colours.jsonl").read_text().replace("Box", "Bag"))
    path.write_text(path.read_text().replace("    test:", f"    train: {train}\n    test:"))
    [task] = load(tmp_path, "colours")
    [again] = load(tmp_path, "colours")
    asked = [[request.args for request in requests] for requests in task.requests]
    assert asked == [[request.args for request in requests] for requests in again.requests]
    assert all(requests[0][0].count("Bag") == 2 for requests in asked)
    values = harness.measure(task, range(len(task)))
    assert [harness.measure(task, [item])[0] for item in (0, 7, 11)] == [values[item] for item in (0, 7, 11)]
    assert harness.measure(task, [11, 0]) == [values[11], values[0]]


def test_a_metric_of_all_documents_together_has_the_tasks_own_figure(harness, tmp_path):
    from sklearn.metrics import f1_score

    f1 = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    rows = [{**row, "choices": row["choices"][:2], "label": row["label"] % 2} for row in CHOICES]
    save_choices(tmp_path, rows=rows, metric_list=[*metrics("acc"), *f1])
    [task] = load(tmp_path, "colours")
    values = harness.measure(task, range(len(task)))
    right = task.by_mean(values)
    assert right.keys() == {"acc"}
    gold = [row["label"] for row in rows]
    predicted = [label if is_right else 1 - label for label, is_right in zip(gold, right["acc"], strict=True)]
    assert task.overall("f1", values) == pytest.approx(f1_score(gold, predicted))


def test_the_first_documents_are_taken(tmp_path):
    save_choices(tmp_path)
    [task] = load(tmp_path, "colours", count=5)
    assert [document["question"] for document in task.documents] == [row["question"] for row in CHOICES[:5]]
    assert task.summary == "colours: 5 of 16 documents, 0 examples before each; acc, acc_norm"


def test_a_tag_stands_for_its_tasks(tmp_path):
    for name in ("one", "two"):
        save_choices(tmp_path, name, tag="both")
    assert [task.name for task in load(tmp_path, "both")] == ["one", "two"]
    assert [task.name for task in load(tmp_path, "both", "one")] == ["one", "two"]


def test_model_and_tokenizer_stay_as_they_were(tiny_model, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    tiny_model.train()
    before = states(tiny_model)
    save_choices(tmp_path)
    [task] = load(tmp_path, "colours")
    Harness(tiny_model, tokenizer, batch_size=4).measure(task, range(3))
    assert tokenizer.pad_token is None
    assert all(module.training for module in tiny_model.modules())
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_sampled_answers_are_the_same_again_and_leave_the_random_state(harness, tiny_model, tokenizer, tmp_path):
    kind = {"until": ["\n"], "max_gen_toks": 5, "do_sample": True, "temperature": 1.0}
    save_answers(tmp_path, answered_rows(tiny_model, tokenizer, 4), generation_kwargs=kind)
    [task] = load(tmp_path, "answers")
    state = torch.random.get_rng_state()
    assert harness.measure(task, range(4)) == harness.measure(task, range(4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_broken_model_is_told(tokenizer, tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    save_choices(tmp_path)
    [task] = load(tmp_path, "colours")
    with pytest.raises(ScoreError, match="task 'colours': a log-probability is nan"):
        Harness(model, tokenizer, batch_size=4).measure(task, range(3))


def test_a_full_device_is_told(harness, tiny_model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    save_choices(tmp_path)
    [task] = load(tmp_path, "colours")
    monkeypatch.setattr(tiny_model, "forward", full)
    with pytest.raises(ModelError, match=r"task 'colours': the device's memory has no room .*batch.size\.$"):
        harness.measure(task, range(3))


def graded_by(folder, code, *, aggregation="mean"):
    """The task of colours by a metric m that this code gives."""
    (folder / "utils.py").write_text(code)
    whole = [{"metric": "m", "aggregation": "AGGREGATION", "higher_is_better": True}]
    path = save_choices(folder, metric_list=whole)
    text = path.read_text().replace("AGGREGATION", aggregation)
    path.write_text(text + "process_results: !function utils.process_results\n")
    return load(folder, "colours")[0]


def test_a_document_without_a_metric_or_with_no_number_is_named(harness, tmp_path):
    task = graded_by(tmp_path, "def process_results(doc, results):\n    return {'m': 1.0} if doc['label'] else {}\n")
    with pytest.raises(TaskError, match=r"task 'colours': its document 0 has the metrics \[\], expected \['m'\]"):
        harness.measure(task, [0, 1])
    with pytest.raises(TaskError, match=r"its document 3 has the metrics \[\], expected \['m'\] for each"):
        harness.measure(task, [1, 2, 3])
    with pytest.raises(TaskError, match="its document 3 has the metrics"):
        harness.measure(task.part([1, 3]), [0, 1])
    task = graded_by(tmp_path, "def process_results(doc, results):\n    return {'m': None}\n")
    with pytest.raises(TaskError, match=r"the m of its document 2 is None, expected a finite number"):
        harness.measure(task, [2])
    task = graded_by(tmp_path, "def process_results(doc, results):\n    return {'m': float('nan')}\n")
    with pytest.raises(TaskError, match=r"the m of its document 2 is nan, expected a finite number"):
        harness.measure(task, [2])


def test_a_metric_that_the_task_does_not_aggregate_is_left_out(harness, tmp_path):
    given = "{'m': 1.0, 'other' if doc['label'] else 'another': 2.0}"
    task = graded_by(tmp_path, f"def process_results(doc, results):\n    return {given}\n")
    assert harness.measure(task, range(4)) == 4 * [{"m": 1.0}]


def test_a_tokenizer_that_the_harness_does_not_take_is_told(tiny_model):
    with pytest.raises(ModelError, match=r"lm-evaluation-harness can't ask this LlamaForCausalLM \(AssertionError"):
        Harness(tiny_model, object(), batch_size=4)


def test_too_long_an_answer_for_the_context_is_told(harness, tmp_path):
    save_answers(tmp_path, [{"question": "?", "answer": "!"}], generation_kwargs={"until": ["\n"], "max_gen_toks": 600})
    [task] = load(tmp_path, "answers")
    with pytest.raises(ScoreError, match=r"task 'answers': the model fails at its questions .*tokens to generate"):
        harness.measure(task, [0])


def test_without_the_extra_the_command_that_installs_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "splaser_plugin\[eval\]"$'):
        load(tmp_path, "arc_easy")


def test_what_is_wrong_with_a_task_file_is_told(tmp_path):
    with pytest.raises(TaskError, match=r"tasks_path .*/nowhere: there is no such folder"):
        load(tmp_path / "nowhere", "mine")
    path = save_choices(tmp_path)
    whole = path.read_text()
    path.write_text(whole.replace("doc_to_choice: choices", "doc_to_choice: nothing"))
    with pytest.raises(TaskError, match=r"task 'colours': it can't be loaded \(.*\)\. Mend the task's file"):
        load(tmp_path, "colours")
    path.write_text(whole.replace("colours.jsonl", "gone.jsonl"))
    with pytest.raises(TaskError, match=r"task 'colours': it can't be loaded .*gone\.jsonl.*Check data_files in"):
        load(tmp_path, "colours")
    path.write_text(whole + "unsafe_code: true\n")
    with pytest.raises(TaskError, match="it runs code that the model writes"):
        load(tmp_path, "colours")
    path.write_text("task: [colours\n")
    with pytest.raises(TaskError, match=r"tasks_path .*colours\.yaml: not valid YAML \(.*\)\. Mend it first\."):
        load(tmp_path, "colours")


@pytest.mark.slow
def test_a_task_that_is_nowhere_and_one_that_needs_the_hub_are_told(tmp_path):
    save_choices(tmp_path)
    with pytest.raises(TaskError, match=r"task 'colors': .* has none of that name, nor has .*nearest: .*colours"):
        load(tmp_path, "colors")
    with pytest.raises(TaskError, match=r"task 'arc_easyy': there is none of that name in .*nearest: arc_easy"):
        load_tasks(["arc_easyy"], "", count=1)
    with pytest.raises(TaskError, match=r"task 'arc_easy': it can't be loaded .*or the connection to the hub"):
        load(tmp_path, "arc_easy")
