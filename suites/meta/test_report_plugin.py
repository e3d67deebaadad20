"""The report's plugin, end to end: what tests measured reaches the report, in one process and over several."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Run, Table
from reports import store

ROOT = Path(__file__).parents[2]

SUITE = '''
"""A suite."""
import dataclasses

import pytest

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Table
from fixtures.verifying import NotHeld
from reports.stash import ABOUT, MEASUREMENTS, SEEDS, TABLES


@dataclasses.dataclass
class Target:
    family: str
    size: str
    quantizer: str

    def __str__(self):
        return f"{self.family}-{self.size}-{self.quantizer}"


TARGETS = pytest.mark.parametrize("target", [Target("vl", "tiny", q) for q in ("awq", "rtn")], ids=str)


@pytest.fixture
def say(request):
    def say(value):
        said = Measurement("mean token KL", value, "nats", Bound("at_most", 0.5), "worst token")
        request.node.stash.setdefault(MEASUREMENTS, []).append(said)
        request.node.stash.setdefault(TABLES, []).append(Table("t", ("layer",), ((1,), (value,))))
        if not said.holds:
            raise NotHeld(str(said), pytrace=False)
    return say


@pytest.fixture
def frail():
    yield
    raise RuntimeError("could not tidy up")


@TARGETS
@pytest.mark.parametrize("modality", ["text"])
def test_good(target, modality, say, request):
    """It is good. More about it.

    At length.
    """
    request.config.stash[ABOUT].setdefault("artifacts", {})[str(target)] = "3f9c01"
    request.config.stash[SEEDS]["held-out samples"] = 7
    say(0.25)


@TARGETS
def test_bad(target, say):
    """It is bad on one."""
    say(0.75 if target.quantizer == "rtn" else float(0))


@pytest.mark.skip(reason="no vLLM: pip install vllm")
def test_unavailable():
    """It needs vLLM."""


@TARGETS
@pytest.mark.xfail(strict=True, reason="known: https://example.org/1")
def test_known(target, say):
    """It is known."""
    say(0.9 if target.quantizer == "awq" else 0.1)


def test_frail(frail):
    """It cannot tidy up."""


def test_unset(no_such_fixture):
    """It cannot start."""


def test_deselected():
    """Nobody asks."""
'''


@pytest.fixture
def verify_suite(pytester, monkeypatch):
    """Run SUITE, or another, with a report; gives pytest's output and results.json."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*arguments: str, suite: str = SUITE) -> tuple[pytest.RunResult, Run]:
        pytester.makepyfile(test_suite=suite)
        options = (
            "-p",
            "reports.plugin",
            "--report",
            "out",
            "-k",
            "not deselected",
            "-p",
            "no:cacheprovider",
        )
        done = pytester.runpytest_subprocess(*options, *arguments)
        return done, store.load(pytester.path / "out" / "results.json")

    return run


@pytest.fixture(params=[(), ("-n", "2")], ids=["one process", "xdist"])
def workers(request):
    """Options for a run in one process and over two."""
    if request.param:
        pytest.importorskip("xdist", reason="no pytest-xdist: pip install pytest-xdist")
    return request.param


