"""Nights from the command line: what a run was found to be, by words and exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixtures.core.measurement import Bound, Measurement
from reports.nights import night
from reports.nights.history import History
from reports.nights.judging import Finding, Judgement
from suites.meta.night_commands import FAILED, WORSE, Nights, judged_plainly
from suites.meta.nights import GOOD, GPU, KL, SPEED, check, kl, run, subjects, written

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nights(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Nights:
    """A history that does not exist yet, judged by a plain judge."""
    return judged_plainly(tmp_path, capsys, monkeypatch)


# Judging a night


def test_first_night(nights: Nights) -> None:
    """The first night has nothing to be compared with, says so, and is no regression."""
    assert nights.night(1) == 0
    assert nights.said[0] == f"night {nights.names[0]}: no night of this kind before: nothing to compare with"
    assert "on AMD EPYC, cores 2; python 3.12.3, torch 2.11.0" in nights.said
    assert (nights.history / "pages/index.html").read_text().startswith("<!DOCTYPE html>")
    assert (nights.history / "pages/trend.html").read_text() == "1 1 0"


def test_steady(nights: Nights) -> None:
    """A night like the ones before is no regression, and its lines say against which it was held."""
    nights.night(1)
    nights.night(2)
    assert nights.night(3) == 0
    first, last, _ = nights.names
    assert nights.said[0].endswith(": no regression")
    assert f"held against the first night {first}, the last night {last}" in nights.said
    assert any(line.startswith("no night of this kind was accepted yet") for line in nights.said)


def test_newly_failing(nights: Nights) -> None:
    """A check that newly fails is a regression with its reason, every night until it is mended or accepted."""
    nights.night(1)
    for day in (2, 3):
        assert nights.night(day, FAILED) == 1
        assert nights.said[0].endswith("REGRESSED: 1 check newly failing")
        at = nights.said.index("newly failing:")
        assert nights.said[at + 1] == (
            "  f-tiny-awq parity: test_kl [text]: ok in the first night; "
            "now mean token KL: 0.3 nats, must be at most 0.02 nats"
        )
        assert any(line.startswith("If that is meant: python -m reports accept") for line in nights.said)
    assert nights.night(4) == 0


def test_mended_and_broken_again(nights: Nights) -> None:
    """What failed in the baseline, was mended and fails again is a regression against the night before."""
    nights.night(1, FAILED)
    nights.night(2)
    assert nights.night(3, FAILED) == 1
    assert "ok in the last night" in nights.out


def test_new_check_that_fails(nights: Nights) -> None:
    """A check that is new and fails is a regression: nothing says that it ever held."""
    nights.night(1)
    assert nights.night(2, (*GOOD, check("failed", kl(1.0), name="test_new"))) == 1
    assert "test_new" in nights.out


def test_no_longer_run(nights: Nights) -> None:
    """A check that the baseline ran and tonight left out or skipped is a regression: nobody looked."""
    nights.night(1)
    assert nights.night(2, (GOOD[0], check("skipped", name="test_top1", message="no vLLM"))) == 1
    assert nights.said[0].endswith("REGRESSED: 2 checks no longer run")
    assert "  f-tiny-awq throughput: test_speed [batch_8]" in nights.said
    assert "  f-tiny-awq parity: test_top1 [text]" in nights.said


def renamed(quantity: str = "mean KL", limit: float | None = 0.02) -> tuple[Any, ...]:
    """The good night, its mean token KL by another name or without its bound."""
    bound = None if limit is None else Bound("at_most", limit)
    return (check("passed", Measurement(quantity, 0.01, "nats", bound), kl(0.1, 0.2)), *GOOD[1:])


@pytest.mark.parametrize(
    "results",
    [renamed(), renamed("mean token KL", None), (check("passed", Measurement("told", 1.0)), *GOOD[1:])],
    ids=["renamed", "bound taken away", "not measured"],
)
def test_no_longer_held(nights: Nights, results: Any) -> None:
    """A quantity that tonight is held against no bound any more is a regression until that is accepted."""
    nights.night(1, (check("passed", kl(0.01), kl(0.1, 0.2)), *GOOD[1:]))
    for day in (2, 3):
        assert nights.night(day, results) == 1
        assert "no longer held" in nights.said[0]
        assert "  f-tiny-awq parity: test_kl [text], mean token KL" in nights.said
    nights("accept", "--reason", "another name")
    assert nights.night(4, results) == 0


def test_failed_before_it_measured(nights: Nights) -> None:
    """What a check does not come to measure because it fails is told by its failing alone."""
    nights.night(1, (check("passed", kl(0.01), Measurement("q", 0.0, "", Bound("at_most", 1))), *GOOD[1:]))
    assert nights.night(2, FAILED) == 1
    assert nights.said[0].endswith("REGRESSED: 1 check newly failing")


def test_listed_as_known(nights: Nights) -> None:
    """A check that held in the baseline and now fails as it is listed to is a regression until it is accepted."""
    excused = (check("xfailed", kl(0.3), message="as everybody knows"), *GOOD[1:])
    nights.night(1)
    for day in (2, 3):
        assert nights.night(day, excused) == 1
        assert nights.said[0].endswith("REGRESSED: 1 check newly failing")
        assert "mean token KL: 0.3 nats, must be at most 0.02 nats" in nights.out
    nights("accept", "--reason", "listed, and why")
    assert nights.night(4, excused) == 0


def test_bound_that_was_loosened(nights: Nights) -> None:
    """A bound that allows more than the baseline's is said with both limits, and is no regression."""
    nights.night(1)
    assert nights.night(2, (check("passed", kl(0.01, 0.2)), *GOOD[1:])) == 0
    assert "  parity: test_kl, mean token KL: at most 0.02 -> at most 0.2, in 1 check" in nights.said
    assert nights.night(3, (check("passed", kl(0.01, 0.015)), *GOOD[1:])) == 0
    assert "bounds that allow more:" not in nights.said


