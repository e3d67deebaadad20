"""Charts of what quantization does to answers: drift through the layers, KL of tokens, which layers cost it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fixtures.core.measurement import readable
from fixtures.core.results import Result
from reports.charts import Chart, bar, distinct, line, number, records, text

_MOST = 20  # layers of a ranking


def drift(results: Sequence[Result]) -> Chart | None:
    """Relative error of the hidden state after every layer, a line per modality."""
    lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    sources = []
    for result, row in records(results, "Hidden-state drift", "layer", "relative"):
        layer, relative = number(row["layer"]), number(row["relative"])
        if layer is not None and relative is not None:
            lines[_kind(result)].append((layer, relative))
            sources.append(result)
    if not lines:
        return None
    worst, layer, kind = max((y, x, name) for name, points in lines.items() for x, y in points)
    ends = ", ".join(f"{name} {readable(max(points)[1])}" for name, points in lines.items())
    return Chart(
        name="drift",
        title="Hidden-state drift: error relative to the reference's state, after each layer",
        finding=f"It is highest for {kind}, after layer {readable(layer)}: {readable(worst)}. After the last: {ends}.",
        traces=[
            line(at, name, *zip(*sorted(points), strict=True), hovertemplate="layer %{x}: %{y:.4~g}")
            for at, (name, points) in enumerate(lines.items())
        ],
        layout={
            "xaxis": {"title": {"text": "layer"}},
            "yaxis": {"title": {"text": "relative error"}, "rangemode": "tozero"},
            "hovermode": "x unified",
        },
        sources=distinct(sources),
    )


@dataclass(frozen=True)
class _Spread:
    """How many tokens have a KL from ``low`` to ``high`` nats, and how many none that is a number."""

    bins: tuple[tuple[float, float, float], ...]  # (low, high, tokens), in order, without empty ones at the ends
    broken: float

    @property
    def total(self) -> float:
        """All tokens compared."""
        return sum(tokens for *_, tokens in self.bins) + self.broken


def divergence(results: Sequence[Result]) -> Chart | None:
    """How the KL of single tokens is distributed, a line per modality."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    sources = []
    for result, row in records(results, "KL distribution", "from nats", "to nats", "tokens"):
        found[_kind(result)].append(row)
        sources.append(result)
    spreads = {name: _spread(rows) for name, rows in found.items()}
    spreads = {name: spread for name, spread in spreads.items() if spread.total}
    if not spreads:
        return None
    return Chart(
        name="kl",
        title="KL divergence of single tokens from the reference, in nats",
        finding=" ".join(_says(name, spread) for name, spread in spreads.items()),
        traces=[_steps(at, name, spread) for at, (name, spread) in enumerate(spreads.items())],
        layout={
            "xaxis": {"type": "log", "title": {"text": "nats, log scale"}, "exponentformat": "power", "dtick": 1},
            "yaxis": {"title": {"text": "share of tokens"}, "tickformat": ".0%", "rangemode": "tozero"},
        },
        sources=distinct(sources),
    )


def _spread(rows: Sequence[Mapping[str, Any]]) -> _Spread:
    """The rows of one histogram: no ``to`` is beyond the last bin, and no ``from`` either is no number at all."""
    bins, broken = [], 0.0
    for row in rows:
        low, high, tokens = (number(row[name]) for name in ("from nats", "to nats", "tokens"))
        if low is None:
            broken += tokens or 0.0
        elif tokens is not None and (high is None or high > low >= 0):
            bins.append((low, 10 * low if high is None else high, tokens))
    bins = sorted(entry for entry in bins if entry[1] > 0)
    taken = [at for at, (*_, tokens) in enumerate(bins) if tokens]
    return _Spread(tuple(bins[taken[0] : taken[-1] + 1]) if taken else (), broken)


def _steps(at: int, name: str, spread: _Spread) -> dict[str, Any]:
    """A line that steps from bin to bin; the lowest, which starts at zero, is as wide as another."""
    width = next((high / low for low, high, _ in spread.bins if low > 0), 10.0)
    centres = [math.sqrt((low if low > 0 else high / width) * high) for low, high, _ in spread.bins]
    told = [[readable(low), readable(high), readable(tokens)] for low, high, tokens in spread.bins]
    hover = "%{customdata[0]} to %{customdata[1]} nats: %{customdata[2]} tokens, %{y:.1%}"
    shares = [number(tokens / spread.total) for *_, tokens in spread.bins]
    drawn = line(at, name, centres, shares, customdata=told, hovertemplate=hover)
    return drawn | {"line": {**drawn["line"], "shape": "hvh"}}


