from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.cli.demo import MODEL_WHEEL, _wheel
from splaser_plugin.config.stages import ScanConfig
from splaser_plugin.errors import OutputError, RecipeError, SpectrumError
from splaser_plugin.progress import Progress
from splaser_plugin.scanning.scan import Scan, scan_checkpoint, scan_model
from splaser_plugin.scanning.scan import scan as run_scan
from splaser_plugin.weights.in_memory import Weights
from tests.benchmarks.scan_memory import measure, write_llama
from tests.builders import SPLASER, accelerate, save_sharded, save_single, tiny_llama, torchrun
from tests.reference import snr_and_rank, thresholds

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


class Notes(Progress):
    """What a run told: facts by label, and how many matrices it computed."""

    def __init__(self):
        self.facts = {}
        self.computed = 0

    def fact(self, label, value):
        self.facts[label] = value

    @contextmanager
    def phase(self, name, total):
        yield self._advance

    def _advance(self, steps):
        self.computed += steps


def layers(count=6, side=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (side, 2 * side)
    return {
        f"model.layers.{number}.mlp.up_proj.weight": torch.randn(shape, generator=generator) for number in range(count)
    }


def mixture(experts=5, rows=24, columns=40):
    """Two blocks with fused experts, some of them alike in shape to the weights beside them."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"mlp.experts.down_proj": (experts, columns, rows), "mlp.experts.gate_up_proj": (experts, rows, columns)}
    shapes |= {"mlp.router.weight": (rows, columns), "self_attn.q_proj.weight": (rows, rows)}
    return {
        f"model.layers.{block}.{name}": torch.randn(shape, generator=generator).bfloat16()
        for block in range(2)
        for name, shape in shapes.items()
    }


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


def test_agrees_with_the_published_arithmetic(tiny_model):
    scan = scan_model(Weights(tiny_model))
    for matrix in scan.matrices:
        weight = tiny_model.get_parameter(matrix.name + ".weight").detach()
        for edge, threshold in thresholds(weight).items():
            got = matrix.edges[edge]
            snr, rank = snr_and_rank(weight, threshold)
            assert got.threshold == pytest.approx(threshold, rel=1e-6)
            assert got.rank == rank
            if got.snr is None:
                assert rank == min(weight.shape)
            else:
                assert got.snr == pytest.approx(snr, rel=1e-6)
                assert got.snr_ratio == pytest.approx(snr / matrix.max_singular_value, rel=1e-6)


def test_a_scan_from_disk_is_the_scan_of_the_loaded_model(tmp_path):
    model = tiny_llama(tie_word_embeddings=False).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    live = {matrix.name: matrix for matrix in scan_model(Weights(model)).matrices}
    stored = {matrix.name: matrix for matrix in scan_checkpoint(open_checkpoint(tmp_path)).matrices}
    assert live == stored


def test_a_saved_scan_comes_back_equal_and_has_the_documented_fields(tiny_model, tmp_path):
    scan = scan_model(Weights(tiny_model), name="tiny", identity="abc", config=ScanConfig(edge="mp"))
    scan.save(tmp_path / "scan.json")
    assert Scan.load(tmp_path / "scan.json") == scan
    stored = json.loads((tmp_path / "scan.json").read_text())
    assert stored == json.loads(json.dumps(scan.to_dict()))
    assert stored["schema"] == "splaser.scan/1"
    assert (stored["model"], stored["edge"]) == ("tiny", "mp")
    first = stored["matrices"][0]
    assert {"name", "type", "block", "shape", "max_singular_value", "edges"} <= set(first)
    assert set(first["edges"]) == {"iqr", "mp", "gavish-donoho"}
    assert set(first["edges"]["mp"]) == {"sigma", "threshold", "rank", "snr", "snr_ratio", "reason"}
    assert stored["skipped"][0].keys() == {"name", "reason", "tied_to"}


def test_matrices_without_noise_rank_above_all_others_and_by_their_headroom(tiny_model):
    weights = Weights(tiny_model)
    matrices = [matrix for matrix in weights.matrices()[0] if matrix.type == "mlp.down_proj"]
    steep = torch.zeros(matrices[0].shape)
    steep.diagonal().copy_(torch.linspace(1.0, 2.0, 32))
    flat = torch.zeros(matrices[1].shape)
    flat.diagonal().copy_(torch.linspace(1.8, 2.0, 32))
    weights.write(matrices[0], flat)
    weights.write(matrices[1], steep)
    ranked = scan_model(weights).ranked()
    assert [matrix.name for matrix in ranked[-2:]] == [matrices[1].name, matrices[0].name]
    for matrix in ranked[-2:]:
        fit = matrix.edges["iqr"]
        assert fit.snr is None
        assert fit.snr_ratio is None
        assert fit.reason


def test_the_kept_spectrum_spans_all_singular_values(tiny_model):
    scan = scan_model(Weights(tiny_model))
    matrix = scan.matrices[0]
    values = torch.linalg.svdvals(tiny_model.get_parameter(matrix.name + ".weight").detach().double()).numpy()
    np.testing.assert_allclose(matrix.spectrum, values, rtol=1e-5)
    assert matrix.max_singular_value == pytest.approx(values[0], rel=1e-9)
    assert matrix.min_singular_value == pytest.approx(values[-1], rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_model, bad):
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    with pytest.raises(SpectrumError, match=r"model\.layers\.1\.mlp\.up_proj"):
        scan_model(Weights(tiny_model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "schema is 'list'"),
        ('{"schema": "splaser.scan/9"}', r"schema is 'splaser\.scan/9', expected 'splaser\.scan/1'"),
        ('{"schema": "splaser.scan/1"}', r"not a whole scan \(model is missing\)"),
    ],
)
def test_a_damaged_scan_is_refused(tmp_path, text, message):
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        Scan.load(tmp_path / "scan.json")


@pytest.mark.parametrize("spectrum", [["1"], [10**400], 7])
def test_a_scan_whose_spectrum_is_not_of_numbers_is_refused(tiny_model, tmp_path, spectrum):
    stored = scan_model(Weights(tiny_model)).to_dict()
    stored["matrices"][0]["spectrum"] = spectrum
    (tmp_path / "scan.json").write_text(json.dumps(stored))
    with pytest.raises(RecipeError, match="not a whole scan"):
        Scan.load(tmp_path / "scan.json")


def test_a_missing_scan_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"can't be read \(No such file"):
        Scan.load(tmp_path / "scan.json")


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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_how_to_go_on_and_keep_what_is_finished(tmp_path, how):
    slow = {"model.layers.9.mlp.up_proj.weight": torch.randn(2400, 2400)}  # ends after the signal
    model = save_single(tmp_path / "model", {**layers(), **slow})
    with stopped_after(6, model, tmp_path / "scan.json") as process:
        process.send_signal(how)
        told = process.stderr.read()
    assert process.returncode == 130
    again = f"splaser scan {model} -o {tmp_path / 'scan.json'}"
    assert told.splitlines(keepends=True)[-1] == f"stopped. What is finished is kept; go on with: {again}\n"
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
        scan_checkpoint(model, output=output, progress=Interrupted(after=4))
    notes = Notes()
    assert scan_checkpoint(model, output=output, progress=notes) == scan_checkpoint(model)
    assert notes.computed == 2
    assert notes.facts["scanned before"] == "4 of 6 matrices, so the others are left"


def test_a_journal_of_other_weights_is_not_used_which_is_said(tmp_path):
    model, output = open_checkpoint(save_single(tmp_path / "model", layers())), tmp_path / "scan.json"
    other = open_checkpoint(save_single(tmp_path / "other", layers(seed=1)))
    with pytest.raises(KeyboardInterrupt):
        scan_checkpoint(other, output=output, progress=Interrupted(after=4))
    notes = Notes()
    assert scan_checkpoint(model, output=output, progress=notes) == scan_checkpoint(model)
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
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(OutputError, match=r"scan\.json: can't be written \(File too large\)\. Make room there"):
            Scan.load(output).save(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"first", "scan.json"}


def test_fused_experts_are_scanned_in_their_order_as_one_by_one(tmp_path):
    tensors = mixture()
    scan = scan_checkpoint(open_checkpoint(save_sharded(tmp_path, [tensors])))
    names = [matrix.name for matrix in scan.matrices if "down_proj" in matrix.name]
    assert names == [f"model.layers.{block}.mlp.experts.down_proj[{index}]" for block in range(2) for index in range(5)]
    for matrix in scan.matrices:
        parameter, _, expert = matrix.name.rstrip("]").partition("[")
        weight = tensors[parameter][int(expert)] if expert else tensors[parameter + ".weight"]
        values = torch.linalg.svdvals(weight.double()).numpy()
        np.testing.assert_allclose(matrix.spectrum, values, rtol=1e-5)
        assert matrix.max_singular_value == pytest.approx(values[0], rel=1e-9)


def test_an_expert_that_is_not_finite_is_named(tmp_path):
    tensors = mixture()
    tensors["model.layers.1.mlp.experts.gate_up_proj"][3, 0, 0] = float("inf")
    with pytest.raises(SpectrumError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj\[3\]: .*inf or nan"):
        scan_checkpoint(open_checkpoint(save_sharded(tmp_path, [tensors])))


def test_a_scan_in_parts_has_the_same_bits_also_where_experts_are_computed_together(tmp_path):
    model, output = open_checkpoint(save_sharded(tmp_path / "model", [mixture(), layers(3)])), tmp_path / "scan.json"
    whole = scan_checkpoint(model, output=tmp_path / "whole.json")
    scan_checkpoint(model, output=output)
    stored = json.loads(output.read_text())
    stored["matrices"] = stored["matrices"][::3]
    output.write_text(json.dumps(stored))
    notes = Notes()
    assert scan_checkpoint(model, output=output, progress=notes) == whole
    assert 0 < notes.computed < len(whole.matrices)
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_odd_weights_give_finite_numbers_or_a_reason(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 24, generator=generator)
    odd = {
        "zeros": torch.zeros(16, 24),
        "equal": torch.ones(16, 24),
        "rank_one": noise[:, :1] @ noise[:1],
        "row": noise[:1],
        "column": noise[:, :1].clone(),
        "one": noise[:1, :1].clone(),
        "denormal": noise * 1e-40,
        "huge": (noise * 1e30).bfloat16(),
        "half": noise.half(),
        "float8": noise.to(torch.float8_e4m3fn),
        "float64": noise.double() * 1e200,
    }
    tensors = {f"model.layers.0.{name}.weight": tensor for name, tensor in odd.items()}
    scan = run_scan(str(save_single(tmp_path / "model", tensors)), output=tmp_path / "scan.json")
    assert len(scan.matrices) == len(odd)
    for matrix in scan.matrices:
        for fit in matrix.edges.values():
            assert np.isfinite([fit.sigma, fit.threshold, fit.rank]).all()
            assert (fit.snr is None or fit.snr_ratio is None) == bool(fit.reason)
    assert "NaN" not in (tmp_path / "scan.json").read_text()
    assert "Infinity" not in (tmp_path / "scan.json").read_text()


def launch(launcher, *arguments):
    """Two processes on this machine."""
    environment = {**ONE_THREAD, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=100)


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


def test_two_processes_each_read_their_own_part_and_go_on_with_what_one_left(tmp_path):
    model, output = save_sharded(tmp_path / "model", [layers(9)]), tmp_path / "scan.json"
    alone = scan_checkpoint(open_checkpoint(model))
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
            read.append(stored.name)
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_bound_by_the_largest_matrix(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "model").mkdir()
    tensors = write_llama(tmp_path / "model", 512, torch.float32, total_bytes=217 * 10**6)
    row = measure("small", tmp_path / "model", tensors, tmp_path / "scan.json")
    assert row.checkpoint_bytes > row.allowed_bytes
    assert row.peak_bytes <= row.allowed_bytes


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


@pytest.mark.real
def test_a_gguf_file_is_scanned_through_the_same_code(tmp_path):
    gguf = next(_wheel(*MODEL_WHEEL).glob("*.gguf"))
    some = ScanConfig(include=("layers.3.self_attn.k_proj", "layers.29.mlp.down_proj"))
    notes = Notes()
    scan = run_scan(gguf, config=some, output=tmp_path / "scan.json", progress=notes)
    assert notes.computed == 2
    assert [(matrix.type, matrix.block) for matrix in scan.matrices] == [("self_attn.k_proj", 3), ("mlp.down_proj", 29)]
    assert Scan.load(tmp_path / "scan.json") == scan
