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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures.core.errors import UserError
from reports.nights import index, kinds
from reports.nights.history import History
from reports.nights.index import Index
from reports.nights.series import Mark
from reports.nights.values import values
from suites.meta.nights import GOOD, KL, SPEED, check, edited, kept, kl, one, run, speed, written
from suites.meta.nights import tree as files_of

ROOT = Path(__file__).parents[2]
MEASURED = sorted((ROOT / "reports/measured").glob("*.json"))
FIRST_SCHEMA = [path for path in MEASURED if json.loads(path.read_text())["schema"] == 1]
KIND = kinds.kind_of(run().about)


@pytest.fixture
def history(tmp_path: Path) -> History:
    """An empty history."""
    return History(tmp_path / "history", start=True)


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
