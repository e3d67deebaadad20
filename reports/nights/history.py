"""A history of nights: a folder that may be copied, merged and carried like any other.

``runs/``            whole results.json files: what the history is
``accepted.jsonl``   every move of a baseline, with its reason
``judged.jsonl``     what each night was found to be
``index.sqlite``     made from ``runs`` alone; delete it whenever you like
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fixtures.core.errors import UserError, unknown
from fixtures.core.results import Run
from reports.nights import marks
from reports.nights.archive import Archive, Stored
from reports.nights.index import Entry, Index
from reports.nights.marks import Judged
from reports.nights.series import Kind, Mark, Series

Answer = TypeVar("Answer")


class History:
    """The nights in a folder, read when it is opened; ``notes`` says what was found wrong there, a line each.

    Args:
        folder: where it is kept.
        start: whether to begin one where there is none.

    Raises:
        UserError: when there is none, or it cannot be read.
    """

    def __init__(self, folder: Path, *, start: bool = False) -> None:
        self.folder = folder
        self.archive = Archive(folder)
        self.notes: list[str] = []
        if not start and not self.archive.runs.is_dir():
            raise UserError(
                f"no history in {folder}; python -m reports night results.json --history {folder} starts one"
            )
        if start or os.access(folder, os.W_OK):
            with self.archive.locked():
                self._sweep()
                self._index = self._opened()
        else:
            self._index = self._in_memory(f"{folder} cannot be written: it was read without its index")
        self.notes += self._index.refused()

    def store(self, source: Path) -> Stored:
        """Keep a results.json; one that is kept already stays as it is.

        Raises:
            UserError: when it is none or cannot be stored; the history is then as it was.
        """
        with self.archive.locked():
            stored = self.archive.store(source)
            self._refresh()
        return stored

    def accept(self, mark: Mark) -> None:
        """Move a baseline.

        Raises:
            UserError: when that cannot be written; the baseline is then where it was.
        """
        with self.archive.locked():
            marks.accept(self.folder, mark)

    def judge(self, found: Judged) -> None:
        """Keep what a night was found to be.

        Raises:
            UserError: when that cannot be written.
        """
        with self.archive.locked():
            marks.judge(self.folder, found)

    def nights(self) -> list[Entry]:
        """Every night that can be read, oldest first."""
        return self._asked(lambda index: index.nights())

    def night(self, name: str) -> Entry:
        """The night of that name, or of a name that starts so when it is the only one; ``latest`` is the last.

        Raises:
            UserError: when there is none, or there are several.
        """
        nights = self.nights()
        if not nights:
            raise UserError(f"the history in {self.folder} has no night yet")
        found = nights[-1:] if name == "latest" else [night for night in nights if night.name.startswith(name)]
        if not found or not name:
            raise unknown("night", name, [night.name for night in nights])
        if len(found) > 1:
            raise UserError(f"{len(found)} nights start with {name!r}: say more of the name, such as {found[-1].name}")
        return found[0]

    def run(self, name: str) -> Run:
        """The whole run of a night.

        Raises:
            UserError: when it cannot be read.
        """
        return self.archive.load(name)

    def series(self, kind: Kind, until: Entry | None = None) -> list[Series]:
        """Every quantity of a kind of machine and versions; ``until`` a night, of that night's checkpoints only."""
        if until is None:
            return self._asked(lambda index: index.series(kind))
        return self._asked(lambda index: index.series(kind, until.name, until.subjects))

    @cached_property
    def marks(self) -> list[Mark]:
        """Every move of a baseline, oldest first; of the kind that its night is of, as far as that is there."""
        found, refused = marks.accepted(self.folder)
        self.notes += refused
        known = {night.name: night.kind for night in self.nights()}  # a later version may name kinds otherwise
        return [replace(mark, kind=known.get(mark.night, mark.kind)) for mark in found]

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """What each night was found to be."""
        found, refused = marks.judged(self.folder)
        self.notes += refused
        return found

    def rebuild(self) -> None:
        """Make the index anew from the runs, each of which is read and held against its digest."""
        with self.archive.locked():
            self._index.close()
            self._delete_index()
            self._index = self._opened()

    # The index is a convenience: whatever is wrong with it, the nights are there.

    @property
    def _path(self) -> Path:
        return self.folder / "index.sqlite"

    def _opened(self) -> Index:
        """The index, up to date: the one that is there, else a new one, else, where none can be written, in memory."""
        for attempt in range(2):
            try:
                return self._current(self._path)
            except sqlite3.OperationalError as error:  # a full disk, no permission
                return self._in_memory(f"{self._path} cannot be used ({error}): the runs were read without it")
            except sqlite3.DatabaseError as error:
                if attempt:
                    raise UserError(f"cannot make {self._path}: {error}") from error
                self._delete_index()
                self.notes.append(f"{self._path} was made anew from the runs: it was {_ailment(error)}")
        raise AssertionError("unreachable")

    def _current(self, path: Path) -> Index:
        index = Index(path)
        try:
            index.check()
            index.refresh(self.archive)
        except BaseException:
            index.close()
            raise
        return index

    def _in_memory(self, why: str) -> Index:
        self.notes.append(why)
        index = Index(":memory:")
        index.refresh(self.archive)
        return index

    def _refresh(self) -> None:
        try:
            self._index.refresh(self.archive)
        except sqlite3.DatabaseError:
            self._index.close()
            self._index = self._opened()

    def _asked(self, question: Callable[[Index], Answer]) -> Answer:
        """The index's answer; a page of it that turns out to be damaged costs a new index, not the night."""
        try:
            return question(self._index)
        except (sqlite3.DatabaseError, ValueError, KeyError):
            self.notes.append(f"{self._path} was made anew from the runs: it was damaged")
            self.rebuild()
            return question(self._index)

    def _delete_index(self) -> None:
        try:
            for suffix in ("", "-journal", "-wal", "-shm"):  # of the same file: they must go together
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot delete {self._path}: {error.strerror or error}; delete it by hand") from error

    def _sweep(self) -> None:
        for draft in self.archive.swept():
            self.notes.append(f"a night was killed while it was stored; its draft {draft} is deleted")


def _ailment(error: sqlite3.DatabaseError) -> str:
    said = str(error)
    return said if said.startswith("an index") else f"damaged ({said})"