def _says(name: str, spread: _Spread) -> str:
    broken = f"{readable(spread.broken)} of {readable(spread.total)} tokens have no KL that is a number."
    if not spread.bins:
        return f"{name}: {broken}"
    reached, half = 0.0, spread.bins[-1][1]
    for _, high, tokens in spread.bins:
        reached += tokens
        if reached >= spread.total / 2:
            half = high
            break
    most = readable(spread.bins[-1][1])
    said = f"{name}: of {readable(spread.total)} tokens half are below {readable(half)} nats, all below {most}."
    return f"{said} {broken}" if spread.broken else said


def sensitivity(results: Sequence[Result]) -> Chart | None:
    """The layers that cost most KL when they alone are quantized, the costliest first."""
    found = []
    for result, row in records(results, "Sensitivity", "tower", "layer", "KL nats"):
        cost = number(row["KL nats"])
        if cost is not None:
            found.append((cost, f"{row['tower']} {row['layer']}", number(row.get("bytes saved")), result))
    if not found:
        return None
    found.sort(key=lambda item: -item[0])
    shown = found[:_MOST]
    saved = [f"{readable(amount / 1e6)} MB saved" if amount is not None else "" for _, _, amount, _ in shown]
    total = sum(cost for cost, *_ in found)
    share = f", {shown[0][0] / total:.0%} of what all cost one by one" if total > 0 else ""
    return Chart(
        name="sensitivity",
        title="Sensitivity: KL when this layer alone is quantized",
        finding=f"{shown[0][1]} costs most: {readable(shown[0][0])} nats{share}, of {len(found)} layers.",
        traces=[
            bar(
                0,
                "KL",
                [cost for cost, *_ in shown],
                [text(name) for _, name, *_ in shown],
                orientation="h",
                customdata=saved,
                hovertemplate="%{y}: %{x:.4~g} nats, %{customdata}<extra></extra>",
            )
        ],
        layout={
            "xaxis": {"title": {"text": "nats"}, "rangemode": "tozero"},
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
            "showlegend": False,
        },
        sources=distinct([result for *_, result in found]),
        height=max(12, 5 + 2 * len(shown)),
    )


def mixed(results: Sequence[Result]) -> Chart | None:
    """What KL is left as more and more layers are kept in 16 bits, against the bytes that costs; a line per start."""
    lines: list[list[tuple[float, float, str]]] = []
    sources = []
    for result, row in records(results, "Mixed precision", "step", "kept in 16 bits", "bytes", "KL nats"):
        size, cost = number(row["bytes"]), number(row["KL nats"])
        if size is None or cost is None:
            continue
        if row["step"] == 0 or not lines:  # each way of asking starts with nothing kept
            lines.append([])
        lines[-1].append((size / 1e6, cost, str(row["kept in 16 bits"] or "nothing")))
        sources.append(result)
    if not lines:
        return None
    said = [
        f"Keeping {last[2]} in 16 bits takes {readable(last[0])} MB instead of {readable(first[0])} "
        f"and leaves {readable(last[1])} nats of {readable(first[1])}."
        for first, *_, last in (steps for steps in lines if len(steps) > 1)
    ]
    return Chart(
        name="mixed-precision",
        title="Mixed precision: layers kept in 16 bits, the most useful first",
        finding=" ".join(said) or "No layer was kept in 16 bits.",
        traces=[
            line(
                at,
                steps[0][2].removeprefix("nothing, "),
                [size for size, *_ in steps],
                [cost for _, cost, _ in steps],
                customdata=[text(kept, 200) for *_, kept in steps],
                hovertemplate="kept: %{customdata}<br>%{x:.4~g} MB, %{y:.4~g} nats<extra></extra>",
            )
            for at, steps in enumerate(lines)
        ],
        layout={
            "xaxis": {"title": {"text": "MB of weights"}},
            "yaxis": {"title": {"text": "mean KL, nats"}, "rangemode": "tozero"},
        },
        sources=distinct(sources),
    )


def _kind(result: Result) -> str:
    return result.modality or result.case or result.check
