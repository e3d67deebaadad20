"""Tables that are made of many checks' measurements: the worst of each, as they were written down."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest

from fixtures.core.errors import UserError
from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Result, Run
from fixtures.meters.regimes import IMAGE_PREFILL, ONE_BY_ONE, REGIMES, STREAMED, TOGETHER, Regime
from fixtures.throughput_under_test import GIB, MORE, PICTURE_KV, TEXT_KV
from reports import store
from reports.nights import noises
from reports.tables import merged

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = ROOT / "reports" / "measured"
TARGET = {"family": "f", "size": "tiny", "quantizer": "awq"}


def result(check: str, case: str, *measurements: Measurement, modality: str | None = None) -> Result:
    return Result(f"t.py::{check}[f-tiny-awq{case}]", "passed", "", TARGET, modality, measurements)


def apart(value: float, modality: str, other: str = "graphs", limit: float = 5) -> Result:
    """A KL in units of the noise floor, as ``test_serving`` says it."""
    detail = f"{value * 1e-6:.3g} nats, noise 1e-06 nats; kernels ('marlin',), ('machete',)"
    quantity = f"KL of {other} to eager, of the noise floor"
    measurement = Measurement(quantity, value, "", Bound("at_most", limit), detail)
    return result("test_agree", "", measurement, modality=modality)


def test_worst_of_the_noise_floor() -> None:
    """Of a check's modalities the worst is shown, with how many there were; another comparison has its own row."""
    run = Run({}, [apart(0.5, "text"), apart(2.0, "image"), apart(1.0, "video"), apart(3.0, "text", "awq")])
    assert merged(run, "KL of the noise floor").rows == (
        ("f-tiny-awq", "test_agree", "awq to eager", "marlin / machete", 1, "text", 3e-6, 1e-6, 3.0, 5),
        ("f-tiny-awq", "test_agree", "graphs to eager", "marlin / machete", 3, "image", 2e-6, 1e-6, 2.0, 5),
    )


@pytest.mark.parametrize("order", [1, -1])
def test_nan_is_the_worst(order: int) -> None:
    """A case whose KL is no number is never hidden behind one that is."""
    run = Run({}, [apart(math.nan, "text"), apart(2.0, "image")][::order])
    (row,) = merged(run, "KL of the noise floor").rows
    assert row[5] == "text"
    assert math.isnan(float(row[8] or 0))


def test_bounds_stay_apart() -> None:
    """Cases that were held against different bounds are not folded: a row's bound is that of all its cases."""
    rows = merged(Run({}, [apart(1.0, "text"), apart(2.0, "image", limit=20)]), "KL of the noise floor").rows
    assert [(row[4], row[8], row[9]) for row in rows] == [(1, 1.0, 5), (1, 2.0, 20)]


def test_ratios_of_together() -> None:
    """A ratio stands with both ends of its interval, beside what its end was held against."""
    quantity = "time to first token together, of one by one, upper end"
    measurement = Measurement(quantity, 0.0972, "", Bound("at_most", 0.17), "0.073 (0.056 to 0.097)")
    run = Run({}, [result("test_concurrent_serving", "", measurement)])
    assert merged(run, "Together, of one by one").rows == (
        ("f-tiny-awq", "time to first token", 0.073, 0.056, 0.097, "at most 0.17"),
    )


def peak(modality: str, tokens: int, *, artifact: bool = True) -> Result:
    """Peaks, as ``test_memory`` says them; without the artifact's where its process died."""
    said = [
        Measurement(f"peak {modality}: lower by, of the weights saved", 0.99, "", Bound("at_least", 0.95)),
        Measurement(f"reference: peak {modality} above the weights", 79.0, "MiB", Bound("at_least", 0)),
        Measurement(f"reference: peak {modality}", 7.0, "GiB", None, f"{tokens} tokens of prompt, 16 new"),
        Measurement(f"artifact: peak {modality}", 3.0, "GiB", None, f"{tokens} tokens of prompt, 16 new"),
    ]
    return result("test_peak", f"-{modality}", *said[: 4 if artifact else 3], modality=modality)


def test_peaks() -> None:
    """Modalities go by the length of their prompts; one that was not measured on both sides has no row."""
    run = Run({}, [peak("image", 281), peak("text", 34), peak("video", 1051, artifact=False)])
    assert merged(run, "Peaks by modality").rows == (
        ("f-tiny-awq", "text", 34, 16, 7.0, 3.0, 0.99, 0.95),
        ("f-tiny-awq", "image", 281, 16, 7.0, 3.0, 0.99, 0.95),
    )


def test_nothing_to_gather() -> None:
    """A run that measured nothing of a table is an error, as is one that lacks a table: no empty table is shown."""
    with pytest.raises(UserError, match="no table 'Peaks by modality'"):
        merged(Run({}, [apart(1.0, "text")]), "Peaks by modality")


# -- what the README says, held against the code and the kept files ---------------------------------------------------


def row(regime: Regime) -> tuple[object, ...]:
    asked = f"{regime.prompt_tokens} tokens"
    if regime.pictures:
        asked = f"{regime.pictures} picture of {regime.side} x {regime.side}"
    way = "streamed" if regime.stream else "whole"
    return (regime.name, regime.requests, asked, regime.new_tokens, regime.concurrency, way)


def test_regimes_are_todays() -> None:
    """The regimes that the README shows, measured then, are those of the code today: all of them, and no others."""
    (file,) = re.findall(r"<!-- table: (\S+): Load regimes: ", README)
    shown = {one[1:] for one in merged(store.load(ROOT / file), "Load regimes").rows}
    assert shown == {row(regime) for regime in (*REGIMES, *STREAMED, TOGETHER)}
    assert (ONE_BY_ONE.requests, ONE_BY_ONE.concurrency) == (TOGETHER.requests, 1)
    assert f"a picture takes {IMAGE_PREFILL.picture_tokens} tokens" in " ".join(README.split())


def test_serving_is_todays() -> None:
    """What the README says loads are served with is what their servers are given."""
    assert "`--no-enable-prefix-caching`" in README
    assert "--no-enable-prefix-caching" in MORE
    text, pictures = (f"{size // GIB} GiB" for size in (TEXT_KV, PICTURE_KV))
    said = f"with CUDA graphs and {text} of KV cache; pictures by servers of their own, eager, with {pictures}"
    assert said in " ".join(README.split())


def test_threshold_of_nights() -> None:
    """The change of a median that the README lets pass is more than two nights without a change ever showed."""
    (percent,) = map(int, re.findall(r"--benchmark-compare-fail=median:(\d+)%", README))
    measured = (MEASURED / "README.md").read_text(encoding="utf-8")
    (nights,) = re.findall(r"Two nights of the steady parts.*?: (.*?us)\. ", measured)
    pairs = [(float(one), float(other)) for one, other in re.findall(r"([\d.]+) and ([\d.]+) [mu]s", nights)]
    assert len(pairs) == 3
    changes = [max(pair) / min(pair) - 1 for pair in pairs]  # either night may come first
    for name, logs in json.loads(noises.RECORDED.read_text())["repeats"]["series"].items():
        if "median time" in name:
            changes += [math.exp(abs(b - a) / 100) - 1 for a, b in pairwise(logs)]
    assert max(changes) < percent / 100
