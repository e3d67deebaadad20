"""The index of a history: what is in its runs, to be read in a moment. It can be deleted any time, and is built again.

A year of nights has half a million values. A row for each takes SQLite and Python seconds to hand over, so a night's
values are one row: their keys (int32) and the values (float64, NaN where there is no number), as two columns.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fixtures.core.errors import UserError
from fixtures.core.results import Run
from reports import verdict
from reports.nights import kinds
from reports.nights.archive import Archive
from reports.nights.series import Key, Kind, Points, Series
from reports.nights.values import values, worse

ROOT = Path(__file__).parents[2]
_MADE_BY = (  # what decides what stands in it
    "reports/nights/index.py",
    "reports/nights/kinds.py",
    "reports/nights/values.py",
    "reports/nights/series.py",
    "reports/escape.py",
    "reports/verdict.py",
    "fixtures/core/measurement.py",
    "fixtures/core/results.py",
)
_TABLES = """
CREATE TABLE kind (id INTEGER PRIMARY KEY, said TEXT NOT NULL UNIQUE);
CREATE TABLE key (
    id INTEGER PRIMARY KEY,
    target TEXT NOT NULL, "check" TEXT NOT NULL, "case" TEXT NOT NULL, quantity TEXT NOT NULL, unit TEXT NOT NULL,
    bounds TEXT NOT NULL, latest TEXT NOT NULL,
    UNIQUE (target, "check", "case", quantity, unit)
);
CREATE TABLE night (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, changed INTEGER NOT NULL, kind INTEGER NOT NULL REFERENCES kind,
    outcomes TEXT NOT NULL, headline TEXT NOT NULL, subjects TEXT NOT NULL, keys BLOB NOT NULL, "values" BLOB NOT NULL
);
CREATE TABLE refused (name TEXT PRIMARY KEY, size INTEGER NOT NULL, changed INTEGER NOT NULL, why TEXT NOT NULL);
"""


@cache
def version() -> int:
    """A number of the code that makes an index: what other code made may say other things, and is made anew.

    Nobody has to remember to raise it: a history whose kinds were named otherwise would be compared with nothing.
    """
    return zlib.crc32(b"".join((ROOT / file).read_bytes() for file in _MADE_BY)) & 0x7FFFFFFF


@dataclass(frozen=True)
class Entry:
    """What the index knows of a night without its values."""

    name: str
    kind: Kind
    outcomes: Mapping[str, int]  # checks by outcome, as their numbers have it
    headline: str
    subjects: Mapping[str, Mapping[str, str]]  # digests by target and part

    @property
    def failing(self) -> int:
        """Checks that failed or erred."""
        return sum(self.outcomes.get(outcome, 0) for outcome in ("failed", "error"))


@dataclass
class _Known:
    """What the index knows of a quantity: its number, and how the latest night that has it bounds it."""

    id: int
    bounds: frozenset[str]
    latest: str


class Index:
    """An SQLite file; who writes it holds the history's lock, who reads it waits for who writes.

    Raises:
        sqlite3.DatabaseError: by any method, when the file is damaged or cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.database = sqlite3.connect(path, timeout=60, isolation_level=None)
        (made_by,) = self.database.execute("PRAGMA user_version").fetchone()
        (tables,) = self.database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and made_by != version():
            raise sqlite3.DatabaseError("an index of another version")
        if not tables:
            self.database.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {version()}; COMMIT;")

    def close(self) -> None:
        """Let go of the file."""
        self.database.close()

    def check(self) -> None:
        """Raise when the file is damaged, as far as SQLite can tell."""
        (said,) = self.database.execute("PRAGMA quick_check(1)").fetchone()
        if said != "ok":
            raise sqlite3.DatabaseError(str(said))

    def refresh(self, archive: Archive) -> None:
        """Read what is new in the archive, and forget what is no longer there.

        A file that cannot be read is kept as ``refused``, and read again only when it changed.
        """
        there = archive.files()
        known = "SELECT name, size, changed FROM night UNION ALL SELECT name, size, changed FROM refused"
        indexed = {name: (size, changed) for name, size, changed in self.database.execute(known)}
        news = [name for name, state in there.items() if indexed.get(name) != state]
        gone = [name for name in indexed if name not in there]
        if not news and not gone:
            return
        with self._transaction():
            keys = self._keys()
            for name in (*gone, *news):
                for table in ("night", "refused"):
                    self.database.execute(f"DELETE FROM {table} WHERE name = ?", (name,))
            for name in news:
                try:
                    run = archive.load(name)
                except UserError as error:
                    self.database.execute("INSERT INTO refused VALUES (?, ?, ?, ?)", (name, *there[name], str(error)))
                else:
                    self._add(name, there[name], run, keys)
            rows = [(of.id, *_words(key), " ".join(sorted(of.bounds)), of.latest) for key, of in keys.items()]
            self.database.executemany("INSERT OR REPLACE INTO key VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def nights(self) -> list[Entry]:
        """Every night, oldest first."""
        rows = self.database.execute(
            "SELECT night.name, kind.said, outcomes, headline, subjects FROM night JOIN kind ON kind = kind.id"
            " ORDER BY night.name"
        )
        known: dict[str, Kind] = {}
        return [
            Entry(name, _kind(said, known), json.loads(outcomes), headline, json.loads(subjects))
            for name, said, outcomes, headline, subjects in rows
        ]

    def refused(self) -> list[str]:
        """A line on every file that is no run."""
        return [why for (why,) in self.database.execute("SELECT why FROM refused ORDER BY name")]

    def series(
        self, kind: Kind, until: str | None = None, subjects: Mapping[str, Mapping[str, str]] | None = None
    ) -> list[Series]:
        """Every quantity of a kind, in the order of its keys.

        Args:
            kind: the machine and versions.
            until: the last night to be read; None: all.
            subjects: tonight's digests by target and part: values of another checkpoint under the same name are left
                out. A night that tells no digest is taken to be of the same.
        """
        rows = self.database.execute(
            'SELECT night.name, subjects, keys, "values" FROM night JOIN kind ON kind = kind.id'
            " WHERE said = ? AND (? IS NULL OR night.name <= ?) ORDER BY night.name",
            (kinds.key_text(kind), until, until),
        ).fetchall()
        if not rows:
            return []
        keys = {of.id: (key, of.bounds) for key, of in self._keys().items()}
        names, ids, found = [], [], []
        for name, told, blob, values_blob in rows:
            which, value = np.frombuffer(blob, np.int32), np.frombuffer(values_blob, np.float64)
            others = _others(json.loads(told), subjects or {})
            if others:
                same = np.array([keys[number][0].target not in others for number in which.tolist()], dtype=bool)
                which, value = which[same], value[same]
            names.append(name)
            ids.append(which)
            found.append(value)
        return sorted(_series(names, ids, found, keys), key=lambda series: series.key)

    def _keys(self) -> dict[Key, _Known]:
        """Every quantity that any night ever had."""
        rows = self.database.execute('SELECT target, "check", "case", quantity, unit, id, bounds, latest FROM key')
        return {Key(*row[:5]): _Known(row[5], frozenset(row[6].split()), row[7]) for row in rows}

    def _add(self, name: str, state: tuple[int, int], run: Run, keys: dict[Key, _Known]) -> None:
        """Add a night; ``keys`` learns its quantities."""
        said = kinds.key_text(kinds.kind_of(run.about))
        self.database.execute("INSERT OR IGNORE INTO kind (said) VALUES (?)", (said,))
        measured = values(run)
        for key, value in measured.items():
            known = keys.setdefault(key, _Known(len(keys) + 1, value.bounds, name))  # none is ever taken away
            if name > known.latest:
                known.bounds, known.latest = value.bounds, name
        outcomes: dict[str, int] = {}
        for result in run.results:
            standing = verdict.standing(result)
            outcomes[standing] = outcomes.get(standing, 0) + 1
        self.database.execute(
            "INSERT INTO night VALUES (?, ?, ?, (SELECT id FROM kind WHERE said = ?), ?, ?, ?, ?, ?)",
            (
                name,
                *state,
                said,
                json.dumps(outcomes),
                verdict.headline(run),
                json.dumps(kinds.subjects_of(run.about)),
                np.array([keys[key].id for key in measured], np.int32).tobytes(),
                np.array([value.value for value in measured.values()], np.float64).tobytes(),
            ),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self.database.in_transaction:  # SQLite itself rolls back when the disk is full
                self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")


def _words(key: Key) -> tuple[str, str, str, str, str]:
    return key.target, key.check, key.case, key.quantity, key.unit


def _series(
    names: Sequence[str],
    ids: Sequence[NDArray[np.int32]],
    found: Sequence[NDArray[np.float64]],
    keys: Mapping[int, tuple[Key, frozenset[str]]],
) -> Iterator[Series]:
    """The nights' columns, one per night, turned into one per key; names and columns are oldest first."""
    key, value = np.concatenate(ids), np.concatenate(found)
    night = np.repeat(np.arange(len(names)), [len(each) for each in ids])
    order = np.argsort(key, kind="stable")  # stable: nights stay in their order within a key
    key, value, night = key[order], value[order], night[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1)).tolist()
    for start, end in pairwise((*starts, len(key))):
        which, bounds = keys[int(key[start])]
        there = names if end - start == len(names) else [names[n] for n in night[start:end].tolist()]
        yield Series(which, worse(which, bounds), Points(there, value[start:end]))


def _others(told: Mapping[str, Mapping[str, str]], tonight: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Targets that were another checkpoint then than tonight."""
    pairs = {t: (kinds.identity(t, told[t]), kinds.identity(t, tonight[t])) for t in told.keys() & tonight.keys()}
    return {target for target, (then, now) in pairs.items() if then and now and then != now}


def _kind(said: str, known: dict[str, Kind]) -> Kind:
    if said not in known:
        known[said] = kinds.from_json(json.loads(said))
    return known[said]
