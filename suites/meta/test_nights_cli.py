"""Nights from the command line: what a run was found to be, by words and exit code; baselines move by hand alone."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixtures.core.measurement import Bound, Measurement
from reports import store
from reports.__main__ import main
from reports.nights import commands, marks, night
from reports.nights.history import History
from reports.nights.judging import Finding, Judgement
from suites.meta.nights import GOOD, GPU, KL, SPEED, check, kl, plain_judge, run, speed, subjects, tree, written

ROOT = Path(__file__).parents[2]
WORSE = (GOOD[0], speed(80.0), GOOD[2])
FAILED = (check("failed", kl(0.3), message="assert 0.3 <= 0.02"), *GOOD[1:])


class Nights:
    """A history, as its commands are called, and what they say."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.history = folder / "history"
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, command: str, *arguments: object) -> int:
        """The exit code of a command on the history."""
        code = main([command, *map(str, arguments), "--history", str(self.history)])
        self.out, self.err = self.capsys.readouterr()
        return code

    def night(self, day: int, results: Any = GOOD, *arguments: object, **about: Any) -> int:
        """The exit code of a night."""
        return self("night", written(self.folder / "results.json", run(day, results, **about)), *arguments)

    @property
    def said(self) -> list[str]:
        """The lines of what was printed."""
        return self.out.splitlines()

    @property
    def names(self) -> list[str]:
        """The nights kept."""
        return [each.name for each in History(self.history).nights()]


