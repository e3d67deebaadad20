"""The trend page: last night first, a year at a glance, every quantity a click away, and nothing from outside runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.nights import trend
from reports.nights.series import Key, Kind, Mark, Night, Points, Series, Verdict
from reports.nights.trend_data import packed
from reports.render import LARGEST
from suites.meta.browsing import LOW, PATIENCE, PHONE, SECOND, WIDE, opening, until
from suites.meta.nightly import KIND, kl, names, noisy, series
from suites.meta.pages import Page

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt;\u202e\x1b[31m"
OTHER = Kind((("gpu", "NVIDIA H100"),), (("torch", "2.11.0"),))


def nights(count: int, verdict: Verdict = "steady", **more: Any) -> list[Night]:
    """Nights that follow each other, the last of that verdict."""
    listed = [Night(name, KIND, f"{name[:10]}T01:00:00+00:00", "steady", page=f"{name}.html") for name in names(count)]
    return [*listed[:-1], replace(listed[-1], verdict=verdict, **more)]


def mark(place: int, reason: str = "Marlin by default", frozen: bool = False) -> Mark:
    return Mark(names(place + 1)[place], KIND, reason, frozen=frozen)


def regressed() -> str:
    """A page with a loss on the last two nights, a rise tonight, a gain and a quantity that is gone."""
    loss, gain = noisy(62, seed=1), noisy(62, seed=2)
    loss[-2:] *= 0.9
    gain[-2:] *= 1.1
    found = [series(loss), kl([*[0.0124] * 61, 0.02]), series(gain, case="gain"), series(noisy(61), case="gone")]
    found += [series(noisy(62, seed=9), case="steady")]
    listed = nights(62, "regressed", regressed=(found[0].key,), note="2 quantities regressed")
    return trend.page({KIND: found}, listed, [mark(0, "the first", frozen=True), mark(10)])


def year(count: int = 365, quantities: int = 1500, noise: int = 500) -> str:
    """A year of 1500 quantities, a third of them noisy."""
    rng = np.random.default_rng(0)
    found = []
    for place in range(quantities):
        key = Key(f"model-{place % 12}", f"suite: test_{place % 40}", str(place), "throughput by marlin", "tokens/s")
        values = 1000 * np.exp(rng.normal(0, 0.01, count)) if place < noise else np.full(count, 1000.0 + place)
        found.append(Series(key, "down", Points(names(count), values)))
    found[0].values[-2:] *= 0.8
    return trend.page({KIND: found}, nights(count, "regressed", regressed=(found[0].key,)), [mark(0, frozen=True)])


def test_one_sentence_on_tonight() -> None:
    """The page begins with last night in one sentence."""
    assert (
        "<h1>The night of 2026-03-03 01:00 UTC: 2 of 5 quantities worse, 1 better, 1 no longer measured</h1>"
        in regressed()
    )
    steady = trend.page({KIND: [series(noisy(30))]}, nights(30), [])
    assert "<h1>The night of 2026-01-30 01:00 UTC: 1 quantity, none worse</h1>" in steady
    assert "checks fail" in trend.page({KIND: [series(noisy(30))]}, nights(30, "failing"), [])
    lost = nights(30, "regressed", note="REGRESSED: 3 checks no longer run")
    html = trend.page({KIND: [series(noisy(30))]}, lost, [])
    assert "<h1>The night of 2026-01-30 01:00 UTC: REGRESSED: 3 checks no longer run</h1>" in html
    assert "<h1>No night is kept yet</h1>" in trend.page({}, [], [])
    assert "measured nothing" in trend.page({KIND: []}, nights(1), [])


def test_findings() -> None:
    """What is worse, better or gone is listed with its numbers, a reason and a link to its chart, without a script."""
    html = regressed()
    page = Page(html)
    assert html.index("mean token KL</a>") < html.index("throughput by marlin</a>")
    assert "two nights running, since 2026-03-02" in html
    assert (
        "Held against the night accepted last, 2026-01-11 (Marlin by default), and against the frozen baseline" in html
    )
    assert page.tags.count("polyline") == 4
    assert "#f-tiny-awq-parity-test_p-image-mean-token-KL" in page.all("href")


def test_every_night_is_there() -> None:
    """Every night has a cell with a sign and words, which leads to its page."""
    html = regressed()
    assert html.count('class="cell regressed" href') == 1
    assert html.count('class="cell steady" href') == 61
    assert 'aria-label="2026-03-03: regressed, 2 quantities regressed"' in html


def test_self_contained() -> None:
    """Nothing is fetched: no address but fragments, runs' pages and data; scripts are named by their hashes."""
    page = Page(regressed())
    outside = [a for a in (*page.all("href"), *page.all("src")) if a and not a.startswith(("#", "data:", "2026-"))]
    assert outside == []
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_untrusted_strings_are_escaped() -> None:
    """Targets, checks, cases, quantities, units, reasons, notes, versions and names of nights are shown as they are."""
    key = Key(EVIL, EVIL, EVIL, EVIL, EVIL)
    kind = Kind(((EVIL, EVIL),), ((EVIL, EVIL),))
    found = Series(key, "up", Points(names(30), np.array([*[1.0] * 29, 2.0])))
    listed = [replace(n, kind=kind, note=EVIL, started=EVIL) for n in nights(30)]
    html = trend.page({kind: [found]}, listed, [Mark(names(1)[0], kind, EVIL, EVIL, EVIL)])
    assert Page(html).tags.count("img") == 0
    assert "alert(1)</script>" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html


