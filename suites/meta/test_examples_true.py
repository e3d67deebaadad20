"""The ready-made examples name what this project has, and do what a night needs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from suites.meta.example_demands import of_gitlab, of_marks, of_script, of_service, of_workflow
from suites.meta.example_files import (
    EXAMPLES,
    FILES,
    ROOT,
    changed,
    environments,
    kept_by_tox,
    read,
    report_commands,
    tox_ini,
    unknown_environments,
    unknown_variables,
    wrong_report_commands,
)

NIGHTLY, ACCEPT = "github-actions/nightly.yml", "github-actions/accept.yml"
GITLAB = "gitlab/.gitlab-ci.yml"
SERVICE = "systemd/quantproof-nightly.service"


def of_service_and_script(text: str) -> Iterable[str]:
    """Complaints about the service, which starts our script."""
    return of_service(text, read("night.sh"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_true(file: Path) -> None:
    """Every environment, variable and command line that an example names is one of this project."""
    text = file.read_text(encoding="utf-8")
    assert unknown_environments(text) == []
    assert unknown_variables(text) == []
    assert wrong_report_commands(text) == []


def test_something_was_read() -> None:
    """The examples name environments and commands at all, so that holding them against the project says something."""
    assert len(FILES) >= 10
    for name in (NIGHTLY, GITLAB, "night.sh"):
        assert "tox -e nightly" in read(name)
        assert {words[0] for words in report_commands(read(name))} >= {"render", "trend"}
    assert {"verify", "tests", "gpu", "nightly", "nightly-cpu", "matrix"} <= environments()


@pytest.mark.parametrize(
    ("finds", "name", "old", "new"),
    [
        (unknown_environments, NIGHTLY, "tox -e nightly", "tox -e nightly-gpu"),
        (unknown_environments, "night.sh", "tox -e nightly", "tox -e nights"),
        (unknown_environments, GITLAB, "CHANGE 3: nightly-cpu", "CHANGE 3: nightly-cpus"),
        (unknown_variables, NIGHTLY, "QUANTPROOF_HISTORY", "QUANTPROOF_HISTROY"),
        (unknown_variables, SERVICE, "QUANTPROOF_BASE", "QUANTPROOF_FOLDER"),
        (wrong_report_commands, NIGHTLY, "--format markdown", "--format summary"),
        (wrong_report_commands, ACCEPT, "${FREEZE:+--freeze}", "${FREEZE:+--frozen}"),
        (wrong_report_commands, ACCEPT, '--reason "$REASON"', ""),
        (wrong_report_commands, GITLAB, "trend -o", "trend --page"),
        (wrong_report_commands, "night.sh", "show reports", "print reports"),
        (wrong_report_commands, "README.md", "history --history", "nights --history"),
        (wrong_report_commands, "offline/README.md", "--only-store", "--store-only"),
        (kept_by_tox, "offline/offline.env", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    ],
)
def test_untrue(finds: Callable[[str], list[str]], name: str, old: str, new: str, tmp_path: Path) -> None:
    """An environment, a variable or an option that this project does not have is found."""
    assert finds(read(name)) == []
    assert finds(changed(tmp_path, name, old, new).read_text())


def test_removed_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the project loses is missed where an example names it."""
    monkeypatch.setattr("reports.__main__._FORMATS", {"html": None, "markdown": None})
    assert "invalid choice: 'junit'" in " ".join(wrong_report_commands(read(NIGHTLY)))


def test_packed_for_the_same_environment() -> None:
    """The wheels that are packed are those of the night's environment, of tox, and of what builds the project."""
    (requirements,) = re.findall(r"set -- (.*?) #", read("offline/pack.sh"))
    deps = tox_ini()["testenv:{gpu,nightly}"]["deps"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extras,) = re.findall(r"-e (\S+)", deps)
    wanted = [extras, tox_ini()["tox"]["requires"], *project["build-system"]["requires"]]
    assert requirements.split() == [f"'{each}'" for each in wanted]
    assert "constraints=${CONSTRAINTS:-constraints-gpu.txt}" in read("offline/pack.sh")
    assert "-c constraints-gpu.txt" in deps


@pytest.mark.parametrize(
    ("complaints", "name"),
    [
        (of_workflow, NIGHTLY),
        (of_workflow, ACCEPT),
        (of_gitlab, GITLAB),
        (of_script, "night.sh"),
        (of_service_and_script, SERVICE),
        *((of_marks, name) for name in (NIGHTLY, ACCEPT, GITLAB, "night.sh", SERVICE, "cron/quantproof")),
        *((of_marks, name) for name in (SERVICE.replace(".service", ".timer"), "offline/offline.env")),
    ],
)
def test_demands(complaints: Callable[[str], Iterable[str]], name: str) -> None:
    """An example publishes failed nights, ends hung ones, never runs two, has few rights and few places to change."""
    assert list(complaints(read(name))) == []


@pytest.mark.parametrize(
    ("complaints", "name", "old", "new", "said"),
    [
        (of_workflow, NIGHTLY, "contents: read", "contents: write", "more than read"),
        (of_workflow, NIGHTLY, "cancel-in-progress: false", "cancel-in-progress: true", "cancels another"),
        (of_workflow, NIGHTLY, "schedule:", "pull_request:", "others than"),
        (of_workflow, NIGHTLY, "if: always()", "if: success()", "left out of a failed night"),
        (of_workflow, NIGHTLY, "timeout-minutes: 300", "timeout-minutes: 400", "hung night"),
        (of_workflow, NIGHTLY, "actions/upload-artifact@v6", "actions/cache@v5", "nothing is published"),
        (of_workflow, NIGHTLY, '>> "$GITHUB_STEP_SUMMARY"', "", "no summary"),
        (of_workflow, ACCEPT, "required: true", "required: false", "without a reason"),
        (of_workflow, ACCEPT, "timeout-minutes", "max-minutes", "no time limit"),
        (of_gitlab, GITLAB, "resource_group: quantproof #", "resource_group: nights #", "two may"),
        (of_gitlab, GITLAB, "when: always", "when: on_success", "not published"),
        (of_gitlab, GITLAB, "junit:", "dotenv:", "no JUnit"),
        (of_gitlab, GITLAB, "RUNNER_SCRIPT_TIMEOUT: 5h", "RUNNER_SCRIPT_TIMEOUT: 6h", "hung night"),
        (of_gitlab, GITLAB, '"web" && $REASON', '"web"', "without a reason"),
        (of_gitlab, GITLAB, "interruptible: false", "cache: {paths: [history]}", "no store"),
        (of_script, "night.sh", 'timeout --signal=INT --kill-after=5m "$limit" ', "", "no time limit"),
        (of_script, "night.sh", "flock --nonblock 9", "true", "two may"),
        (of_script, "night.sh", "publish ||", "true ||", "not published"),
        (of_service_and_script, SERVICE, "5h 30min", "2h", "hung night"),
        (of_service_and_script, SERVICE, "User=quantproof", "User=root", "no root"),
        (of_marks, NIGHTLY, "CHANGE 2", "CHANGE 5", "numbered"),
    ],
)
def test_unmet_demands(
    complaints: Callable[[str], Iterable[str]], name: str, old: str, new: str, said: str, tmp_path: Path
) -> None:
    """Each demand is missed when it is not met."""
    assert said in " ".join(complaints(changed(tmp_path, name, old, new).read_text()))