def test_worse(nights: Nights) -> None:
    """A quantity that the statistics find worse is a regression, with value, expectation and reason."""
    nights.night(1)
    assert nights.night(2, WORSE) == 1
    assert nights.said[0].endswith("REGRESSED: 1 quantity worse")
    assert (
        "  f-tiny-awq throughput: test_speed [batch_8], throughput of awq: 80 tokens/s, expected 100: "
        "less than nine tenths"
    ) in nights.said
    (kept,) = [each for each in History(nights.history).judged.values() if each.verdict == "regressed"]
    assert (kept.night, kept.regressed) == (nights.names[1], (SPEED,))


def test_regression_does_not_become_the_baseline(nights: Nights) -> None:
    """However many nights are worse, the baseline stays where it was put."""
    nights.night(1)
    nights("accept", "--reason", "as published")
    for day in range(2, 6):
        assert nights.night(day, WORSE) == 1
    assert len(History(nights.history).marks) == 1


def test_bound_that_was_moved(nights: Nights) -> None:
    """A check that fails by a tighter bound alone is said, and is no regression."""
    nights.night(1)
    assert nights.night(2, (check("failed", kl(0.01, 0.005)), *GOOD[1:])) == 0
    assert "failing by a bound that was moved, not by a number:" in nights.said
    assert History(nights.history).judged[nights.names[1]].verdict == "failing"


