"""Lines that are only ever added: which nights were accepted and why, and what each night was found to be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fixtures.core.errors import UserError
from fixtures.core.files import check_depth, check_regular

SCHEMA = 1
_MOST = 64 << 20  # bytes; a line has some hundred
Entry = TypeVar("Entry")


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line, on the disk when this returns; who calls holds the history's lock.

    Raises:
        UserError: when it cannot be written; the file is then as it was.
    """
    line = json.dumps({"schema": SCHEMA, **entry}, allow_nan=False).encode() + b"\n"
    try:
        with path.open("ab") as file:
            before = file.tell()
            try:
                file.write(line if _ends(path, before) else b"\n" + line)  # a line that was cut short stays by itself
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, before)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path, entry: Callable[[Mapping[str, Any]], Entry]) -> tuple[list[Entry], list[str]]:
    """The entries, oldest first, and a line on each that cannot be read; a file that is not there has none.

    Raises:
        UserError: when there is a file and it cannot be read at all.
    """
    try:
        if not os.path.lexists(path):
            return [], []
        check_regular(path, _MOST)
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    found, refused = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(entry(_checked(json.loads(line.decode()))))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            refused.append(f"{path}, line {number}: left out, it is no entry of this file ({reason})")
    return found, refused


def _checked(data: object) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise TypeError("not an object")
    check_depth(data)
    schema = data.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        advice = "; a newer version wrote it: update quantproof" if newer else ""
        raise ValueError(f"schema {schema!r}; this version reads schema {SCHEMA}{advice}")
    return data


def _ends(path: Path, size: int) -> bool:
    """Whether the last line is whole."""
    if size == 0:
        return True
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"
