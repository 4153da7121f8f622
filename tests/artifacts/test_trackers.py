"""A run in TensorBoard and W&B, read back from their own files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from splaser_plugin.artifacts import trackers
from splaser_plugin.artifacts.results import Results
from tests.builders import EXAMPLE_PAIRS, FLAGS, wandb_history

pytestmark = pytest.mark.slow


def read(folder):
    """What TensorBoard shows of the event files in a folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture
def run(tiny_folder, tmp_path):
    return ["laser", tiny_folder, "--pairs", EXAMPLE_PAIRS, "--samples", 20, "-o", tmp_path / "out", *FLAGS]


def test_tensorboard_has_the_metrics_the_curve_and_the_answers(splaser, run, tmp_path):
    code, _, stderr = splaser(*run, "--report-to", "tensorboard")
    assert code == 0 and "reported to  tensorboard" in stderr, stderr
    found = Results.load(tmp_path / "out" / "results.json")
    events = read(tmp_path / "runs" / "out")
    curve = [(point.step, point.value) for point in events.Scalars("laser/candidate_score")]
    assert curve == [(step, pytest.approx(trial.score)) for step, trial in enumerate(found.candidates, 1)]
    assert events.Scalars("laser/score_after")[0].value == pytest.approx(found.final.score)
    assert events.Scalars("laser/held_out_difference")[0].value == pytest.approx(found.held_out.difference)
    [text] = events.Tensors("laser/answers/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert table.count("\n") == 1 + 20
    assert found.texts.held_out[0].prompt.split("\n")[0][:30] in table


def test_a_repeated_run_has_a_curve_of_its_own(splaser, run, tmp_path):
    for anew in ([], ["--overwrite"], ["--overwrite"]):
        code, _, stderr = splaser(*run, "--report-to", "tensorboard", *anew)
        assert code == 0, stderr
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["out", "out-2", "out-3"]
    tried = len(Results.load(tmp_path / "out" / "results.json").candidates)
    for name in ("out", "out-2", "out-3"):
        assert len(read(tmp_path / "runs" / name).Scalars("laser/candidate_score")) == tried


def test_wandb_has_them_offline(splaser, run, wandb_folder):
    code, _, stderr = splaser(*run, "--report-to", "wandb")
    assert code == 0 and "reported to  wandb" in stderr, stderr
    found = Results.load(wandb_folder / "out" / "results.json")
    history = wandb_history(wandb_folder)
    for trial in found.candidates:
        assert history.count(b"laser/candidate_score") >= len(found.candidates)
        assert json.dumps(trial.score).encode() in history
    [table] = wandb_folder.glob("wandb/offline-run-*/files/media/table/laser/answers_*.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == trackers.COLUMNS
    asked = [*found.texts.search, *found.texts.held_out]
    assert sorted(row[1] for row in rows["data"]) == sorted(pair.prompt for pair in asked)


def test_mlflow_has_them(splaser, run, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    code, _, stderr = splaser(*run, "--report-to", "mlflow")
    assert code == 0 and "reported to  mlflow" in stderr, stderr
    found = Results.load(tmp_path / "out" / "results.json")
    [logged] = mlflow.search_runs(experiment_names=["splaser"], output_format="list")
    assert logged.data.metrics["laser/score_after"] == pytest.approx(found.final.score)
    curve = mlflow.MlflowClient().get_metric_history(logged.info.run_id, "laser/candidate_score")
    values = [point.value for point in sorted(curve, key=lambda point: point.step)]
    assert values == [pytest.approx(trial.score) for trial in found.candidates]
    table = mlflow.artifacts.download_artifacts(run_id=logged.info.run_id, artifact_path="answers.json")
    stored = json.loads(Path(table).read_text())
    assert stored["columns"] == trackers.COLUMNS and len(stored["data"]) == 20


def test_a_tracker_that_is_unknown_or_absent_is_refused_before_the_work(splaser, run, tmp_path, monkeypatch):
    code, _, stderr = splaser(*run, "--report-to", "tensorbored")
    assert code == 2 and "--report-to: got 'tensorbored', expected one of tensorboard, wandb, mlflow." in stderr
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    code, _, stderr = splaser(*run, "--report-to", "wandb")
    assert code == 1 and "--report-to wandb: it isn't installed. Install it: " in stderr
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_costs_no_result(splaser, run, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    code, _, stderr = splaser(*run, "--report-to", "tensorboard")
    assert code == 0 and "not reported  " in stderr
    assert (tmp_path / "out" / "results.json").is_file()
