"""A run's verdicts as compact JSON of a stable shape, for programs that decide by them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fixtures.core.measurement import Measurement
from fixtures.core.results import Result, Run
from reports import store, verdict
from reports.render import shortened
from reports.verdict import Verdict

SCHEMA = 1  # to be raised when a key changes its meaning or goes; new keys may come any time
_ALARMING = ("failed", "error", "xpassed")


def brief(run: Run) -> str:
    """What was proved of each target and what was not, as one JSON object; what is no number is null."""
    git = run.about.get("git")
    data = {
        "schema": SCHEMA,
        "headline": verdict.headline(run),
        "started": run.about.get("started"),
        "exit_status": run.about.get("exit_status"),
        "commit": git.get("commit") if isinstance(git, Mapping) else None,
        "verdicts": Counter(v.word for v in verdict.verdicts(run)),
        "counts": _counts(run.results),
        "targets": [_target(v) for v in verdict.verdicts(run)],
        "own": {"counts": _counts(mine := verdict.own(run.results)), "failures": _failures(mine)},
        "not_run": [{"reason": shortened(why, 400), "count": len(them)} for why, them in verdict.unrun(run.results)],
    }
    return json.dumps(store.plain(data), indent=1, allow_nan=False) + "\n"


def _target(found: Verdict) -> dict[str, Any]:
    return {
        "target": found.target,
        "verdict": found.word,
        "sentence": found.sentence,
        "counts": _counts(found.results),
        "suites": {s: _counts(r for r in found.results if r.suite == s) for s in verdict.suites(found.results)},
        "bounds_held": len(found.held),
        "gaps": found.gaps,
        "failures": _failures(found.results),
    }


def _counts(results: Iterable[Result]) -> dict[str, int]:
    """Outcomes as their numbers have them, so that a check that passed beyond a bound counts as failed."""
    return dict(Counter(verdict.standing(r) for r in results))


def _failures(results: Iterable[Result]) -> list[dict[str, Any]]:
    return [
        {
            "id": result.id,
            "outcome": verdict.standing(result),
            "suite": result.suite,
            "check": result.check,
            "case": result.case or result.modality or "",
            "message": shortened(result.message, 400),
            "beyond": [_beyond(m) for m in verdict.broken(result)],
        }
        for result in results
        if verdict.standing(result) in _ALARMING
    ]


def _beyond(measurement: Measurement) -> dict[str, Any]:
    bound = measurement.bound
    return {
        "quantity": measurement.quantity,
        "value": measurement.value,
        "unit": measurement.unit,
        "bound": None if bound is None else {bound.kind: bound.limit},
        "margin": verdict.margin(measurement),
        "detail": shortened(measurement.detail, 400),
    }