def test_better_and_unsure(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Improvements, suspects and too short histories are said, and fail no night."""
    found = Finding(KL, 0.005, 0.01, -0.5, 0.001, "halved")
    judged = Judgement("", improvements=(found,), insufficient=(found,) * 3, suspects=(found,), gone=(found,))
    nights.night(1)
    monkeypatch.setattr(night, "judge", lambda *_: judged)
    assert nights.night(2) == 0
    assert nights.said[0].endswith("no regression; 1 quantity better")
    where = "  f-tiny-awq parity: test_kl [text]"
    assert f"{where}, mean token KL" in nights.said
    assert nights.night(3, GOOD[1:]) == 1
    assert where in nights.said  # no longer run, which says of its quantities that they are gone
    assert "not measured tonight:" not in nights.said
    assert nights.night(4) == 0
    for line in (
        "better:",
        "worse, if the next night says so, too:",
        "not measured tonight:",
        "3 numbers had too few nights to tell noise from change",
    ):
        assert line in nights.said


def test_few_lines(nights: Nights) -> None:
    """However much regressed, it is a page of a terminal, the rest counted."""
    many = [check("passed", kl(0.01), name=f"test_{n}") for n in range(200)]
    nights.night(1, many)
    assert nights.night(2, [check("failed", kl(0.3), name=f"test_{n}") for n in range(200)]) == 1
    assert len(nights.said) < 25
    assert "  and 192 more" in nights.said


def test_another_kind(nights: Nights) -> None:
    """A night of other versions is not held against those before, and what differs is said."""
    nights.night(1)
    assert nights.night(2, FAILED, versions={"python": "3.12.3", "torch": "2.12.0"}) == 0
    assert f"the last night, {nights.names[0]}, was of another kind: torch 2.11.0 -> 2.12.0" in nights.said


def test_checks_that_an_upgrade_took(nights: Nights) -> None:
    """The first night of another kind says how many checks of the last night are gone, skipped or newly failing."""
    upgraded = {"versions": {"python": "3.12.3", "torch": "2.12.0"}}
    nights.night(1)
    nights.night(2, (FAILED[0], check("skipped", name="test_top1", message="no vLLM")), **upgraded)
    assert "of what it checked, 2 checks no longer run and 1 newly fail: python -m reports diff" in nights.out
    nights.night(3, versions={"python": "3.12.3", "torch": "2.13.0"})
    assert "no longer run" not in nights.out


def test_another_checkpoint(nights: Nights) -> None:
    """Numbers of another reference are no regression but another thing, which is said; another artifact is judged."""
    nights.night(1, subjects=subjects())
    assert nights.night(2, WORSE, subjects=subjects("other")) == 0
    assert any(line.startswith("another checkpoint: f-tiny-awq") for line in nights.said)
    assert nights.night(3, WORSE, subjects=subjects(artifact="other")) == 1
    assert any(line.startswith("other bytes: the artifact of f-tiny-awq") for line in nights.said)


def test_same_run_again(nights: Nights) -> None:
    """A run that is given twice is judged as before, and said to be no new night."""
    nights.night(1)
    assert nights.night(2, WORSE) == 1
    assert nights.night(2, WORSE) == 1
    assert "note: this run was in the history already: no new night" in nights.said
    assert len(nights.names) == 2


def test_only_store(nights: Nights) -> None:
    """A run from elsewhere is kept without being judged, and makes no page."""
    nights.night(2)
    assert nights.night(1, FAILED, "--only-store") == 0
    assert len(nights.names) == 2
    assert len(History(nights.history).judged) == 1


def test_earlier_night(nights: Nights) -> None:
    """A night that is stored late is held against those before it alone."""
    nights.night(1)
    nights.night(3, WORSE)
    assert nights.night(2) == 0


def test_clock_that_went_back(nights: Nights) -> None:
    """A new night that began before all others of its kind is kept, and fails: it was held against nothing."""
    nights.night(3)
    assert nights.night(1, WORSE) == 2
    assert nights.err.count("\n") == 1
    assert "look at the machine's clock" in nights.err
    assert len(nights.names) == 2
    assert nights.night(1, WORSE) == 0  # known by now
    assert nights.night(2, machine={"cpu": "other"}) == 0


def test_night_of_the_future(nights: Nights) -> None:
    """A night that says it began later than tonight's is named every night: it is no baseline, and one never looks."""
    nights.night(1)
    nights.night(20)
    assert nights.night(2, WORSE) == 1
    assert f"1 night of this kind began later and were not looked at, the last {nights.names[-1]}" in nights.said


def test_gpu_that_is_gone(nights: Nights) -> None:
    """Where a GPU is asked for, a night that saw none fails, however well it compares with others without one."""
    assert nights.night(1, GOOD, "--gpu", machine=GPU) == 0
    for day in (2, 3):
        assert nights.night(day, GOOD, "--gpu") == 2
        assert "saw no GPU" in nights.err
    assert nights.night(4) == 0
    assert len(nights.names) == 4


def test_pages_elsewhere(nights: Nights, tmp_path: Path) -> None:
    """Pages are written where they are wanted."""
    assert nights.night(1, GOOD, "-o", tmp_path / "site") == 0
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"index.html", "trend.html"}
    assert not (nights.history / "pages").exists()


def test_strange_words(nights: Nights) -> None:
    """What anybody wrote into a run reaches the terminal as text, never as an escape."""
    evil = "\x1b[2J\u202e<script>\n"
    where = f"suites/test_parity.py::test_x[{evil}]"
    about = {"machine": {"cpu": evil}, "versions": {"torch": evil}}
    nights.night(1, [check("passed", kl(0.01), id=where)], **about)
    assert nights.night(2, [check("failed", kl(0.3), id=where, message=evil)], **about) == 1
    assert nights("history") == 0
    assert "\x1b" not in nights.out
    assert all(line.isprintable() for line in nights.said)


def test_nobody_reads_to_the_end(nights: Nights) -> None:
    """Read by ``head`` or in another encoding, a command ends as it should: pages are drawn, a baseline is moved."""
    nights.night(1)
    source = written(nights.folder / "2.json", run(2, FAILED))
    history = ["--history", str(nights.history)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    for command, code in (
        (["night", str(source), *history], 1),
        (["accept", *history, "--despite-failures", "--reason", "gew\u00f6hnt"], 0),
    ):
        reader, writer = os.pipe()
        os.close(reader)  # who reads is gone before anything is said
        with os.fdopen(writer, "wb") as out:
            done = subprocess.run(
                [sys.executable, "-m", "reports", *command], stdout=out, stderr=subprocess.PIPE, env=environment
            )
        assert (done.returncode, done.stderr) == (code, b"")
    assert "<h1>The night of 2026-11-02" in (nights.history / "pages/trend.html").read_text()
    assert [mark.reason for mark in History(nights.history).marks] == ["gew\u00f6hnt"]
    assert subprocess.run([sys.executable, "-m", "reports", "history", *history], env=environment).returncode == 0
