"""The journal of an unfinished laser run: the same command again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file

from splaser_plugin import LaserConfig, laser
from splaser_plugin.errors import OutputError, ScoreError
from splaser_plugin.files.output import check_output, check_space
from splaser_plugin.jobs import laser as jobs
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.journal import Journal, LaserJournal, RecordedScorer
from splaser_plugin.weights.loading import load_model
from tests.builders import ROOT, TO_RESUME, files_of_at_most, tiny_llama


class StoppedError(Exception):
    """Raised by a test in the middle of a run."""


class Fails:
    """A scorer for a model that can't be scored."""

    name, size, asked = "fails", 1, 0

    def score(self, items, like=None):
        self.asked += 1
        raise ScoreError("the logits are nan")


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"Name {what}.", "chosen": f"{what} it is.", "rejected": "No."}
        for what in ("a fruit", "a colour", "a city", "a river", "a tree", "a fish", "a bird")
        for what in (what, what + " you like")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def unbroken(tiny_folder, pairs_file, tmp_path_factory):
    """Output of a run that nothing stopped."""
    return run(tiny_folder, pairs_file, tmp_path_factory.mktemp("unbroken") / "out")


def run(model, pairs, out, overwrite=False, **changes):
    laser(model, pairs, config=LaserConfig(**{**TO_RESUME, **changes}), output=out, overwrite=overwrite)
    return out


def results(out):
    """results.json without its times."""
    stored = json.loads((out / "results.json").read_text())
    del stored["elapsed_s"]
    for candidate in stored["candidates"]:
        del candidate["elapsed_s"]
    return stored


