"""Scripts and charts of a page: the library inlined once, figures as data, nothing fetched and nothing evaluated.

A page with charts is given ``scripts(TEMPLATES / "charts.js", ..., later=PLOTLY)`` and its figures as ``embedded`` JSON
in an element of id ``figures``: name to ``{"data", "layout"}``. charts.js draws each into ``<div class="plot"
data-figure="name">`` when it comes into view, in the page's colours.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fixtures.core.results import Result
from reports.escape import printable

PLOTLY = Path(__file__).parent / "vendor" / "plotly-4.1.1.min.js"
_LIBRARY = Path(__file__).parent / "templates" / "library.js"  # what runs it


@dataclass(frozen=True)
class Script:
    """A script as it stands in a page."""

    source: Markup  # ours, never from outside: it is not escaped
    later: bool = False  # inlined as text, to be run when it is needed

    @cached_property
    def hash(self) -> str:
        """What the page's Content-Security-Policy names it by, so that no other script runs."""
        return f"sha256-{base64.b64encode(hashlib.sha256(self.source.encode()).digest()).decode()}"


@cache
def script(file: Path) -> Script:
    """A file as a script.

    Raises:
        ValueError: when it holds what would end the script early within a page.
    """
    source = file.read_text(encoding="utf-8")
    if any(end in source.lower() for end in ("</script", "<!--")):
        raise ValueError(f"{file.name} cannot be inlined: it holds the end of a script or a comment's start")
    return Script(Markup(source))


def scripts(*files: Path, later: Path | None = None) -> tuple[Script, ...]:
    """``files`` as a page's scripts, in this order; hand them to its template as ``scripts``.

    ``head.html`` names their hashes in the page's Content-Security-Policy, ``scripts.html`` inlines them; it belongs at
    the end of the body. ``later`` is inlined as text that ``library()`` of library.js, which comes with it, runs when
    the first chart is to be drawn: Plotly takes a second of a slow machine, which opening a page should not wait for.
    """
    loaded = tuple(map(script, files))
    return loaded if later is None else (Script(script(later).source, later=True), script(_LIBRARY), *loaded)


def embedded(data: object) -> Markup:
    """``data`` as JSON that may stand in a ``<script type="application/json">``: no text in it can end the script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@dataclass(frozen=True)
class Chart:
    """A chart: what it shows, what it finds, a figure of Plotly's without colours, and the checks it is drawn from.

    A trace's ``hue`` is its place in the page's palette; ``reports/templates/charts.js`` turns it into a colour of the
    reader's light or dark page. Because colours do not speak alone, lines have dashes and symbols, bars patterns.
    """

    name: str  # of its own among the charts of a target; a fragment of its address
    title: str
    finding: str  # a sentence: what an eye would take from the chart, for those who do not see it
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[Result] = ()  # whose tables have the numbers
    height: int = 20  # rem
    wide: bool = False

    @property
    def figure(self) -> dict[str, Any]:
        """``{"data": [...], "layout": {...}}``, as Plotly takes it."""
        return {"data": list(self.traces), "layout": dict(self.layout)}


DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star")
PATTERNS = ("", "/", ".", "x", "-", "+")


def line(place: int, name: str, x: Sequence[object], y: Sequence[object], **more: Any) -> dict[str, Any]:
    """The ``place``-th line of a chart, told from others by colour, dash and symbol."""
    style = {"line": {"dash": DASHES[place % len(DASHES)], "width": 2}, "mode": "lines+markers"}
    symbol = {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7}
    return {"type": "scatter", "name": text(name), "x": x, "y": y, "hue": place, "marker": symbol} | style | more


def bar(place: int, name: str, x: Sequence[object], y: Sequence[object], **more: Any) -> dict[str, Any]:
    """The ``place``-th series of bars, told from others by colour and pattern."""
    pattern = {"pattern": {"shape": PATTERNS[place % len(PATTERNS)], "solidity": 0.35}}
    return {"type": "bar", "name": text(name), "x": x, "y": y, "hue": place, "marker": pattern} | more


def text(value: object, characters: int = 60) -> str:
    """Any text as Plotly shows it unchanged: it reads tags and references in what it is given."""
    said = " ".join(printable(str(value)).split())
    said = said if len(said) <= characters else f"{said[: characters - 3]}..."
    return html.escape(said, quote=False)


def number(value: object) -> float | None:
    """A finite number as a float, to six digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def records(results: Sequence[Result], title: str, *columns: str) -> Iterator[tuple[Result, dict[str, Any]]]:
    """The rows of every table of this title that has these columns, by column, each with the result it belongs to."""
    for result in results:
        for table in result.tables:
            if table.title == title and set(columns) <= set(table.columns):
                for row in table.rows:
                    if len(row) == len(table.columns):
                        yield result, dict(zip(table.columns, row, strict=True))


def distinct(items: Sequence[Result]) -> tuple[Result, ...]:
    """``items``, each once, in their order."""
    return tuple({id(item): item for item in items}.values())