def test_plugin(verify_suite, workers):
    """Every outcome arrives with requirement, target, measurements and reason, also from xdist's workers."""
    done, run = verify_suite(*workers)
    found = {r.id.removeprefix("test_suite.py::"): r for r in run.results}

    assert {name: r.outcome for name, r in found.items()} == {
        "test_good[text-vl-tiny-awq]": "passed",
        "test_good[text-vl-tiny-rtn]": "passed",
        "test_bad[vl-tiny-awq]": "passed",
        "test_bad[vl-tiny-rtn]": "failed",
        "test_unavailable": "skipped",
        "test_known[vl-tiny-awq]": "xfailed",
        "test_known[vl-tiny-rtn]": "xpassed",
        "test_frail": "error",
        "test_unset": "error",
    }
    good, bad = found["test_good[text-vl-tiny-awq]"], found["test_bad[vl-tiny-rtn]"]
    assert (good.requirement, good.modality, good.target_id) == ("It is good.", "text", "vl-tiny-awq")
    assert good.seconds > 0
    assert bad.measurements == (Measurement("mean token KL", 0.75, "nats", Bound("at_most", 0.5), "worst token"),)
    assert bad.tables == (Table("t", ("layer",), ((1,), (0.75,))),)
    assert bad.message == "mean token KL: 0.75 nats, must be at most 0.5 nats"
    assert found["test_unavailable"].message == "no vLLM: pip install vllm"
    assert found["test_known[vl-tiny-awq]"].message.startswith("known: https://example.org/1\n\nmean token KL: 0.9")
    assert "strike it" in found["test_known[vl-tiny-rtn]"].message
    assert "could not tidy up" in found["test_frail"].message
    assert "no_such_fixture" in found["test_unset"].message
    assert run.about["deselected"] == {"test_suite.py": 1}
    assert run.about["subjects"] == {"artifacts": {"vl-tiny-awq": "3f9c01", "vl-tiny-rtn": "3f9c01"}}
    assert run.about["seeds"] == {"held-out samples": 7}
    assert run.about["exit_status"] == done.ret == 1
    assert run.about["versions"]["pytest"] == pytest.__version__
    assert "-p reports.plugin --report out -k 'not deselected'" in run.about["command"]


def test_plugin_speaks_in_the_terminal(verify_suite):
    """The verdict table and the paths of the report end the output, before pytest's own last line."""
    done, _ = verify_suite()

    done.stdout.fnmatch_lines(
        [
            "*= verdict =*",
            "target *suite *verdict",
            "vl-tiny-awq *1 known bad, 2 ok *known bad (1 check)",
            "vl-tiny-rtn *1 FAILED, 1 no longer bad, 1 ok *DISPROVED",
            "not asked for: 1 deselected",
            "*out*results.json",
            "*out*index.html",
        ]
    )
    assert "2 failed" in done.outlines[-1]


def test_plugin_tells_junit(verify_suite, pytester):
    """JUnit XML carries every measurement as a property of its test."""
    verify_suite("--junitxml", "junit.xml")

    xml = (pytester.path / "junit.xml").read_text()
    assert '<property name="mean token KL" value="0.75 nats, must be at most 0.5 nats"' in xml


def test_plugin_after_an_early_end(verify_suite, workers):
    """Checks that a run never came to are reported as not run, so that no target is proved without them."""
    _, run = verify_suite("--maxfail", "1", *workers)

    unrun = [r for r in run.results if r.message.startswith("not run")]
    assert len(run.results) == 9
    assert workers or "test_known[vl-tiny-awq]" in " ".join(r.id for r in unrun)
    assert all(r.outcome == "skipped" for r in unrun)


def test_plugin_without_collection(verify_suite, workers):
    """A module that cannot be imported is an error in the report, not an absence."""
    done, run = verify_suite(*workers, suite="import no_such_module")

    (lost,) = run.results
    assert (lost.id, lost.outcome) == ("test_suite.py", "error")
    assert "no_such_module" in lost.message
    assert done.ret != 0


def test_plugin_after_a_crash(verify_suite):
    """A test that kills its worker is an error of its target."""
    pytest.importorskip("xdist", reason="no pytest-xdist: pip install pytest-xdist")
    suite = SUITE.replace("    say(0.25)", "    say(0.25)\n    if target.quantizer == 'awq': import os; os._exit(3)")
    _, run = verify_suite("-n", "1", suite=suite)

    (crashed,) = [r for r in run.results if "crashed" in r.message]
    assert (crashed.outcome, crashed.target_id) == ("error", "vl-tiny-awq")


def test_no_report_unless_asked_for(pytester, monkeypatch):
    """Without ``--report`` nothing is written and nothing is said."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile("def test_a(): pass")

    done = pytester.runpytest_subprocess("-p", "reports.plugin", "-p", "no:cacheprovider")

    assert "verdict" not in done.stdout.str()
    assert not list(pytester.path.rglob("results.json"))


def test_unwritable_folder(pytester, monkeypatch):
    """A folder that cannot be written is refused before the first test runs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile("def test_a(): pass")
    (pytester.path / "taken").write_text("a file")

    done = pytester.runpytest_subprocess("-p", "reports.plugin", "--report", "taken")

    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: --report: cannot write into *taken: *"])
