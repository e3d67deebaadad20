"""Pages in a real browser: Playwright drives Debian's own Chromium, or what QUANTPROOF_CHROMIUM names."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("QUANTPROOF_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WIDE, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 800}
LOW = {"width": 1400, "height": 300}  # so low that no chart is in view: the page as it opens, before it draws
SECOND = 1.0  # that a page may take to open
PATIENCE = 5.0  # times that, by the clock on the wall of a machine with other work


@contextmanager
def started() -> Iterator[Any]:
    """A browser; where there is none, the test is skipped and says what to install."""
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(frozen=True)
class Opening:
    """What opening a page took, in seconds."""

    busy: float  # of a core, by the page's main thread: other jobs of the machine hardly touch it
    loaded: float  # by the clock, to the end of its load event
    painted: float  # by the clock, to the first paint

    def __str__(self) -> str:
        return f"busy for {self.busy:.2f} s, loaded in {self.loaded:.2f} s, painted in {self.painted:.2f} s"


def until(page: Any, condition: str) -> None:
    """Wait until a condition on the page holds, 30 s at most.

    Playwright's own ``wait_for_function`` asks again from within the page, by ``eval``, which the page's policy
    refuses: it works only where the condition holds at once.
    """
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never held: {condition}"
        page.wait_for_timeout(20)


def opening(browser: Any, page: Path, tries: int = 5) -> Opening:
    """The quickest of each of several openings of a page that lies on the disk."""
    times = [_once(browser, page.as_uri()) for _ in range(tries)]
    return Opening(*(min(each) for each in zip(*times, strict=True)))


def _once(browser: Any, address: str) -> tuple[float, float, float]:
    tab = browser.new_page(viewport=LOW)
    devtools = tab.context.new_cdp_session(tab)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})  # the thread's own time, not the wall's
    tab.goto(address)
    loaded, painted = tab.evaluate(
        """() => new Promise((done) => new PerformanceObserver((list) => done([
          performance.getEntriesByType("navigation")[0].loadEventEnd, list.getEntries().at(-1).startTime
        ])).observe({ type: "paint", buffered: true }))"""
    )
    metrics = {each["name"]: each["value"] for each in devtools.send("Performance.getMetrics")["metrics"]}
    tab.close()
    return metrics["TaskDuration"], loaded / 1000, painted / 1000
