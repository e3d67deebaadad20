"""Of nights kept: which are comparable, which way is worse, the baselines set by hand, and how fast a year is read."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.core.errors import UserError
from fixtures.core.measurement import Bound, Measurement
from reports.nights import kinds, marks, policy
from reports.nights.history import History
from reports.nights.series import Kind, Mark, Point, Points, Series
from reports.nights.values import values, worse
from suites.meta.nights import GPU, KL, MACHINE, SPEED, VERSIONS, check, kept, kl, one, run, speed, subjects

KIND = kinds.kind_of(run().about)


@pytest.fixture
def history(tmp_path: Path) -> History:
    """An empty history."""
    return History(tmp_path / "history", start=True)


# What is comparable


def test_kind() -> None:
    """GPUs and driver, or without any CPU and cores, and the versions that matter make a kind; nothing else does."""
    assert KIND.machine == (("cpu", "AMD EPYC"), ("cores", "2"))
    assert kinds.kind_of({"machine": GPU}).machine == (("gpu", GPU["gpu"]), ("driver", "580.159.04"))
    assert KIND.versions == (("python", "3.12.3"), ("torch", "2.11.0"))
    same = run(machine={**MACHINE, "memory": "1"}, versions={**VERSIONS, "pytest": "9"}, git={"commit": "b"})
    assert kinds.kind_of(same.about) == KIND
    other = kinds.kind_of(run(versions={**VERSIONS, "torch": "2.12.0", "vllm": "1"}).about)
    assert kinds.differences(KIND, other) == ["torch 2.11.0 -> 2.12.0", "vllm none -> 1"]
    assert kinds.from_json(kinds.to_json(KIND)) == KIND
    assert kinds.kind_of({"machine": 3, "versions": []}) == Kind((), ())


def test_engines_over_several_gpus_are_another_kind() -> None:
    """A night whose engines spread over two GPUs is not compared with one whose engines have one each."""
    alone, spread = ({"machine": GPU, "subjects": engines} for engines in ({}, {"engines": {"spread": "over 2 GPUs"}}))
    assert kinds.differences(kinds.kind_of(alone), kinds.kind_of(spread)) == ["engines none -> over 2 GPUs"]
    assert kinds.machine_words(kinds.kind_of(spread)) == f"{GPU['gpu']}, driver 580.159.04, engines over 2 GPUs"
    assert kinds.kind_of({**spread, "subjects": {"engines": 3}}) == kinds.kind_of(alone)


def test_kinds_apart(history: History) -> None:
    """Nights of another machine or other versions are other series."""
    kept(history, run(1), run(2, machine=GPU), run(3, versions={**VERSIONS, "torch": "2.12.0"}), run(4))
    assert len(one(history.series(KIND), KL)) == 2
    assert len(one(history.series(kinds.kind_of(run(machine=GPU).about)), KL)) == 1
    assert history.series(Kind((), ())) == []


def test_until(history: History) -> None:
    """A night's series end with it, whatever came later."""
    names = kept(history, run(1), run(2), run(3))
    assert [night for night, _ in one(history.series(KIND, history.night(names[1])), KL)] == names[:2]


def test_no_number_and_no_value(history: History) -> None:
    """A value that was no number is NaN, and a night without the quantity has no point."""
    names = kept(history, run(1), run(2, (check("failed", kl(math.nan)),)), run(3, (speed(1.0),)), run(4))
    (found,) = [each for each in history.series(KIND) if each.key == KL]
    assert found.nights == [names[0], names[1], names[3]]
    assert [math.isnan(value) for value in found.values] == [False, True, False]


