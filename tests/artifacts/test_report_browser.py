"""The report in a real Chromium: every control used, nothing loaded, nothing on the console."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from splaser_plugin.artifacts.report import write_report
from splaser_plugin.artifacts.results import Results
from splaser_plugin.scanning.records import Scan
from tests.artifacts.browser import DRAWN, SCAN, wait_for
from tests.report_data import LARGE, made_up_results, made_up_scan, replaced

pytestmark = pytest.mark.browser

EVIL = "</script><script>pwned=1</script><img src=x onerror=pwned=1><b>%{x}</b>"


def test_the_edge_can_be_switched(open_page, run_page):
    it = open_page(run_page)
    for edge in ("mp", "gavish-donoho", "iqr"):
        it.page.get_by_role("radio", name=edge, exact=True).check()
        noisiest = SCAN.ranked("snr", edge)[0]
        assert noisiest.name in it.text("#noisiest li:first-child")
        assert f"snr {float(f'{noisiest.edges[edge].snr:.4g}'):g}" in it.text("#noisiest li:first-child")
        assert it.text("#fits .current").startswith(edge)
        drawn = it.page.evaluate("document.getElementById('heat-map').data[0].z.flat()")
        lowest = min(10**value for value in drawn if value is not None)
        assert lowest == pytest.approx(min(m.edges[edge].snr or 9e9 for m in SCAN.matrices), rel=1e-3)


def test_hovering_tells_about_a_matrix_and_clicking_shows_its_spectrum(open_page, run_page):
    it = open_page(run_page)
    for block, kind in ((4, 0), (1, 2)):
        matrix = next(
            m for m in SCAN.matrices if m.block == block and m.type == sorted({m.type for m in SCAN.matrices})[kind]
        )
        it.hover_heat_map(block, kind, matrix.name)
        hovered = it.text("#heat-map .hoverlayer")
        fit = matrix.edges["iqr"]
        for part in (matrix.name, "x".join(map(str, matrix.shape)), f"rank {fit.rank} of", f"{fit.threshold:.4g}"):
            assert part.replace(" ", "") in hovered.replace(" ", "")
        it.page.mouse.down()
        it.page.mouse.up()
        it.wait_for_matrix(matrix.name)
        assert f"all of its {min(matrix.shape)} singular values" in it.text("#spectrum-note")
        assert f"{fit.rank} of {min(matrix.shape)}" in it.text("#fits .current")
        legend = it.text("#spectrum .legend")
        assert f"iqr: {fit.rank} above" in legend
        assert f"mp: {matrix.edges['mp'].rank} above" in legend
        assert f"gavish-donoho: {matrix.edges['gavish-donoho'].rank} above" in legend
        assert "Marchenko-Pastur" in legend


def test_the_histogram_counts_every_value_and_the_noise_has_as_many(open_page, run_page):
    it = open_page(run_page)
    bars, noise = it.page.evaluate("document.getElementById('spectrum').data.slice(0, 2).map(({x, y}) => [x, y])")
    matrix = next(m for m in SCAN.matrices if m.name == it.matrix)
    assert sum(bars[1]) == pytest.approx(min(matrix.shape))
    width = bars[0][1] - bars[0][0]
    assert np.trapezoid(noise[1], noise[0]) / width == pytest.approx(min(matrix.shape), rel=0.01)
    assert noise[0][-1] == pytest.approx(matrix.edges["mp"].threshold, rel=1e-3)


def test_everything_can_be_done_from_the_keyboard(open_page, run_page):
    it = open_page(run_page)
    keyboard = it.page.keyboard
    reached = []

    def tab_to(selector: str) -> None:
        for _ in range(80):
            keyboard.press("Tab")
            reached.append(it.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
            if it.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab never comes to {selector}; it came to {reached}")

    tab_to("#theme")
    keyboard.press("Enter")
    assert it.page.evaluate("document.documentElement.dataset.theme") == "dark"
    tab_to("summary")
    keyboard.press("Enter")
    assert it.page.locator("details[open]").count() == 1
    tab_to("input[name=edge]")
    keyboard.press("ArrowRight")
    assert it.text("#fits .current").startswith("mp")
    tab_to("#heat-map")
    for key, step in (("ArrowRight", 1), ("ArrowLeft", -1), ("ArrowDown", None), ("ArrowUp", None)):
        before = it.matrix
        keyboard.press(key)
        block = int(re.search(r"layers\.(\d+)", it.matrix)[1]) - int(re.search(r"layers\.(\d+)", before)[1])
        assert step is None or block in (step, 0)
    tab_to("#noisiest button")
    keyboard.press("Tab")
    keyboard.press("Enter")
    assert it.matrix in it.text("#noisiest li:nth-child(2)")
    tab_to("#matrix")
    before = it.matrix
    keyboard.press("ArrowDown")
    if it.matrix == before:  # it was the last one
        keyboard.press("ArrowUp")
    assert it.matrix != before
    tab_to("#next")
    before = it.matrix
    keyboard.press("Enter")
    assert it.matrix != before
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    assert it.matrix == before
    tab_to(".copy")
    keyboard.press("Enter")
    wait_for(it.page, "document.querySelector('.copy').textContent === 'Copied'")


def test_the_yaml_can_be_copied(open_page, run_page):
    it = open_page(run_page)
    for place in (0, 1):
        it.page.locator(".copy").nth(place).click()
        wait_for(it.page, "place => document.querySelectorAll('.copy')[place].textContent === 'Copied'", place)
        copied = it.page.evaluate("navigator.clipboard.readText()")
        assert copied == it.page.locator("pre").nth(place).text_content()
        assert it.text("#copied") == "Copied"


def test_the_yaml_can_be_copied_where_the_clipboard_is_out_of_reach(open_page, run_page):
    it = open_page(run_page)
    it.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    it.page.locator(".copy").first.click()
    wait_for(it.page, "document.querySelector('.copy').textContent === 'Copied'")
    assert it.page.evaluate("navigator.clipboard.readText()").startswith("# splaser: ")


@pytest.mark.parametrize(("preferred", "other"), [("light", "dark"), ("dark", "light")])
def test_light_and_dark_follow_the_system_and_the_button(open_page, run_page, preferred, other):
    it = open_page(run_page, color_scheme=preferred)

    def brightness() -> tuple[int, int]:
        colors = it.page.evaluate(
            """[getComputedStyle(document.body).backgroundColor,
                document.querySelector('#heat-map .xtick text').style.fill]"""
        )
        page, text = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
        return page, text

    def looks(theme: str) -> bool:
        page, text = brightness()
        return page > 600 > 300 > text if theme == "light" else text > 600 > 300 > page

    assert looks(preferred)
    it.page.click("#theme")
    assert looks(other)
    it.page.click("#theme")
    assert looks(preferred)
    it.page.emulate_media(color_scheme=other)
    assert looks(preferred), "what the reader chose stays"


@pytest.mark.parametrize("width", [375, 1200])
def test_nothing_is_wider_than_the_window(open_page, run_page, width):
    it = open_page(run_page, width=width)
    assert it.page.evaluate("document.documentElement.scrollWidth") <= width
    wide = it.page.evaluate(
        """width => [...document.querySelectorAll("main *, header *")]
            .filter((each) => each.getBoundingClientRect().right > width + 1)
            .filter((each) => !each.closest("pre, .scroll, .js-plotly-plot"))
            .map((each) => each.outerHTML.slice(0, 100))""",
        width,
    )
    assert wide == []


def test_on_a_phone_the_heat_map_goes_down_and_is_clicked_as_well(open_page, run_page):
    it = open_page(run_page, width=375)
    types = sorted({matrix.type for matrix in SCAN.matrices})
    wanted = f"model.layers.3.{types[1]}"
    it.hover_heat_map(1, 3, wanted)
    it.page.mouse.down()
    it.page.mouse.up()
    it.wait_for_matrix(wanted)
    it.page.focus("#heat-map")
    it.page.keyboard.press("ArrowDown")
    assert it.matrix == f"model.layers.4.{types[1]}"


def test_a_cell_is_chosen_by_touch(open_page, run_page):
    it = open_page(run_page, has_touch=True)
    matrix = next(matrix for matrix in SCAN.matrices if matrix.block == 2)
    it.page.touchscreen.tap(*it.scroll_to_cell(2, sorted({matrix.type for matrix in SCAN.matrices}).index(matrix.type)))
    it.wait_for_matrix(matrix.name)


def test_a_press_that_ends_in_another_cell_chooses_none(open_page, run_page):
    it = open_page(run_page)
    before = it.matrix
    it.page.mouse.move(*it.scroll_to_cell(2, 0))
    it.page.mouse.down()
    it.page.mouse.move(*it.scroll_to_cell(3, 1))
    it.page.mouse.up()
    it.page.evaluate("new Promise((done) => requestAnimationFrame(done))")
    assert it.matrix == before


def test_the_held_out_pairs_are_drawn_with_their_interval(open_page, run_page):
    it = open_page(run_page)
    stored = made_up_results(SCAN)["held_out"]
    dots, mean = it.page.evaluate("document.getElementById('verdict-chart').data")
    assert len(dots["x"]) == 8
    assert mean["x"] == [pytest.approx(stored["difference"], rel=1e-3)]
    ends = [mean["x"][0] - mean["error_x"]["arrayminus"][0], mean["x"][0] + mean["error_x"]["array"][0]]
    assert ends == pytest.approx(stored["interval"], rel=1e-3)
    assert it.page.locator(".timeline li").count() == 4
    assert it.page.locator(".timeline .interval").count() == 3
    assert it.page.locator("#answers-held-out .exchange").count() == 8
    assert it.page.locator("#answers-searched .exchange").count() == 20


def test_planted_scripts_are_shown_as_text_and_never_run(open_page, tmp_path):
    scan = made_up_scan(3, model=f"somebody/{EVIL}")
    stored = scan.to_dict()
    for matrix in stored["matrices"]:
        matrix["type"] += EVIL
        matrix["name"] += f"{EVIL}\x1b[31m"
        matrix["edges"]["mp"] = {**matrix["edges"]["mp"], "snr": None, "snr_ratio": None, "reason": f"reason{EVIL}"}
    results = made_up_results(scan)
    for word in ("Question", "old", "new", "Yes", "pairs;"):
        results = replaced(results, word, word + EVIL)
    results = replaced(results, "_proj", f"_proj{EVIL}\x1b[31m")
    write_report(tmp_path / "report.html", Scan.from_dict(stored), Results.from_dict(results))

    it = open_page(tmp_path / "report.html")
    it.page.get_by_role("radio", name="mp", exact=True).check()
    it.page.get_by_role("radio", name="iqr", exact=True).check()
    it.hover_heat_map(1, 1, "model.layers.1.")
    assert EVIL in it.text("#heat-map .hoverlayer")
    it.page.mouse.down()
    it.page.mouse.up()
    for place in (".path", ".prompt", ".answer", "#noisiest", "#heat-map .yaxislayer-above", ".timeline"):
        assert EVIL in it.page.locator(place).first.text_content()
    assert f"{EVIL}\\x1b[31m" in it.matrix
    it.page.evaluate("document.querySelector('#verdict-chart').scrollIntoView({block: 'center'})")
    dot = it.page.locator("#verdict-chart .point").first.bounding_box()
    it.page.mouse.move(dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2)
    it.page.wait_for_selector("#verdict-chart .hoverlayer .hovertext")
    assert "</script>" in it.text("#verdict-chart .hoverlayer")
    assert it.page.evaluate("typeof pwned") == "undefined"
    assert it.page.locator("img, b, body script:nth-of-type(4)").count() == 0


def test_even_a_script_that_got_into_the_page_is_not_run(chromium, run_page, tmp_path):
    html = run_page.read_text()
    (tmp_path / "report.html").write_text(html.replace("</main>", "<script>pwned = 1</script></main>"))
    page = chromium.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    wait_for(page, DRAWN)
    assert page.evaluate("typeof pwned") == "undefined"
    page.close()


def test_a_scan_alone_and_one_without_spectra_are_shown(open_page, tmp_path):
    stored = SCAN.to_dict()
    for matrix in stored["matrices"][::2]:
        matrix["spectrum"] = []
    scan = Scan.from_dict(stored)
    write_report(tmp_path / "report.html", scan)
    it = open_page(tmp_path / "report.html")
    notes = set()
    for _ in SCAN.matrices:
        it.page.click("#next")
        notes.add(it.text("#spectrum-note")[:9])
    assert "This scan" in notes
    assert len(notes) > 1
    assert it.page.locator("#verdict-chart").count() == 0


def test_a_scan_of_a_70b_model_is_drawn_and_below_8_mb(open_page, tmp_path):
    scan = made_up_scan(80, LARGE)
    write_report(tmp_path / "report.html", scan, Results.from_dict(made_up_results(scan)))
    assert (tmp_path / "report.html").stat().st_size < 8e6
    it = open_page(tmp_path / "report.html")
    drawn_ms = it.page.evaluate("performance.getEntriesByName('drawn')[0].startTime")
    print(json.dumps({"bytes": (tmp_path / "report.html").stat().st_size, "drawn_ms": round(drawn_ms)}))
    assert it.page.locator("#matrix option").count() == 560
    it.page.click("#next")
    assert "256 of its 8192 singular values" in it.text("#spectrum-note")
