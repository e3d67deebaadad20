"""``python -m reports``: the page or the verdicts of a results.json that exists already."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fixtures.core.errors import UserError
from reports import store, terminal
from reports.render import render


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 when what was given is wrong."""
    asked = _parser().parse_args(arguments)
    try:
        run = store.load(asked.results)
        if asked.command == "show":
            print(terminal.text(run))
        else:
            page = asked.output or asked.results.with_name("index.html")
            store.write(page, render(run))
            print(page)
    except UserError as error:
        print(f"reports: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the verdict on each target")
    page = commands.add_parser("render", help="write the HTML page")
    for command in (show, page):
        command.add_argument("results", type=Path, metavar="results.json")
    page.add_argument("-o", "--output", type=Path, help="the page (default: index.html beside the results)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