def test_size_and_packing() -> None:
    """A year of 1500 quantities is a page of less than 6 MB, even when all of them are noisy; columns come back."""
    assert len(year(noise=1500).encode()) < LARGEST
    assert packed(np.full(5, 3.0)) == 3.0
    assert packed(np.full(5, np.nan)) is None
    assert isinstance(packed(np.array([1.0, np.nan])), str)


Show = Callable[..., Any]


def drawn(page: Any) -> str:
    """The fragment of the series that is drawn, once it is."""
    page.wait_for_selector(".plot[data-drawn] .main-svg")
    return str(page.get_attribute(".plot", "data-drawn"))


def test_opens_at_once(browser: Any, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """365 nights of 1500 quantities open in less than a second of a core."""
    (tmp_path / "trend.html").write_text(year(), encoding="utf-8")
    took = opening(browser, tmp_path / "trend.html")
    record_property("opening", str(took))
    print(took)
    assert 0 < took.busy < SECOND
    assert 0 < took.loaded < PATIENCE * SECOND


def test_choosing(browse: Show) -> None:
    """Filters narrow the list, its head sorts it, and a click draws a quantity."""
    page = browse(regressed())
    output = page.locator(".picker output")
    assert output.inner_text() == "5 of 5 quantities"
    page.fill("[name=text]", "kl image")
    assert output.inner_text() == "0 of 5 quantities"
    page.fill("[name=text]", "token kl")
    assert output.inner_text() == "1 of 5 quantities"
    page.fill("[name=text]", "")
    page.select_option("[name=target]", label="f-tiny-awq")
    page.get_by_role("button", name="from level, %").click()
    assert page.locator(".picked tbody tr").first.inner_text().startswith("mean token KL")
    assert page.locator("[data-by=change]").get_attribute("aria-sort") == "descending"
    page.locator(".picked tbody a").first.click()
    until(page, "document.querySelector('.plot').dataset.drawn?.includes('mean-token-KL')")
    assert "+61.3 % from it" in page.locator(".finding").inner_text()


def test_nothing_moves(browse: Show) -> None:
    """Where the list lies does not change when it is scrolled to and the chart above it is drawn."""
    page = browse(regressed(), LOW)
    place = "document.querySelector('.list').offsetTop"
    before = page.evaluate(place)
    assert page.get_attribute(".plot", "data-drawn") is None
    page.locator(".plot").scroll_into_view_if_needed()
    drawn(page)
    assert page.evaluate(place) == before


def test_deep_link(browse: Show) -> None:
    """A link to a quantity shows it, with its remarks on accepted nights, changes of level and regressions."""
    page = browse(regressed(), fragment="#f-tiny-awq-parity-test_p-batch_8-throughput-by-marlin")
    assert drawn(page) == "f-tiny-awq-parity-test_p-batch_8-throughput-by-marlin"
    assert "its level changed on 2026-03-02" in page.locator(".finding").inner_text()
    page.locator("summary").click()
    rows = page.locator(".numbers tbody").inner_text()
    assert all(
        words in rows for words in ("accepted: Marlin by default", "another level from here on", "found to be worse")
    )


@pytest.mark.parametrize(("scheme", "viewport"), [("light", WIDE), ("dark", WIDE), ("light", PHONE), ("dark", PHONE)])
def test_accessible(browse: Show, scheme: str, viewport: Any) -> None:
    """No rule of axe is broken, light or dark, and a phone's screen is not wider than the page."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no axe: pip install axe-playwright-python"
    )
    page = browse(regressed(), viewport, scheme)
    page.locator(".list").scroll_into_view_if_needed()
    drawn(page)
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_nothing_from_outside_runs(browse: Show) -> None:
    """Scripts in names, units, reasons and notes stay text, in the page, the list and the chart."""
    key = Key(EVIL, EVIL, EVIL, EVIL, EVIL)
    found = [Series(key, "up", Points(names(30), np.array([*[1.0] * 29, 2.0]))), series(noisy(30))]
    html = trend.page({KIND: found, OTHER: [replace(found[0])]}, nights(30, note=EVIL), [mark(3, EVIL)])
    page = browse(html)
    page.locator(".list").scroll_into_view_if_needed()
    drawn(page)
    page.select_option("[name=kind]", index=1)
    page.locator(".picked tbody a").first.click()
    until(page, "document.querySelector('.plot').dataset.drawn?.endsWith('on-2')")
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert "<script>" in page.locator("#chosen").inner_text()
