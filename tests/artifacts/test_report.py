"""What a report says, and that untrusted texts stay text. Its looks: test_report_browser.py."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin.artifacts.report import render, report
from splaser_plugin.artifacts.results import Results
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import OutputError, RecipeError
from splaser_plugin.files.json import write_json
from splaser_plugin.files.text import visible
from splaser_plugin.integrations.configs.axolotl import axolotl_yaml
from splaser_plugin.integrations.configs.plan import Plan
from splaser_plugin.scanning.agreement import agreements
from splaser_plugin.scanning.records import Scan, matrix_scan
from splaser_plugin.scanning.selection import choose
from splaser_plugin.weights.matrices import Matrix
from tests.artifacts.page import Page, squeezed
from tests.report_data import made_up_results, made_up_scan, replaced

SCAN = made_up_scan(4)
SMOLLM2 = Path(__file__).parents[1] / "data" / "smollm2_scan.json"
RESULTS = made_up_results(SCAN)


def test_a_report_answers_in_the_order_of_the_questions():
    text = squeezed(Page(render(SCAN, Results.from_dict(RESULTS))).text)
    sentences = [
        "Yes: better on 8 pairs that the search never saw.",
        "What the score is",
        "1 of 4 candidates kept",
        "better than the best before it, on all 20 pairs",
        "after 10 pairs a bound said that it can't be accepted any more",
        "it can't be scored: answers are empty",
        "28 of 28 answers changed",
        "An edge splits the singular values",
        "LoRA on these and nothing else",
        "lora_target_modules",
    ]
    places = [text.index(sentence) for sentence in sentences]
    assert places == sorted(places)


def test_the_interval_of_a_candidate_is_that_of_its_differences_to_the_best_before_it():
    run = Results.from_dict(RESULTS)
    kept, restored, stopped, failed = run.compared
    gained = RESULTS["final"]["score"] - RESULTS["baseline"]["score"]
    assert kept.change == pytest.approx(gained)
    assert restored.change == pytest.approx(-gained)
    assert stopped.change == 0
    assert stopped.interval == (0, 0)
    assert kept.interval[0] < kept.change < kept.interval[1]
    assert failed.change is None and failed.interval is None


def test_all_answers_are_there_held_out_ones_apart_what_changed_most_first():
    stored = json.loads(json.dumps(RESULTS))
    stored["final"]["answers"][3] = stored["baseline"]["answers"][3]
    run = Results.from_dict(stored)
    for is_held_out, count in ((True, 8), (False, 20)):
        exchanges = run.exchanges(is_held_out=is_held_out)
        assert len(exchanges) == count
        changes = [abs(exchange.change) for exchange in exchanges]
        assert changes == sorted(changes, reverse=True)
    assert [exchange.asked.prompt for exchange in run.exchanges(is_held_out=False) if not exchange.is_changed] == [
        "Question 3?"
    ]
    changed = exchanges[1] if not exchanges[0].is_changed else exchanges[0]
    assert changed.before[: changed.shared].endswith(" is ")
    page = Page(render(SCAN, run))
    assert page.tags.count("article") == 28
    assert squeezed(page.text).count("Before and after") == 1


def test_a_stopped_candidate_stands_beside_the_best_model_on_the_same_pairs():
    stored = json.loads(json.dumps(RESULTS))
    stored["candidates"][2]["per_pair"] = [value - 0.05 for value in stored["final"]["per_pair"][:10]]
    run = Results.from_dict(stored)
    before = np.mean(stored["final"]["per_pair"][:10])
    assert run.compared[2].change == pytest.approx(-0.05)
    assert run.compared[2].score_before == pytest.approx(before)
    sentence = f"-0.0500 -0.0500 to -0.0500 {before - 0.05:+.4f} against {before:+.4f} on the same 10 pairs"
    assert sentence in squeezed(Page(render(SCAN, run)).text)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"verdict": "worse"}, "No: worse on 8 pairs that the search never saw."),
        ({"verdict": "no difference that 8 pairs can show"}, "No difference that 8 pairs can show."),
        ({"verdict": None, "split": "none, as asked for"}, "That can't be said: no pairs were held out."),
    ],
)
def test_the_verdict_in_words(change, sentence):
    run = Results.from_dict({**RESULTS, "held_out": {**RESULTS["held_out"], **change}})
    assert sentence in squeezed(Page(render(SCAN, run)).text)


def test_a_run_on_windows_of_text_by_the_harmless_rule_has_words_of_its_own():
    stored = json.loads(json.dumps(RESULTS))
    stored |= {"unit": "windows", "compared_with": "base", "parameters_removed": 12345, "texts": {"search": []}}
    stored["held_out"]["split"] = "8 windows; 20 to search on"
    stored["held_out"]["loss_verdict"] = "loses less than the tolerance of 0.02"
    stored["candidates"][1] |= {"verdict": "guarded", "guard_loss": 1.05}
    for part in (stored["baseline"], stored["final"], stored["held_out"]["base"], stored["held_out"]["result"]):
        part["answers"] = []
    failed = {"verdict": "failed", "reason": "only nan came out", "score": None, "per_pair": [], "pairs_scored": []}
    stored["candidates"].append({**stored["candidates"][0], **failed})
    run = Results.from_dict(stored)
    text = squeezed(Page(render(SCAN, run)).text)
    for sentence in (
        "20 windows searched on",
        "Stored as factors, the kept matrices have 12,345 parameters fewer.",
        "against the base model, on the same windows",
        "by its test not worse than the base by the tolerance, on all 20 windows",
        "the guard measured 1.0500, over its limit",
        "it can't be scored: only nan came out",
        "better on 8 windows that the search never saw. Loses less than the tolerance of 0.02.",
    ):
        assert sentence in text
    assert "pair" not in text.split("The answers, before and after")[0].replace("Intel/orca_dpo_pairs", "")
    stopped = run.compared[2]
    gained = np.subtract(stored["final"]["per_pair"], stored["baseline"]["per_pair"])[:10]
    assert stopped.change == pytest.approx(gained.mean())


def test_a_run_that_kept_and_generated_nothing_says_so():
    silent = {**RESULTS["baseline"], "answers": []}
    held_out = {**RESULTS["held_out"], "verdict": None}
    changes = {"baseline": silent, "final": silent, "candidates": RESULTS["candidates"][1:], "held_out": held_out}
    text = squeezed(Page(render(SCAN, Results.from_dict({**RESULTS, **changes}))).text)
    assert "None of 3 candidates was kept" in text
    assert "This run generated no answers" in text


def test_the_training_targets_are_those_of_emit():
    page = Page(render(SCAN, scan_name="scan.json"))
    selection = choose(SCAN, top=16, source="scan.json")
    assert axolotl_yaml(Plan(selection=selection, mode="lora")) in page.text
    assert "splaser emit llamafactory scan.json -o llamafactory.yml" in page.text


def test_the_chosen_matrices_are_listed_and_marked():
    page = Page(render(SCAN))
    names = choose(SCAN, top=16).names
    listed = page.text.split("# mlp.down_proj: 4\n")[1]
    assert [name for name in names if name not in listed] == []
    assert "# self_attn.q_proj: 4\nmodel.layers.0.self_attn.q_proj\nmodel.layers.1.self_attn.q_proj\n" in page.text
    assert {matrix["name"] for matrix in page.data["matrices"] if matrix["chosen"]} == set(names)
    text = squeezed(Page(render(SCAN, Results.from_dict(RESULTS))).text)
    assert "a ring: tried and put back. A square: chosen to be trained." in text


def test_the_chosen_matrices_have_their_figures_and_the_edges_that_choose_them():
    scan = Scan.load(SMOLLM2)
    text = squeezed(Page(render(scan)).text)
    halves = {edge: choose(scan, top=16, edge=edge).names for edge in ("iqr", "mp", "gavish-donoho")}
    for name in halves["iqr"]:
        matrix = next(matrix for matrix in scan.matrices if matrix.name == name)
        fit, edges = matrix.edges["iqr"], ", ".join(edge for edge, names in halves.items() if name in names)
        rows, columns = matrix.shape
        assert f"{name} {rows} x {columns} {fit.rank} {fit.snr:.4g} {fit.snr_ratio:.4g} {edges} " in text


def test_experts_are_listed_as_the_stack_that_is_trained():
    plain = made_up_scan(2, {f"mlp.experts.down_proj[{expert}]": (16, 32) for expert in range(3)})
    stacked = [
        replace(matrix, type="mlp.experts.down_proj", stack=matrix.name.partition("[")[0]) for matrix in plain.matrices
    ]
    text = squeezed(Page(render(replace(plain, matrices=tuple(stacked)))).text)
    mean = np.mean([matrix.edges["iqr"].snr_ratio for matrix in stacked[:3]])
    assert re.search(
        rf"model.layers.0.mlp.experts.down_proj 3 x 16 x 32 \d+ - {mean:.4g} iqr, mp, gavish-donoho ", text
    )
    assert "Rank and snr_ratio of experts, which are trained together, are means." in text


def test_edges_that_disagree_are_told():
    scan = Scan.load(SMOLLM2)
    text = squeezed(Page(render(scan)).text)
    for found in agreements(scan, choose(scan, top=16)):
        row = f"{found.type} iqr, {found.other} {found.shared} of 16 8.5 {found.correlation:+.2f}"
        assert f"{row} disagree " in text if found.disagrees else f"{row} " in text
    assert "Where edges disagree" in text and "self_attn.v_proj iqr, mp 5 of 16 8.5 -0.75 disagree" in text


@pytest.mark.parametrize("save", ["dense", "factored"])
def test_what_is_trained_is_the_lasered_model_where_anything_was_kept(tmp_path, save):
    settings = LaserConfig(save=save).to_dict()
    text = Page(render(SCAN, Results.from_dict(RESULTS), settings=settings, output=tmp_path)).text
    place = f"{tmp_path}-plain" if save == "factored" else str(tmp_path)
    assert f"base_model: {place}\n" in text and f"model_name_or_path: {place}\n" in text
    assert f"splaser emit axolotl scan.json --model {place} -o axolotl.yml" in text
    assert (f"splaser expand {tmp_path} -o {place}" in text) == (save == "factored")
    if save == "factored":
        spaced = Page(render(SCAN, Results.from_dict(RESULTS), settings=settings, output=tmp_path / "my models")).text
        assert f"splaser expand '{tmp_path}/my models' -o '{tmp_path}/my models-plain'" in spaced
    nothing = Results.from_dict({**RESULTS, "candidates": RESULTS["candidates"][1:]})
    assert "base_model: somebody/model\n" in Page(render(SCAN, nothing, settings=settings, output=tmp_path)).text


def run_on(source, rejected="No."):
    texts = {
        part: [{**texts_of_pair, "rejected": rejected} for texts_of_pair in asked]
        for part, asked in RESULTS["texts"].items()
    }
    return Results.from_dict({**RESULTS, "pairs": {**RESULTS["pairs"], "source": str(source)}, "texts": texts})


def test_the_training_targets_train_on_the_runs_own_pairs(tmp_path):
    pairs = tmp_path / "my pairs.jsonl"
    pairs.write_text('{"prompt": "Hot?", "chosen": "Yes.", "rejected": "No."}\n')
    page = Page(render(SCAN, run_on(pairs), scan_name="scan.json"))
    plan = Plan(selection=choose(SCAN, top=16, source="scan.json"), mode="lora", stage="dpo", dataset=pairs)
    assert axolotl_yaml(plan) in page.text
    assert f"splaser emit axolotl scan.json --rl dpo --dataset '{pairs}' -o axolotl.yml" in page.text
    assert f"splaser emit llamafactory scan.json --stage dpo --dataset '{pairs}' -o llamafactory.yml" in page.text
    page = Page(render(SCAN, run_on(pairs, rejected=None), scan_name="scan.json"))
    assert f"splaser emit axolotl scan.json --dataset '{pairs}' -o axolotl.yml" in page.text


@pytest.mark.parametrize("source", ["Intel/orca_dpo_pairs", "gone.jsonl", "x" * 5000], ids=["hub", "gone", "long"])
def test_pairs_that_are_no_file_are_left_out_of_the_training_targets(source):
    page = Page(render(SCAN, run_on(source), scan_name="scan.json"))
    assert "no --dataset was given, so nothing trains before you add `datasets`." in page.text
    assert "splaser emit axolotl scan.json --rl dpo -o axolotl.yml" in page.text


def test_experts_are_marked_with_their_stack_and_a_tool_that_cannot_train_it_gets_the_reason_instead():
    stack = "layers.0.experts.up_proj"
    matrices = [Matrix(f"{stack}[{place}]", stack, "experts.up_proj", 0, (3, 2), expert=place) for place in range(2)]
    found = tuple(matrix_scan(matrix, np.array([2.0, 1.0])) for matrix in matrices)
    page = Page(render(Scan("m", "0", "mp", found, ())))
    text = squeezed(page.text)
    assert f"No configuration: {stack}: PEFT has to be told it as a parameter, and LLaMA-Factory has no key" in text
    assert f"lora_target_parameters: - {stack}" in text
    assert all(matrix["chosen"] for matrix in page.data["matrices"])
    old = tuple(replace(matrix, stack="") for matrix in found)
    assert f"No configuration: {stack}[1] is one expert" in squeezed(Page(render(Scan("m", "0", "mp", old, ()))).text)


def test_the_charts_have_every_number_of_the_scan_at_every_edge():
    data = Page(render(SCAN)).data
    for matrix, drawn in zip(SCAN.matrices, data["matrices"], strict=True):
        assert drawn["name"] == matrix.name
        assert data["types"][drawn["type"]] == matrix.type
        assert drawn["spectrum"] == pytest.approx(list(matrix.spectrum), rel=1e-3)
        for edge, (sigma, threshold, rank, snr, reason) in zip(data["edges"], drawn["edges"], strict=True):
            fit = matrix.edges[edge]
            assert (rank, reason) == (fit.rank, fit.reason)
            assert [sigma, threshold] == pytest.approx([fit.sigma, fit.threshold], rel=1e-3)
            assert snr == pytest.approx(fit.snr, rel=1e-3) or snr is fit.snr is None


def test_thousands_of_experts_are_drawn_from_fewer_values_each():
    scan = Scan("m", "0", "mp", SCAN.matrices * 900, ())
    page = render(scan)
    assert len(scan.matrices) > 10_000
    assert len(page) < 12e6
    assert {len(matrix["spectrum"]) for matrix in Page(page).data["matrices"]} == {18}


EVIL = "</script><script>pwned=1</script><img src=x onerror=pwned=1>"


@pytest.mark.parametrize(
    "planted", [EVIL, "{{ 7 * 7 }}", "<b>bold</b> & \"quotes\" 'too'", "a\x1b[31mb\x00", "\u202eevil"]
)
def test_untrusted_texts_stay_text(planted):
    scan = made_up_scan(2, model=f"somebody/{planted}")
    stored = replaced(scan.to_dict(), "q_proj", f"q_proj{planted}")
    results = replaced(made_up_results(scan), "Question", planted)
    for word in ("old", "Yes", "pairs;", "model.layers"):
        results = replaced(results, word, planted)
    clean = Page(render(scan, Results.from_dict(made_up_results(scan))))
    page = Page(render(Scan.from_dict(stored), Results.from_dict(results)))
    assert page.tags == clean.tags
    assert len(page.scripts) == 3
    assert visible(planted) in page.text
    assert f"q_proj{visible(planted)}" in page.data["matrices"][0]["name"]
    assert not re.search(r"[\x00\x1b\u202e]", page.text + page.scripts[0])


def test_every_scripts_own_characters_stay():
    text = "Grüße, 你好, שלום, می‌خواهم, 👩‍👩‍👧\n\tline"
    assert visible(text) == text
    assert visible("\ud800") == "\\ud800"


def test_nothing_is_loaded_and_no_other_script_is_allowed():
    html = render(SCAN, Results.from_dict(RESULTS))
    own = html.replace(Page(html).scripts[1], "")
    assert not re.search(r"""(src|href)=["'](?!#|data:,)""", own)
    assert "url(" not in own
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_the_same_input_gives_the_same_bytes():
    assert render(SCAN, Results.from_dict(RESULTS)) == render(SCAN, Results.from_dict(RESULTS))


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    SCAN.save(folder / "scan.json")
    write_json(folder / "results.json", RESULTS)
    return folder


