"""The page in a real browser: it opens at once, draws, sorts, filters, prints, and runs nothing but its own scripts."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import pytest

from reports.render import LARGEST, render
from suites.meta.browsing import PATIENCE, PHONE, SECOND, WIDE, opening, until
from suites.meta.page_runs import crowded, evil, illustrated

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install axe-playwright-python")


@pytest.fixture
def show(browse: Callable[..., Any]) -> Callable[..., Any]:
    """Opens a run's page."""
    return lambda run, *arguments, **options: browse(render(run), *arguments, **options)


def drawn(page: Any, chart: str) -> Any:
    """A chart, scrolled to and drawn."""
    plot = page.locator(f"#{chart} .plot")
    plot.scroll_into_view_if_needed()
    page.locator(f"#{chart} .plot[data-drawn] .main-svg").first.wait_for()
    return plot


def all_drawn(page: Any) -> None:
    """Every chart of the page, drawn."""
    page.evaluate("charts.plots().forEach((plot) => { plot.closest('details').open = true; charts.draw(plot); })")


def test_a_big_run_opens_at_once(browser, tmp_path, record_property):
    """1000 layers of 7 linears by 12 targets make a page of at most 6 MB that opens in less than a second of a core."""
    (tmp_path / "index.html").write_text(page := render(crowded(linears=7000, targets=12)), encoding="utf-8")
    took = opening(browser, tmp_path / "index.html")
    record_property("opening", f"{len(page.encode()) / 1e6:.2f} MB, {took}")
    print(f"{len(page.encode()) / 1e6:.2f} MB, {took}")
    assert len(page.encode()) <= LARGEST
    assert 0 < took.busy < SECOND
    assert 0 < took.painted < PATIENCE * SECOND
    assert 0 < took.loaded < PATIENCE * SECOND


def test_a_busy_page_is_told_from_a_busy_machine(browser, tmp_path):
    """A page that computes for longer than it may is seen as busy, and one that only waits is not."""
    busy = {}
    for name, done in (("computes", "while (performance.now() < 1500);"), ("waits", "setTimeout(() => {}, 500);")):
        (tmp_path / "page.html").write_text(f"<!DOCTYPE html><p>text<script>{done}</script>", encoding="utf-8")
        busy[name] = opening(browser, tmp_path / "page.html", tries=2).busy
    assert busy["waits"] < 0.3 < busy["computes"]


def test_the_library_waits_for_the_first_chart(show):
    """Plotly runs when a chart comes into view, under the page's Content-Security-Policy, and not before."""
    page = show(crowded(linears=28, targets=6))
    assert page.evaluate("window.Plotly === undefined")
    page.locator(".charts > summary").first.click()
    page.locator(".plot[data-drawn] .main-svg").first.wait_for()
    assert page.evaluate("typeof window.Plotly.react") == "function"


def test_hover_names_the_layer(show):
    """Hovering over a heat map names tower, layer and linear with the value."""
    page = show(illustrated())
    box = drawn(page, "chart-qwen2_5_vl-tiny-awq-Error-per-layer").locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 8, box["y"] + 5)
    tip = page.locator(".hoverlayer .hovertext").first
    tip.wait_for()
    assert "language_model layer 0 self_attn.q_proj" in tip.text_content()
    assert "0.5 half scales" in tip.text_content()


def test_every_kind_of_chart_draws(show):
    """Every chart of a run that has all tables is drawn, with as many series as it has data for."""
    page = show(illustrated())
    all_drawn(page)
    series = page.evaluate(
        """Object.fromEntries(charts.plots().map((plot) => [plot.dataset.figure.split("-awq-")[1],
           plot.querySelectorAll(".trace, .hm, .scatterlayer > g").length]))"""
    )
    assert set(series) == {
        "Error-per-layer",
        "Search-gain-per-layer",
        "drift",
        "kl",
        "sensitivity",
        "mixed-precision",
        "memory-by-tower",
        "memory",
        "throughput",
        "ttft",
        "itl",
    }
    assert all(series.values()), series
    assert series["drift"] >= 2


def test_rows_come_when_a_table_is_opened_and_sort_whole(show):
    """A long table has all its rows when it is opened, and sorting orders all of them, by keyboard too."""
    page = show(crowded(linears=100, targets=1))
    page.evaluate("document.querySelectorAll('.check').forEach((check) => { check.open = true; })")
    table = page.locator(".data", has=page.locator("summary", has_text="Error per layer")).first
    assert table.locator("tbody tr").count() == 20
    table.locator("summary").click()
    until(page, "document.querySelector('.data[open] tbody').rows.length === 100")
    button = table.locator("thead button").last
    button.press("Enter")
    values = [float(cell) for cell in table.locator("tbody td:last-child").all_text_contents()]
    assert values == sorted(values, reverse=True)
    button.press("Enter")
    values = [float(cell) for cell in table.locator("tbody td:last-child").all_text_contents()]
    assert values == sorted(values)


def test_rows_of_a_table_are_filtered(show):
    """Of a long table the rows with every word are left and counted, sorted or not; emptied, all come back."""
    page = show(crowded(linears=100, targets=1))
    page.evaluate("document.querySelectorAll('.check').forEach((check) => { check.open = true; })")
    table = page.locator(".data", has=page.locator("summary", has_text="Error per layer")).first
    table.locator("summary").click()
    field = table.get_by_role("searchbox", name="Rows of Error per layer containing")
    shown = table.locator("tbody tr:visible")
    word = table.locator("tbody tr").nth(42).locator("td").nth(1).text_content()
    for _ in ("as it comes", "sorted"):
        field.fill(f"  {word.upper()} ")
        found = shown.all_text_contents()
        assert 0 < len(found) < 100
        assert all(word in text for text in found)
        assert table.locator("label output").text_content() == f"{len(found)} of 100"
        table.locator("thead button").last.press("Enter")
    field.fill("nothing has this")
    assert shown.count() == 0
    field.fill("")
    assert shown.count() == 100


