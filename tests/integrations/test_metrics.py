"""Where the callback's metrics go: the history, each tracker's run, and what happens when a tracker fails."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from splaser_plugin import LaserCallback
from splaser_plugin.artifacts.trackers import COLUMNS, answers, markdown
from tests.builders import ROOT, tiny_llama, wandb_history
from tests.integrations.trainings import CONFIG

pytestmark = pytest.mark.slow


class Closing(TrainerCallback):
    """A reporter that closes its run at the end of training, as MLflow's: keeps what came in time."""

    def __init__(self):
        self.seen = {}
        self.is_open = False

    def on_train_begin(self, args, state, control, **rest):
        self.is_open = True

    def on_log(self, args, state, control, logs=None, **rest):
        if self.is_open:
            self.seen.update(logs)

    def on_train_end(self, args, state, control, **rest):
        self.is_open = False


class Begun(TrainerCallback):
    """Keeps what was logged until the first step."""

    def __init__(self, caplog):
        self.caplog = caplog
        self.said = None

    def on_step_begin(self, args, state, control, **rest):
        self.said = self.caplog.text if self.said is None else self.said


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
@pytest.mark.parametrize("when", ["init", "before", "after"])
def test_without_the_trainer_metrics_reach_the_history_and_trainer_state_and_what_trackers_need_is_said_at_the_start(
    when, report_to, trainer_of, pairs, tmp_path, caplog
):
    begun, callback = Begun(caplog), LaserCallback(when=when, pairs=pairs, config=CONFIG)
    trainer = trainer_of(tiny_llama(), callback, begun, report_to=[report_to])
    trainer.train()
    assert any("laser/score_after" in logged for logged in trainer.state.log_history)
    if when != "after":
        trainer.save_state()
    stored = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert stored["log_history"] == trainer.state.log_history
    said = "log_history; trainer.add_callback(LaserCallback(trainer=trainer, ...)) sends them to tensorboard too."
    assert (said in begun.said) is (report_to == "tensorboard")


