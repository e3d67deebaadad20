"""From pytest's words to ours: a test report becomes a Result."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fixtures.core.results import Outcome, Result

if TYPE_CHECKING:
    import pytest

ATTRIBUTE = "quantproof"  # of a test report; plain JSON, so that it survives the way from an xdist worker

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_EXCEPTION = re.compile(r"\A[\w.]*(?:Error|Failed|NotHeld): ")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)\s+(?=[A-Z`'\"(])")
_XPASS = "[XPASS(strict)] "
_LONGEST = 20_000  # characters of a message; a traceback through a model can be endless


def identity(item: pytest.Item) -> dict[str, Any]:
    """Which requirement, of which target, in which modality."""
    callspec = getattr(item, "callspec", None)
    parameters = {} if callspec is None else callspec.params
    modality = parameters.get("modality")
    return {
        "requirement": _requirement(getattr(getattr(item, "obj", None), "__doc__", None)),
        "target": _target(parameters),
        "modality": None if modality is None else str(modality),
    }


def result_of(report: pytest.TestReport | pytest.CollectReport) -> Result:
    """The result that a report of pytest tells of, with what the plugin attached to it."""
    said: dict[str, Any] = {"requirement": "", "measurements": [], **getattr(report, ATTRIBUTE, {})}
    heard = {"id": report.nodeid, "outcome": _outcome(report), "message": _message(report)}
    return Result.from_json(said | heard)


def with_failed_teardown(result: Result, report: pytest.TestReport) -> Result:
    """``result`` after its teardown failed: an error, unless it had failed already, which says more."""
    outcome: Outcome = "failed" if result.outcome == "failed" else "error"
    said = (result.message, f"teardown failed: {_message(report)}")
    return replace(result, outcome=outcome, message="\n\n".join(filter(None, said)))


def module_of(nodeid: str) -> str:
    """The file of a node id."""
    return nodeid.partition("::")[0]


def _requirement(docstring: str | None) -> str:
    """The first sentence of a test's docstring, on one line."""
    paragraph = inspect.cleandoc(docstring or "").partition("\n\n")[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]


def _target(parameters: Mapping[str, Any]) -> dict[str, str] | None:
    """The target among a test's parameters, as a result names it."""
    target = parameters.get("target")
    names = ("family", "size", "quantizer")
    if not all(hasattr(target, name) for name in names):
        return None
    return {name: str(getattr(target, name)) for name in names}


def _outcome(report: pytest.TestReport | pytest.CollectReport) -> Outcome:
    known_bad = hasattr(report, "wasxfail")
    if report.skipped:
        return "xfailed" if known_bad else "skipped"
    if report.passed:
        return "xpassed" if known_bad else "passed"
    if _longrepr(report).startswith(_XPASS):
        return "xpassed"
    return "failed" if report.when == "call" else "error"  # setup, collection, or a worker that died ("???")


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test did not pass: the reason where somebody gave one, else what was raised."""
    if hasattr(report, "wasxfail"):
        reason = report.wasxfail.removeprefix("reason: ")
        return "\n\n".join(filter(None, (reason, _raised(report) if report.skipped else "")))
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    said = _longrepr(report)
    if said.startswith(_XPASS):
        return f"{said} - it passes now: strike it from the expected failures"
    # A check that judged says all in its message. Of anything else, only the traceback tells what happened.
    judged = any(m["holds"] is False for m in getattr(report, ATTRIBUTE, {}).get("measurements", ()))
    return _shortened(_raised(report) if judged else said)


def _raised(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The exception's own message."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return _longrepr(report)
    return _EXCEPTION.sub("", _ANSI.sub("", crash.message))


def _longrepr(report: pytest.TestReport | pytest.CollectReport) -> str:
    return _ANSI.sub("", str(report.longrepr or ""))  # longreprtext would say which xdist worker it was


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]}\n[... {len(text) - _LONGEST} characters left out ...]\n{text[-half:]}"
