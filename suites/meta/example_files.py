"""What ``examples/`` name and start, and what is wrong with it: read from the files, held against the project."""

from __future__ import annotations

import configparser
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from reports.__main__ import _parser

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FILES = sorted(file for file in EXAMPLES.rglob("*") if file.is_file())
_SHELL = {"|", "||", "&&", ";", "&", ">", ">>", ")", "<"}
_BY_TOX_ITSELF = ("PIP_*",)  # passed on by tox without being asked to


def read(name: str) -> str:
    """The text of an example, by its path below ``examples``."""
    return (EXAMPLES / name).read_text(encoding="utf-8")


def changed(folder: Path, name: str, old: str, new: str) -> Path:
    """A copy of an example in which the first ``old`` is ``new``: a planted fault."""
    text = read(name)
    assert old in text, f"{name} has no {old!r} to break"
    copy = folder / Path(name).name
    copy.write_text(text.replace(old, new, 1), encoding="utf-8")
    return copy


@cache
def tox_ini() -> configparser.ConfigParser:
    """The project's tox.ini."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return parser


@cache
def environments() -> frozenset[str]:
    """The environments that tox.ini describes: sections' names, and the factors of ``[testenv]``."""
    named = [section.removeprefix("testenv:") for section in tox_ini() if section.startswith("testenv:")]
    braced = [name.strip("{}").split(",") if name.startswith("{") else [name] for name in named]
    factors = re.findall(r"^([a-z-]+):", tox_ini()["testenv"]["description"], re.MULTILINE)
    return frozenset(factors).union(*braced)


def night(environment: str = "nightly") -> list[list[str]]:
    """The commands of a night's environment, as words."""
    lines = tox_ini()["testenv:{gpu,nightly}"]["commands"].splitlines()
    return [shlex.split(line.partition(":")[2]) for line in lines if line.startswith(f"{environment}:")]


def unknown_environments(text: str) -> list[str]:
    """Environments that are started or called by their names, and that tox.ini does not have."""
    named = re.findall(r"\btox (?:run )?-e[ =]?([\w-]+)|\b(nightly-\w+)", text)
    return sorted({one or other for one, other in named} - environments())


def unknown_variables(text: str) -> list[str]:
    """Variables of the project's name that nothing reads, neither the project nor the examples' own script."""
    readers = (ROOT / "tox.ini", ROOT / "reports/nights/commands.py", EXAMPLES / "night.sh")
    known = set().union(
        *(re.findall(r"QUANTPROOF_[A-Z]+", file.read_text(encoding="utf-8")) for file in readers[:2]),
        re.findall(r"\$\{(QUANTPROOF_[A-Z]+):-", readers[2].read_text(encoding="utf-8")),
    )
    return sorted(set(re.findall(r"QUANTPROOF_[A-Z]+", text)) - known)


def kept_by_tox(text: str) -> list[str]:
    """Variables that an environment file sets, and that tox keeps from what it runs."""
    passed = (*re.split(r"[,\s]+", tox_ini()["testenv"]["pass_env"]), *_BY_TOX_ITSELF)
    names = re.findall(r"^([A-Z_]+)=", text, re.MULTILINE)
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in passed)]


def report_commands(text: str) -> Iterator[list[str]]:
    """The arguments of every ``python -m reports`` in a text, whatever the language around it."""
    for found in re.finditer(r"python -m reports\s([^\n`]*)", re.sub(r"\\\n\s*", " ", text)):
        line = re.sub(r"\$\{\w+:\+([^}]*)\}", r"\1", found.group(1))  # what is only added when a variable is set
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if word in _SHELL:
                break
            words.append(word)
        yield words


def wrong_report_commands(text: str) -> list[str]:
    """What the real parser says of the ``python -m reports`` lines that it refuses."""
    refused = []
    for words in report_commands(text):
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                _parser().parse_args(words)
        except SystemExit:
            refused.append(f"{shlex.join(words)}: {said.getvalue().splitlines()[-1]}")
    return refused


def wrong_cron(fields: str) -> list[str]:
    """What is wrong with the five fields of a cron line: minute, hour, day, month, weekday (crontab(5))."""
    bounds = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    given = fields.split()
    if len(given) != len(bounds):
        return [f"{len(given)} fields instead of five: {fields}"]
    return [
        f"{field} is not within {low} to {high}"
        for field, (low, high) in zip(given, bounds, strict=True)
        if not all(_cron_part(part, low, high) for part in field.split(","))
    ]


def _cron_part(part: str, low: int, high: int) -> bool:
    found = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
    if not found:
        return False
    first, last, step = found.groups()
    if first is None:
        return True
    return low <= int(first) <= int(last or first) <= high and (step is None or last is not None)
