"""A run as one HTML page: a pure function, needing nothing but the run."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from fixtures.core.measurement import Measurement, readable
from fixtures.core.results import Outcome, Result, Run
from reports import verdict
from reports.charts import PLOTLY, Chart, embedded, scripts
from reports.escape import printable
from reports.gallery import gallery
from reports.power import power, shade
from reports.rows import FIRST, LaterRows
from reports.samples import others, voices, with_room, worst_tokens
from reports.sentences import Caution, called, telling, warnings
from reports.store import plain
from reports.verdict import Verdict

LARGEST = 6_000_000  # bytes of a page

TEMPLATES = Path(__file__).parent / "templates"
_BADGES: dict[Outcome, tuple[str, str]] = {  # a sign and a word, so that none speaks by colour alone
    "passed": ("✓", "ok"),
    "failed": ("✗", "failed"),
    "error": ("!", "error"),
    "xfailed": ("≈", "known bad"),
    "xpassed": ("?", "no longer bad"),
    "skipped": ("○", "skipped"),
}


@dataclass(frozen=True)
class _Budget:
    """How much of each table and message a page shows, and whether it draws; the rest is in results.json."""

    rows: int
    characters: int
    charts: bool = True


_BUDGETS = (
    _Budget(20_000, 20_000),
    _Budget(2000, 20_000),
    _Budget(500, 4000),
    _Budget(100, 1000),
    _Budget(20, 400),
    _Budget(0, 200, charts=False),
)
# Between blocks, where it shows nothing: a quarter of what a browser would make of a page. Text has no "<" or ">".
_BLANK = re.compile(
    r"(?<=>)\s+(?=</?(?:tr|td|th|t?body|thead|table|div|details|summary|section|figure|ul|li|svg|rect|p|pre|article)\b)"
)
_FOR_MEDIA = 2_000_000  # bytes that tables and messages leave to pictures and sounds, where there are any
_OPEN = 4  # targets; where there are more, their charts are folded


def render(run: Run) -> str:
    """The report on ``run`` as one page without outside parts; what exceeds ``LARGEST`` bytes is left out.

    Of pictures and sounds those of checks that failed stay longest.
    """
    context = _context(run)
    wanted = min(sum(len(m.data) * 4 // 3 for r in run.results for m in r.media), _FOR_MEDIA)
    page = ""
    # With room for pictures and sounds; where even the shortest tables leave too little, they go before charts do.
    for least, budgets in ((wanted, [b for b in _BUDGETS if b.charts]), (0, _BUDGETS)):
        for budget in budgets:
            page = _page(context, budget, frozenset())
            room = LARGEST - len(page.encode(errors="replace"))
            if room >= least:
                kept = with_room(run.results, room)
                return _page(context, budget, kept) if kept else page
    return page


def _page(context: dict[str, Any], budget: _Budget, kept: Collection[int]) -> str:
    template = environment().get_template("report.html")
    page = template.render(
        context | {"figures": context["figures"] if budget.charts else embedded({})},
        budget=budget,
        later=LaterRows(budget.rows),
        kept=kept,
        lost=sum(id(m) not in kept for r in context["run"].results for m in r.media),
    ).lstrip()
    body, script, rest = page.partition('<script type="application/json"')
    return _BLANK.sub("", body) + script + rest


@dataclass(frozen=True)
class _Target:
    """A target as the page tells of it."""

    verdict: Verdict
    title: str
    warnings: list[Caution]
    charts: list[tuple[str, Chart]]  # each with the fragment of its address


def _targets(run: Run) -> list[_Target]:
    targets = []
    for found in verdict.verdicts(run):
        charts: dict[str, Chart] = {}
        for chart in gallery(found.results):
            wanted = name = slug(f"chart-{found.target}-{chart.name}")
            again = 1
            while name in charts:
                again += 1
                name = f"{wanted}-{again}"
            charts[name] = chart
        targets.append(_Target(found, called(found, run.about), warnings(found), list(charts.items())))
    return targets


def _context(run: Run) -> dict[str, Any]:
    targets = _targets(run)
    of_targets = [r for r in run.results if r.target_id]
    return {
        "run": run,
        "headline": verdict.headline(run),
        "targets": targets,
        "alone": len(run.results) == 1,  # what else would be read
        "open_charts": len(targets) <= _OPEN,
        "figures": embedded(plain({name: chart.figure for target in targets for name, chart in target.charts})),
        "suites": verdict.suites(of_targets),
        "own": verdict.own(run.results),
        "power": power(run.results),
        "unrun": verdict.unrun(run.results),
        "anchors": _anchors(run.results),
        "scripts": scripts(TEMPLATES / "report.js", TEMPLATES / "charts.js", later=PLOTLY),
    }


def _anchors(results: Iterable[Result]) -> dict[str, str]:
    """A fragment for every check, readable and unique."""
    anchors: dict[str, str] = {}
    taken: set[str] = set()
    for result in results:
        name = wanted = slug(f"{result.suite}-{result.id.rsplit('::', 1)[-1]}")
        again = 1
        while name in taken:
            again += 1
            name = f"{wanted}-{again}"
        taken.add(name)
        anchors[result.id] = name
    return anchors


def slug(text: str) -> str:
    """``text`` as it can stand in an address: letters, digits, ``_``, ``.`` and ``-``."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-")


