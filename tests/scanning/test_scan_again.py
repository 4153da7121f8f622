"""Scans that are stopped, gone on with, used again, and shared between two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import textwrap
import time
from contextlib import contextmanager

import pytest
import torch

from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.config.stages import ScanConfig
from splaser_plugin.errors import OutputError
from splaser_plugin.scanning.scan import Scan, scan_source
from splaser_plugin.scanning.scan import scan as run_scan
from splaser_plugin.weights.stored import StoredWeights
from tests.builders import SPLASER, accelerate, files_of_at_most, save_sharded, save_single, torchrun
from tests.scanning.checkpoints import Notes, layers, mixture

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(model, output, *options):
    return [*SPLASER, "scan", model, "-o", output, *options]


def run_command(model, output, *options):
    return subprocess.run(command(model, output, *options), env=ONE_THREAD, capture_output=True, text=True, check=True)


def lines_of(journal):
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@contextmanager
def stopped_after(matrices, model, output):
    """A real `splaser scan` in the middle of its work, with this many matrices in its journal."""
    journal = output.with_name(output.name + ".journal.jsonl")
    with subprocess.Popen(command(model, output), env=ONE_THREAD, stderr=subprocess.PIPE, text=True) as process:
        while lines_of(journal) < matrices:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        yield process


@pytest.mark.slow
def test_a_killed_scan_goes_on_where_it_stopped_and_ends_with_the_same_bytes(tmp_path):
    slow = {"model.layers.9.mlp.up_proj.weight": torch.randn(1200, 1200)}
    model = save_single(tmp_path / "model", {**layers(), **slow})
    killed, unbroken = tmp_path / "killed.json", tmp_path / "unbroken.json"
    run_command(model, unbroken)
    with stopped_after(6, model, killed) as process:
        process.kill()
    journal = tmp_path / "killed.json.journal.jsonl"
    assert not killed.exists()
    assert lines_of(journal) == 6
    with journal.open("ab") as file:  # as a kill in the middle of a line leaves it
        file.write(journal.read_bytes()[:200])
    resumed = run_command(model, killed)
    assert "scanned before  6 of 7 matrices" in resumed.stderr
    assert killed.read_bytes() == unbroken.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "killed.json", "unbroken.json"}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_how_to_go_on_and_keep_what_is_finished(tmp_path, how):
    slow = {"model.layers.9.mlp.up_proj.weight": torch.randn(2400, 2400)}  # ends after the signal
    model = save_single(tmp_path / "model", {**layers(), **slow})
    with stopped_after(6, model, tmp_path / "scan.json") as process:
        process.send_signal(how)
        stderr = process.stderr.read()
    assert process.returncode == 130
    again = f"splaser scan {model} -o {tmp_path / 'scan.json'}"
    assert stderr.splitlines(keepends=True)[-1] == f"stopped. What is finished is kept; go on with: {again}\n"
    assert lines_of(tmp_path / "scan.json.journal.jsonl") >= 6


class Interrupted(Notes):
    """Ctrl-C after so many matrices."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def _advance(self, steps):
        super()._advance(steps)
        if self.computed >= self.after:
            raise KeyboardInterrupt


def test_only_what_an_interrupted_scan_lacks_is_computed(tmp_path):
    model, output = open_checkpoint(save_single(tmp_path / "model", layers())), tmp_path / "scan.json"
    with pytest.raises(KeyboardInterrupt):
        scan_source(StoredWeights(model), output=output, progress=Interrupted(after=4))
    notes = Notes()
    assert scan_source(StoredWeights(model), output=output, progress=notes) == scan_source(StoredWeights(model))
    assert notes.computed == 2
    assert notes.facts["scanned before"] == "4 of 6 matrices, so the others are left"


def test_a_journal_of_other_weights_is_not_used_which_is_said(tmp_path):
    model, output = open_checkpoint(save_single(tmp_path / "model", layers())), tmp_path / "scan.json"
    other = open_checkpoint(save_single(tmp_path / "other", layers(seed=1)))
    with pytest.raises(KeyboardInterrupt):
        scan_source(StoredWeights(other), output=output, progress=Interrupted(after=4))
    notes = Notes()
    assert scan_source(StoredWeights(model), output=output, progress=notes) == scan_source(StoredWeights(model))
    assert notes.computed == 6
    journal = tmp_path / "scan.json.journal.jsonl"
    assert notes.facts["journal"] == f"{journal} was left by another scan (other weights), so it is not used"


def test_a_finished_scan_is_not_computed_again_and_another_edge_needs_no_other(tmp_path):
    model, output = str(save_single(tmp_path / "model", layers())), tmp_path / "scan.json"
    first = run_scan(model, output=output)
    before = output.read_bytes()
    notes = Notes()
    assert run_scan(model, output=output, progress=notes) == first
    assert notes.computed == 0
    assert "nothing is computed again" in notes.facts["scanned before"]
    assert output.read_bytes() == before
    again = run_scan(model, config=ScanConfig(edge="mp"), output=output, progress=notes)
    assert (notes.computed, again.edge, again.matrices) == (0, "mp", first.matrices)
    assert Scan.load(output) == again


def test_an_earlier_scan_of_some_of_the_matrices_is_added_to(tmp_path):
    model, output = str(save_single(tmp_path / "model", layers())), tmp_path / "scan.json"
    run_scan(model, config=ScanConfig(include=("layers.1", "layers.2")), output=output)
    notes = Notes()
    scan = run_scan(model, output=output, progress=notes)
    assert notes.computed == 4
    assert notes.facts["scanned before"] == "2 of 6 matrices, so the others are left"
    assert scan == run_scan(model)


