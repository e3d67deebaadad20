"""``python -m reports``: the page, the verdicts or the tables of a results.json that exists already."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fixtures.core.errors import UserError
from fixtures.core.results import Run
from reports import store, tables, terminal
from reports.render import render


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 when what was given is wrong."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.command == "readme":
            _fill(asked.readme)
            return 0
        run = store.load(asked.results)
        if asked.command == "show":
            print(terminal.text(run))
        elif asked.command == "tables":
            print("\n".join(_tables(run, asked.title)))
        else:
            page = asked.output or asked.results.with_name("index.html")
            store.write(page, render(run))
            print(page)
    except UserError as error:
        print(f"reports: {error}", file=sys.stderr)
        return 2
    return 0


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
    page = commands.add_parser("render", help="write the HTML page")
    rows = commands.add_parser("tables", help="print its tables as Markdown")
    readme = commands.add_parser("readme", help="fill the tables of a README in from the runs that it names")
    readme.add_argument("readme", type=Path, metavar="README.md")
    rows.add_argument("--title", help="only the tables of this title")
    for command in (show, page, rows):
        command.add_argument("results", type=Path, metavar="results.json")
    page.add_argument("-o", "--output", type=Path, help="the page (default: index.html beside the results)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
