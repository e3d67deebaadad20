"""What a night's example must do, whatever its system: complaints about a text, none when all is well."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from suites.meta.unit_files import setting

_EVEN_IF_FAILED = {"always()", "${{ always() }}"}


def minutes(duration: str) -> int:
    """Minutes of a duration such as ``5h``, ``15m`` or ``5h 30min``; 0 where there is none."""
    units = {"h": 60, "m": 1, "min": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)(h|min|m)\b", duration))


def of_workflow(text: str) -> Iterator[str]:
    """Complaints about GitHub's nightly.yml or accept.yml."""
    flow: dict[Any, Any] = yaml.safe_load(text)
    if flow.get("permissions") != {"contents": "read"}:
        yield "it may do more than read the code"
    if flow.get("concurrency") != {"group": "quantproof-nightly", "cancel-in-progress": False}:
        yield "two may run at once, or one cancels another"
    triggers = flow[True]  # "on" is true in YAML 1.1
    if set(triggers) - {"schedule", "workflow_dispatch"}:
        yield "others than the clock and a person may start it"
    for name, job in flow["jobs"].items():
        if "timeout-minutes" not in job:
            yield f"{name} has no time limit"
        if "permissions" in job:
            yield f"{name} gives itself rights"
    if "nightly" in flow["jobs"]:
        yield from _of_night(flow["jobs"]["nightly"])
    else:
        asked = (triggers.get("workflow_dispatch") or {}).get("inputs", {})
        if asked.get("reason", {}).get("required") is not True:
            yield "a baseline may be moved without a reason"


def _of_night(job: dict[str, Any]) -> Iterator[str]:
    steps = job["steps"]
    (at,) = [number for number, step in enumerate(steps) if "tox -e" in step.get("run", "")]
    if not steps[at].get("timeout-minutes", 10**9) < job.get("timeout-minutes", 0):
        yield "a hung night leaves no time to publish"
    after = steps[at + 1 :]
    if not any(step.get("uses", "").startswith("actions/upload-artifact@v") for step in after):
        yield "nothing is published"
    yield from (
        f"'{step['name']}' is left out of a failed night" for step in after if step.get("if") not in _EVEN_IF_FAILED
    )
    if not any('>> "$GITHUB_STEP_SUMMARY"' in step.get("run", "") for step in after):
        yield "there is no summary"


def of_gitlab(text: str) -> Iterator[str]:
    """Complaints about .gitlab-ci.yml."""
    flow = yaml.safe_load(text)
    night, accept = flow["nightly"], flow["accept"]
    if not night.get("resource_group") or night["resource_group"] != accept.get("resource_group"):
        yield "two may run at once"
    if night.get("artifacts", {}).get("when") != "always":
        yield "a failed night is not published"
    if not night.get("artifacts", {}).get("reports", {}).get("junit"):
        yield "there is no JUnit"
    parts = [
        minutes(night.get("variables", {}).get(f"RUNNER_{part}_TIMEOUT", "")) for part in ("SCRIPT", "AFTER_SCRIPT")
    ]
    if not all(parts) or not sum(parts) < minutes(night.get("timeout", "")):
        yield "a hung night leaves no time to publish"
    if not all("$REASON" in rule["if"] for rule in accept["rules"]):
        yield "a baseline may be moved without a reason"
    if "cache" in night or "cache" in flow.get("default", {}):
        yield "a cache is no store"


def of_script(text: str) -> Iterator[str]:
    """Complaints about night.sh, whose time limit is below that of the unit that starts it."""
    lines = [line.strip() for line in text.splitlines()]
    limit = re.findall(r"QUANTPROOF_LIMIT:-(\w+)", text)
    if not any(line.startswith("timeout ") and '"$limit" tox -e' in line for line in lines) or not limit:
        yield "a night has no time limit"
    if not any("flock --nonblock" in line for line in lines):
        yield "two may run at once"
    if not any(line.startswith("publish ||") for line in lines):
        yield "a night is not published"


def of_service(text: str, script: str) -> Iterator[str]:
    """Complaints about the service that starts ``script``, night.sh."""
    (limit,) = re.findall(r"QUANTPROOF_LIMIT:-(\w+)", script)
    if not 0 < minutes(limit) < minutes(setting(text, "TimeoutStartSec")):
        yield "a hung night leaves no time to publish"
    if setting(text, "User") in ("", "root"):
        yield "a night needs no root"


def of_marks(text: str) -> Iterator[str]:
    """Complaints about the places to change: one to five, numbered when there are several."""
    marks = re.findall(r"CHANGE( \d)?:", text)
    if not 1 <= len(marks) <= 5:
        yield f"{len(marks)} places are marked"
    if len(marks) > 1 and [mark.strip() for mark in marks] != [str(n + 1) for n in range(len(marks))]:
        yield "the places to change are not numbered in order"