def shown(value: object) -> str:
    """A table's cell as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return readable(value) if isinstance(value, int | float) else str(value)


FAR = 10  # bounds' worth of margin from which percent say less than a factor


def margin_text(measurement: Measurement) -> str:
    """How far from its bound a value is, in words: ``38 % inside``."""
    bound, share = measurement.bound, verdict.margin(measurement)
    if bound is None:
        return ""
    if measurement.value == bound.limit:
        return "exact" if bound.kind == "equal_to" else "at the bound"
    if share is None:  # no value, or a bound of zero
        return "not a number" if math.isnan(measurement.value) else "inside" if measurement.holds else "beyond"
    if abs(share) > FAR and bound.limit:
        return f"{readable(round(measurement.value / bound.limit))} x the bound"
    return f"{verdict.percent(share)} {'inside' if share > 0 else 'beyond'}"


def used(measurement: Measurement) -> int | None:
    """How much of the room up to the bound is used, in percent, for a bar; None where that means nothing."""
    bound, share = measurement.bound, verdict.margin(measurement)
    if share is None or bound is None or bound.kind == "equal_to":
        return None
    return round(100 * min(max(1 - share, 0.0), 1.0))


def shortened(text: str, characters: int) -> str:
    """``text``, cut where it is longer than ``characters``."""
    return text if len(text) <= characters else f"{text[:characters]}\n[... the rest is in results.json ...]"


def duration(seconds: object) -> str:
    """Seconds as a person reads them: ``4 min 10 s``."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return str(seconds)
    if seconds < 0.01:
        return "< 0.01 s"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(started: object) -> str:
    """A time in ISO 8601 as a person reads it; anything else as it is."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d)?(\+00:00|Z)", str(started))
    return f"{match[1]} {match[2]} UTC" if match else str(started)


@cache
def environment() -> jinja2.Environment:
    """The templates, with what they need; whatever they are given is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["mapping"] = lambda value: isinstance(value, Mapping)
    environment.filters |= {
        "cell": verdict.cell,
        "duration": duration,
        "embedded": embedded,
        "key": lambda result: telling([result]) or next(iter(result.measurements), None),
        "margin": margin_text,
        "moment": moment,
        "printable": printable,
        "shortened": shortened,
        "shade": shade,
        "shown": shown,
        "slug": slug,
        "telling": telling,
        "used": used,
        "voices": voices,
        "others": others,
        "worst": verdict.worst,
        "worst_tokens": worst_tokens,
    }
    environment.globals |= {"badges": _BADGES, "counted": verdict.counted, "suites_of": verdict.suites, "FIRST": FIRST}
    return environment
