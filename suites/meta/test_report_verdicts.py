"""Verdicts: numbers outrank outcomes, silence proves nothing, and the terminal says so of every target."""

from __future__ import annotations

import math

import pytest

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Result, Run
from reports import terminal
from reports.render import margin_text
from reports.verdict import margin, verdicts
from suites.meta.parity_results import BAD, FLOOR, GOOD, result

NOTHING = Measurement("mean token KL", math.nan, "nats", Bound("at_most", 0.02))


def verdict(*results: Result) -> str:
    """The verdict on the one target of ``results``."""
    (found,) = verdicts(Run({}, results))
    return str(found)


# The verdict


def test_proved():
    """A target is proved when bounds hold and nothing is left out."""
    assert verdict(result("passed", GOOD, FLOOR), result("passed")) == "proved"


def test_known_bad():
    """A target whose only failures are known is no news, and is not called proved."""
    assert verdict(result("passed", GOOD), result("xfailed", BAD)) == "known bad (1 check)"


def test_disproved():
    """One failure disproves a target, whatever else holds, is skipped or erred."""
    others = (result("passed", GOOD), result("skipped"), result("error"), result("xfailed", BAD))
    assert verdict(*others, result("failed", BAD)) == "DISPROVED"


@pytest.mark.parametrize("measured", [BAD, NOTHING], ids=["beyond", "nan"])
def test_numbers_outrank_the_outcome(measured):
    """A check that passed although its own bound does not hold disproves its target."""
    assert verdict(result("passed", GOOD, measured)) == "DISPROVED"


@pytest.mark.parametrize(
    ("results", "gaps"),
    [
        ([result("skipped")], "1 skipped, nothing was compared"),
        ([result("passed")], "nothing was compared"),
        ([result("passed", FLOOR)], "nothing was compared"),
        ([result("xfailed", BAD)], "no bound was held, 1 known bad"),
        ([result("xfailed", GOOD)], "no bound was held, 1 known bad"),
        ([result("passed", GOOD), result("skipped")], "1 skipped"),
        ([result("passed", GOOD), result("error"), result("error")], "2 errors"),
        ([result("passed", GOOD), result("xpassed", GOOD)], "1 no longer bad"),
    ],
)
def test_incomplete(results, gaps):
    """A target that nothing disproves is not proved either while checks lack or nothing was compared."""
    assert verdict(*results) == f"incomplete ({gaps})"


def test_uncollected_module():
    """While a test module cannot be collected, no target is proved: nobody knows what it would have said."""
    lost = Result("suites/test_roundtrip.py", "error", "It can be collected.")
    assert verdict(result("passed", GOOD), lost) == "incomplete (suites/test_roundtrip.py was not collected)"


def test_the_tightest_is_the_one_with_the_least_room():
    """The sentence names the value that has used most of its room, and how far from its bound it is."""
    gain = Measurement("gain", 1.1523, "", Bound("at_least", 1.15))  # 0.0023 of the 0.15 that were wanted
    weights = Measurement("weights", 1.01, "", Bound("at_most", 1.02))  # half of its room, though 1 % away
    wait = Measurement("wait", 0.12, "", Bound("at_most", 0.17))
    alone = result("passed", gain, id="suites/test_speed.py::test_speed[qwen2_5_vl-tiny-awq-alone]")
    (found,) = verdicts(Run({}, (result("passed", wait, weights), alone)))
    assert found.sentence == "is proved: all 3 bounds hold in 2 checks; the tightest, gain (alone), by 0.2 %."


def test_verdicts_keep_targets_apart():
    """A failure of one target says nothing of another."""
    run = Run({}, (result("passed", GOOD), result("failed", BAD, quantizer="rtn")))
    assert [(v.target, str(v)) for v in verdicts(run)] == [
        ("qwen2_5_vl-tiny-awq", "proved"),
        ("qwen2_5_vl-tiny-rtn", "DISPROVED"),
    ]


# The margin


@pytest.mark.parametrize(
    ("kind", "limit", "value", "share", "text"),
    [
        ("at_most", 0.02, 0.005, 0.75, "75 % inside"),
        ("at_most", 0.02, 0.03, -0.5, "50 % beyond"),
        ("at_least", 2.0, 128.0, 63.0, "64 x the bound"),
        ("at_least", 3.0, 3.3, 0.1, "10 % inside"),
        ("at_least", -2.0, -3.0, -0.5, "50 % beyond"),
        ("at_most", 2.0, 2.0, 0.0, "at the bound"),
        ("equal_to", 7.0, 7.0, 0.0, "exact"),
        ("equal_to", 8.0, 7.0, -0.125, "12 % beyond"),
        ("equal_to", 0.0, 0.0, None, "exact"),
        ("at_most", 0.0, 1.0, None, "beyond"),
        ("at_most", 1.0, math.nan, None, "not a number"),
    ],
)
def test_margin(kind, limit, value, share, text):
    """A margin is the share of the bound between it and the value, negative beyond the bound."""
    measured = Measurement("q", value, "", Bound(kind, limit))
    assert margin(measured) == (None if share is None else pytest.approx(share))
    assert margin_text(measured) == text


# In the terminal


def test_table():
    """The terminal shows a row per target and a column per suite, and what is about no target apart."""
    own = Result("suites/meta/test_metrics.py::test_kl", "passed", "")
    coverage = "suites/test_coverage.py::test_linears[qwen2_5_vl-tiny-awq]"
    run = Run(
        {},
        (
            result("passed", GOOD),
            result("failed", BAD),
            result("passed", GOOD, id=coverage),
            result("xfailed", BAD, quantizer="rtn"),
            result("passed", GOOD, quantizer="rtn"),
            own,
        ),
    )

    assert terminal.text(run).splitlines() == [
        "target               coverage  parity             verdict",
        "qwen2_5_vl-tiny-awq  1 ok      1 FAILED, 1 ok     DISPROVED",
        "qwen2_5_vl-tiny-rtn  -         1 known bad, 1 ok  known bad (1 check)",
        "about no target: 1 ok",
    ]
    assert max(map(len, terminal.text(run, width=50).splitlines())) <= 50


def test_no_target():
    """A run about no target says so."""
    assert terminal.text(Run({})) == "No target was checked."
