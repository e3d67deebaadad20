"""The history from the command line: baselines move by hand alone, and mistakes cost one line."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fixtures.core.measurement import Measurement
from reports import store
from reports.__main__ import main
from reports.nights import commands, marks, night
from reports.nights.history import History
from suites.meta.night_commands import FAILED, WORSE, Nights, judged_plainly
from suites.meta.nights import GOOD, SPEED, check, plain_judge, run, subjects, tree, written

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nights(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Nights:
    """A history that does not exist yet, judged by a plain judge."""
    return judged_plainly(tmp_path, capsys, monkeypatch)


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
        results = tmp_path / "out" / "results.json"
        assert main(["night", str(results), "--history", str(tmp_path / "history")]) == 0
        began = datetime.fromisoformat(store.load(results).about["started"])
        while datetime.now(UTC) < began.replace(microsecond=0) + timedelta(seconds=1):
            time.sleep(0.05)  # nights of one second have no order
    assert len(list((tmp_path / "benchmarks").rglob("*.json"))) == 2
    assert len(History(tmp_path / "history").nights()) == 2


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
