"""The examples' own scripts, run: what they promise is there, after good nights and after bad ones."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from reports.nights.history import History
from suites.meta.example_files import EXAMPLES, read
from suites.meta.nights import GOOD, check, kl
from suites.meta.rehearsal import Job, Stage, on_github, on_gitlab
from suites.meta.unit_files import environment, setting

FAILED = (check("failed", kl(0.3), message="assert 0.3 <= 0.02"), *GOOD[1:])
WHOLE = {"results.json", "index.html", "trend.html", "junit.xml"}
NIGHTLY, ACCEPT, GITLAB = "github-actions/nightly.yml", "github-actions/accept.yml", "gitlab/.gitlab-ci.yml"
EVIL = "faster driver; $(touch pwned) `touch pwned` \"'"
CI = pytest.mark.parametrize(("system", "name"), [(on_github, NIGHTLY), (on_gitlab, GITLAB)])
System = Callable[[Stage, str, str], Job]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A machine that has had one good night."""
    stage = Stage(tmp_path)
    stage.play(1, GOOD)
    return stage


@pytest.fixture
def alone(stage: Stage) -> Stage:
    """A machine without a CI system: its checkout has a branch to pull, and our script."""
    shutil.copytree(EXAMPLES, stage.checkout / "examples")
    (stage.checkout / ".gitignore").write_text("reports/\n")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(stage.checkout)]
    for words in (
        "init -q -b main",
        "add .",
        "commit -qm start",
        "clone -q --bare . ../origin",
        "remote add origin ../origin",
    ):
        subprocess.run([*git, *words.split()], check=True)
    for words in ("fetch -q", "branch -q --set-upstream-to origin/main"):
        subprocess.run([*git, *words.split()], check=True)
    return stage


def nights(stage: Stage) -> list[str]:
    """What the nights of a machine's history came to, oldest first."""
    history = History(stage.base / "history")
    return [history.judged[each.name].verdict for each in history.nights()]


def by_hand(stage: Stage, **variables: str) -> tuple[int, str]:
    """Exit code and words of night.sh."""
    return stage.bash("examples/night.sh", {"QUANTPROOF_BASE": str(stage.base), **variables})


def published(stage: Stage) -> set[str]:
    """Names of what night.sh published."""
    return {file.name for file in (stage.base / "published").iterdir()}


# CI systems


@CI
def test_good_and_bad_night(system: System, name: str, stage: Stage) -> None:
    """A regression fails the job, and page, trend, results and JUnit are published as after a good night."""
    good = system(stage, read(name), "nightly")
    assert good.succeeded, good.said
    assert stage.left() == WHOLE
    stage.play(2, FAILED)
    bad = system(stage, read(name), "nightly")
    assert not bad.succeeded
    assert "REGRESSED: 1 check newly failing" in bad.said
    assert stage.missing(bad.published) == []
    assert stage.left() == WHOLE
    assert nights(stage) == ["unjudged", "failing"]  # the history outlived the checkout
    assert ET.parse(stage.checkout / "reports/out/junit.xml").getroot().find(".//failure") is not None
    assert system is on_gitlab or "f-tiny-awq" in bad.summary


@CI
def test_night_that_dies(system: System, name: str, stage: Stage) -> None:
    """A night that dies before it has results fails the job, and publishes the trend and nothing of another night."""
    system(stage, read(name), "nightly")
    stage.play(2, None)
    died = system(stage, read(name), "nightly")
    assert not died.succeeded
    assert stage.left() == {"trend.html"}
    assert "cannot read reports/out/results.json" in died.said
    assert "Traceback" not in died.said
    assert nights(stage) == ["unjudged"]


@CI
def test_published_is_missed(system: System, name: str, stage: Stage) -> None:
    """A path that no command writes is found."""
    stage.play(1, None)
    job = system(stage, read(name).replace("reports/out/\n", "reports/page/\n"), "nightly")
    assert "reports/page/" in stage.missing(job.published)


def test_junit_is_missed(stage: Stage) -> None:
    """A list of tests that nobody wrote is found."""
    text = read(GITLAB).replace("-o reports/out/junit.xml", "-o reports/out/tests.xml")
    assert stage.missing(on_gitlab(stage, text, "nightly").published) == ["reports/out/junit.xml"]


