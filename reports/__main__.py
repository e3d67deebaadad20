"""``python -m reports``: what a results.json says, to people and to programs, and what changed between two."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fixtures.core.errors import UserError
from fixtures.core.results import Run
from reports import changes, store, tables, terminal
from reports.brief import brief
from reports.compare import Comparison
from reports.junit import junit
from reports.nights import commands as nights
from reports.printing import printed
from reports.render import render
from reports.step_summary import step_summary

_FORMATS: dict[str, Callable[[Run], str]] = {
    "html": render,
    "markdown": step_summary,
    "junit": junit,
    "json": brief,
}
_DIFFS: dict[str, Callable[[Comparison], str]] = {
    "text": changes.text,
    "markdown": changes.markdown,
    "html": changes.page,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 1 when a night regressed, 2 when what was given is wrong."""
    asked = _parser().parse_args(arguments)
    try:
        if "run" in asked:  # of nights
            code: int = asked.run(asked)
            return code
        if asked.command == "readme":
            _fill(asked.readme)
            return 0
        if asked.command == "diff":
            _diff(asked)
            return 0
        run = store.load(asked.results)
        if asked.command == "show":
            printed(f"{terminal.text(run)}\n")
        elif asked.command == "tables":
            printed("\n".join((*_tables(run, asked.title), "")))
        else:
            beside = asked.results.with_name("index.html") if asked.format == "html" else None
            _deliver(_FORMATS[asked.format](run), asked.output or beside, [asked.results])
    except UserError as error:
        print(f"reports: {error}", file=sys.stderr)
        return 2
    return 0


def _diff(asked: argparse.Namespace) -> None:
    try:
        percent = float(asked.above.removesuffix("%"))
    except ValueError:
        percent = math.nan
    if not 0 <= percent < math.inf:
        raise UserError(f"--above {asked.above} is no percentage: write a number from 0 on, such as 5")
    found = Comparison(store.load(asked.before), store.load(asked.after), percent / 100)
    _deliver(_DIFFS[asked.format](found), asked.output, [asked.before, asked.after])


def _deliver(text: str, output: Path | None, sources: Sequence[Path]) -> None:
    """Write ``text`` to a file and say which, or else print it, as UTF-8 whatever the terminal's encoding."""
    if output is None:
        printed(text)
        return
    if any(output.resolve() == source.resolve() for source in sources):
        raise UserError(f"-o {output} is the results.json itself, which would be lost: choose another file")
    store.write(output, text)
    printed(f"{output}\n")


def _fill(readme: Path) -> None:
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {readme}: {error.strerror or error}") from error
    store.write(readme, tables.filled(text, readme.parent))


def _tables(run: Run, title: str | None) -> Iterator[str]:
    titles = [title] if title else dict.fromkeys(t.title for result in run.results for t in result.tables)
    for one in titles:
        yield f"{one}\n\n{tables.markdown(tables.merged(run, one))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the verdict on each target")
    page = commands.add_parser("render", help="write the HTML page, or the run in another format")
    rows = commands.add_parser("tables", help="print its tables as Markdown")
    readme = commands.add_parser("readme", help="fill the tables of a README in from the runs that it names")
    readme.add_argument("readme", type=Path, metavar="README.md")
    rows.add_argument("--title", help="only the tables of this title")
    for command in (show, page, rows):
        command.add_argument("results", type=Path, metavar="results.json")
    page.add_argument("--format", choices=_FORMATS, default="html", help="markdown: for the summary of a CI step")
    page.add_argument(
        "-o", "--output", type=Path, help="the file (default: index.html beside the results; other formats are printed)"
    )
    diff = commands.add_parser("diff", help="say what changed between two runs")
    diff.add_argument("before", type=Path, metavar="A.json")
    diff.add_argument("after", type=Path, metavar="B.json")
    diff.add_argument("--format", choices=_DIFFS, default="text")
    diff.add_argument(
        "--above",
        default="1",
        metavar="PERCENT",
        help="leave out numbers that changed by no more than this (default: 1)",
    )
    diff.add_argument("-o", "--output", type=Path, help="the file (default: it is printed)")
    nights.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
