"""Charts of what quantization does to a machine: bytes, tokens a second, how long one waits."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from fixtures.core.measurement import readable
from fixtures.core.results import Result
from reports.charts import DASHES, SYMBOLS, Chart, bar, distinct, line, number, records, text

_METERS = ("predicted GB", "allocator GB", "reserved GB", "NVML GB")
_QUANTILE = re.compile(r"(TTFT|ITL) p(\d+) ms")
_Lines = dict[tuple[str, str], dict[float, float]]  # (kernel, regime) -> quantile -> ms


def ledger(results: Sequence[Result]) -> Chart | None:
    """What each tower weighs in each checkpoint, the largest first, by the kind of its bytes."""
    kinds: defaultdict[str, dict[tuple[str, str], float]] = defaultdict(dict)  # -> (tower, checkpoint) -> GB
    sources = []
    for result, row in records(results, "Memory by tower", "checkpoint", "tower", "kind", "GB"):
        size = number(row["GB"])
        if size:
            kinds[str(row["kind"] or "all")][str(row["tower"]), _checkpoint(row["checkpoint"])] = size
            sources.append(result)
    if not kinds:
        return None
    towers: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for sizes in kinds.values():
        for (tower, checkpoint), size in sizes.items():
            towers[tower] += size  # type: ignore[assignment]
            totals[checkpoint] += size  # type: ignore[assignment]
    rows = [(tower, checkpoint) for tower, _ in towers.most_common() for checkpoint in totals]
    return Chart(
        name="memory-by-tower",
        title="Memory by tower, in GB",
        finding=" ".join(f"{name} takes {readable(size)} GB." for name, size in totals.items()),
        traces=[
            bar(
                at,
                kind,
                [sizes.get(row, 0) for row in rows],
                [[text(tower) for tower, _ in rows], [text(checkpoint) for _, checkpoint in rows]],
                orientation="h",
                hovertemplate="%{y}, %{fullData.name}: %{x:.4~g} GB<extra></extra>",
            )
            for at, (kind, sizes) in enumerate(sorted(kinds.items(), key=lambda kind: -sum(kind[1].values())))
        ],
        layout={
            "barmode": "stack",
            "legend": {"traceorder": "normal"},
            "xaxis": {"title": {"text": "GB"}},
            "yaxis": {"type": "multicategory", "autorange": "reversed", "automargin": True, "showdividers": False},
        },
        sources=distinct(sources),
        height=9 + 2 * len(rows),
    )


def meters(results: Sequence[Result]) -> Chart | None:
    """Predicted bytes beside what the allocator, its reserve and NVML count, per checkpoint and engine."""
    rows: dict[tuple[str, str], list[float | None]] = {}
    sources = []
    for title in ("Memory in transformers", "Memory inside vLLM"):
        for result, row in records(results, title, "checkpoint", "in", *_METERS):
            sizes = [number(row[name]) for name in _METERS]
            if any(size is not None for size in sizes):
                rows[_checkpoint(row["checkpoint"]), f"in {row['in']}"] = sizes
                sources.append(result)
    if not rows:
        return None
    said = [f"{' '.join(name)}: {readable(sizes[1])} GB." for name, sizes in rows.items() if sizes[1] is not None]
    return Chart(
        name="memory",
        title="Memory of the GPU, in GB, by who counts it",
        finding=f"Handed out by the allocator: {' '.join(said)}" if said else "The allocator was not asked.",
        traces=[
            bar(
                at,
                meter.removesuffix(" GB"),
                [sizes[at] for sizes in rows.values()],
                ["<br>".join(map(text, name)) for name in rows],
                orientation="h",
                hovertemplate="%{fullData.name}: %{x:.4~g} GB<extra></extra>",
            )
            for at, meter in enumerate(_METERS)
        ],
        layout={
            "barmode": "group",
            "xaxis": {"title": {"text": "GB"}},
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
        },
        sources=distinct(sources),
        height=10 + 5 * len(rows),
    )


def throughput(results: Sequence[Result]) -> Chart | None:
    """Tokens a second relative to FP16's, with the interval, a row per regime and a symbol per kernel."""
    kernels: defaultdict[str, list[tuple[str, float, float, float, str]]] = defaultdict(list)
    sources = []
    for result, row in records(results, "Throughput", "regime", "kernel", "of FP16's", "low", "high"):
        ratio, low, high = (number(row[name]) for name in ("of FP16's", "low", "high"))
        if ratio is None or low is None or high is None:  # FP16 itself
            continue
        speed = number(row.get("tokens/s"))
        told = "" if speed is None else f", {readable(speed)} tokens/s"
        kernels[str(row["kernel"])].append((str(row["regime"]), ratio, low, high, told))
        sources.append(result)
    if not kernels:
        return None
    everything = [(ratio, name, regime) for name, rows in kernels.items() for regime, ratio, *_ in rows]
    best, worst = max(everything), min(everything)
    faster = sum(low > 1 for rows in kernels.values() for _, _, low, _, _ in rows)
    return Chart(
        name="throughput",
        title="Throughput relative to FP16's, with 95 % intervals",
        finding=(
            f"From {readable(worst[0])} ({worst[1]}, {worst[2]}) to {readable(best[0])} ({best[1]}, {best[2]}) "
            f"of FP16's; surely faster in {faster} of {len(everything)}."
        ),
        traces=[
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(name),
                "hue": at + 1,  # the first colour is FP16's, here the line at 1
                "x": [ratio for _, ratio, *_ in rows],
                "y": [text(regime) for regime, *_ in rows],
                "marker": {"symbol": SYMBOLS[(at + 1) % len(SYMBOLS)], "size": 10},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - ratio for _, ratio, _, high, _ in rows],
                    "arrayminus": [ratio - low for _, ratio, low, *_ in rows],
                },
                "customdata": [[readable(low), readable(high), told] for _, _, low, high, told in rows],
                "hovertemplate": (
                    "%{fullData.name}, %{y}: %{x:.3f} of FP16's<br>%{customdata[0]} to %{customdata[1]}"
                    "%{customdata[2]}<extra></extra>"
                ),
            }
            for at, (name, rows) in enumerate(kernels.items())
        ],
        layout={
            "xaxis": {"title": {"text": "of FP16's tokens a second"}},
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
            "shapes": [{"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1}],
            "scattermode": "group",
        },
        sources=distinct(sources),
        height=9 + 3 * len({regime for _, _, regime in everything}),
    )


def waits(results: Sequence[Result], latency: str) -> Chart | None:
    """How long one waits for the first token (TTFT) or the next (ITL): quantiles, a line per kernel and regime."""
    lines, sources = _distributions(results, latency)
    if not lines:
        return None
    kernels = list(dict.fromkeys(kernel for kernel, _ in lines))
    regimes = list(dict.fromkeys(regime for _, regime in lines))
    middle = [(_at(points, 0.5), f"{kernel}, {regime}") for (kernel, regime), points in lines.items()]
    said = ", ".join(f"{name} {readable(ms)} ms" for ms, name in sorted(middle)[:6])
    named = {"TTFT": "Time to first token (TTFT)", "ITL": "Time between tokens (ITL)"}[latency]
    return Chart(
        name=latency.lower(),
        title=f"{named}: share of waits that are no longer",
        finding=f"Medians, the shortest first: {said}.",
        traces=[
            line(
                kernels.index(kernel),
                f"{kernel}, {regime}",
                [ms for _, ms in sorted(points.items())],
                [quantile for quantile, _ in sorted(points.items())],
                hovertemplate="%{fullData.name}: %{y:.1%} within %{x:.4~g} ms<extra></extra>",
            )
            | {"line": {"dash": DASHES[regimes.index(regime) % len(DASHES)], "width": 2}}
            for (kernel, regime), points in lines.items()
        ],
        layout={
            "xaxis": {"type": "log", "title": {"text": "ms, log scale"}} | _ticks(lines),
            "yaxis": {"title": {"text": "share"}, "tickformat": ".0%", "range": [0, 1.02]},
        },
        sources=sources,
        height=22,
    )


def _distributions(results: Sequence[Result], latency: str) -> tuple[_Lines, tuple[Result, ...]]:
    """Quantiles of a latency; of runs before those were recorded, the two that the table ``Latency`` has."""
    lines: defaultdict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    sources = []
    for result, row in records(results, "Latency distribution", "regime", "kernel", "latency", "quantile", "ms"):
        quantile, ms = number(row["quantile"]), number(row["ms"])
        if row["latency"] == latency and quantile is not None and ms is not None and ms > 0:
            lines[str(row["kernel"]), str(row["regime"])][quantile] = ms
            sources.append(result)
    if not lines:
        for result, row in records(results, "Latency", "regime", "kernel"):
            for column, value in row.items():
                match, ms = _QUANTILE.fullmatch(column), number(value)
                if match and match[1] == latency and ms is not None and ms > 0:
                    lines[str(row["kernel"]), str(row["regime"])][int(match[2]) / 100] = ms
                    sources.append(result)
    return lines, distinct(sources)


def _ticks(lines: _Lines) -> dict[str, object]:
    """1, 2, 5, 10, ... where there are values: by itself Plotly labels a logarithmic axis with lone digits."""
    values = [ms for points in lines.values() for ms in points.values()]
    decades = range(math.floor(math.log10(min(values))) - 1, min(math.ceil(math.log10(max(values))) + 1, 308))
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 3, 5, 7)]
    return {"tickvals": ticks, "ticktext": [readable(tick) for tick in ticks]}


def _at(points: dict[float, float], quantile: float) -> float:
    return points[min(points, key=lambda known: abs(known - quantile))]


def _checkpoint(name: object) -> str:
    """A checkpoint's name without the digest that its folder ends in."""
    return re.sub(r"-[0-9a-f]{12,}$", "", str(name))