def test_filter(show):
    """The filter leaves the checks of an outcome or with a text, says how many, and hides groups without any."""
    page = show(illustrated())
    assert page.locator(".filter output").text_content() == "10 of 10 checks"
    page.get_by_text("failed", exact=True).click()
    assert page.locator(".check:visible").count() == 1
    page.get_by_text("all", exact=True).first.click()
    page.locator(".filter").get_by_role("searchbox").fill("drift")
    assert page.locator(".check:visible").count() == 2
    assert page.locator(".filter output").text_content() == "2 of 10 checks"


def test_deep_links(show):
    """A link to a check or a chart opens what folds it, and shows it."""
    page = show(illustrated(), fragment="#parity-test_hidden_state_drift-qwen2_5_vl-tiny-awq-text")
    check = page.locator(".check:target")
    assert check.get_attribute("open") is not None
    assert check.is_visible()
    page = show(crowded(linears=28, targets=6), fragment="#chart-qwen2_5_vl-q5-awq-Error-per-layer")
    chart = page.locator(".chart:target")
    chart.locator(".plot[data-drawn]").wait_for()
    assert chart.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(show, scheme):
    """No rule of axe is broken, with every check and chart open, in light and in dark."""
    page = show(illustrated(), scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    all_drawn(page)
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]][:3]) for one in found] == []


def test_charts_follow_the_scheme(show):
    """Charts have the colours of the page's scheme, and follow when it changes."""
    page = show(illustrated())
    plot = drawn(page, "chart-qwen2_5_vl-tiny-awq-drift")
    light = plot.locator(".xtick text").first.evaluate("(text) => getComputedStyle(text).fill")
    page.emulate_media(color_scheme="dark")
    until(page, f"getComputedStyle(document.querySelector('[id$=awq-drift] .xtick text')).fill !== '{light}'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"


def test_print(show):
    """Printed, every check is open and every chart drawn, dark on white even where the screen is dark."""
    page = show(illustrated(), scheme="dark")
    page.evaluate(
        """addEventListener("beforeprint", () => { window.printed = [
          charts.plots().filter((plot) => plot.dataset.drawn === undefined).length,
          document.querySelectorAll(".check:not([open])").length,
          document.querySelector("[id$=awq-drift] .xtick text").style.fill,
        ]; })"""
    )
    assert page.pdf().startswith(b"%PDF")
    assert page.evaluate("window.printed") == [0, 0, "rgb(92, 99, 110)"]
    assert page.locator(".check[open]").count() == 1  # as before: the one that failed


def test_phone(show):
    """On a phone nothing makes the page scroll sideways, with everything open and drawn."""
    page = show(illustrated(), viewport=PHONE)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    all_drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_without_scripts(show):
    """Without scripts the verdicts, findings, first rows and every check's numbers are there to read."""
    page = show(crowded(linears=100, targets=1), java_script_enabled=False)
    assert page.get_by_text("The highest of 100 values").first.is_visible()
    assert "These are the first 20" in page.content()
    assert page.get_by_text("is proved").first.is_visible()


def test_pictures_and_sounds(show):
    """A prompt's picture is shown beside its worst token, its sound can be played, and both waveforms are drawn."""
    page = show(illustrated())
    page.evaluate("document.querySelectorAll('.check').forEach((check) => { check.open = true; })")
    sample = page.locator(".sample", has_text="a red seven").first
    sample.locator("img").wait_for()
    assert sample.locator("img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 2
    assert "seven" in sample.locator(".token").text_content()
    sound = page.locator(".voices audio").first
    sound.evaluate("(audio) => { audio.load(); audio.preload = 'auto'; }")
    until(page, "document.querySelector('.voices audio').duration > 0.09")
    assert page.locator(".voices .wave path").count() == 2


def test_nothing_from_outside_runs(show):
    """No string of a run runs anything or becomes an element, wherever it stands, with everything open and drawn."""
    page = show(evil())
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    all_drawn(page)
    assert page.evaluate("window.evil") is None
    assert page.locator("img:not([src^='data:image/png'])").count() == 0
    assert page.locator("a[href^=http], a[href^=javascript]").count() == 0
    assert page.locator("script").count() == 7  # two of data, the library as text and run, and three of ours
    assert any("</script><script>" in said for said in page.locator(".plot .legendtext").all_text_contents())


@pytest.mark.parametrize(("policy", "ran"), [(True, None), (False, 1)], ids=["policy alone", "neither"])
def test_the_attack_is_one(browser, tmp_path, policy, ran):
    """Without escaping the page's policy alone still stops the attack, and without both it runs: it is a real one."""
    unescaped = html.unescape(render(evil()))
    if not policy:
        unescaped = unescaped.replace("Content-Security-Policy", "no-policy")
    (tmp_path / "index.html").write_text(unescaped, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    assert page.evaluate("window.evil") == ran
    page.close()


def test_a_changed_library_does_not_run(browser, tmp_path):
    """A library that is not, byte by byte, the one that the page's policy names is refused, and nothing is drawn."""
    changed = render(illustrated()).replace("plotly.js (cartesian - minified)", "plotly.js (someone's own)")
    (tmp_path / "index.html").write_text(changed, encoding="utf-8")
    page = browser.new_page(viewport=WIDE)
    page.goto((tmp_path / "index.html").as_uri())
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate("library()")
    assert page.evaluate("window.Plotly === undefined")
    assert page.locator(".plot[data-drawn]").count() == 0
    page.close()
