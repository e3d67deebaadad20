"""The history as one page: what changed tonight, and every quantity over the nights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reports.charts import PLOTLY, embedded, scripts
from reports.escape import inline
from reports.nights.findings import Finding
from reports.nights.series import Kind, Mark, Night, Series, day
from reports.nights.trend_data import History, name_of, told
from reports.render import TEMPLATES, environment, moment
from reports.verdict import counted

_SIGNS = {  # a sign and a word, so that none speaks by colour alone
    "regressed": ("✗", "regressed"),
    "failing": ("!", "checks fail"),
    "improved": ("↑", "improved"),
    "steady": ("✓", "steady"),
    "unjudged": ("·", "not judged"),
}
_LISTED = 200  # findings of one sort


def page(kinds: Mapping[Kind, Sequence[Series]], nights: Sequence[Night], marks: Sequence[Mark]) -> str:
    """The trend page, one HTML file without outside parts.

    Args:
        kinds: every kind of machine and versions with its series; the kind of the last night is shown first.
        nights: all nights, oldest first.
        marks: every move of a baseline, oldest first; the last of a kind counts.
    """
    last = nights[-1].kind if nights else None
    ordered = sorted(kinds, key=lambda kind: kind != last)
    histories = [
        History(kind, kinds[kind], [n for n in nights if n.kind == kind], [m for m in marks if m.kind == kind], place)
        for place, kind in enumerate(ordered)
    ]
    context: dict[str, Any] = {
        "headline": headline(nights, histories),
        "histories": histories,
        "sections": [_sections(history) for history in histories],
        "months": _months(nights),
        "count": len(nights),
        "day": day,
        "signs": _SIGNS,
        "kind_names": {kind: kind_name(kind) for kind in {*kinds, *(night.kind for night in nights)}},
        "data": embedded([history.data() for history in histories]),
        "scripts": scripts(TEMPLATES / "trend.js", later=PLOTLY),
        "listed": _LISTED,
        "name_of": name_of,
        "told": told,
    }
    return environment().get_template("trend.html").render(context).lstrip()


def headline(nights: Sequence[Night], histories: Sequence[History]) -> str:
    """The last night in one sentence, the worst first."""
    if not nights:
        return "No night is kept yet"
    when, history = inline(moment(nights[-1].started), 40), histories[0] if histories else None
    if history is None or not history.series:
        return f"The night of {when} measured nothing"
    said, last = history.judgement, nights[-1]
    parts = [f"{len(said.regressions)} of {counted(len(history.series), 'quantity')} worse"] if said.regressions else []
    alarming = last.verdict == "failing" or (last.verdict == "regressed" and not said.regressions)
    parts += [inline(last.note, 200) or "checks fail"] if alarming else []  # what no quantity tells
    parts += [f"{len(said.suspects)} to be confirmed tomorrow"] if said.suspects else []
    parts += [f"{len(said.improvements)} better"] if said.improvements else []
    parts += [f"{len(said.gone)} no longer measured"] if said.gone else []
    steady = f"{counted(len(history.series), 'quantity')}, none worse"
    return f"The night of {when}: {', '.join(parts) or steady}".replace("quantitys", "quantities")


def kind_name(kind: Kind) -> str:
    """A kind of machine and versions in one line."""
    return ", ".join(f"{name} {value}" for name, value in (*kind.machine, *kind.versions)) or "machine not told"


def _months(nights: Sequence[Night]) -> dict[str, list[Night]]:
    """Nights by month, the newest month first and the oldest night of a month first."""
    found: dict[str, list[Night]] = {}
    for night in nights:
        found.setdefault(inline(night.started[:7]) or "no date", []).append(night)
    return dict(reversed(found.items()))


def _sections(history: History) -> list[tuple[str, str, Sequence[Finding]]]:
    said = history.judgement
    listed = (
        ("Worse", "regressed", said.regressions),
        ("Worse tonight, to be confirmed", "failing", said.suspects),
        ("Better", "improved", said.improvements),
        ("No longer measured", "unjudged", said.gone),
    )
    return [part for part in listed if part[2]]
