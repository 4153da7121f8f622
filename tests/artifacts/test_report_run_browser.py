"""The report of a run in a real Chromium: its answers, the chosen matrices, and a phone that is turned."""

from __future__ import annotations

import pytest

from splaser_plugin.artifacts.report import write_report
from splaser_plugin.artifacts.results import Results
from tests.artifacts.browser import SCAN, wait_for
from tests.report_data import made_up_results

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(("before", "after"), [((390, 844), (844, 390)), ((844, 390), (390, 844))])
def test_a_phone_that_is_turned_shows_the_same_heat_map_as_one_that_was_held_so(open_page, run_page, before, after):
    it = open_page(run_page, width=before[0])
    it.page.set_viewport_size({"width": after[0], "height": after[1]})
    axis = "xaxis" if after[0] > 640 else "yaxis"
    drawn = "document.getElementById('heat-map')._fullLayout"
    wait_for(it.page, f"{drawn}.{axis}.title.text === 'block' && {drawn}.width <= {after[0]}")
    fresh = open_page(run_page, width=after[0])
    size = f"(({{ l, r, t, b, w, h }}) => [l, r, t, b, w, h])({drawn}._size)"
    expected = fresh.page.evaluate(size)
    wait_for(it.page, f"expected => {size}.every((each, index) => Math.abs(each - expected[index]) < 3)", expected)
    image = it.page.locator("#heat-map .hm image, #heat-map .hm path").first.bounding_box()
    assert image["width"] > after[0] / 2
    it.page.locator("#heat-map").scroll_into_view_if_needed()
    matrix = next(matrix for matrix in SCAN.matrices if matrix.block == 2)
    kind = sorted({matrix.type for matrix in SCAN.matrices}).index(matrix.type)
    it.page.mouse.click(*it.scroll_to_cell(*((2, kind) if after[0] > 640 else (kind, 2))))
    it.wait_for_matrix(matrix.name)


def test_answers_are_filtered_by_what_became_of_them_and_by_words(open_page, tmp_path):
    stored = made_up_results(SCAN)
    stored["final"]["answers"][3] = stored["baseline"]["answers"][3]
    stored["held_out"]["result"]["per_pair"][5] -= 1.0
    write_report(tmp_path / "report.html", SCAN, Results.from_dict(stored))
    it = open_page(tmp_path / "report.html")

    def shown() -> int:
        return it.page.locator(".exchange:visible").count()

    assert shown() == 28
    assert it.text("#answers-shown") == "Shown held out: 8 of 8; searched on: 20 of 20."
    choose = it.page.locator("#answer-filter")
    choose.get_by_role("radio", name="changed").check()
    assert it.text("#answers-shown") == "Shown held out: 8 of 8; searched on: 19 of 20."
    choose.get_by_role("radio", name="worse").check()
    assert it.page.locator("#answers-held-out .exchange:visible .prompt").all_text_contents() == ["Question 25?"]
    choose.get_by_role("radio", name="all").check()
    it.page.locator("#answer-words").fill("QUESTION 7?")
    assert it.page.locator(".exchange:visible .prompt").all_text_contents() == ["Question 7?"]
    it.page.locator("#answer-words").fill("nothing has this")
    assert shown() == 0
    assert it.text("#answers-shown") == "Shown held out: 0 of 8; searched on: 0 of 20."


def test_the_verdict_stands_before_what_the_search_gained_on_its_own_pairs(open_page, run_page):
    it = open_page(run_page)
    tops = [it.page.locator(f"#{section}").bounding_box()["y"] for section in ("better", "happened", "answers")]
    assert tops == sorted(tops)
    assert it.page.locator("#measurement dt").count() >= 2
    assert it.page.locator("#answer-counts tbody tr").count() == 4
    assert "on the same 10 pairs" in it.text(".timeline .stopped .score")


@pytest.mark.parametrize("width", [375, 1200])
def test_the_matrices_to_train_are_marked_on_the_map_and_listed(open_page, run_page, width):
    it = open_page(run_page, width=width)
    squares = it.page.evaluate("document.getElementById('heat-map').data[3]")
    assert len(squares["x"]) == len(SCAN.matrices)
    assert squares["marker"]["symbol"] == "square-open"
    assert it.page.locator("#heat-map .scatterlayer .trace:last-child .point").count() == len(SCAN.matrices)
    it.page.locator(".copy[data-for=chosen]").click()
    wait_for(it.page, "document.querySelector('[data-for=chosen]').textContent === 'Copied'")
    copied = it.page.evaluate("navigator.clipboard.readText()").splitlines()
    assert sorted(line for line in copied if not line.startswith("#")) == sorted(
        matrix.name for matrix in SCAN.matrices
    )
    assert it.page.locator("#chosen-table tbody tr").count() == len(SCAN.matrices)
    assert it.page.locator("#agreements tbody tr").count() == 2 * len({matrix.type for matrix in SCAN.matrices})
    assert it.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