@pytest.mark.parametrize(("seed", "precision"), [(1, "auto"), (0, "float64")])
def test_other_weights_or_another_precision_are_computed_anew(tmp_path, seed, precision):
    output, notes = tmp_path / "scan.json", Notes()
    run_scan(str(save_single(tmp_path / "model", layers())), output=output)
    other = str(save_single(tmp_path / "other", layers(seed=seed)))
    scan = run_scan(other, config=ScanConfig(precision=precision), output=output, progress=notes)
    assert notes.computed == 6
    assert Scan.load(output) == scan


def test_a_scan_of_another_version_or_a_damaged_one_is_replaced(tmp_path):
    model, output = str(save_single(tmp_path / "model", layers())), tmp_path / "scan.json"
    whole = run_scan(model, output=output).to_dict()
    for content in ({**whole, "version": "0.0.1"}, {"schema": whole["schema"]}):
        output.write_text(json.dumps(content))
        notes = Notes()
        assert run_scan(model, output=output, progress=notes).to_dict() == whole
        assert notes.computed == 6


def test_a_loaded_model_is_scanned_once_too(tiny_model, tmp_path):
    first, second = Notes(), Notes()
    scan = run_scan(tiny_model, output=tmp_path / "scan.json", progress=first)
    assert run_scan(tiny_model, output=tmp_path / "scan.json", progress=second) == scan
    assert (first.computed, second.computed) == (len(scan.matrices), 0)


def test_a_file_that_is_no_scan_is_refused_before_any_work(tmp_path):
    output = tmp_path / "scan.json"
    output.write_text("{}")
    with pytest.raises(OutputError, match=r"scan\.json: exists and was not written by splaser"):
        run_scan("./no-such-model", output=output)
    with pytest.raises(OutputError, match="there is no folder"):
        run_scan("./no-such-model", output=tmp_path / "absent" / "scan.json")
    assert output.read_text() == "{}"


def test_a_scan_that_can_not_be_written_leaves_the_old_one_and_the_journal(tmp_path):
    output = tmp_path / "scan.json"
    run_scan(str(save_single(tmp_path / "first", layers())), output=output)
    before = output.read_bytes()
    message = r"scan\.json: can't be written \(File too large\)\. Make room there"
    with files_of_at_most(len(before) // 2), pytest.raises(OutputError, match=message):
        Scan.load(output).save(output)
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"first", "scan.json"}


def launch(launcher, *arguments):
    """Two processes on this machine."""
    environment = {**ONE_THREAD, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_and_only_one_of_them_speaks(tmp_path):
    model = save_sharded(tmp_path / "model", [mixture(), layers(7)])
    script = tmp_path / "splaser.py"
    script.write_text("from splaser_plugin.cli.app import main\nmain()\n")
    run_command(model, tmp_path / "one.json")
    run = launch(accelerate(), script, "scan", model, "-o", tmp_path / "two.json")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert run.stderr.count("scanned  31 matrices") == 1
    assert not (tmp_path / "two.json.journal.jsonl").exists()


@pytest.mark.slow
def test_two_processes_each_read_their_own_part_and_go_on_with_what_one_left(tmp_path):
    model, output = save_sharded(tmp_path / "model", [layers(9)]), tmp_path / "scan.json"
    alone = scan_source(StoredWeights(open_checkpoint(model)))
    run_scan(str(model), config=ScanConfig(include=("layers.0",)), output=output)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import json, sys
        from pathlib import Path
        from splaser_plugin.checkpoints import checkpoint
        from splaser_plugin.distributed import join_processes, process_index
        from splaser_plugin.scanning.scan import scan as run_scan

        read, read_one = [], checkpoint._read_tensor
        def spy(file, stored, file_bytes):
            read.extend([stored.name] if len(stored.shape) > 1 else [])  # not the samples of the identity
            return read_one(file, stored, file_bytes)
        checkpoint._read_tensor = spy
        join_processes()
        scan = run_scan(sys.argv[1], output=sys.argv[2])
        found = {"read": read, "matrices": [matrix.name for matrix in scan.matrices]}
        Path(f"{sys.argv[2]}.{process_index()}").write_text(json.dumps(found))
        """)
    )
    run = launch(torchrun(), script, model, output)
    assert run.returncode == 0, run.stderr
    first, second = (json.loads((tmp_path / f"scan.json.{index}").read_text()) for index in range(2))
    assert first["matrices"] == second["matrices"] == [matrix.name for matrix in alone.matrices]
    assert len(first["read"]) == len(second["read"]) == 4
    assert set(first["read"]) | set(second["read"]) == set(list(layers(9))[1:])


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_message(tmp_path):
    broken = layers(4)
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    model = save_single(tmp_path / "model", broken)
    script = tmp_path / "splaser.py"
    script.write_text("from splaser_plugin.cli.app import main\nmain()\n")
    run = launch(torchrun(), script, "scan", model, "-o", tmp_path / "scan.json")
    assert run.returncode != 0
    assert "SpectrumError: model.layers.1.mlp.up_proj: weight of shape (24, 48) holds inf or nan" in run.stderr
    assert not (tmp_path / "scan.json").exists()


def test_a_folder_of_the_hubs_cache_is_scanned_as_the_plain_one(tmp_path):
    plain = save_sharded(tmp_path / "blobs", [mixture(), layers(3)])
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    first = run_scan(str(plain), output=tmp_path / "plain.json")
    notes = Notes()
    second = run_scan(str(snapshot), output=tmp_path / "plain.json", progress=notes)
    assert second.matrices == first.matrices
    assert notes.computed == 0, "the same weights in another place"
