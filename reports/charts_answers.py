"""Charts of what quantization does to answers: drift through the layers, KL of tokens, which layers cost it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
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


def divergence(results: Sequence[Result]) -> Chart | None:
    """How the KL of single tokens is distributed, a line per modality."""
    bins: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
    sources = []
    for result, row in records(results, "KL distribution", "from nats", "to nats", "tokens"):
        low, high, tokens = (number(row[name]) for name in ("from nats", "to nats", "tokens"))
        if low is not None and tokens is not None and (high or low) > 0:
            bins[_kind(result)].append((low, high if high is not None else low * 10, tokens))
            sources.append(result)
    if not any(tokens for found in bins.values() for *_, tokens in found):
        return None
    return Chart(
        name="kl",
        title="KL divergence of single tokens from the reference, in nats",
        finding=" ".join(_spread(name, sorted(found)) for name, found in bins.items()),
        traces=[_steps(at, name, sorted(found)) for at, (name, found) in enumerate(bins.items())],
        layout={
            "xaxis": {"type": "log", "title": {"text": "nats, log scale"}, "exponentformat": "power", "dtick": 1},
            "yaxis": {"title": {"text": "share of tokens"}, "tickformat": ".0%", "rangemode": "tozero"},
        },
        sources=distinct(sources),
    )


def _steps(at: int, name: str, bins: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """A line that steps from bin to bin; the lowest, which starts at zero, is as wide as its neighbour."""
    total = sum(tokens for *_, tokens in bins) or 1
    widths = [high / low for low, high, _ in bins if low > 0 and high > low]
    width = widths[0] if widths else 10.0
    centres = [math.sqrt((low if low > 0 else high / width) * high) for low, high, _ in bins]
    told = [[readable(low), readable(high), readable(tokens)] for low, high, tokens in bins]
    hover = "%{customdata[0]} to %{customdata[1]} nats: %{customdata[2]} tokens, %{y:.1%}"
    more = {"customdata": told, "hovertemplate": hover}
    drawn = line(at, name, centres, [number(tokens / total) for *_, tokens in bins], **more)
    return drawn | {"line": {**drawn["line"], "shape": "hvh"}}


def _spread(name: str, bins: Sequence[tuple[float, float, float]]) -> str:
    total = sum(tokens for *_, tokens in bins)
    reached, half = 0.0, bins[-1][1]
    for _, high, tokens in bins:
        reached += tokens
        if reached >= total / 2:
            half = high
            break
    top = max((high for _, high, tokens in bins if tokens), default=half)
    return f"{name}: of {readable(total)} tokens half are below {readable(half)} nats, all below {readable(top)}."


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
    """What KL is left as more and more layers are kept in 16 bits, against the bytes that costs."""
    steps = []
    for result, row in records(results, "Mixed precision", "kept in 16 bits", "bytes", "KL nats"):
        size, cost = number(row["bytes"]), number(row["KL nats"])
        if size is not None and cost is not None:
            steps.append((size / 1e6, cost, str(row["kept in 16 bits"] or "nothing"), result))
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    return Chart(
        name="mixed-precision",
        title="Mixed precision: layers kept in 16 bits, the most useful first",
        finding=(
            f"Keeping {last[2]} in 16 bits takes {readable(last[0])} MB instead of {readable(first[0])} "
            f"and leaves {readable(last[1])} nats of {readable(first[1])}."
        ),
        traces=[
            line(
                0,
                "KL",
                [size for size, *_ in steps],
                [cost for _, cost, *_ in steps],
                customdata=[text(kept, 200) for _, _, kept, _ in steps],
                hovertemplate="kept: %{customdata}<br>%{x:.4~g} MB, %{y:.4~g} nats<extra></extra>",
            )
        ],
        layout={
            "xaxis": {"title": {"text": "MB of weights"}},
            "yaxis": {"title": {"text": "mean KL, nats"}, "rangemode": "tozero"},
            "showlegend": False,
        },
        sources=distinct([result for *_, result in steps]),
    )


def _kind(result: Result) -> str:
    return result.modality or result.case or result.check
