"""The commands on a history of nights, as a test calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reports.__main__ import main
from reports.nights import commands, night
from reports.nights.history import History
from suites.meta.nights import GOOD, check, kl, plain_judge, run, speed, written

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


def judged_plainly(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Nights:
    """A history that does not exist yet, judged by a plain judge, its pages short."""
    monkeypatch.setattr(night, "judge", plain_judge)
    monkeypatch.setattr(commands.trend, "page", lambda kinds, nights, marks: f"{len(kinds)} {len(nights)} {len(marks)}")
    return Nights(folder, capsys)
