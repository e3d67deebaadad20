"""A run as Markdown for the summary of a CI step: the verdicts first, then what failed, then what was not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fixtures.core.measurement import Measurement
from fixtures.core.results import Result, Run
from reports import verdict
from reports.escape import markdown, preformatted, summary
from reports.render import duration, margin_text, moment, shortened, shown

LARGEST = 1_000_000  # bytes; GitHub drops a summary of more than 1 MiB
_ALARMING = ("failed", "error", "xpassed")
_ROWS = 200
_MESSAGE = 4000  # characters
_NOTE = "*What has no room here is in results.json.*\n"


def step_summary(run: Run) -> str:
    """The run as Markdown of at most ``LARGEST`` bytes; of what has no room, the first checks are kept."""
    head = [_head(run), _matrix(run)]
    tail = [_unrun(run)]
    failures = [_failure(r) for r in run.results if verdict.standing(r) in _ALARMING]
    title = [f"## {verdict.counted(len(failures), 'check')} failed\n"] if failures else []
    return fitting(first=[*head, *title], middle=failures, last=tail)


def fitting(first: Sequence[str], middle: Sequence[str], last: Sequence[str]) -> str:
    """Blocks of Markdown in one text: the first and last ones, and as many of those between as have room.

    A block is kept whole or left out, so that nothing that it opens stays open.
    """
    room = LARGEST - size(_NOTE)

    def kept(blocks: Sequence[str]) -> list[str]:
        nonlocal room
        taken = []
        for block in blocks:
            if block and size(block) > room:
                break
            taken.append(block)
            room -= size(block)
        return taken

    ahead, behind, between = kept(first), kept(last), kept(middle)
    lost = len(ahead) + len(behind) + len(between) < len(first) + len(last) + len(middle)
    return "\n".join(block for block in (*ahead, *between, _NOTE * lost, *behind) if block)


def size(block: str) -> int:
    """The bytes that a block takes, with the line between it and the next."""
    return len(block.encode(errors="replace")) + 1


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of GitHub's Markdown, everything in it escaped."""
    lines = [columns, *rows[:_ROWS]]
    text = [f"| {' | '.join(markdown(cell, 200) for cell in line)} |\n" for line in lines]
    more = f"\n*and {len(rows) - _ROWS} more*\n" if len(rows) > _ROWS else ""
    return "".join((text[0], "| --- " * len(columns), "|\n", *text[1:], more))


def _head(run: Run) -> str:
    about = run.about
    lines = [f"# quantproof: {markdown(verdict.headline(run))}\n"]
    git = about.get("git")
    where = [moment(about["started"])] if about.get("started") else []
    where += [f"for {duration(about['seconds'])}"] if about.get("seconds") is not None else []
    where += [f"at commit {git.get('commit')}"] if isinstance(git, Mapping) else []
    where += ["with uncommitted changes"] if isinstance(git, Mapping) and git.get("dirty") else []
    if where:
        lines.append(f"<p>{summary(', '.join(where))}</p>\n")
    if about.get("exit_status", 0) not in (0, 1):
        status = markdown(about["exit_status"])
        lines.append(f"**The run did not end as it should (pytest's exit status {status}): checks may lack.**\n")
    return "\n".join(lines)


def _matrix(run: Run) -> str:
    found = verdict.verdicts(run)
    columns = verdict.suites(r for v in found for r in v.results)
    rows = [
        (v.target, *(verdict.cell(r for r in v.results if r.suite == suite) for suite in columns), v) for v in found
    ]
    own = verdict.own(run.results)
    lines = [table(("target", *columns, "verdict"), rows)] if rows else []
    lines += [f"About no target: {markdown(verdict.cell(own))}\n"] if own else []
    return "\n".join(lines)


def _failure(result: Result) -> str:
    """What became of one check, folded; its parts stand apart by empty lines, which is what ends HTML in Markdown."""
    said = verdict.why(result) or "no reason given"
    name = " ".join(word for word in (result.check, result.case or result.modality) if word)
    place = ": ".join(word for word in (result.target_id, result.suite) if word)
    outcome = verdict.label(verdict.standing(result))
    parts = [
        f"<details><summary>{outcome} <b>{summary(name)}</b> ({summary(place)}): {summary(said)}</summary>\n",
        f"<p>{summary(result.requirement)}</p>\n" if result.requirement else "",
        _measured(result.measurements) if result.measurements else "",
        f"{preformatted(shortened(result.message, _MESSAGE))}\n" if result.message else "",
        "</details>\n",
    ]
    return "\n".join(part for part in parts if part)


def _measured(measurements: Sequence[Measurement]) -> str:
    beyond_first = sorted(measurements, key=lambda m: m.holds is not False)
    rows = [(m.quantity, _value(m), m.bound or "informs", margin_text(m), m.detail) for m in beyond_first]
    return table(("quantity", "value", "bound", "margin", "worst offender"), rows)


def _value(measurement: Measurement) -> str:
    return f"{shown(measurement.value)} {measurement.unit}".rstrip()


def _unrun(run: Run) -> str:
    lines = list(_reasons(run))
    return "".join(["## What was not run\n\n", *lines]) if lines else "Everything collected ran.\n"


def _reasons(run: Run) -> Iterator[str]:
    reasons = verdict.unrun(run.results)
    for reason, results in reasons[:_ROWS]:
        yield f"- {len(results)}: {markdown(reason)}\n"
    if len(reasons) > _ROWS:
        yield f"- {len(reasons) - _ROWS} more reasons\n"
    deselected = run.about.get("deselected")
    if isinstance(deselected, Mapping) and deselected:
        modules = list(deselected.items())[:_ROWS]
        named = ", ".join(f"{markdown(count)} in {markdown(module)}" for module, count in modules)
        yield f"- Not asked for (deselected on the command line or by default): {named}\n"
