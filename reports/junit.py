"""A run as JUnit XML, for CI systems that list tests: a suite per target and module, numbers as properties."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from xml.etree import ElementTree as ET

from fixtures.core.measurement import Measurement
from fixtures.core.results import Result, Run
from reports import verdict
from reports.escape import inline, printable
from reports.render import margin_text, shortened

LONGEST = 20_000  # characters of a message
_KINDS = {"failed": "failure", "xpassed": "failure", "error": "error", "skipped": "skipped", "xfailed": "skipped"}


def junit(run: Run) -> str:
    """The run as JUnit XML; a check that passed beyond a bound of its own is a failure there."""
    counts = _counts(run.results)
    del counts["skipped"]  # which the schema knows of suites alone
    root = ET.Element("testsuites", {"name": "quantproof", **counts})
    for target in dict.fromkeys(r.target_id for r in run.results):
        of_target = [r for r in run.results if r.target_id == target]
        for suite in verdict.suites(of_target):
            results = [r for r in of_target if r.suite == suite]
            name = printable(f"{target}: {suite}" if target else suite)
            element = ET.SubElement(root, "testsuite", {"name": name, **_counts(results), **_started(run)})
            element.extend(_case(result) for result in results)
    ET.indent(root, space="")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _case(result: Result) -> ET.Element:
    module, _, name = result.id.partition("::")
    classname = module.removesuffix(".py").replace("/", ".")
    case = ET.Element(
        "testcase",
        {"classname": printable(classname), "name": printable(name or module), "time": _seconds([result])},
    )
    if result.measurements:
        properties = ET.SubElement(case, "properties")
        for key, value in (pair for m in result.measurements for pair in _properties(m)):
            ET.SubElement(properties, "property", {"name": printable(key), "value": printable(value)})
    outcome = verdict.standing(result)
    if kind := _KINDS.get(outcome):
        element = ET.SubElement(case, kind, {"type": outcome, "message": inline(_why(result), 400)})
        element.text = printable(shortened("\n".join(_lines(result)), LONGEST))
    return case


def _properties(measurement: Measurement) -> Iterator[tuple[str, str]]:
    """Properties of their own for bound and margin: the format's schemas know no more than a name and a value."""
    name, value = measurement.quantity, exact(measurement.value)
    yield name, f"{value} {measurement.unit}".rstrip()
    if measurement.bound is not None:
        yield f"{name}: bound", f"{measurement.bound.words} {exact(measurement.bound.limit)}"
        yield f"{name}: margin", margin_text(measurement)


def exact(value: float) -> str:
    """A number in full, for programs to read."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def _why(result: Result) -> str:
    first = verdict.first_line(result.message)
    match result.outcome:
        case "xfailed":
            return f"known bad: {first or verdict.why(result) or 'no reason given'}"
        case "xpassed":
            return f"no longer bad: {first}".removesuffix(": ")
        case "skipped" | "error":
            return first or "no reason given"
        case _:
            return verdict.why(result) or result.requirement or result.check


def _lines(result: Result) -> Iterator[str]:
    for measurement in verdict.broken(result):
        yield f"{measurement} ({margin_text(measurement)})"
        if measurement.detail:
            yield measurement.detail
    if result.message:
        yield result.message


def _counts(results: Iterable[Result]) -> dict[str, str]:
    listed = list(results)
    kinds = [_KINDS.get(verdict.standing(r)) for r in listed]
    return {
        "tests": str(len(listed)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": str(kinds.count("skipped")),
        "time": _seconds(listed),
    }


def _seconds(results: Iterable[Result]) -> str:
    total = sum(float(r.seconds) for r in results)
    return f"{total if math.isfinite(total) else 0:.3f}"


def _started(run: Run) -> dict[str, str]:
    started = run.about.get("started")
    return {"timestamp": printable(started)} if isinstance(started, str) else {}
