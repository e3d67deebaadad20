"""All charts of a target, in the order of its page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fixtures.core.results import Result
from reports.charts import Chart
from reports.charts_answers import divergence, drift, mixed, sensitivity
from reports.charts_machine import ledger, meters, throughput, waits
from reports.heatmap import heatmap

_BUILDERS = (
    divergence,
    drift,
    sensitivity,
    mixed,
    ledger,
    meters,
    throughput,
    partial(waits, latency="TTFT"),
    partial(waits, latency="ITL"),
)


def gallery(results: Sequence[Result]) -> list[Chart]:
    """Every chart that the tables of ``results`` have data for: heat maps first, then answers, then the machine."""
    maps = [heatmap(table, result) for result in results for table in result.tables]
    return [chart for chart in (*maps, *(build(results) for build in _BUILDERS)) if chart is not None]
