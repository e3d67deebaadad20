"""Numbers that changed between two runs: by how much, to better or worse, and apart from bounds that changed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fixtures.core.measurement import Bound, Measurement
from reports import changes
from reports.compare import Move, Rebound
from suites.meta.compared_runs import BAD, GOOD, compared, result, said, titles, valued

# Numbers


@pytest.mark.parametrize(
    ("old", "new", "above", "line"),
    [
        (0.010, 0.0101, 0.01, ""),
        (0.010, 0.0102, 0.01, "0.01 nats 0.0102 nats +2.0 % worse at most 0.02 50 % inside 49 % inside"),
        (0.010, 0.005, 0.01, "0.01 nats 0.005 nats -50 % better at most 0.02 50 % inside 75 % inside"),
        (0.010, 0.005, 0.6, ""),
        (0.0, 0.005, 9.0, "0 nats 0.005 nats from zero worse at most 0.02 100 % inside 75 % inside"),
        (-0.01, -0.005, 0.1, "-0.01 nats -0.005 nats +50 % worse at most 0.02 150 % inside 125 % inside"),
        (0.010, math.nan, 9.0, "0.01 nats NaN nats worse at most 0.02 50 % inside not a number"),
        (math.nan, 0.010, 9.0, "NaN nats 0.01 nats better at most 0.02 not a number 50 % inside"),
        (math.nan, math.nan, 0.0, ""),
        (math.inf, math.inf, 0.0, ""),
        (0.02, 0.0200001, 0.01, "0.02 nats 0.0200001 nats +< 0.1 % worse at most 0.02 at the bound < 0.1 % beyond"),
        (0.0199, 0.0201, 0.5, "0.0199 nats 0.0201 nats +1.0 % worse at most 0.02 0.5 % inside 0.5 % beyond"),
    ],
)
def test_numbers(old: float, new: float, above: float, line: str) -> None:
    """A number that changed by more than asked for, or across its bound, comes with values, bound and margins."""
    found = compared([result("passed", valued(old))], [result("passed", valued(new))], above)
    table = next((t for t in changes.sections(found) if t.title.startswith("Numbers")), None)
    if not line:
        assert table is None
        return
    assert table is not None
    shown = " ".join(str(cell) for cell in table.rows[0][3:])
    assert shown == line


def test_numbers_in_order() -> None:
    """What is beyond its bound comes first, then what became worse by the largest share, then what became better."""
    pairs = {"test_a": (0.01, 0.005), "test_b": (0.01, 0.011), "test_c": (0.01, 0.015), "test_d": (0.03, 0.021)}
    before = [result("passed", valued(old), name=n) for n, (old, _) in pairs.items()]
    after = [result("passed", valued(new), name=n) for n, (_, new) in pairs.items()]
    assert [m.result.check for m in compared(before, after).moves] == ["test_d", "test_c", "test_b", "test_a"]


@pytest.mark.parametrize(
    ("bound", "old", "new", "toward"),
    [
        (Bound("at_most", 1), 0.5, 0.6, "worse"),
        (Bound("at_least", 1), 1.5, 1.6, "better"),
        (Bound("at_least", 1), 1.5, 1.4, "worse"),
        (Bound("equal_to", 1), 1.5, 1.4, "better"),
        (Bound("equal_to", 1), 0.75, 1.25, ""),
        (None, 0.5, 0.6, ""),
    ],
)
def test_better_or_worse(bound: Bound | None, old: float, new: float, toward: str) -> None:
    """Better and worse are said only of what a bound judges, and by its direction."""
    move = Move(result(), valued(old, bound), valued(new, bound))
    assert move.toward == toward


def test_measurements_come_and_go() -> None:
    """A quantity that a check no longer measures, or measures anew, or in another unit, is a change."""
    one, other = Measurement("one", 1.0), Measurement("other", 2.0)
    found = compared(
        [result("passed", one, GOOD)],
        [result("passed", other, valued(0.0124, unit="bits"))],
    )
    rows = sorted(row[2:6] for row in changes.sections(found)[0].rows)
    assert rows == [
        ("mean token KL", "0.0124 nats", "0.0124 bits", ""),
        ("one", "1", "not measured", "gone"),
        ("other", "not measured", "2", "new"),
    ]
    skipped = compared([result("passed", one, GOOD)], [result("skipped", message="no vLLM")])
    assert skipped.moves == ()  # the outcome says it


def test_alike_quantities_keep_apart() -> None:
    """Two measurements of one name in a check are compared each with its own."""
    found = compared([result("passed", valued(1.0), valued(2.0))], [result("passed", valued(1.0), valued(3.0))])
    assert [(m.before.value, m.after.value) for m in found.moves if m.before and m.after] == [(2.0, 3.0)]


# Bounds


def test_changed_bound_is_no_regression() -> None:
    """A check that fails by a stricter bound alone is named so, and comes after what fails by its numbers."""
    strict = Bound("at_most", 0.01)
    found = compared(
        [result("passed", GOOD, name="test_a"), result("passed", GOOD, name="test_b")],
        [result("failed", valued(0.0124, strict), name="test_a"), result("failed", BAD, name="test_b")],
    )
    assert [line.split(" f-")[0] for line in said(found)["Outcomes"][1:]] == ["newly failing", "by a changed bound"]
    assert [m.result.check for m in found.moves] == ["test_b"]
    assert said(found)["Bounds that changed (the limits, not what was measured)"] == [
        "check quantity before after for",
        "tighter parity: test_a mean token KL at most 0.02 at most 0.01 1 check",
    ]
    assert "1 check newly failing, 1 check newly failing by a changed bound" in changes.headline(found)


def test_looser_bound_is_no_repair() -> None:
    """A check that passes by a looser bound alone is not called repaired."""
    found = compared([result("failed", BAD)], [result("passed", valued(0.314, Bound("at_most", 0.5)))])
    (line,) = said(found)["Outcomes"][1:]
    assert line.startswith("by a changed bound f-tiny-awq parity: test_p FAILED ok")


@pytest.mark.parametrize("value", [0.03, math.nan])
def test_changed_bound_hides_no_regression(value: float) -> None:
    """A number that the bound before would have refused as well is a regression, whatever became of the bound."""
    found = compared([result("passed", GOOD)], [result("failed", valued(value, Bound("at_most", 0.015)))])
    (line,) = said(found)["Outcomes"][1:]
    assert line.startswith("newly failing")


@pytest.mark.parametrize(
    ("old", "new", "way"),
    [
        (Bound("at_most", 1), Bound("at_most", 2), "looser"),
        (Bound("at_most", 2), Bound("at_most", 1), "tighter"),
        (Bound("at_least", 1), Bound("at_least", 2), "tighter"),
        (Bound("at_least", 2), Bound("at_least", 1), "looser"),
        (Bound("equal_to", 2), Bound("equal_to", 1), "another bound"),
        (Bound("at_least", 2), Bound("at_most", 2), "another bound"),
        (None, Bound("at_most", 2), "added"),
        (Bound("at_most", 2), None, "removed"),
    ],
)
def test_bounds(old: Bound | None, new: Bound | None, way: str) -> None:
    """What became of a bound is said in a word."""
    assert Rebound("c", "q", old, new, ()).way == way
    found = compared([result("passed", valued(1.5, old))], [result("passed", valued(1.5, new))])
    assert [b.way for b in found.rebounds] == [way]
    assert found.moves == ()


def test_bounds_once_for_all_checks() -> None:
    """A limit that changed for many cases is one line."""
    new = [result("passed", valued(0.0124, Bound("at_most", 0.03)), name=f"test_p[{i}]") for i in range(5)]
    old = [replace(r, measurements=(GOOD,)) for r in new]
    found = compared(old, new)
    assert titles(found) == ["Bounds that changed"]
    assert said(found)["Bounds that changed (the limits, not what was measured)"][1].endswith("5 checks")
