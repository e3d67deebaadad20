"""Nights on disk: kept whole, in order, apart by kind; what is broken is named and loses nothing else."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.core.errors import UserError
from fixtures.core.measurement import Bound, Measurement
from reports.nights import index, kinds, marks, policy
from reports.nights.history import History
from reports.nights.index import Index
from reports.nights.series import Key, Kind, Mark, Point, Points, Series
from reports.nights.values import values, worse
from suites.meta.nights import GOOD, GPU, KL, MACHINE, SPEED, VERSIONS, check, edited, kl, run, speed, subjects, written
from suites.meta.nights import tree as files_of

ROOT = Path(__file__).parents[2]
MEASURED = sorted((ROOT / "reports/measured").glob("*.json"))
FIRST_SCHEMA = [path for path in MEASURED if json.loads(path.read_text())["schema"] == 1]
KIND = kinds.kind_of(run().about)


@pytest.fixture
def history(tmp_path: Path) -> History:
    """An empty history."""
    return History(tmp_path / "history", start=True)


def kept(history: History, *runs: Any) -> list[str]:
    """The names under which runs are stored."""
    source = history.folder.with_name("results.json")
    return [history.store(written(source, each)).name for each in runs]


def one(series: list[Series], key: Key) -> list[tuple[str, float]]:
    """The points of one quantity."""
    (found,) = [each for each in series if each.key == key]
    return [(point.night, point.value) for point in found.points]


# What is kept


def test_kept_whole(history: History, tmp_path: Path) -> None:
    """A run is kept as it was written, under a name of its start in UTC and its content, and once."""
    source = written(tmp_path / "results.json", run(started="2026-11-25T01:30:00+02:00"))
    stored = history.store(source)
    assert stored.name.startswith("2026-11-24T23-30-00Z-")
    assert stored.new
    assert (history.archive.runs / f"{stored.name}.json").read_bytes() == source.read_bytes()
    again = history.store(source)
    assert (again.name, again.new) == (stored.name, False)
    assert len(history.nights()) == 1


def test_order(history: History) -> None:
    """Nights are in the order in which they started, whenever they were stored."""
    names = kept(history, run(3), run(1), run(2))
    assert [night.name for night in history.nights()] == sorted(names) == [names[1], names[2], names[0]]
    assert [night for night, _ in one(history.series(KIND), KL)] == sorted(names)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not JSON"),
        ({"started": None}, "says not when"),
        ({"started": "yesterday"}, "says not when"),
        ({"started": 5}, "says not when"),
        ({"started": "0001-01-01T00:00:00+23:00"}, "says not when"),
        ([], "no result"),
        ({"schema": 99}, "update quantproof"),
    ],
)
def test_refused(history: History, tmp_path: Path, content: Any, reason: str) -> None:
    """What is no run, has no result or says not when it started is refused in one line, and nothing is kept of it."""
    source = written(tmp_path / "results.json", run(results=() if content == [] else GOOD))
    if content == "":
        source.write_text("")
    elif isinstance(content, dict):
        about = {**run().about, **content}
        source.write_text(edited(source, **({"run": about} if "started" in content else content)))
    before = files_of(history.folder)
    with pytest.raises(UserError, match=reason):
        history.store(source)
    assert files_of(history.folder) == before
    assert history.nights() == []


def test_first_schema_is_there() -> None:
    """There are real runs in schema 1, as it was written then."""
    assert FIRST_SCHEMA


@pytest.mark.parametrize("source", MEASURED, ids=lambda path: path.stem)
def test_real_runs(history: History, source: Path) -> None:
    """Real runs, of schema 1 and later, are kept as they were written, read, and indexed with every value."""
    stored = history.store(source)
    (night,) = history.nights()
    assert history.archive.path(stored.name).read_bytes() == source.read_bytes()
    machine = json.loads(source.read_text())["run"]["machine"]
    assert source.stem.endswith("-on-a-cpu") == ("gpu" not in machine)
    assert dict(night.kind.machine).get("gpu") == machine.get("gpu")
    assert sum(night.outcomes.values()) == len(stored.run.results)
    found = {s.key: s.values[-1] for s in history.series(night.kind)}
    expected = {key: value.value for key, value in values(stored.run).items()}
    assert found == pytest.approx(expected, nan_ok=True, rel=0, abs=0)
    measured = {m.value for r in stored.run.results for m in r.measurements if math.isfinite(m.value)}
    assert measured == {value for value in found.values() if math.isfinite(value)}


# What is broken


def test_quarantine(history: History) -> None:
    """A file that is cut, changed, of a newer schema, no file or named otherwise is left where it is and named."""
    names = kept(history, *(run(day) for day in range(1, 6)))
    paths = [history.archive.path(name) for name in names]
    paths[0].write_text(paths[0].read_text()[:200])
    paths[1].write_text(paths[1].read_text().replace("0.01", "0.02"))
    paths[2].write_text(edited(paths[2], schema=99))
    paths[3].unlink()
    paths[3].mkdir()
    (history.archive.runs / "mine.json").write_text("{}")
    before = files_of(history.folder)

    again = History(history.folder)

    assert [night.name for night in again.nights()] == names[4:]
    assert len(one(again.series(KIND), KL)) == 1
    assert len(again.notes) == 5
    for path in (*paths[:4], history.archive.runs / "mine.json"):
        (note,) = [note for note in again.notes if str(path) in note]
        assert note.isprintable()
    assert "add it by python -m reports night" in again.notes[-1]
    assert files_of(history.folder) == before
    assert History(history.folder).notes == again.notes  # said every time, until somebody does something


def test_mended(history: History) -> None:
    """A file that is repaired or put back is a night again; one that is taken away is none."""
    (name,) = kept(history, run())
    path = history.archive.path(name)
    text = path.read_text()
    path.write_text("")
    assert History(history.folder).nights() == []
    path.write_text(text)
    assert [night.name for night in History(history.folder).nights()] == [name]
    path.unlink()
    assert History(history.folder).nights() == []


DAMAGES = ["gone", "no database", "cut", "of another version", "a page of zeros", "keys lost"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_index(history: History, damage: str) -> None:
    """An index that is gone, damaged or of another version is made anew from the runs, and says so."""
    kept(history, *(run(day, (*GOOD, speed(90.0 + day))) for day in range(1, 5)))
    expected = history.series(KIND), history.nights()
    history._index.close()
    index = history.folder / "index.sqlite"
    content = index.read_bytes()
    match damage:
        case "gone":
            index.unlink()
        case "no database":
            index.write_bytes(b"mine" * 5000)
        case "cut":
            index.write_bytes(content[: len(content) // 2])
        case "of another version":
            with sqlite3.connect(index) as database:
                database.execute("PRAGMA user_version = 7")
        case "a page of zeros":
            index.write_bytes(content[:4096] + bytes(4096) + content[8192:])
        case _:
            with sqlite3.connect(index) as database:
                database.execute("DELETE FROM key")
    again = History(history.folder)
    assert (again.series(KIND), again.nights()) == expected
    assert len(again.notes) == (0 if damage == "gone" else 1)
    assert all("made anew" in note for note in again.notes)


@pytest.mark.parametrize("file", index._MADE_BY)
def test_index_of_other_code(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """An index that other code made is not believed: a change of any file that decides what is in it makes it anew."""
    kept(history, run(1))
    for each in index._MADE_BY:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_bytes((index.ROOT / each).read_bytes())
    (tmp_path / file).write_text("changed = True", encoding="utf-8")
    monkeypatch.setattr(index, "ROOT", tmp_path)
    monkeypatch.setattr(index, "version", index.version.__wrapped__)
    (note,) = History(history.folder).notes
    assert note.endswith("was made anew from the runs: it was an index of another version")
    assert History(history.folder).notes == []


def test_kinds_named_otherwise(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a later version names kinds otherwise, what was accepted still counts for the kind of its night."""
    (name,) = kept(history, run(1))
    history.accept(Mark(name, KIND, "good"))
    monkeypatch.setattr(kinds, "_VERSIONS", (*kinds._VERSIONS, "pytest"))
    again = History(history.folder)
    again.rebuild()
    (mark,), (night,) = again.marks, again.nights()
    assert (mark.night, mark.kind) == (name, night.kind)
    assert mark.kind != KIND