@pytest.fixture
def nights(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Nights:
    """A history that does not exist yet, judged by a plain judge."""
    monkeypatch.setattr(night, "judge", plain_judge)
    monkeypatch.setattr(commands.trend, "page", lambda kinds, nights, marks: f"{len(kinds)} {len(nights)} {len(marks)}")
    return Nights(tmp_path, capsys)


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


# Baselines


def test_accept(nights: Nights) -> None:
    """An accepted night is what later ones are held against, with its reason; what it measured is no regression."""
    nights.night(1)
    nights.night(2, WORSE)
    assert nights("accept", "--reason", "the driver costs that", "--who", "me") == 0
    assert nights.said[0] == f"accepted {nights.names[1]}: the driver costs that"
    assert nights.night(3, WORSE) == 0
    assert f"held against the accepted night {nights.names[1]} (the driver costs that)" in nights.said


def test_accept_again(nights: Nights) -> None:
    """Judged anew, an accepted night is held against the baseline before it, not against itself."""
    nights.night(1)
    nights("accept", "--reason", "good")
    nights.night(2, WORSE)
    nights("accept", "--reason", "worse")
    assert nights.night(2, WORSE) == 1
    assert f"held against the accepted night {nights.names[0]} (good)" in nights.said


@pytest.mark.parametrize("outcome", ["failed", "error", "xpassed"])
def test_accept_failures(nights: Nights, outcome: str) -> None:
    """A night in which checks fail is accepted only by saying so, and names the first of them."""
    nights.night(1, (check(outcome, name="test_bad"),))
    assert nights("accept", "--reason", "fine") == 2
    assert "test_bad" in nights.err
    assert "--despite-failures" in nights.err
    assert not (nights.history / marks.ACCEPTED).exists()
    assert nights("accept", "--reason", "fine", "--despite-failures") == 0
    assert nights.night(2, (check(outcome, name="test_bad"),)) == 0


def test_freeze(nights: Nights) -> None:
    """The frozen baseline is held against beside the accepted one, and moves only when another is frozen."""
    nights.night(1)
    nights("accept", "--reason", "the release", "--freeze")
    nights.night(2)
    nights("accept", "latest", "--reason", "next")
    nights.night(3)
    assert f"accepted night {nights.names[1]} (next), the frozen night {nights.names[0]} (the release)" in nights.out
    assert nights("history") == 0
    assert "frozen, by " in nights.out
    assert "accepted, by " in nights.out


def test_accepted_night_that_is_gone(nights: Nights) -> None:
    """An accepted night whose run is no longer there is said to be missing; nothing takes its place in silence."""
    nights.night(1)
    nights("accept", "--reason", "good")
    (nights.history / "runs" / f"{nights.names[0]}.json").unlink()
    nights.night(2)
    nights.night(3)
    assert any("is not among the runs any more" in line for line in nights.said)


def test_history(nights: Nights) -> None:
    """The table of nights has what each was found to be, by kind, and names files that are none."""
    nights.night(1)
    nights.night(2, WORSE)
    nights.night(3, FAILED, machine={"cpu": "other"})
    (nights.history / "runs" / "mine.json").write_text("{}")
    assert nights("history") == 0
    rows = nights.said[1:4]
    assert [row.split()[1] for row in rows] == ["[1]", "[1]", "[2]"]
    assert "3 passed" in rows[0]
    assert "regressed: REGRESSED: 1 quantity worse" in rows[1]
    assert "1 failed, 2 passed" in rows[2]
    assert nights.said[5].startswith("[2] other; python")
    assert "mine.json is not named as a stored run is" in nights.said[-1]
    said = nights.out
    assert nights("history", "--rebuild") == 0
    assert nights.out == said


def test_trend(nights: Nights, tmp_path: Path) -> None:
    """The trend page is drawn of all nights, kinds and marks, where it is wanted."""
    nights.night(1)
    nights.night(2, machine={"cpu": "other"})
    nights("accept", "--reason", "good")
    assert nights("trend", "-o", tmp_path / "t.html") == 0
    assert (tmp_path / "t.html").read_text() == "2 2 1"


def test_trend_of_another_checkpoint(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's series are those that the night was judged by: another checkpoint's values are none of them."""
    drawn: list[int] = []

    def page(kinds: Any, *_: Any) -> str:
        drawn.extend(len(series.points) for found in kinds.values() for series in found if series.key == SPEED)
        return ""

    monkeypatch.setattr(commands.trend, "page", page)
    for day, reference in ((1, "r"), (2, "r"), (3, "other")):
        nights.night(day, WORSE if reference == "other" else GOOD, subjects=subjects(reference))
    assert drawn == [1, 2, 1]


# A user's mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["night", "nowhere.json"], "cannot read nowhere.json"),
        (["accept", "2027", "--reason", "r"], "unknown night '2027'"),
        (["accept", "2026", "--reason", "r"], "2 nights start with '2026'"),
        (["accept", "", "--reason", "r"], "unknown night ''"),
        (["accept", "--reason", " \n"], "--reason is empty"),
        (["trend", "-o", "."], "it is a folder"),
    ],
)
def test_mistake(nights: Nights, arguments: list[str], said: str) -> None:
    """A mistake costs one clear line and exit code 2, and changes nothing."""
    nights.night(1)
    nights.night(2)
    before = tree(nights.history)
    assert nights(*arguments) == 2
    assert said in nights.err
    assert nights.err.count("\n") == 1
    assert nights.err.startswith("reports: ")
    assert tree(nights.history) == before


@pytest.mark.parametrize("command", [["history"], ["trend"], ["accept", "--reason", "r"]])
def test_no_history(nights: Nights, command: list[str]) -> None:
    """Without a history there is nothing to list, draw or accept, and none is started."""
    assert nights(*command) == 2
    assert "no history in" in nights.err
    assert not nights.history.exists()


def test_history_is_a_file(nights: Nights) -> None:
    """A file in the place of the history is refused, and stays."""
    nights.history.write_text("mine")
    assert nights.night(1) == 2
    assert "is a file" in nights.err
    assert nights.history.read_text() == "mine"


def test_reason_is_required(nights: Nights) -> None:
    """A baseline never moves without a reason."""
    nights.night(1)
    with pytest.raises(SystemExit):
        nights("accept")
    assert not (nights.history / marks.ACCEPTED).exists()


def test_page_that_cannot_be_written(nights: Nights, tmp_path: Path) -> None:
    """Where its pages find no place, the night is kept and judged all the same, and the command fails."""
    (tmp_path / "site").write_text("")
    assert nights.night(1, GOOD, "-o", tmp_path / "site") == 2
    assert "cannot write" in nights.err
    assert len(nights.names) == 1
    assert len(History(nights.history).judged) == 1


def test_measured_nothing_of_it(nights: Nights) -> None:
    """A night of checks that measure nothing is a night, too."""
    assert nights.night(1, [check("passed")]) == 0
    assert nights.night(2, [check("passed", Measurement("q", float("nan")))]) == 0


# Beside pytest-benchmark, and under tox


def test_beside_pytest_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark keeps and compares its own figures beside ours, of the same run."""
    monkeypatch.setattr(night, "judge", plain_judge)
    monkeypatch.setattr(commands.trend, "page", lambda *_: "")
    test = "def test_it(benchmark):\n    '''It runs.'''\n    benchmark.pedantic(lambda: 1, rounds=3)\n"
    (tmp_path / "test_it.py").write_text(test)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["reports.plugin"]\n')
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path / "test_it.py"]
    command += [
        "--report",
        tmp_path / "out",
        "--benchmark-autosave",
        f"--benchmark-storage=file://{tmp_path}/benchmarks",
    ]
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**mine, "PYTHONPATH": str(ROOT)}  # in a worker of xdist, pytest-benchmark switches itself off
    for compare in ([], ["--benchmark-compare", "--benchmark-compare-fail=median:1000000%"]):
        done = subprocess.run(
            [*map(str, command), *compare], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("Comparing against benchmarks from" in done.stdout + done.stderr) == bool(compare)
        said = ["night", str(tmp_path / "out" / "results.json"), "--history", str(tmp_path / "history")]
        assert main(said) == 0
    assert len(list((tmp_path / "benchmarks").rglob("*.json"))) == 2
    assert len(History(tmp_path / "history").nights()) in (1, 2)  # two within one second are one when they are alike


@pytest.mark.parametrize("environment", ["testenv:{gpu,nightly}", "testenv:nightly-cpu"])
def test_tox_goes_on(environment: str) -> None:
    """A night is kept and judged though its tests fail, and the environment then fails all the same."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    lines = [line.removeprefix("nightly: ") for line in tox[environment]["commands"].strip().splitlines()]
    first, second = [line for line in lines if not line.startswith("gpu: ")]
    assert tox[environment]["ignore_errors"] == "true"
    assert first.startswith("pytest ")
    assert second.startswith("python -m reports night reports/out/results.json")
    assert not any(line.startswith("-") for line in lines)  # a dash would forget that a command failed


def test_planted_regression_between_two_nights(nights: Nights) -> None:
    """Of two nights in a row with a fault planted between, the second fails and names it; a real run's numbers."""
    source = ROOT / "reports/measured/2026-11-23-vl-3b-on-two-h200.json"
    good = store.load(source)
    assert nights("night", source) == 0
    slow = [
        check(r.outcome, *(slowed(m) for m in r.measurements), id=r.id, target=r.target, modality=r.modality)
        for r in good.results
    ]
    assert nights("night", written(nights.folder / "2.json", run(24, slow, **{**good.about, "started": LATER}))) == 1
    assert "throughput by marlin" in nights.out


LATER = "2026-11-24T00:00:00+00:00"


def slowed(measured: Measurement) -> Measurement:
    """Marlin's tokens, a fifth fewer."""
    slow = measured.quantity == "throughput by marlin"
    return Measurement(measured.quantity, measured.value * 0.8, measured.unit) if slow else measured