@pytest.mark.parametrize(
    ("subject", "then", "points"),
    [
        ("f-tiny-awq", subjects("another"), 1),
        ("f-tiny-awq", subjects(artifact="another"), 2),
        ("f-tiny-awq", {}, 2),
        ("f-tiny-awq_artifact", subjects(artifact="another", target="f-tiny-awq_artifact"), 1),
        ("f-tiny-awq_artifact", subjects(target="f-tiny-awq_artifact"), 2),
    ],
    ids=["reference", "artifact made here", "untold", "artifact given", "same"],
)
def test_another_checkpoint(history: History, subject: str, then: Any, points: int) -> None:
    """Values of another reference, or of another artifact that was given, are not values of tonight's."""
    family, size, quantizer = subject.split("-")
    result = check("passed", kl(0.01), target={"family": family, "size": size, "quantizer": quantizer})
    names = kept(history, run(1, (result,), subjects=then), run(2, (result,), subjects=subjects(target=subject)))
    tonight = history.night(names[1])
    (found,) = history.series(KIND, tonight)
    assert len(found.points) == points
    assert len(history.series(KIND)[0].points) == 2


# Which quantities, and which way is worse


def bounded(quantity: str, value: float, **bounds: float) -> list[Measurement]:
    """A measurement per bound, or one without any."""
    found = [Measurement(quantity, value, "", Bound(kind, limit)) for kind, limit in bounds.items()]  # type: ignore[arg-type]
    return found or [Measurement(quantity, value)]


@pytest.mark.parametrize(
    ("measured", "quantity", "way"),
    [
        (bounded("q", 1.0, at_most=2), "q", "up"),
        (bounded("q", 1.0, at_least=0), "q", "down"),
        (bounded("q", 1.0, equal_to=1), "q", "either"),
        (bounded("q", 1.0, at_most=2, at_least=0), "q", "either"),
        (bounded("q", 1.0, at_least=0) + bounded("q, at most", 1.0, at_most=2), "q", "either"),
        (bounded("a, of b", 1.0, at_most=2) + bounded("a, at least of b", 1.0, at_least=0), "a, of b", "either"),
        (bounded("q", math.nan, at_least=0) + bounded("q, at most", math.nan, at_most=2), "q", "either"),
        (bounded("q", 1.0) + bounded("q", 1.0, at_most=2), "q", "up"),
    ],
)
def test_worse(measured: list[Measurement], quantity: str, way: str) -> None:
    """The way to a bound is for the worse; a value with a bound on each side is one quantity, worse either way."""
    ((key, value),) = values(run(results=[check("passed", *measured)])).items()
    assert (key.quantity, worse(key, value.bounds)) == (quantity, way)


def test_worse_by_the_latest_night(history: History) -> None:
    """Where a bound became another, the latest night's counts, whichever was stored last."""
    kept(history, run(2, [check("passed", *bounded("q", 1.0, at_least=0))]))
    kept(history, run(1, [check("passed", *bounded("q", 1.0, at_most=2))]))
    assert [series.worse for series in history.series(KIND)] == ["down"]


def test_values_of_one_name() -> None:
    """Other values under one name are other quantities, by their place."""
    measured = [*bounded("q", 1.0), *bounded("q", 2.0), *bounded("q, at most", 3.0, at_most=5)]
    found = values(run(results=[check("passed", *measured), check("passed", *bounded("q", 4.0))]))
    assert {key.quantity: value.value for key, value in found.items()} == {
        "q": 1.0,
        "q (2)": 2.0,
        "q, at most": 3.0,
        "q (3)": 4.0,
    }


def test_policy_says_what_no_bound_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way a quantity without a bound is worse is the policy's say; a bound does not hide the other way."""
    monkeypatch.setattr(policy, "worse_of", lambda quantity, unit: "down" if unit == "tokens/s" else "never")
    assert worse(SPEED, frozenset()) == "down"
    assert worse(KL, frozenset()) == "never"
    assert worse(SPEED, frozenset({"at_least"})) == "down"
    assert worse(SPEED, frozenset({"at_most"})) == "either"
    assert worse(KL, frozenset({"at_most"})) == "up"


