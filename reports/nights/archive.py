"""The folder of nights: whole results.json files under names that sort by time and hold a digest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fixtures.core.errors import UserError
from fixtures.core.results import Run
from reports import store

PATIENCE = 120.0  # seconds that a night waits for another one that is storing
_MOMENT = "%Y-%m-%dT%H-%M-%SZ"  # no colons: not every file system has them in names
_NAME = re.compile(_NAMED := r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ-[0-9a-f]{12}")
_DRAFT = re.compile(rf"\.{_NAMED}\.json\.\d+")  # as store.write calls what it has not done yet


@dataclass(frozen=True)
class Stored:
    """A run in the archive."""

    name: str  # "2026-11-25T18-40-12Z-3f9c01ab12cd"
    run: Run
    new: bool  # whether it was not there before


class Archive:
    """``HISTORY/runs``. What is in it is never changed and never deleted, but for drafts of nights that were killed.

    A run lies there as it was written, in the schema of its time; reading migrates it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes meanwhile. The system frees the lock of a process that was killed.

        Raises:
            UserError: when the folder cannot be written, or another process keeps the lock for minutes.
        """
        lock = FileLock(self.folder / ".lock", timeout=PATIENCE)
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{self.folder} is in use by another process for more than {PATIENCE:.0f} s: try again when it is done"
            ) from error
        except (OSError, NotImplementedError) as error:  # filelock's word for a file system without locks
            raise UserError(f"cannot write into {self.folder}: {getattr(error, 'strerror', None) or error}") from error
        try:
            yield
        finally:
            lock.release()

    def swept(self) -> list[str]:
        """Delete the drafts that killed nights left, and name them; only for who holds the lock: others' are none."""
        drafts = sorted(path for path in self.runs.glob(".*") if _DRAFT.fullmatch(path.name))
        try:
            for draft in drafts:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot delete {draft}, which a killed night left: {error.strerror or error}") from error
        return [draft.name for draft in drafts]

    def store(self, source: Path) -> Stored:
        """Copy a results.json into the archive; who calls holds the lock.

        Raises:
            UserError: when it is none, says not when it started, has no result, or cannot be written; nothing changed.
        """
        text = store.read(source)
        run = store.parsed(text, source)
        if not run.results:
            raise UserError(f"{source} has no result: nothing was run, so there is no night to keep")
        name = f"{_moment(run, source)}-{_digest(text)}"
        path = self.path(name)
        new = not path.exists()
        if new:
            store.write(path, text)
            _settle(self.runs)
        return Stored(name, run, new)

    def load(self, name: str) -> Run:
        """A stored run.

        Raises:
            UserError: when the file is no run, or not the one that was stored.
        """
        path = self.path(name)
        if not _NAME.fullmatch(name):
            raise UserError(f"{path} is not named as a stored run is: add it by python -m reports night --only-store")
        text = store.read(path)
        if _digest(text) != name[-12:]:
            raise UserError(f"{path} is not what was stored: its content has another digest than its name")
        return store.parsed(text, path)

    def path(self, name: str) -> Path:
        """Where the run of that name lies."""
        return self.runs / f"{name}.json"

    def files(self) -> dict[str, tuple[int, int]]:
        """Size in bytes and time of change in ns of every run's file, by the run's name, oldest first.

        Raises:
            UserError: when the folder cannot be read.
        """
        try:
            entries = sorted(e.name for e in os.scandir(self.runs)) if self.runs.is_dir() else []
            found = {}
            for entry in entries:
                if entry.endswith(".json") and not entry.startswith("."):
                    status = (self.runs / entry).lstat()
                    found[entry.removesuffix(".json")] = (status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise UserError(f"cannot read {self.runs}: {error.strerror or error}") from error
        return found


def _moment(run: Run, source: Path) -> str:
    """When a run started, in UTC, as names of files say it; of a time without a zone that is what it is."""
    told = run.about.get("started")
    try:
        moment = datetime.fromisoformat(told) if isinstance(told, str) else None
        if moment is None:
            raise ValueError("not a text")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).strftime(_MOMENT)
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{source} says not when its run started ('started': {told!r:.100}), by which nights are kept in order"
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _settle(folder: Path) -> None:
    """Have the system write down which files a folder has: a power cut must not lose one that was said to be stored."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems know no such thing for folders
    finally:
        os.close(handle)
