"""What changed between two runs: outcomes, verdicts, checks and facts, each by its right name, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fixtures.core.measurement import Measurement
from fixtures.core.results import Outcome, Result
from reports import changes
from suites.meta.compared_runs import BAD, BOUND, GOOD, compared, result, said, titles, valued

NOTHING = Measurement("mean token KL", math.nan, "nats", BOUND)
FULL = [
    result("passed", GOOD, valued(math.inf), name="test_a"),
    result("failed", BAD, NOTHING, name="test_b", message="m"),
    result("skipped", name="test_c", message="no vLLM"),
]


@pytest.mark.parametrize("results", [[], FULL], ids=["empty", "full"])
def test_nothing_changed(results: list[Result]) -> None:
    """Of a run and itself at another time, for longer and into another folder, nothing is said to have changed."""
    again = [replace(r, seconds=9.0) for r in results]
    about = {
        "started": ("2026-11-22T00:00:00+00:00", "2026-11-23T00:00:00+00:00"),
        "seconds": (1, 2),
        "command": ("a", "b"),
        "machine": ({"gpu": "H200"}, {"gpu": "H200"}),
        "versions": ({"torch": "2", "vllm": None}, {"torch": "2"}),
    }
    found = compared(results, again, 0.0, **about)
    assert found.same
    assert changes.text(found).startswith("nothing changed\n")
    assert changes.markdown(found).startswith("# quantproof: nothing changed\n")
    assert "<h1>nothing changed</h1>" in changes.page(found) and "<table" not in changes.page(found)


def test_outcomes() -> None:
    """Outcomes that changed come with what newly fails first; those that did not are left out."""
    names = (
        "test_same",
        "test_fixed",
        "test_lost",
        "test_known",
        "test_worse",
        "test_erred",
        "test_beyond",
        "test_still",
    )
    before: list[Outcome] = ["passed", "failed", "passed", "passed", "passed", "skipped", "passed", "failed"]
    after: list[Outcome] = ["passed", "passed", "skipped", "xfailed", "failed", "error", "passed", "failed"]
    found = compared(
        [result(o, name=n) for n, o in zip(names, before, strict=True)],
        [
            result(o, *([BAD] if n == "test_beyond" else []), name=n, message="why" if n == "test_worse" else "")
            for n, o in zip(names, after, strict=True)
        ],
    )
    assert said(found)["Outcomes"] == [
        "target check before after why",
        "newly failing f-tiny-awq parity: test_worse ok FAILED why",
        "newly failing f-tiny-awq parity: test_beyond ok FAILED mean token KL: 0.314 nats, must be at most 0.02 nats",
        "newly failing f-tiny-awq parity: test_erred skipped ERROR",
        "changed f-tiny-awq parity: test_known ok known bad",
        "changed f-tiny-awq parity: test_lost ok skipped",
        "no longer failing f-tiny-awq parity: test_fixed FAILED ok",
    ]
    assert changes.headline(found).startswith("3 checks newly failing, 3 checks with another outcome")


def test_verdicts() -> None:
    """A target whose verdict changed is named with both."""
    found = compared([result("passed", GOOD)], [result("failed", GOOD)])
    assert said(found)["Verdicts"] == ["target before after", "f-tiny-awq proved DISPROVED"]


def test_appeared_and_disappeared() -> None:
    """Checks that only one run has are listed, the worst first, and are no other kind of change."""
    common = result("passed", GOOD)
    found = compared(
        [common, result("passed", GOOD, name="test_old")],
        [common, result("passed", GOOD, name="test_new"), result("passed", GOOD, BAD, name="test_bad")],
    )
    parts = said(found)
    assert parts["Checks that are gone"] == ["target check was", "f-tiny-awq parity: test_old ok"]
    assert parts["New checks"] == [
        "target check is",
        "f-tiny-awq parity: test_bad FAILED: mean token KL: 0.314 nats, must be at most 0.02 nats",
        "f-tiny-awq parity: test_new ok",
    ]
    assert titles(found) == ["Verdicts", "Checks that are gone", "New checks"]


def test_different_targets() -> None:
    """Runs of different targets have no check in common: a line per target, not one per check."""
    about = {"subjects": ({"f-tiny-awq": {"sha256": "a"}}, {"f-tiny-rtn": {"sha256": "b"}})}
    found = compared(
        [result("passed", GOOD, name=f"test_{i}") for i in range(9)],
        [result("failed", BAD, name=f"test_{i}", quantizer="rtn") for i in range(9)],
        **about,
    )
    parts = said(found)
    assert "The two runs have no check in common." in parts[""]
    assert parts["Checks that are gone"][1:] == ["f-tiny-awq all of this target 9 ok"]
    assert parts["New checks"][1:] == ["f-tiny-rtn all of this target 9 FAILED"]
    assert parts["Verdicts"][1:] == ["f-tiny-awq proved -", "f-tiny-rtn - DISPROVED"]
    assert titles(found) == ["Verdicts", "Checks that are gone", "New checks"]


def test_facts() -> None:
    """What differs in machine, versions, commit, seed and subjects is named, and what agrees is not."""
    found = compared(
        [],
        [],
        machine=({"gpu": "H100", "cores": 2}, {"gpu": "H200", "cores": 2}),
        versions=({"torch": "2.11", "vllm": None}, {"torch": "2.11", "vllm": "0.25"}),
        git=({"commit": "a", "dirty": False}, {"commit": "b", "dirty": True}),
        seeds=({"held-out samples": 0}, {"held-out samples": 1}),
        subjects=({"x": {"artifact": {"sha256": "1"}}}, {"x": {"artifact": {"sha256": "2"}}}),
    )
    assert titles(found) == ["What differs in machine, versions, commit and subjects"]
    assert said(found)["What differs in machine, versions, commit and subjects"] == [
        "what before after",
        "machine: gpu H100 H200",
        "versions: vllm not said 0.25",
        "git: commit a b",
        "git: dirty no yes",
        "seeds: held-out samples 0 1",
        "subjects: x: artifact: sha256 1 2",
    ]


@pytest.mark.parametrize("about", ["git", "versions", "subjects", "machine", "deselected"])
def test_odd_facts(about: str) -> None:
    """Facts of another shape than ours are compared as they are."""
    assert len(compared([], [], **{about: ("x", {"a": [1]})}).facts) == 2
