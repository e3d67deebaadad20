"""``verify``: everything measured is recorded, what does not hold fails, and so does a test that measured nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fixtures.core.measurement import Bound, Measurement, as_value, readable
from fixtures.verifying import Verify

NAN, INF = math.nan, math.inf


@pytest.fixture
def listening():
    """A ``verify`` that belongs to no running test."""
    return Verify(SimpleNamespace(stash={}), [])


# What holds


@pytest.mark.parametrize(
    ("kind", "limit", "good", "bad"),
    [
        ("at_most", 2.0, (2.0, 1.9, -5.0, -INF), (2.0000001, INF)),
        ("at_least", 2.0, (2.0, 2.1, INF), (1.9999999, -5.0, -INF)),
        ("equal_to", 2.0, (2.0,), (1.9999999, 2.0000001, INF, -2.0)),
        ("at_most", 0.0, (0.0, -0.0), (1e-300,)),
        ("equal_to", 0, (0.0, False), (1e-300, True)),
    ],
)
def test_bounds(listening, kind, limit, good, bad):
    """A value at its bound holds, the next one beyond does not, and a bound of 0 is a bound."""
    for value in (*good, *bad):
        listening("q", value, **{kind: limit})

    assert [m.holds for m in listening.measurements] == [True] * len(good) + [False] * len(bad)
    assert (listening.conclude() == "") == (not bad)


@pytest.mark.parametrize(
    "nothing", [None, NAN, torch.tensor(NAN), np.float32("nan")], ids=["None", "NaN", "torch", "numpy"]
)
@pytest.mark.parametrize("kind", ["at_most", "at_least", "equal_to"])
@pytest.mark.parametrize("limit", [0.0, INF, -INF])
def test_nothing_never_holds(listening, nothing, kind, limit):
    """NaN, and None for nothing measured, hold against no bound."""
    listening("mean token KL", nothing, "nats", **{kind: limit})

    assert listening.measurements[0].holds is False
    assert listening.conclude().startswith("mean token KL: NaN nats, must be ")


@pytest.mark.parametrize(
    "bounds", [{}, {"at_most": 1, "at_least": 0}, {"at_most": 1, "equal_to": 1}, {"at_most": None}]
)
def test_exactly_one_bound(listening, bounds):
    """A value without a bound, or with several, is an error, and nothing is recorded."""
    with pytest.raises(TypeError, match="exactly one of at_most, at_least, equal_to"):
        listening("q", 1.0, **bounds)

    assert not listening.measurements


@pytest.mark.parametrize("kind", ["at_most", "at_least", "equal_to"])
def test_no_bound_of_nan(listening, kind):
    """A bound of NaN is an error: it would judge nothing."""
    with pytest.raises(ValueError, match="NaN"):
        listening("q", 1.0, **{kind: NAN})


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (True, 1.0), (torch.tensor(0.5), 0.5), (torch.tensor([0.5]), 0.5), (np.float16(0.5), 0.5)],
    ids=repr,
)
def test_values(value, number):
    """A value is a number of whatever library."""
    assert as_value(value) == number
    assert type(as_value(value)) is float


def test_a_tensor_of_many_is_no_value(listening):
    """A tensor of several elements is an error, not its first or its mean."""
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        listening("q", torch.zeros(2), at_most=1)


# What it says


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.314, "0.314"), (0.02, "0.02"), (0.0123456, "0.01235"), (-1.5, "-1.5"), (1234.56, "1235"), (1e-9, "1e-09"),
        (0.0, "0"), (-0.0, "0"), (3.0, "3"), (123456789.0, "123456789"), (1e9, "1e+09"), (1e300, "1e+300"),
        (NAN, "NaN"), (INF, "inf"), (-INF, "-inf"),
    ],
)  # fmt: skip
def test_readable(number, text):
    """A number has four significant digits, whole ones stand in full."""
    assert readable(number) == text


@pytest.mark.parametrize(
    ("measurement", "text"),
    [
        (Measurement("mean token KL", 0.314, "nats", Bound("at_most", 0.020)),
         "mean token KL: 0.314 nats, must be at most 0.02 nats"),
        (Measurement("top-1", 0.5, "", Bound("at_least", 0.95)), "top-1: 0.5, must be at least 0.95"),
        (Measurement("linears", 3, "of 252", Bound("equal_to", 0)), "linears: 3 of 252, must be equal to 0 of 252"),
        (Measurement("noise floor", 1.5e-6, "nats"), "noise floor: 1.5e-06 nats"),
        (Measurement("KL", 0.0200001, "", Bound("at_most", 0.02)), "KL: 0.0200001, must be at most 0.02"),
        (Measurement("KL", 0.02, "", Bound("at_most", 0.02)), "KL: 0.02, must be at most 0.02"),
    ],
    ids=["at most", "at least", "equal to", "no bound", "beyond by a digit not shown", "at the bound"],
)  # fmt: skip
def test_measurement_speaks(measurement, text):
    """A measurement says quantity, value, unit and bound, and never that a value fails a bound it seems to meet."""
    assert str(measurement) == text


@pytest.mark.parametrize(
    "measurement",
    [
        Measurement("mean token KL", 0.314, "nats", Bound("at_most", 0.02), "rain.wav, token 17"),
        Measurement("noise floor", 1.5e-6, "nats"),
        Measurement("q", -3.0, "", Bound("equal_to", 0.0)),
    ],
    ids=["judged", "note", "plain"],
)
def test_measurement_survives_json(measurement):
    """A measurement comes back from JSON as it went in."""
    assert Measurement.from_json(measurement.to_json()) == measurement


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_broken_value_survives_json(value):
    """A value that JSON has no word for comes back as one that holds against nothing."""
    back = Measurement.from_json(Measurement("q", value, "", Bound("at_most", 1.0)).to_json())

    assert math.isnan(back.value)
    assert back.holds is False


def test_none_of(listening):
    """No offenders among things looked at holds."""
    listening.none_of("linears with broken scales", [], among=252)

    assert listening.conclude() == ""
    assert listening.measurements == [Measurement("linears with broken scales", 0.0, "of 252", Bound("equal_to", 0.0))]


@pytest.mark.parametrize("offenders", [[], ["a"]], ids=["none", "one"])
def test_none_of_nothing(listening, offenders):
    """Looking at nothing never holds."""
    listening.none_of("linears with broken scales", offenders, among=0)

    assert listening.conclude().startswith("linears with broken scales: NaN of 0, must be equal to 0 of 0")


@pytest.mark.parametrize("count", [1, 10, 11, 300])
def test_offenders(listening, count):
    """Offenders are counted, and the first ten named."""
    listening.none_of("broken linears", (f"linear {i}" for i in range(count)), among=1000)

    first, *lines = listening.conclude().splitlines()
    assert first == f"broken linears: {count} of 1000, must be equal to 0 of 1000"
    assert lines[0] == "  worst      linear 0"
    assert lines[1 : min(count, 10)] == [f"             linear {i}" for i in range(1, min(count, 10))]
    assert lines[10:] == ([f"             (and {count - 10} more)"] if count > 10 else [])
