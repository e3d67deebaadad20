"""Runs on disk: written whole or not at all, read back or refused in one line."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

from fixtures.core.errors import UserError
from fixtures.core.files import check_depth, read_text
from fixtures.core.measurement import Kind
from fixtures.core.results import Outcome, Result, Run


def save(run: Run, path: Path) -> None:
    """Write ``run`` as JSON, one result a line; NaN and infinities become null."""
    data = plain(run.to_json())
    results = ",\n".join(json.dumps(result, allow_nan=False) for result in data.pop("results"))
    head = json.dumps(data, allow_nan=False).removesuffix("}")
    write(path, f'{head},\n"results": [\n{results}\n]}}\n')


def load(path: Path) -> Run:
    """The run in ``path``.

    Raises:
        UserError: when there is no such file, or it is no results.json of this version.
    """
    return parsed(read(path), path)


def read(path: Path) -> str:
    """The text of a file that should be a results.json.

    Raises:
        UserError: when there is no such file, or it is no text.
    """
    try:
        return read_text(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def parsed(text: str, path: Path) -> Run:
    """The run that ``text``, the content of ``path``, says.

    Raises:
        UserError: when it is no results.json of this version.
    """
    try:
        data = json.loads(text, parse_int=_integer)
        check_depth(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    try:
        run = Run.from_json(data)
        _check(run)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not a results.json: {reason}") from error
    return run


def _integer(digits: str) -> int:
    """An integer that can be drawn, compared and divided: as a float, too."""
    number = int(digits)
    try:
        float(number)
    except OverflowError:
        raise ValueError(f"a number of {len(digits)} digits, which no float can be") from None
    return number


def write(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step, so that a reader or a crash never meets half a file.

    Raises:
        UserError: when it cannot be written; what was at ``path`` is then still there.
    """
    if not path.name:
        raise UserError(f"cannot write {path}: it is a folder")
    # In the same folder, because os.replace is atomic only within a file system.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is none there is no draft either
            draft.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """``value`` as JSON can say it: mappings, lists, strings, finite numbers, bools and null.

    Scalars of NumPy and torch become numbers, so that a report also survives the way from an xdist worker.
    """
    if value is None or type(value).__name__ in ("bool", "bool_"):  # NumPy's too
        return None if value is None else bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Integral):  # NumPy registers its own
        return int(value)
    if hasattr(value, "__float__"):
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # an array of many numbers
            return str(value)
        return number if math.isfinite(number) else None
    return str(value)


def _check(run: Run) -> None:
    """Raise unless ``run`` holds what its types promise: JSON from elsewhere may hold anything."""
    if not isinstance(run.about, Mapping):
        raise TypeError("'run' is not an object")
    for result in run.results:
        if result.outcome not in get_args(Outcome):
            raise ValueError(f"unknown outcome {result.outcome!r} of {result.id!r}")
        words = [result.id, result.requirement, result.message, result.target_id, result.modality or ""]
        for measurement in result.measurements:
            words += [measurement.quantity, measurement.unit, measurement.detail]
            if measurement.bound is not None and measurement.bound.kind not in get_args(Kind):
                raise ValueError(f"unknown bound {measurement.bound.kind!r} in {result.id!r}")
        for medium in result.media:
            words += [medium.name, medium.type, medium.caption]
        for table in result.tables:
            words += [table.title, *table.columns]
            if not all(isinstance(cell, str | int | float | None) for row in table.rows for cell in row):
                raise TypeError(f"a table of other things than texts and numbers in {_name(result)}")
        if not isinstance(result.seconds, int | float) or not math.isfinite(result.seconds):
            raise TypeError(f"{_name(result)} took no number of seconds")
        if not all(isinstance(word, str) for word in words):
            raise TypeError(f"a text of the wrong type in {_name(result)}")


def _name(result: Result) -> str:
    return repr(result.id) if isinstance(result.id, str) else "a result"
