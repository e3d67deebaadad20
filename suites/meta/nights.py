"""Nights to store: small runs that start when, where and with what a test says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Result, Run
from reports import store
from reports.nights.history import History
from reports.nights.judging import Finding, Judgement
from reports.nights.series import Key, Series

MACHINE = {"cpu": "AMD EPYC", "cores": 2}
GPU = {"cpu": "Xeon", "cores": 32, "gpu": "NVIDIA H200, NVIDIA H200", "driver": "580.159.04"}
VERSIONS = {"python": "3.12.3", "pytest": "9.1.1", "torch": "2.11.0", "vllm": None}
TARGET = {"family": "f", "size": "tiny", "quantizer": "awq"}
KL = Key("f-tiny-awq", "parity: test_kl", "text", "mean token KL", "nats")
SPEED = Key("f-tiny-awq", "throughput: test_speed", "batch_8", "throughput of awq", "tokens/s")


def check(outcome: str = "passed", *measured: Measurement, name: str = "test_kl", **more: Any) -> Result:
    """A result of the target ``f-tiny-awq``."""
    given: dict[str, Any] = {"id": f"suites/test_parity.py::{name}[f-tiny-awq-text]", "target": TARGET}
    return Result(**{"outcome": outcome, "requirement": "", "measurements": measured, **given, **more})


def kl(value: float, limit: float = 0.02) -> Measurement:
    """The mean token KL with that value."""
    return Measurement("mean token KL", value, "nats", Bound("at_most", limit))


def speed(value: float) -> Result:
    """A check that tells tokens per second."""
    where = "suites/test_throughput.py::test_speed[f-tiny-awq-batch_8]"
    return check("passed", Measurement("throughput of awq", value, "tokens/s"), id=where)


GOOD = (check("passed", kl(0.01)), speed(100.0), check("passed", kl(0.001), name="test_top1"))


def run(day: int = 1, results: Sequence[Result] = GOOD, **about: Any) -> Run:
    """A run of the ``day``-th of November at three in the morning."""
    said = {"started": f"2026-11-{day:02}T03:00:00+00:00", "exit_status": 0, "machine": MACHINE, "versions": VERSIONS}
    return Run({**said, **about}, tuple(results))


def written(path: Path, given: Run | None = None) -> Path:
    """A results.json of it."""
    store.save(given or run(), path)
    return path


def kept(history: History, *runs: Run) -> list[str]:
    """The names under which runs are stored."""
    source = history.folder.with_name("results.json")
    return [history.store(written(source, each)).name for each in runs]


def one(series: list[Series], key: Key) -> list[tuple[str, float]]:
    """The points of one quantity."""
    (found,) = [each for each in series if each.key == key]
    return [(point.night, point.value) for point in found.points]


def subjects(reference: str = "r", artifact: str = "a", target: str = "f-tiny-awq") -> Mapping[str, Any]:
    """What a run says of what it checked."""
    return {target: {"reference": {"sha256": reference}, "artifact": {"sha256": artifact}}}


def plain_judge(series: Sequence[Series], tonight: str, accepted: str | None, frozen: str | None) -> Judgement:
    """In place of the statistics: what is less than nine tenths of the baseline, or the first night, is worse."""
    worse = []
    for each in series:
        values = {point.night: point.value for point in each.points}
        before = values.get(accepted or min(values), 0.0)
        if each.worse == "down" and tonight in values and values[tonight] < 0.9 * before:
            change = values[tonight] / before - 1
            worse.append(Finding(each.key, values[tonight], before, change, 0.001, "less than nine tenths"))
    return Judgement(tonight, tuple(worse))


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the lock and the index, with their content."""
    files = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if file.name != ".lock" and not file.name.startswith("index.sqlite")
    }


def edited(path: Path, **changes: Any) -> str:
    """The text of a JSON file with some of its fields changed."""
    return json.dumps({**json.loads(path.read_text()), **changes})