def test_index_of_any_order(history: History, tmp_path: Path) -> None:
    """The index says the same whether nights came one by one, in another order, or all at once."""
    runs = [run(day, (check("passed", kl(day / 1000, 0.02 if day < 3 else 0.03)), speed(day))) for day in range(1, 5)]
    kept(history, *(runs[day] for day in (2, 0, 3, 1)))
    series, nights = history.series(KIND), history.nights()
    history.rebuild()
    assert (history.series(KIND), history.nights()) == (series, nights)
    assert [value for _, value in one(series, KL)] == [0.001, 0.002, 0.003, 0.004]


def test_folder_that_cannot_be_written(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    """A history that may only be read is read, without a file being touched; storing says that it cannot."""
    kept(history, run())
    expected = history.series(KIND)
    before = {path: path.stat().st_mtime_ns for path in history.folder.rglob("*")}
    monkeypatch.setattr(os, "access", lambda *_: False)
    again = History(history.folder)
    assert again.series(KIND) == expected
    assert "cannot be written" in again.notes[0]
    assert {path: path.stat().st_mtime_ns for path in history.folder.rglob("*")} == before


def test_no_history(tmp_path: Path) -> None:
    """To read a history where there is none is refused, and starts none."""
    with pytest.raises(UserError, match=r"no history in .*reports night"):
        History(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# Many at once, killed, full


def stored_by(history: Path, *sources: Path, before: str = "") -> subprocess.Popen[str]:
    """A process that stores results.json files one after the other."""
    script = (
        f"import sys, os, signal\nfrom pathlib import Path\nfrom reports.nights.history import History\n{before}\n"
        "history = History(Path(sys.argv[1]), start=True)\n"
        "for source in sys.argv[2:]:\n    history.store(Path(source))\nprint(*history.notes, sep='\\n')"
    )
    command = [sys.executable, "-c", script, str(history), *map(str, sources)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_concurrent_nights(tmp_path: Path) -> None:
    """Processes that store at once lose nothing, and no half-written file is to be seen."""
    sources = [written(tmp_path / f"{day}.json", run(day, (*GOOD, speed(day)))) for day in range(1, 25)]
    folder = tmp_path / "history"
    processes = [stored_by(folder, *sources[at::4], sources[0]) for at in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
    history = History(folder)
    assert len(history.nights()) == 24
    again = replace(SPEED, quantity="throughput of awq (2)")
    assert [value for _, value in one(history.series(KIND), again)] == list(range(1, 25))
    assert history.notes == []
    assert {path.suffix for path in history.archive.runs.iterdir()} == {".json"}


@pytest.mark.parametrize("moment", ["before the file is whole", "before the index knows"])
def test_killed_night(history: History, tmp_path: Path, moment: str) -> None:
    """A night that is killed while it is stored leaves nothing half-written; the next one cleans up and says so."""
    kept(history, run(1))
    source = written(tmp_path / "killed.json", run(2))
    kill = "lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    whole = moment != "before the file is whole"
    before = f"from reports.nights.index import Index\nIndex._add = {kill}" if whole else f"os.fsync = {kill}"
    process = stored_by(history.folder, source, before=before)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL

    again = History(history.folder)

    assert len(again.nights()) == (2 if whole else 1)
    assert len(again.notes) == (0 if whole else 1)
    assert all(note.startswith("a night was killed while it was stored") for note in again.notes)
    again.store(source)
    assert len(again.nights()) == 2
    assert History(history.folder).notes == []
    assert all(path.suffix == ".json" for path in history.archive.runs.iterdir())


def test_others_files_stay(history: History) -> None:
    """Cleaning up takes nothing but drafts of nights: a file of the user's stays."""
    for name in (".gitkeep", ".mine.json.7", "notes.txt"):
        (history.archive.runs / name).write_text("")
    assert History(history.folder).notes == []
    assert {path.name for path in history.archive.runs.iterdir()} == {".gitkeep", ".mine.json.7", "notes.txt"}


def test_full_disk(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk neither a night nor a move of a baseline is half written, and what was there stays."""
    (name,) = kept(history, run(1))
    history.accept(Mark(name, KIND, "first"))
    before = files_of(history.folder)
    source = written(tmp_path / "more.json", run(2))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        history.store(source)
    with pytest.raises(UserError, match=r"cannot write .*accepted.jsonl: No space left on device"):
        history.accept(Mark(name, KIND, "second"))
    monkeypatch.undo()
    assert files_of(history.folder) == before
    assert len(History(history.folder).nights()) == 1


def test_index_on_a_full_disk(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the index finds no room, the nights are read without it."""
    kept(history, run(1))
    expected = history.series(KIND)
    (history.folder / "index.sqlite").unlink()
    made = Index.__init__

    def full(self: Index, path: Path | str) -> None:
        if path != ":memory:":
            raise sqlite3.OperationalError("database or disk is full")
        made(self, path)

    monkeypatch.setattr(Index, "__init__", full)
    again = History(history.folder)
    assert again.series(KIND) == expected
    assert "disk is full" in again.notes[0]


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
