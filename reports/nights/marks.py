"""Baselines: every move of one, by whom and why. The last line of a kind of machine counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from reports.nights import journal, kinds
from reports.nights.series import Key, Kind, Mark, Verdict

ACCEPTED = "accepted.jsonl"
JUDGED = "judged.jsonl"


@dataclass(frozen=True)
class Judged:
    """What a night was found to be when it was judged."""

    night: str
    verdict: Verdict
    regressed: tuple[Key, ...]
    note: str


def accept(folder: Path, mark: Mark) -> None:
    """Move a baseline; who calls holds the lock.

    Raises:
        UserError: when it cannot be written; the baseline is then where it was.
    """
    said = {
        "run": mark.night,
        "kind": kinds.to_json(mark.kind),
        "frozen": mark.frozen,
        "when": mark.when,
        "who": mark.who,
        "reason": mark.reason,
    }
    journal.append(folder / ACCEPTED, said)


def accepted(folder: Path) -> tuple[list[Mark], list[str]]:
    """Every move of a baseline, oldest first, and a line on each that cannot be read.

    Raises:
        UserError: when there is a file and it cannot be read at all.
    """
    return journal.read(folder / ACCEPTED, _mark)


def baseline(marks: Sequence[Mark], kind: Kind, *, frozen: bool = False) -> Mark | None:
    """The night accepted last, of a kind; or the one pinned last as its frozen baseline."""
    return next((mark for mark in reversed(marks) if mark.kind == kind and (mark.frozen or not frozen)), None)


def judge(folder: Path, found: Judged) -> None:
    """Keep what a night was found to be; who calls holds the lock.

    Raises:
        UserError: when it cannot be written.
    """
    keys = [[k.target, k.check, k.case, k.quantity, k.unit] for k in found.regressed]
    said = {"run": found.night, "verdict": found.verdict, "regressed": keys, "note": found.note}
    journal.append(folder / JUDGED, said)


def judged(folder: Path) -> tuple[dict[str, Judged], list[str]]:
    """What each night was found to be, the last judgement of it; and a line on each that cannot be read.

    Raises:
        UserError: when there is a file and it cannot be read at all.
    """
    found, refused = journal.read(folder / JUDGED, _judged)
    return {each.night: each for each in found}, refused


def _mark(data: Mapping[str, Any]) -> Mark:
    night, reason, when, who = (_text(data[name]) for name in ("run", "reason", "when", "who"))
    if not isinstance(data["frozen"], bool):
        raise TypeError("'frozen' is neither true nor false")
    return Mark(night, kinds.from_json(data["kind"]), reason, when, who, data["frozen"])


def _judged(data: Mapping[str, Any]) -> Judged:
    if data["verdict"] not in get_args(Verdict):
        raise ValueError(f"unknown verdict {json.dumps(data['verdict'])[:40]}")
    regressed = tuple(Key(*(_text(text) for text in key)) for key in data["regressed"])
    return Judged(_text(data["run"]), data["verdict"], regressed, _text(data["note"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not a text")
    return value
