"""A stage on which the examples' own scripts run: a machine in a folder, where a night takes a second.

Only tox is played: it leaves what ``tox -e nightly`` leaves, by the command lines of tox.ini that follow the tests.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fixtures.core.results import Result
from reports import store
from suites.meta.example_files import ROOT, night
from suites.meta.nights import GPU, run

MACHINE = "/srv/quantproof"  # what the examples call the folder that outlives a job
_EVEN_IF_FAILED = ("always()", "${{ always() }}")


class Stage:
    """A machine: its lasting folder, a checkout, and a tox that leaves a run as a night does.

    Attributes:
        base: in place of ``/srv/quantproof``.
        checkout: where a job works.
    """

    def __init__(self, folder: Path) -> None:
        self.base = folder / "machine"
        self.checkout = self.base / "checkout"
        self.checkout.mkdir(parents=True)
        self._tonight = folder / "tonight.json"
        self._program("tox/quantproof-gpu/bin/python", f'exec {shlex.quote(sys.executable)} "$@"')
        tests, *after = night()
        (report,) = [word.removeprefix("--report=") for word in tests if word.startswith("--report=")]
        self._program(
            "tools/bin/tox",
            '[[ "$*" == "-e nightly" ]] || exit 64',
            f"[[ -f {self._tonight} ]] || exit 3",
            'PATH="$TOX_WORK_DIR/quantproof-gpu/bin:$PATH"',
            f"mkdir -p {report} && cp {self._tonight} {report}/results.json",
            f"echo the page > {report}/index.html",
            *(shlex.join(command) for command in after),
        )

    def play(self, day: int, results: Sequence[Result] | None) -> None:
        """Have the next night, of that day, come to these results; None when it dies before it has any."""
        self._tonight.unlink(missing_ok=True)
        if results is not None:
            store.save(run(day, results, machine=GPU), self._tonight)

    def clean(self) -> None:
        """Delete what the last job left in the checkout, as a CI system's checkout does."""
        subprocess.run(["git", "-C", self.checkout, "init", "-q"], check=True)
        subprocess.run(["git", "-C", self.checkout, "clean", "-ffdxq"], check=True)

    def here(self, text: str) -> str:
        """An example's text, its folder this machine's."""
        return text.replace(MACHINE, str(self.base))

    def bash(self, script: str, environment: Mapping[str, str], shell: Sequence[str] = ()) -> tuple[int, str]:
        """Exit code and words of a script in the checkout, in bash as CI systems call it, or in another ``shell``."""
        command = [*(shell or ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")), script]
        clean = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.base), "LANG": "C.UTF-8"}
        clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=self.checkout, env={**clean, **environment}, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    def left(self) -> set[str]:
        """Names of the files in the folder that is published, none of them empty."""
        return {file.name for file in (self.checkout / "reports/out").glob("*") if file.stat().st_size}

    def missing(self, paths: Sequence[str]) -> list[str]:
        """Of paths that a job publishes, those where there is nothing."""
        found = {path: self.checkout / path for path in paths}
        return [path for path, at in found.items() if not (any(at.iterdir()) if at.is_dir() else at.is_file())]

    def _program(self, name: str, *lines: str) -> None:
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["#!/bin/bash", "set -e", *lines]) + "\n")
        path.chmod(0o755)


class Job:
    """What a job came to: whether all went well, what it said, and what it publishes."""

    def __init__(self) -> None:
        self.succeeded = True
        self.said = ""
        self.published: list[str] = []
        self.summary = ""


def on_github(stage: Stage, text: str, job: str, answers: Mapping[str, str] | None = None) -> Job:
    """Run a workflow's job step by step, as the runner does: one that is no ``always()`` only while all went well.

    ``answers`` says what each ``${{ expression }}`` is.
    """
    flow = yaml.safe_load(stage.here(text))
    came = Job()
    files = {name: stage.base.parent / name for name in ("GITHUB_PATH", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    for step in flow["jobs"][job]["steps"]:
        if not came.succeeded and step.get("if") not in _EVEN_IF_FAILED:
            continue
        if step.get("uses", "").startswith("actions/checkout@"):
            stage.clean()
        elif step.get("uses", "").startswith("actions/upload-artifact@"):
            came.published += step["with"]["path"].split()
        else:
            _step(stage, came, {**flow["env"], **step.get("env", {})}, step["run"], files, answers or {})
    came.summary = files["GITHUB_STEP_SUMMARY"].read_text()
    return came


def _step(
    stage: Stage,
    came: Job,
    given: Mapping[str, Any],
    script: str,
    files: Mapping[str, Path],
    answers: Mapping[str, str],
) -> None:
    assert "${{" not in script, "an expression is part of a script"
    said = {name: re.sub(r"\$\{\{ (.*?) \}\}", lambda m: answers[m[1]], str(value)) for name, value in given.items()}
    path = ":".join([*reversed(files["GITHUB_PATH"].read_text().split()), "/usr/bin", "/bin"])
    named = {name: str(file) for name, file in files.items()}
    code, words = stage.bash(script, {**said, **named, "PATH": path, "GITHUB_ACTOR": "somebody"})
    came.succeeded &= code == 0
    came.said += words


def on_gitlab(stage: Stage, text: str, job: str, variables: Mapping[str, str] | None = None) -> Job:
    """Run a job as the runner does: before_script and script as one, after_script apart, whatever these came to."""
    flow = yaml.safe_load(stage.here(text))
    default, night = flow["default"], flow[job]
    given = {**flow["variables"], **night.get("variables", {}), **(variables or {})}
    given = {name: str(value["value"] if isinstance(value, dict) else value) for name, value in given.items()}
    came = Job()
    stage.clean()
    code, came.said = stage.bash("\n".join([*default["before_script"], *night["script"]]), given)
    came.succeeded = code == 0
    came.said += stage.bash("\n".join(night.get("after_script", [])), given)[1]
    artifacts = night.get("artifacts", {})
    if came.succeeded or artifacts.get("when") == "always":
        came.published = [*artifacts.get("paths", []), *artifacts.get("reports", {}).values()]
    return came
