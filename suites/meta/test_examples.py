"""The ready-made examples are sound by the rules of the systems that read them, whose linters find a planted fault."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from suites.meta.example_files import EXAMPLES, ROOT, changed, read, wrong_cron
from suites.meta.unit_files import wrong_unit

WORKFLOWS = ("github-actions/nightly.yml", "github-actions/accept.yml")
GITLAB = "gitlab/.gitlab-ci.yml"
SCRIPTS = ("night.sh", "offline/pack.sh")
UNITS = ("systemd/quantproof-nightly.service", "systemd/quantproof-nightly.timer")
BESIDE = Path(sys.executable).parent  # where the linters of this environment are


def said(*command: object) -> str:
    """What a linter says against what it was given; empty when it has nothing against it."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}" or f"exit code {done.returncode}"


def of_schema(schema: str, path: Path) -> str:
    """What the schema that check-jsonschema ships says against a file; nothing is fetched."""
    more = ["--data-transform", "gitlab-ci"] if schema == "gitlab-ci" else []
    return said(BESIDE / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", *more, path)


def of_zizmor(path: Path, folder: Path) -> str:
    """What zizmor says against a workflow's security; GitHub's own actions may be pinned by their major version."""
    config = folder / "zizmor.yml"
    config.write_text('rules: {unpinned-uses: {config: {policies: {"actions/*": ref-pin, "*": hash-pin}}}}\n')
    return said(BESIDE / "zizmor", "--offline", "--no-progress", "--persona=regular", "--config", config, path)


def of_bash(path: Path) -> str:
    """What bash and shellcheck say against a script."""
    return said("bash", "-n", path) + said(BESIDE / "shellcheck", "--severity=style", path)


# By their systems' rules


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow(name: str, tmp_path: Path) -> None:
    """A workflow is one by GitHub's schema, and zizmor finds no way to misuse it."""
    assert of_schema("github-workflows", EXAMPLES / name) == ""
    assert of_zizmor(EXAMPLES / name, tmp_path) == ""


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (WORKFLOWS[0], "runs-on:", "run-on:"),
        (WORKFLOWS[0], "timeout-minutes: 330", "timeout-minutes: soon"),
        (WORKFLOWS[0], "contents: read", "contents: reed"),
        (WORKFLOWS[1], "group: quantproof", "grouped: quantproof"),
    ],
)
def test_broken_workflow(name: str, old: str, new: str, tmp_path: Path) -> None:
    """A key or a value that GitHub does not know is found by its schema."""
    assert "Schema validation errors" in of_schema("github-workflows", changed(tmp_path, name, old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "finding"),
    [
        (WORKFLOWS[0], "actions/upload-artifact@v6", "someone/upload@v6", "unpinned-uses"),
        (WORKFLOWS[0], "persist-credentials: false", "fetch-depth: 1", "artipacked"),
        (WORKFLOWS[1], '"$REASON"', '"${{ inputs.reason }}"', "template-injection"),
    ],
)
def test_unsafe_workflow(name: str, old: str, new: str, finding: str, tmp_path: Path) -> None:
    """Another's action that may change, credentials left behind and injected text are found."""
    assert finding in of_zizmor(changed(tmp_path, name, old, new), tmp_path)


def test_gitlab(tmp_path: Path) -> None:
    """GitLab's file is one by its schema, which finds a broken key."""
    assert of_schema("gitlab-ci", EXAMPLES / GITLAB) == ""
    for old, new in (("resource_group: quantproof #", "resource_group: [] #"), ("when: always", "when: often")):
        assert "Schema validation errors" in of_schema("gitlab-ci", changed(tmp_path, GITLAB, old, new))


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str) -> None:
    """A script is sound to bash and shellcheck, and may be run."""
    assert of_bash(EXAMPLES / name) == ""
    assert (EXAMPLES / name).stat().st_mode & 0o111


def test_broken_script(tmp_path: Path) -> None:
    """A loop left open and a word left unquoted are found."""
    assert "syntax error" in of_bash(changed(tmp_path, "night.sh", "    fi\n", ""))
    assert "SC2086" in of_bash(changed(tmp_path, "night.sh", 'mv "$base/published.new"', "mv $base/published.new"))


@pytest.mark.parametrize("name", UNITS)
def test_unit(name: str) -> None:
    """A unit has the sections and keys that systemd documents, and no other."""
    assert wrong_unit(read(name), Path(name).suffix) == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (UNITS[0], "ExecStart=", "ExecStarts="),
        (UNITS[0], "[Service]", "[service]"),
        (UNITS[0], "TimeoutStartSec=", "TimeoutSecs="),
        (UNITS[0], "ProtectSystem=strict", "strict"),
        (UNITS[1], "OnCalendar=*-*-* 01:30:00", "OnCalendar="),
        (UNITS[1], "Persistent=true\n", "Persistent =true\n"),
    ],
)
def test_broken_unit(name: str, old: str, new: str, tmp_path: Path) -> None:
    """A key, a section or a value that systemd would pass over is found without systemd, too."""
    assert wrong_unit(changed(tmp_path, name, old, new).read_text(), Path(name).suffix)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze: apt-get install systemd")
def test_units_by_systemd(tmp_path: Path) -> None:
    """By systemd's own word the units are well, and not so with a broken key or a month that never comes."""
    for folder, old, new in (
        ("good", "", ""),
        ("key", "KillMode=", "KillMod="),
        ("day", "*-*-* 01:30", "*-13-* 01:30"),
    ):
        place = tmp_path / folder
        (place / "checkout/examples").mkdir(parents=True)
        shutil.copy(EXAMPLES / "night.sh", place / "checkout/examples")
        for name in UNITS:
            text = read(name).replace("/srv/quantproof", str(place)).replace("User=quantproof", "User=root")
            (place / Path(name).name).write_text(text.replace(old, new) if old else text)
        done = subprocess.run(
            ["systemd-analyze", "verify", *(place / Path(name).name for name in UNITS)], capture_output=True, text=True
        )
        ours = [line for line in done.stderr.splitlines() if "quantproof" in line]
        assert bool(ours) == (folder != "good"), done.stderr


def cron_lines(text: str) -> list[str]:
    """The lines of a crontab that start something."""
    return [line for line in text.splitlines() if line and not line.startswith("#") and not re.match(r"\w+=", line)]


def test_cron() -> None:
    """The line of cron has five good fields, a user and a command; the workflow's schedule has five good fields."""
    (line,) = cron_lines(read("cron/quantproof"))
    fields, user, command = line.split(maxsplit=6)[:5], *line.split(maxsplit=6)[5:]
    assert wrong_cron(" ".join(fields)) == []
    assert (user, command) == ("quantproof", "/srv/quantproof/checkout/examples/night.sh")
    assert read("cron/quantproof").endswith("\n")  # cron ignores a last line without its end
    workflow = yaml.safe_load(read(WORKFLOWS[0]))
    assert [wrong_cron(each["cron"]) for each in workflow[True]["schedule"]] == [[]]  # "on" is true in YAML 1.1


@pytest.mark.parametrize(
    "fields", ["30 25 * * *", "30 1 * *", "60 * * * *", "30 1 0 * *", "5-2 * * * *", "soon 1 * * *"]
)
def test_broken_cron(fields: str) -> None:
    """A field out of its bounds, one too few and a word are found."""
    assert wrong_cron(fields)
    assert wrong_cron("*/5 0-6/2 1,15 * 7") == []