def test_strange_names(history: History) -> None:
    """Names that no terminal or database should meet are written out, and tell quantities apart all the same."""
    evil = "\x1b[31m\ud800\0\n<script>"
    kept(history, run(1, [check("passed", *bounded(evil, 1.0), *bounded(f"{evil}!", 2.0))], machine={"cpu": evil}))
    (night,) = history.nights()
    found = [series.key.quantity for series in history.series(night.kind)]
    assert found == ["\\x1b[31m\\ud800\\x00 <script>", "\\x1b[31m\\ud800\\x00 <script>!"]
    assert night.kind.machine[0][1].isprintable()


# Baselines


def test_baselines(history: History) -> None:
    """The last line of a kind counts; the frozen baseline stays until another is frozen."""
    other = kinds.kind_of({"machine": GPU})
    for night, kind, frozen in (("1", KIND, True), ("2", KIND, False), ("3", other, False), ("4", KIND, False)):
        history.accept(Mark(night, kind, "because", "2026", "me", frozen))
    found = History(history.folder).marks
    assert [mark.night for mark in found] == ["1", "2", "3", "4"]
    assert marks.baseline(found, KIND) == found[3]
    assert marks.baseline(found, KIND, frozen=True) == found[0]
    assert marks.baseline(found, other) == found[2]
    assert marks.baseline(found, other, frozen=True) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"schema": 1, "run": "x", "ki', "line 2"),
        (b'{"schema": 2}', "update quantproof"),
        (b'{"run": "x"}', "schema None"),
        (b'{"schema": 1, "run": "x"}', "no 'reason'"),
        (b'{"schema": 1, "run": "x", "kind": 3, "frozen": 1, "when": "", "who": "", "reason": ""}', "frozen"),
        (b"[]", "not an object"),
        (b"\xff\xfe", "line 2"),
        (b"[" * 100_000, "line 2"),
    ],
    ids=range(8),
)
def test_broken_line(history: History, line: bytes, reason: str) -> None:
    """A line that is none is left where it is and named; those around it count, and the next one stands by itself."""
    path = history.folder / marks.ACCEPTED
    history.accept(Mark("1", KIND, "first"))
    path.write_bytes(path.read_bytes() + line)
    history.accept(Mark("2", KIND, "second"))
    again = History(history.folder)
    assert [mark.night for mark in again.marks] == ["1", "2"]
    (note,) = again.notes
    assert reason in note
    assert line in path.read_bytes()


def test_no_file_of_baselines(history: History) -> None:
    """Where baselines should be kept and something else lies, that is one clear line."""
    (history.folder / marks.ACCEPTED).mkdir()
    with pytest.raises(UserError, match="cannot read"):
        _ = history.marks


# Speed


def test_year_of_nights(history: History) -> None:
    """A year of nights with 1500 quantities each is read in less than a second."""
    results = [
        check("passed", *(Measurement(f"q{m}", m / 7, "s") for m in range(10)), name=f"test_{c}") for c in range(150)
    ]
    (name,) = kept(history, run(1, results))
    copied = 'INSERT INTO night SELECT ?, size, changed, kind, outcomes, headline, subjects, keys, "values" FROM night'
    for day in range(364):
        history._index.database.execute(f"{copied} WHERE name = ?", (f"2027-{day:03}", name))
    started = time.process_time()
    series = history.series(KIND)
    seconds = time.process_time() - started
    assert len(series) == 1500
    assert all(len(each.points) == 365 for each in series)
    assert seconds < 1.0


def test_points() -> None:
    """Points in columns are the same points."""
    columns = Points(["a", "b", "c"], np.array([1.0, 2.0, 3.0]))
    points = (Point("a", 1.0), Point("b", 2.0), Point("c", 3.0))
    assert columns == points
    assert columns[1:] == points[1:]
    assert columns[-1] == points[-1]
    assert columns != points[1:]
    assert Series(KL, "up", columns) == Series(KL, "up", Points(["a", "b", "c"], np.array([1.0, 2.0, 3.0])))
    assert list(Series(KL, "up", points).values) == list(columns.values)