def assert_same(out, unbroken):
    assert results(out) == results(unbroken)
    for name in ("recipe.json", "scan.json", "model.safetensors"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == {path.name for path in unbroken.iterdir()}


def stop_after(monkeypatch, measurements):
    """Let a run fail when it measures once more than that."""
    measured = []
    score = RecordedScorer.score

    def counted(self, items, like=None):
        if len(measured) == measurements:
            raise StoppedError
        measured.append(self.name)
        return score(self, items, like)

    monkeypatch.setattr(RecordedScorer, "score", counted)
    return measured


@pytest.fixture
def left(tiny_folder, pairs_file, tmp_path):
    """Output folder of a run that was stopped after five measurements."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(StoppedError):
        stop_after(monkeypatch, 5)
        run(tiny_folder, pairs_file, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["journal.jsonl"]
    return tmp_path / "out"


@pytest.mark.slow
def test_runs_killed_at_20_random_moments_end_as_an_unbroken_one(tiny_folder, pairs_file, tmp_path):
    command = [sys.executable, "-m", "tests.kill_runs", tiny_folder, pairs_file, tmp_path, "20"]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.stdout.startswith("20 killed"), run.stderr
    for out in tmp_path.glob("[0-9]*"):
        assert_same(out, tmp_path / "unbroken")


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(left, tiny_folder, pairs_file, unbroken, monkeypatch):
    computed = []
    once = LaserJournal._append

    def counted(self, record):
        computed.append(record)
        once(self, record)

    monkeypatch.setattr(LaserJournal, "_append", counted)
    before = len((left / "journal.jsonl").read_text().splitlines())
    run(tiny_folder, pairs_file, left)
    resumed = len(computed)
    computed.clear()
    run(tiny_folder, pairs_file, left.with_name("another"))
    assert before + resumed == len(computed)
    assert_same(left, unbroken)


def test_a_measurement_that_failed_is_not_made_again_either(tmp_path):
    scorer = Fails()
    for _ in range(2):
        journal = LaserJournal(tmp_path / "out")
        journal.begin({})
        with journal.measuring("a candidate"), pytest.raises(ScoreError, match="the logits are nan"):
            RecordedScorer(scorer, journal).score([0])
        journal.close()
    assert scorer.asked == 1


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.6, 0.93, 0.999])
def test_a_journal_cut_anywhere_is_gone_on_with(share, left, tiny_folder, pairs_file, unbroken):
    path = left / "journal.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: round(share * len(content))])
    run(tiny_folder, pairs_file, left)
    assert_same(left, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"candidates": 3}, "settings candidates was 6, is 3"),
        ({"edge": "mp", "seed": 7}, "settings edge was 'iqr', is 'mp'; settings seed was 1, is 7"),
    ],
)
def test_a_journal_of_other_settings_is_refused_and_kept(changes, difference, left, tiny_folder, pairs_file):
    before = (left / "journal.jsonl").read_bytes()
    with pytest.raises(OutputError, match=rf"was left by another run: .*{difference}.*or pass overwrite"):
        run(tiny_folder, pairs_file, left, **changes)
    assert (left / "journal.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_journal_of_other_weights_or_pairs_is_refused(left, tiny_folder, pairs_file, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    tiny_llama(seed=1).save_pretrained(other)
    with pytest.raises(OutputError, match=r"was left by another run: weights was '\w{64}', is '\w{64}'\. Give"):
        run(other, pairs_file, left)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(OutputError, match=r"another run: held_out was '\w{64}', is '\w{64}'"):
        run(tiny_folder, fewer, left)


@pytest.mark.slow
def test_overwrite_starts_anew_where_the_journal_is_of_other_settings(left, tiny_folder, pairs_file, tmp_path):
    run(tiny_folder, pairs_file, left, overwrite=True, candidates=2)
    assert_same(left, run(tiny_folder, pairs_file, tmp_path / "fresh", candidates=2))


@pytest.mark.slow
def test_a_run_that_replaces_an_earlier_output_keeps_it_until_the_end(left, tiny_folder, pairs_file, monkeypatch):
    run(tiny_folder, pairs_file, left)
    before = {path.name: path.read_bytes() for path in left.iterdir()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        stop_after(patch, 3)
        run(tiny_folder, pairs_file, left, overwrite=True, candidates=2)
    assert {path.name: path.read_bytes() for path in left.iterdir() if path.name != "journal.jsonl"} == before
    run(tiny_folder, pairs_file, left, overwrite=True, candidates=2)
    assert len(results(left)["candidates"]) == 2
    assert not (left / "journal.jsonl").exists()


def test_two_runs_on_one_output_refuse_each_other(left, tiny_folder, pairs_file, unbroken):
    journal = LaserJournal(left)
    with pytest.raises(OutputError, match=r"out/journal\.jsonl: another run is at work there\. Wait"):
        run(tiny_folder, pairs_file, left)
    journal.close()
    run(tiny_folder, pairs_file, left)
    assert_same(left, unbroken)


@pytest.mark.parametrize("damage", ["{}", "no json", '{"subject": "base model", "what": "scan", "asked": []}', "7"])
@pytest.mark.slow
def test_a_damaged_line_is_named(damage, left, tiny_folder, pairs_file):
    path = left / "journal.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = damage
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(OutputError, match=r"journal\.jsonl, line 2: is damaged.*Delete that line and all after it"):
        run(tiny_folder, pairs_file, left)


def test_measurements_in_another_order_are_refused(left, tiny_folder, pairs_file):
    path = left / "journal.jsonl"
    lines = path.read_text().splitlines()
    lines[2:4] = reversed(lines[2:4])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(OutputError, match=r"has semantic of base model, where semantic of base model, held out"):
        run(tiny_folder, pairs_file, left)


@pytest.mark.parametrize("notes", ["my notes\n", "my notes", "one\ntwo", '{"schema": "splaser.recipe/1"}'])
def test_a_file_that_is_no_journal_is_refused_and_kept(notes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "journal.jsonl").write_text(notes)
    with closing(LaserJournal(out)) as journal, pytest.raises(OutputError, match="in the journal's place, but none"):
        journal.begin({})
    assert (out / "journal.jsonl").read_text() == notes


def test_a_base_model_that_could_not_be_measured_is_tried_again(tmp_path):
    scorer = Fails()
    for _ in range(2):
        with closing(LaserJournal(tmp_path / "out")) as journal:
            journal.begin({})
            with pytest.raises(ScoreError):
                RecordedScorer(scorer, journal).score([0])
    assert scorer.asked == 2
    assert not (tmp_path / "out").exists()


def test_a_run_that_found_nothing_leaves_nothing(tiny_folder, tmp_path):
    with pytest.raises(Exception, match="absent"):
        run(tiny_folder, tmp_path / "absent.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_are_kept_though_nothing_else_is_finished(tmp_path):
    with closing(LaserJournal(tmp_path / "out")) as journal:
        journal.begin({})
        journal.statistics.mkdir(parents=True)
        (journal.statistics / "0.safetensors").write_bytes(b"measured")
    with closing(LaserJournal(tmp_path / "out")) as journal:
        assert journal.begin({}) == 0
        assert (journal.statistics / "0.safetensors").read_bytes() == b"measured"


@pytest.mark.slow
def test_an_output_whose_replacing_was_cut_short_is_put_back(left, tiny_folder, pairs_file, unbroken):
    replaced = left.with_name(f".{left.name}.unfinished-1234.replaced")
    left.rename(replaced)
    half = left.with_name(f".{left.name}.unfinished-1234")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    run(tiny_folder, pairs_file, left)
    assert_same(left, unbroken)
    assert [path.name for path in left.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_disk_too_small_is_refused_before_anything_is_measured(dtype, tiny_folder, pairs_file, tmp_path, monkeypatch):
    def loads(*arguments, **options):
        loaded.append(True)
        return load_model(*arguments, **options)

    loaded = []
    monkeypatch.setattr(jobs, "load_model", loads)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"out: needs 0\.\d MB, but 0\.1 MB are free there\. Make room there"):
        run(tiny_folder, pairs_file, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    assert bool(loaded) == (dtype == "float32")


@pytest.mark.slow
def test_a_full_disk_says_what_was_needed_and_leaves_the_journal(left, tiny_folder, pairs_file, unbroken):
    message = r"out: can't be written \(.*it needs 0\.\d MB, and .*B are free there"
    with files_of_at_most(300_000), pytest.raises(OutputError, match=message):
        run(tiny_folder, pairs_file, left)
    assert [path.name for path in left.parent.iterdir()] == ["out"]
    assert [path.name for path in left.iterdir()] == ["journal.jsonl"]
    run(tiny_folder, pairs_file, left)
    assert_same(left, unbroken)


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path):
    check_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(OutputError, match="are free there"):
        check_space(tmp_path / "not" / "yet" / "there", 2**62)


def test_a_folder_with_nothing_but_a_journal_can_be_an_output(left):
    assert check_output(left, overwrite=False, goes_on=True) == left
    (left / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="exists and isn't empty"):
        check_output(left, overwrite=False, goes_on=True)


def test_without_an_output_nothing_is_remembered():
    class Constant:
        name, size = "constant", 2

        def score(self, items, like=None):
            return Scores(tuple(items), tuple(float(item) for item in items))

    scorer = RecordedScorer(Constant(), Journal())
    assert scorer.score([0, 1]).values == (0.0, 1.0)
    assert scorer.score([1]).values == (1.0,)


def test_the_saved_weights_are_those_of_the_recipe(unbroken, tiny_folder):
    steps = json.loads((unbroken / "recipe.json").read_text())["steps"]
    assert steps, "this run has to keep something to show anything"
    state, base = load_file(unbroken / "model.safetensors"), load_file(tiny_folder / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], state[name])}
    assert changed == {step["name"] + ".weight" for step in steps}