@pytest.mark.parametrize("when", ["before", "init", "after"])
def test_with_the_trainer_metrics_reach_all_its_reporters_while_their_runs_are_open(when, trainer_of, pairs):
    logs = Closing()
    trainer = trainer_of(tiny_llama(), logs)
    callback = LaserCallback(when=when, pairs=pairs, config=CONFIG, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    found = callback.result.search
    expected = {
        "laser/score_before": found.baseline.mean,
        "laser/score_after": found.final.mean,
        "laser/matrices_tried": 4,
        "laser/matrices_kept": len(found.kept),
        "laser/rank_removed": sum(min(candidate.matrix.shape) - candidate.rank for candidate in found.kept),
    }
    assert expected.items() <= logs.seen.items()
    assert logs.seen["laser/seconds"] > 0
    assert any(expected.items() <= logged.items() for logged in trainer.state.log_history)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names[-1] == "LaserCallback"
    assert len(names) == len(set(names))


def test_tensorboard_gets_metrics_and_a_curve_in_the_trainings_own_run(trainer_of, pairs, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = trainer_of(tiny_llama(), report_to=["tensorboard"])
    callback = LaserCallback(when="after", pairs=pairs, config=CONFIG, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    [file] = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    curve = [(point.step, point.value) for point in events.Scalars("train/laser/candidate_score")]
    trials = callback.result.search.trials
    assert curve == [(step, pytest.approx(trial.judgement.scores.mean)) for step, trial in enumerate(trials, 1)]
    assert events.Scalars("train/laser/score_after")[-1].value == pytest.approx(callback.result.score_after)
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2]
    [text] = events.Tensors("laser/answers/text_summary")
    assert text.tensor_proto.string_val[0].decode() == markdown(answers(callback.result.record))
    assert not any("candidate" in key for logged in trainer.state.log_history for key in logged)


def test_mlflow_and_wandb_get_the_curve_in_the_trainings_own_run(trainer_of, pairs, wandb_folder, monkeypatch):
    import mlflow
    import wandb

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{wandb_folder}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")  # its file store loses what threads write at once
    trainer = trainer_of(tiny_llama(), report_to=["mlflow", "wandb"], run_name="both")
    callback = LaserCallback(when="after", pairs=pairs, config=CONFIG, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    mlflow.flush_async_logging()
    scores = [trial.judgement.scores.mean for trial in callback.result.search.trials]
    [run] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FINISHED" and "loss" in run.data.metrics
    assert run.data.metrics["laser/score_after"] == pytest.approx(callback.result.score_after)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "laser/candidate_score")
    curve = sorted((point.step, point.value) for point in history)
    assert curve == [(n, pytest.approx(s)) for n, s in enumerate(scores, 1)]
    rows = answers(callback.result.record)
    table = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="answers.json")
    assert json.loads(Path(table).read_text())["columns"] == COLUMNS
    wandb.finish()
    [table] = wandb_folder.glob("wandb/offline-run-*/files/media/table/laser/answers_*.json")
    assert json.loads(table.read_text()) == {"columns": COLUMNS, "data": rows} and rows
    history = wandb_history(wandb_folder)
    assert all(json.dumps(score).encode() in history for score in scores)


@pytest.mark.parametrize("order", ["after the reporters", "before the reporters", "first of all"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_in_every_order_of_callbacks_each_tracker_has_one_run_with_all_metrics(
    when, order, trainer_of, pairs, wandb_folder, monkeypatch
):
    import mlflow
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for variable, value in (("TRACKING_URI", f"file:{wandb_folder}/mlruns"), ("ALLOW_FILE_STORE", "true")):
        monkeypatch.setenv(f"MLFLOW_{variable}", value)
    reporters = [TensorBoardCallback, MLflowCallback, WandbCallback]
    later = order == "before the reporters"
    trainer = trainer_of(
        tiny_llama(), report_to=[] if later else ["tensorboard", "mlflow", "wandb"], save_strategy="steps", save_steps=1
    )
    callback = LaserCallback(when=when, pairs=pairs, config=CONFIG, trainer=trainer)
    if order == "first of all":
        trainer.callback_handler.callbacks.insert(0, callback)
    else:
        trainer.add_callback(callback)
    for reporter in reporters if later else ():
        trainer.add_callback(reporter)
    trainer.train()
    score = pytest.approx(callback.result.score_after)
    folder = Path(trainer.args.output_dir)
    stored = folder / "trainer_state.json" if when == "after" else folder / "checkpoint-1" / "trainer_state.json"
    history = {key: value for logged in json.loads(stored.read_text())["log_history"] for key, value in logged.items()}
    assert history["laser/score_after"] == score and "loss" in history
    [file] = wandb_folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    assert [point.value for point in events.Scalars("train/laser/score_after")] == [score]
    assert len(events.Scalars("train/loss")) == 2
    mlflow.flush_async_logging()
    [run] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FINISHED" and "loss" in run.data.metrics
    assert run.data.metrics["laser/score_after"] == score
    assert len(list(wandb_folder.glob("wandb/offline-run-*"))) == 1
    summary = dict(wandb.run.summary)
    assert summary["train/laser/score_after"] == score and "train/loss" in summary
    wandb.finish()


def test_a_tracker_that_fails_loses_neither_the_lasered_model_nor_other_trackers(
    trainer_of, pairs, wandb_folder, tmp_path, monkeypatch, capsys
):
    import mlflow

    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{wandb_folder}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")  # its file store loses what threads write at once
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "unwritable")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    mlflow.MlflowClient().create_experiment("unwritable", artifact_location=str(tmp_path / "file" / "artifacts"))
    trainer = trainer_of(tiny_llama(), report_to=["mlflow", "tensorboard"])
    trainer.add_callback(LaserCallback(when="after", pairs=pairs, config=CONFIG, trainer=trainer))
    trainer.train()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lasered")
    assert "laser: not reported: the answers, by MLflowCallback: NotADirectoryError: " in capsys.readouterr().err
    [file] = tmp_path.rglob("events.out.tfevents*")
    assert b"laser/answers" in file.read_bytes()


def test_what_a_reporter_raises_at_the_metrics_comes_after_the_lasered_model_is_saved(trainer_of, pairs, tmp_path):
    class Failing(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **rest):
            if "laser/score_after" in logs:
                raise ConnectionError("the tracker is away")

    trainer = trainer_of(tiny_llama(), Failing())
    trainer.add_callback(LaserCallback(when="after", pairs=pairs, config=CONFIG, trainer=trainer))
    with pytest.raises(ConnectionError, match="the tracker is away"):
        trainer.train()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lasered")


def test_the_held_out_difference_is_a_metric(trainer_of):
    held_out = str(ROOT / "examples" / "data" / "held_out.jsonl")
    callback = LaserCallback(when="after", pairs=held_out, config=dataclasses.replace(CONFIG, samples=24))
    trainer = trainer_of(tiny_llama(), callback)
    trainer.train()
    verdict = callback.result.held_out
    assert len(verdict.base.items) == 7
    logged = trainer.state.log_history[-1]
    assert logged["laser/held_out_difference"] == verdict.difference
    assert (logged["laser/held_out_low"], logged["laser/held_out_high"]) == verdict.interval
