"""The command line of nights: keep and judge one, accept one, list them, draw them."""

from __future__ import annotations

import argparse
import getpass
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fixtures.core.errors import UserError
from reports import store, verdict
from reports.escape import inline
from reports.nights import kinds, saying, trend
from reports.nights.history import History
from reports.nights.index import Entry
from reports.nights.night import Report, report
from reports.nights.series import Mark, Night
from reports.printing import printed
from reports.render import render

HISTORY = "QUANTPROOF_HISTORY"
_ALARMING = ("failed", "error", "xpassed")


def add_to(commands: Any) -> None:
    """Add ``night``, ``accept``, ``history`` and ``trend`` to the command line; each runs by its ``run``."""
    night = commands.add_parser("night", help="keep a run in the history and compare it with the nights before")
    night.add_argument("results", type=Path, metavar="results.json")
    night.add_argument("-o", "--output", type=Path, metavar="DIR", help="for the pages (default: pages in the history)")
    night.add_argument("--gpu", action="store_true", help="fail when the run saw no GPU: its checks were skipped")
    night.add_argument("--only-store", action="store_true", help="keep it, and judge nothing")
    accept = commands.add_parser("accept", help="move the baseline to a night, with a reason")
    accept.add_argument("night", nargs="?", default="latest", metavar="NIGHT", help="its name or how it starts")
    accept.add_argument("--reason", required=True, help="why this night is as it should be")
    accept.add_argument("--freeze", action="store_true", help="make it the frozen baseline too, which only this moves")
    accept.add_argument("--despite-failures", action="store_true", help="accept a night in which checks fail")
    accept.add_argument("--who", help="who says so (default: the user's name)")
    listed = commands.add_parser("history", help="list the nights")
    listed.add_argument("--rebuild", action="store_true", help="read every run again and make the index anew")
    drawn = commands.add_parser("trend", help="draw every quantity over the nights, as one page")
    drawn.add_argument("-o", "--output", type=Path, help="the file (default: pages/trend.html in the history)")
    for command, run in ((night, _night), (accept, _accept), (listed, _history), (drawn, _trend)):
        command.set_defaults(run=run)
        command.add_argument(
            "--history",
            type=Path,
            default=os.environ.get(HISTORY) or "reports/history",
            metavar="DIR",
            help=f"where nights are kept (default: ${HISTORY}, else reports/history)",
        )


def _night(asked: argparse.Namespace) -> int:
    """0 without a regression, 1 with one."""
    history = History(_folder(asked), start=True)
    stored = history.store(asked.results)
    if not stored.new:
        history.notes.append("this run was in the history already: no new night")
    if asked.only_store:
        _say([f"kept {history.archive.path(stored.name)}", *(f"note: {note}" for note in history.notes)])
        return 0
    found = report(history, stored.name)
    history.judge(found.kept())
    _say(saying.night(found))
    pages = asked.output or asked.history / "pages"
    store.write(pages / "index.html", render(found.run))
    _say([str(pages / "index.html")])
    _draw(history, pages / "trend.html", today=stored.name)
    if found.regressed:
        despite = ["--despite-failures"] if found.night.failing else []
        meant = shlex.join(["accept", stored.name, "--history", str(asked.history), *despite])
        _say([f'If that is meant: python -m reports {meant} --reason "..."'])
    if stored.new:
        _compared(found, on_gpu=asked.gpu)
    return int(found.regressed)


def _compared(found: Report, *, on_gpu: bool) -> None:
    """Raise where a new night was judged, in a way, and not by what it should have been: nobody would notice."""
    if on_gpu and not kinds.on_gpu(found.night.kind):
        raise UserError(
            f"--gpu: {found.night.name} saw no GPU, and was held against nights without one; is nvidia-smi well?"
        )
    if found.later and not found.against:
        raise UserError(
            f"{found.night.name} is kept, but held against nothing: all {len(found.later)} other nights of its kind "
            "began later; look at the machine's clock (old runs are added by --only-store)"
        )


def _accept(asked: argparse.Namespace) -> int:
    history = History(_folder(asked))
    reason = inline(asked.reason, 1000)
    if not reason:
        raise UserError("--reason is empty: say why this night is as it should be")
    night = history.night(asked.night)
    failing = [r for r in history.run(night.name).results if verdict.standing(r) in _ALARMING]
    if failing and not asked.despite_failures:
        raise UserError(
            f"{verdict.counted(len(failing), 'check')} of {night.name} failed, the first {failing[0].id}: "
            "mend it, or accept the night --despite-failures"
        )
    when = datetime.now(UTC).isoformat(timespec="seconds")
    history.accept(Mark(night.name, night.kind, reason, when, inline(asked.who or _user(), 100), asked.freeze))
    _say([f"accepted {night.name}{' as the frozen baseline too' if asked.freeze else ''}: {reason}"])
    _say([f"for {kinds.machine_words(night.kind)}; {kinds.version_words(night.kind)}"])
    return 0


def _history(asked: argparse.Namespace) -> int:
    history = History(_folder(asked))
    if asked.rebuild:
        history.rebuild()
    _say(saying.history(history))
    return 0


def _trend(asked: argparse.Namespace) -> int:
    history = History(_folder(asked))
    _draw(history, asked.output or asked.history / "pages" / "trend.html")
    _say([f"note: {note}" for note in history.notes])
    return 0


def _draw(history: History, path: Path, today: str = "") -> None:
    """Write the trend page; beside it lies the page of ``today``'s run."""
    entries = history.nights()
    last = {entry.kind: entry for entry in entries}  # whose checkpoints the series are of, as when it was judged
    series = {kind: history.series(kind, entry) for kind, entry in last.items()}
    nights = [_drawn(history, entry, "index.html" if entry.name == today else "") for entry in entries]
    store.write(path, trend.page(series, nights, history.marks))
    _say([str(path)])


def _drawn(history: History, entry: Entry, page: str) -> Night:
    name = entry.name
    judged = history.judged.get(name)
    started = f"{name[:10]}T{name[11:19].replace('-', ':')}+00:00"
    if judged is None:
        return Night(name, entry.kind, started, "failing" if entry.failing else "unjudged", page=page)
    return Night(name, entry.kind, started, judged.verdict, judged.regressed, judged.note, page)


def _folder(asked: argparse.Namespace) -> Path:
    folder: Path = asked.history
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--history {folder} is a file: name the folder where nights are kept")
    return folder


def _say(lines: list[str]) -> None:
    printed("".join(f"{line}\n" for line in lines))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without a name for its user
        return "somebody"