def test_accept_on_github(stage: Stage) -> None:
    """A baseline moves by hand with a reason, which reaches the history word for word and is never run."""
    on_github(stage, read(NIGHTLY), "nightly")
    answers = {"inputs.night": "latest", "inputs.reason": EVIL, "inputs.freeze && 'yes' || ''": "yes"}
    job = on_github(stage, read(ACCEPT), "accept", answers)
    assert job.succeeded, job.said
    assert "accepted" in job.summary
    said = json.loads((stage.base / "history/accepted.jsonl").read_text())
    assert (said["reason"], said["who"], said["frozen"]) == (EVIL, "somebody", True)
    assert not list(stage.checkout.glob("pwned"))
    answers |= {"inputs.reason": ""}
    assert not on_github(stage, read(ACCEPT), "accept", answers).succeeded


def test_accept_on_gitlab(stage: Stage) -> None:
    """GitLab's form moves the baseline as well, by who filled it in."""
    on_gitlab(stage, read(GITLAB), "nightly")
    job = on_gitlab(stage, read(GITLAB), "accept", {"REASON": EVIL, "GITLAB_USER_LOGIN": "me"})
    assert job.succeeded, job.said
    said = json.loads((stage.base / "history/accepted.jsonl").read_text())
    assert (said["reason"], said["who"], said["frozen"]) == (EVIL, "me", False)


# Without one


def test_night_by_hand(alone: Stage) -> None:
    """Good nights and bad ones are published and told by exit code and words."""
    code, said = by_hand(alone)
    assert code == 0, said
    assert published(alone) == WHOLE
    alone.play(2, FAILED)
    code, said = by_hand(alone)
    assert code == 1
    assert "REGRESSED" in said
    assert "f-tiny-awq" in said
    assert published(alone) == WHOLE
    assert json.loads((alone.base / "published/results.json").read_text())["run"]["started"].startswith("2026-11-02")
    assert nights(alone) == ["unjudged", "failing"]


def test_night_by_hand_that_dies(alone: Stage) -> None:
    """A night that dies early takes the last one's page away, and is told."""
    by_hand(alone)
    alone.play(2, None)
    code, said = by_hand(alone)
    assert code == 3
    assert published(alone) == {"trend.html"}
    assert "cannot read reports/out/results.json" in said


def test_night_by_hand_newest_commit(alone: Stage) -> None:
    """A night tests the newest commit: what was pushed is there, and a checkout that cannot follow stops it."""
    other = alone.base / "other"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C"]
    subprocess.run(["git", "clone", "-q", alone.base / "origin", other], check=True)
    (other / "new").write_text("")
    for words in ("add .", "commit -qm new", "push -q"):
        subprocess.run([*git, str(other), *words.split()], check=True)
    alone.play(1, None)
    assert by_hand(alone)[0] == 3
    assert (alone.checkout / "new").exists()
    subprocess.run([*git, str(alone.checkout), "reset", "-q", "--hard", "HEAD~"], check=True)
    subprocess.run([*git, str(alone.checkout), "commit", "-q", "--allow-empty", "-m", "mine"], check=True)
    assert by_hand(alone)[0] not in (0, 1, 3)


def test_two_nights_at_once(alone: Stage) -> None:
    """A second night is kept out by one line, and touches nothing of the first."""
    (alone.checkout / "reports/out").mkdir(parents=True)
    (alone.checkout / "reports/out/results.json").write_text("the first one's")
    with (alone.base / "night.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = by_hand(alone)
    assert code == 75
    assert said.count("\n") == 1
    assert "another night is under way" in said
    assert (alone.checkout / "reports/out/results.json").read_text() == "the first one's"
    assert not (alone.base / "history").exists()


def test_hung_night(alone: Stage) -> None:
    """A night that hangs is stopped at its limit, and what it left is published."""
    tox = alone.base / "tools/bin/tox"
    tox.write_text(tox.read_text().replace("\npython", "\nsleep 600\npython", 1))
    code, _ = by_hand(alone, QUANTPROOF_LIMIT="2s")
    assert code == 124
    assert published(alone) == WHOLE - {"trend.html"}  # of no night yet


def test_by_systemd(alone: Stage) -> None:
    """The service's ExecStart, with the variables that the unit sets, is a whole night."""
    text = alone.here(read("systemd/quantproof-nightly.service"))
    command = shlex.join(shlex.split(setting(text, "ExecStart")))
    code, said = alone.bash(command, environment(text))
    assert code == 0, said
    assert published(alone) == WHOLE


def test_by_cron(alone: Stage) -> None:
    """The command of cron's line, in the shell and with the variables that its file names, is a whole night."""
    *_, line = alone.here(read("cron/quantproof")).splitlines()
    variables = dict(re.findall(r"^([A-Z_]+)=(.*)$", alone.here(read("cron/quantproof")), re.MULTILINE))
    code, said = alone.bash(line.split(maxsplit=6)[6], variables, [variables["SHELL"], "-c"])
    assert code == 0, said
    assert published(alone) == WHOLE
