"""A search by a task of lm-evaluation-harness, and one that a task guards."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from splaser_plugin import LaserConfig, laser
from splaser_plugin.artifacts.results import Results
from splaser_plugin.errors import ConfigError, OutputError, PairsError, TaskError
from splaser_plugin.jobs.materials import materials
from splaser_plugin.scoring.tasks import load_scored
from tests.builders import EXAMPLE_PAIRS, QUICK, save_rows
from tests.task_files import CHOICES, likelihoods, right_choices, save_answers, save_choices

SUMS = "def process_results(doc, results):\n    return {'worst': -sum(float(score) for score, _ in results)}\n"
"""A metric of which less is better: minus the summed log-probability of all choices."""


def graded(tasks, **settings):
    """The task of colours by a metric that every change of the model changes."""
    (tasks / "utils.py").write_text(SUMS)
    path = save_choices(
        tasks, metric_list=[{"metric": "worst", "aggregation": "mean", "higher_is_better": False}], **settings
    )
    path.write_text(path.read_text() + "process_results: !function utils.process_results\n")


def config(tasks, **options):
    return LaserConfig(**{**QUICK, "scorer": "lm-eval:colours", "tasks_path": str(tasks), "seed": 1, **options})


def worst(folder, tokenizer, rows):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return [-sum(likelihoods(model, tokenizer, row)) for row in rows]


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def lasered(tmp_path_factory, tiny_folder):
    """A run without pairs, its folder, and that of the task."""
    tasks = tmp_path_factory.mktemp("tasks")
    graded(tasks)
    out = tmp_path_factory.mktemp("runs") / "lasered"
    options = config(tasks, held_out_fraction=0.4, accept="harmless", tolerance=1000.0, candidates=2)
    return laser(tiny_folder, config=options, output=out), out, tasks


def test_search_and_verdict_have_the_scores_of_their_own_documents(lasered, tiny_folder, tokenizer):
    result, out, _ = lasered
    before, after = worst(tiny_folder, tokenizer, CHOICES), worst(out, tokenizer, CHOICES)
    assert result.kept
    used: list[tuple[int, ...]] = []
    for found, made in (
        (result.search.baseline.values, before),
        (result.held_out.base.values, before),
        (result.search.final.values, after),
        (result.held_out.result.values, after),
    ):
        distance = np.abs(np.subtract.outer(found, np.negative(made)))
        assert distance.min(axis=1).max() < 1e-3
        used.append(tuple(distance.argmin(axis=1)))
    assert used[:2] == used[2:]
    assert sorted(used[0] + used[1]) == list(range(len(CHOICES)))


def test_the_split_is_told_in_results_report_and_card(lasered):
    _, out, _ = lasered
    stored = json.loads((out / "results.json").read_text())
    assert (stored["scorer"], stored["unit"]) == ("lm-eval:colours", "documents")
    assert stored["held_out"]["split"] == "6 documents; 10 to search on; task colours by its worst"
    assert Results.load(out / "results.json").searched == 10
    page = (out / "report.html").read_text()
    assert "6 documents; 10 to search on; task colours by its worst" in page
    assert "what the task&#39;s first metric gives" in page or "what the task's first metric gives" in page
    card = (out / "README.md").read_text()
    assert "10 documents of the task `colours`" in card
    assert "On documents that the search never saw" in card
    assert "scorer: lm-eval:colours" in (out / "run.yaml").read_text()


def test_documents_of_one_question_stay_together(tiny_folder, tmp_path):
    rows = [{**CHOICES[number // 2], "label": number % 2} for number in range(32)]
    save_choices(tmp_path, rows=rows)
    result = laser(tiny_folder, config=config(tmp_path, candidates=1, held_out_fraction=0.4))
    assert len(result.held_out.base.items) % 2 == 0
    assert result.search.baseline.values[::2] != result.search.baseline.values[1::2]


def test_accuracy_is_that_of_the_documents_searched_on(tiny_folder, tokenizer, tmp_path):
    save_choices(tmp_path)
    result = laser(tiny_folder, config=config(tmp_path, candidates=1, held_out_fraction=0.0))
    acc, _ = right_choices(AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), tokenizer)
    assert list(result.search.baseline.values) == acc
    assert result.held_out is None


@pytest.mark.slow
def test_a_stopped_run_goes_on_only_with_the_same_documents(tiny_folder, tmp_path):
    graded(tmp_path)
    options, out = config(tmp_path, held_out_fraction=0.4, candidates=3), tmp_path / "out"
    whole = laser(tiny_folder, config=options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("splaser_plugin.jobs.stages.search", interrupted)
        laser(tiny_folder, config=options, output=out)
    data = tmp_path / "colours.jsonl"
    documents = data.read_text()
    data.write_text(documents.replace("Box", "Bag"))
    with pytest.raises(OutputError, match=r"was left by another run: tasks was"):
        laser(tiny_folder, config=options, output=out)
    data.write_text(documents)
    graded(tmp_path, doc_to_target="{{(label + 1) % 3}}")
    with pytest.raises(OutputError, match=r"was left by another run: tasks was"):
        laser(tiny_folder, config=options, output=out)
    graded(tmp_path)
    again = laser(tiny_folder, config=options, output=out)
    assert again.search.final == whole.search.final
    assert again.held_out == whole.held_out


def test_a_run_is_known_by_how_its_task_grades(tmp_path):
    def identity():
        return load_scored(["colours"], str(tmp_path), count=100)[0].identity

    save_choices(tmp_path)
    first = identity()
    assert identity() == first
    save_choices(tmp_path, doc_to_target="{{(label + 1) % 3}}")
    assert identity() != first
    save_choices(tmp_path, filter_list=[{"name": "none", "filter": [{"function": "take_first"}]}])
    assert identity() != first
    graded(tmp_path)
    summed = identity()
    (tmp_path / "utils.py").write_text(f"def minus(value):\n    return -value\n\n\n{SUMS}")
    helped = identity()
    assert helped != summed
    assert identity() == helped


@pytest.mark.slow
def test_a_guard_turns_down_what_loses_too_much_of_a_task(tiny_folder, pairs, tmp_path):
    graded(tmp_path)
    options = {**QUICK, "scorer": "margin", "tasks_path": str(tmp_path), "accept": "harmless", "tolerance": 1000.0}
    options["candidates"] = 4
    free = laser(tiny_folder, pairs, config=LaserConfig(**options, guard="lm-eval:colours:100000"))
    assert {trial.judgement.guard for trial in free.search.trials} == {"lm-eval:colours"}
    losses = [trial.judgement.guard_loss for trial in free.search.trials]
    assert any(loss > 0 for loss in losses)
    strict = laser(tiny_folder, pairs, config=LaserConfig(**options, guard="lm-eval:colours:0.0"))
    for trial in strict.search.trials:
        assert trial.judgement.outcome == ("kept" if trial.judgement.guard_loss <= 0 else "guarded")
    assert {trial.judgement.outcome for trial in strict.search.trials} >= {"guarded"}
    assert strict.search.trials[0].judgement.guard_loss == losses[0]


def test_a_guard_on_answers_needs_no_pairs_beside_a_text(tiny_folder, text, tmp_path):
    save_answers(tmp_path, [{"question": f"{number}?", "answer": "no"} for number in range(4)])
    options = {**QUICK, "scorer": "perplexity", "text": text, "window": 16, "samples": 20, "candidates": 2}
    given = LaserConfig(**options, guard="lm-eval:answers:0.5", tasks_path=str(tmp_path))
    assert not given.needs_pairs
    laser(tiny_folder, config=given)


@pytest.fixture
def measured_on(monkeypatch):
    """What the run measured on, in its two parts."""
    found = []

    def noted(*arguments):
        found[:] = materials(*arguments)
        return tuple(found)

    monkeypatch.setattr("splaser_plugin.jobs.stages.materials", noted)
    return found


def asked(rows, tasks, name, text):
    save_answers(tasks, [{"prompt": row["prompt"], "answer": row["chosen"]} for row in rows], name, doc_to_text=text)


def prompts_of(task):
    return {document["prompt"] for document in task.documents}


@pytest.mark.slow
def test_nothing_sees_a_held_out_question_in_another_template(tiny_folder, tmp_path, measured_on):
    rows = [json.loads(line) for line in EXAMPLE_PAIRS.read_text().splitlines()][:30]
    given = save_rows(tmp_path / "pairs.jsonl", rows)
    asked(rows, tmp_path, "asked", "Question: {{prompt}}\nAnswer:")
    asked(rows[:24], tmp_path, "quoted", 'He said: "{{prompt}}"')
    options = {**QUICK, "candidates": 1, "tasks_path": str(tmp_path)}

    guarded = laser(tiny_folder, given, config=LaserConfig(**options, scorer="margin", guard="lm-eval:asked:1"))
    split, searched, unseen = measured_on
    seen, unseen_prompts = prompts_of(searched.tasks["asked"]), {pair.prompt for pair in unseen.pairs}
    assert len(seen) > 1 and len(unseen_prompts) >= 6
    assert not seen & unseen_prompts
    assert re.search(r"; left out, as they share its questions: \d+ documents of task asked$", split.reason)
    assert guarded.record.held_out.split == split.reason

    by_task = {**options, "scorer": "lm-eval:asked", "guard": "lm-eval:quoted:1", "reduce": "whitened"}
    laser(tiny_folder, given, config=LaserConfig(**by_task))
    split, searched, unseen = measured_on
    held_out = prompts_of(unseen.tasks["asked"])
    assert len(held_out) >= 6
    assert not held_out & prompts_of(searched.tasks["quoted"])
    assert searched.pairs == split.search
    assert len(searched.pairs) > 1 and not held_out & {pair.prompt for pair in searched.pairs}
    assert re.search(r"its questions: \d+ documents of task quoted, \d+ pairs$", split.reason)

    asked([{"prompt": prompt, "chosen": "no"} for prompt in held_out], tmp_path, "quoted", "{{prompt}}")
    with pytest.raises(TaskError, match="task 'quoted': all its documents have questions that are held out"):
        laser(tiny_folder, given, config=LaserConfig(**by_task))
    held_rows = save_rows(tmp_path / "held.jsonl", [row for row in rows if row["prompt"] in held_out])
    with pytest.raises(PairsError, match="all prompts of pairs are held-out questions of the task"):
        laser(tiny_folder, held_rows, config=LaserConfig(**{**by_task, "guard": "none"}))


def test_what_a_search_cannot_go_by_is_refused_before_a_model_is_loaded(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("splaser_plugin.jobs.laser.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    save_choices(tmp_path, num_fewshot=2, fewshot_split="test")
    with pytest.raises(TaskError, match="task 'colours': its few-shot examples are documents that are scored"):
        laser(tiny_folder, config=config(tmp_path))
    few_shot = {"num_fewshot": 2, "fewshot_split": "train"}
    path = save_choices(tmp_path, **few_shot)
    rows = [{**row, "number": number, "question": f" {row['question']}"} for number, row in enumerate(CHOICES)]
    train = save_rows(tmp_path / "train.jsonl", rows)
    path.write_text(path.read_text().replace("    test:", f"    train: {train}\n    test:"))
    with pytest.raises(TaskError, match="task 'colours': its few-shot examples are documents that are scored"):
        laser(tiny_folder, config=config(tmp_path))
    save_choices(tmp_path, metric_list=[{"metric": "f1", "aggregation": "f1", "higher_is_better": True}])
    with pytest.raises(TaskError, match=r"none of its metrics \(f1\) is a mean over documents"):
        laser(tiny_folder, config=config(tmp_path))
    (tmp_path / "utils.py").write_text(SUMS)
    path = save_choices(tmp_path, metric_list=[{"metric": "worst", "aggregation": "mean"}])
    path.write_text(path.read_text() + "process_results: !function utils.process_results\n")
    with pytest.raises(TaskError, match=r"whether more of its worst is better\. Say higher_is_better"):
        laser(tiny_folder, config=config(tmp_path))
    save_choices(tmp_path, "one", tag="colours")
    save_choices(tmp_path, "two", tag="colours")
    (tmp_path / "colours.yaml").unlink()
    with pytest.raises(TaskError, match=r"task 'colours': it is a group\. Name one of its tasks: one, two"):
        laser(tiny_folder, config=config(tmp_path))


def test_options_that_contradict_a_task_are_refused(tiny_folder, pairs_file):
    with pytest.raises(ConfigError, match="held_out with scorer lm-eval:x: what is held out are documents of the task"):
        LaserConfig(scorer="lm-eval:x", held_out=pairs_file)
    with pytest.raises(ConfigError, match=r"scorer: got 'lm-eval:', expected .*lm-eval:TASK"):
        LaserConfig(scorer="lm-eval:")
    for guard in ("lm-eval:x", "lm-eval:x:-1", "lm-eval::1"):
        with pytest.raises(ConfigError, match=r"lm-eval:TASK:FALL"):
            LaserConfig(guard=guard)
    with pytest.raises(ConfigError, match="none were given"):
        laser(tiny_folder, config=LaserConfig(scorer="lm-eval:x", reduce="whitened"))
    with pytest.raises(ConfigError, match="none were given"):
        laser(tiny_folder, config=LaserConfig(scorer="lm-eval:x", guard="margin:0.1"))
    given = LaserConfig(guard="lm-eval:a:b:0.1,margin:0.2", scorer="lm-eval:c")
    assert given.guards == {"lm-eval:a:b": 0.1, "margin": 0.2}
    assert given.tasks_used == ("a:b", "c")
    assert LaserConfig(tasks_path="somewhere").without_effect == ("--tasks-path",)
