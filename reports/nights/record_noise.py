"""Noise as runs recorded it, into ``noise.json``: ``python -m reports.nights.record_noise RESULTS.json ...``.

The simulation draws from that file. Give it repeats of one thing on one machine, oldest first, and the error rates that
it prints are those of your machine: ``python -m reports.nights.simulation --noise FILE``. With ``--intervals`` alone
the repeats stay those that are in the file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixtures.core.results import Run
from reports import store

COUNTED, FEWEST = "rounds counted", 6  # the quantity that says how many rounds there were, at least these
TIMED = ("ms", "s", "GB/s", "tokens/s", "requests/s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="repeats; none: those of the output stay")
    parser.add_argument("--how", default="", help="what was repeated, and beside what")
    parser.add_argument("--intervals", nargs="*", type=Path, default=[], help="runs whose tables of throughput to read")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args(arguments)
    if bool(asked.results) != bool(asked.how):
        parser.error("--how says what RESULTS are repeats of: give both, or neither")
    if asked.results:
        repeated = repeats([store.load(file) for file in asked.results], asked.how)
    else:
        try:
            repeated = json.loads(asked.output.read_text(encoding="utf-8"))["repeats"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{asked.output} has no repeats to keep ({error}): give RESULTS")
    found = {"repeats": repeated, "intervals": [r for f in asked.intervals for r in intervals(f)]}
    store.write(asked.output, json.dumps(found, indent=1) + "\n")


def repeats(runs: Sequence[Run], how: str) -> dict[str, Any]:
    """Every timed quantity that all runs have, run after run, as logarithms less their median, in percent."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for run in runs:
        for result in run.results:
            for m in result.measurements:
                if m.unit in TIMED:
                    values[f"{result.check} {result.case}: {m.quantity}, {m.unit}"].append(math.log(m.value))
    whole = {name: logs for name, logs in values.items() if len(logs) == len(runs)}
    about = runs[-1].about
    return {
        "how": how,
        "machine": about.get("machine"),
        "versions": about.get("versions"),
        "series": {name: [round(100 * (x - sorted(v)[len(v) // 2]), 2) for x in v] for name, v in whole.items()},
    }


def intervals(file: Path) -> list[dict[str, Any]]:
    """The 95 % intervals of ratios of tokens per second to FP16's, that a run's tables hold, and of how many rounds."""
    wanted = ("regime", "kernel", "low", "high")
    found = []
    for result in store.load(file).results:
        rounds = next((int(m.value) for m in result.measurements if m.quantity.startswith(COUNTED)), FEWEST)
        for table in (t for t in result.tables if t.title == "Throughput"):
            rows = [{name: row[table.columns.index(name)] for name in wanted} for row in table.rows]
            found += [row | {"rounds": rounds, "file": file.name} for row in rows if row["low"] is not None]
    return found


if __name__ == "__main__":
    main()
