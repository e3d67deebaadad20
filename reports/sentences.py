"""What a target is called by people, and what they should be warned of although nothing failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fixtures.core.measurement import Measurement
from fixtures.core.results import Result
from reports import verdict
from reports.verdict import Verdict

NARROW = 0.05  # of the room up to its bound: a value this near to it is a warning
_FAMILIES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen2_5_omni": "Qwen2.5-Omni"}
_QUANTIZERS = {
    "awq": "AWQ",
    "autoawq": "AutoAWQ",
    "rtn": "RTN",
    "bnb-nf4": "bitsandbytes NF4",
    "bnb-nf4-dq": "bitsandbytes NF4, double-quantized,",
    "bnb-fp4": "bitsandbytes FP4",
    "bnb-int8": "bitsandbytes int8",
}
_TELLING = (  # starts of the quantities that say most about a suite, the first that there is
    "mean token KL",
    "mean codec KL",
    "costliest layer's KL",
    "throughput ",
    "median time to first token",
    "share of the weights saved",
    "relative Frobenius",
    "KL against FP16",
    "distance to FP16",
    "bytes, of those promised",
    "same answers",
)


@dataclass(frozen=True)
class Caution:
    """Something to look at, and the check that it is about."""

    says: str
    result: Result


def called(found: Verdict, about: Mapping[str, Any]) -> str:
    """A target in people's words: ``AWQ 4-bit g128 of Qwen2.5-VL-3B``; ``about`` is the run's."""
    target = next((r.target for r in found.results if r.target), None)
    if target is None:
        return found.target
    quantizer = _QUANTIZERS.get(target["quantizer"], target["quantizer"])
    known = set(quantizer.casefold().replace(",", "").split())
    scheme = " ".join(word for word in _scheme(found.target, about).split() if word.casefold() not in known)
    size = target["size"].replace("_", ", ")
    model = _FAMILIES.get(target["family"], target["family"])
    return f"{quantizer} {scheme} of ".replace("  ", " ") + (
        f"{model}-{size.upper()}" if size[:1].isdigit() else f"{model} ({size})"
    )


def warnings(found: Verdict) -> list[Caution]:
    """What a target should not be called proved without: known failures, gaps, and bounds held by next to nothing.

    Known to fail, skipped, no longer failing as listed: a warning per check. Of a passed check: a warning per value
    within ``NARROW`` of its bound, of the room that the bound leaves (``verdict.nearness``).
    """
    said = {"xfailed": "is known to fail", "skipped": "was skipped", "xpassed": "is listed as failing and passed"}
    listed = []
    for result in found.results:
        if result.outcome in said:
            reason = verdict.why(result)
            listed.append(Caution(f"{result.check} {said[result.outcome]}{f': {reason}' if reason else ''}", result))
        elif verdict.standing(result) == "passed":
            listed += [
                Caution(f"{m}: held by {verdict.percent(verdict.margin(m) or 0)} only", result)
                for m in result.measurements
                if _narrow(m)
            ]
    return listed


def telling(results: Iterable[Result]) -> Measurement | None:
    """The number to name of checks: one beyond its bound, else of what says most the nearest to its bound.

    A value just on its bound is a count of what was asked for, and says least.
    """
    measured = [m for r in results for m in r.measurements if m.bound is not None]
    beyond = [m for m in measured if m.holds is False]
    place = {start: at for at, start in enumerate(_TELLING)}
    ranked = [
        (
            next((at for start, at in place.items() if m.quantity.startswith(start)), len(place)),
            share == 0,
            share,
            at,
            m,
        )
        for at, m in enumerate(measured)
        if (share := verdict.margin(m)) is not None
    ]
    nearest = [min(ranked)[-1]] if ranked else []
    return next(iter((*beyond, *nearest, *measured)), None)


def _narrow(measurement: Measurement) -> bool:
    near = verdict.nearness(measurement)
    return near is not None and bool(measurement.holds) and near < NARROW


def _scheme(target: str, about: Mapping[str, Any]) -> str:
    at: Any = about
    for key in ("subjects", target, "artifact", "scheme"):
        at = at.get(key) if isinstance(at, Mapping) else None
    return at if isinstance(at, str) else ""