def test_a_folder_and_a_scan_alone_can_be_reported_on(run_folder, tmp_path):
    page = report(run_folder, tmp_path / "run.html").read_text()
    assert "What happened" in page
    page = report(run_folder / "scan.json", tmp_path / "scan.html").read_text()
    assert "What happened" not in page
    (run_folder / "results.json").unlink()
    assert "What happened" not in report(run_folder, tmp_path / "run.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "schema is 'list', expected 'splaser.results/1'"),
        ('{"schema": "splaser.results/2"}', r"'splaser.results/2', expected 'splaser.results/1'.*splaser laser"),
        (json.dumps({**RESULTS, "candidates": [{}]}), r"results.json: not whole \(candidates\.0\.name is missing\)"),
        (json.dumps({**RESULTS, "baseline": {"per_pair": [], "score": 0, "answers": []}}), "not whole"),
        ("{", "not JSON"),
    ],
)
def test_damaged_results_are_refused(run_folder, tmp_path, content, message):
    (run_folder / "results.json").write_text(content)
    with pytest.raises(RecipeError, match=message):
        report(run_folder, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


WRONG = [None, True, -1, 1.5, float("nan"), float("inf"), 1e308, 10**400, "", "</script>", [], {}, [[]]]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_wrong_value_is_refused_or_shown_but_never_breaks_the_page(data):
    small = made_up_scan(1)
    content = {"scan": small.to_dict(), "results": made_up_results(small, pairs=12, held_out=2)}
    part = data.draw(st.sampled_from(["scan", "results"]))
    inside, is_first = content[part], True
    while is_first or (isinstance(inside, dict | list) and inside and data.draw(st.integers(0, 9))):
        key = data.draw(st.sampled_from(list(inside) if isinstance(inside, dict) else range(len(inside))))
        parent, inside, is_first = inside, inside[key], False
    parent[key] = data.draw(st.sampled_from(WRONG))
    try:
        scan, run = Scan.from_dict(content["scan"]), Results.from_dict(content["results"])
    except RecipeError as error:
        assert len(str(error)) < 600
        return
    page = Page(render(scan, run))
    assert page.data["matrices"]
    assert page.tags.count("script") == 3


def test_what_is_no_run_is_refused_and_no_file_of_somebody_else_is_replaced(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"empty: has no scan\.json\. Give the output folder"):
        report(tmp_path / "empty", tmp_path / "report.html")
    (tmp_path / "thesis.html").write_text("mine")
    with pytest.raises(OutputError, match="was not written by splaser"):
        report(run_folder, tmp_path / "thesis.html")
    report(run_folder, tmp_path / "report.html")
    assert report(run_folder, tmp_path / "report.html").is_file()


def test_the_yaml_on_the_page_is_yaml():
    page = Page(render(SCAN))
    start = page.text.index("base_model:")
    end = page.text.index("The same as splaser emit axolotl")
    assert len(yaml.safe_load(page.text[start:end])["lora_target_modules"]) == 12
