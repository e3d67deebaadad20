"""Tests spread over workers: each runs once, what shares a model stays together, and the longest go first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.core.targets import Target
from fixtures.options import SELECTION
from fixtures.spreading import LONGEST, MOST, Spread, pytest_xdist_auto_num_workers

ROOT = Path(__file__).parents[2]
TARGETS = [Target(f"family_{f}", "tiny", quantizer) for f in "ab" for quantizer in ("bnb-nf4", "bnb-nf4-dq", "rtn")]
CHECKS = [f"suites/test_{name}.py::test_it[{target}-text]" for name in ("one", "two") for target in TARGETS]
OTHERS = [f"suites/meta/test_{name}.py::test_it[{n}]" for name in ("x", "y") for n in range(3)]
LONG = [f"{LONGEST[0]}::test_{n}[{TARGETS[0]}]" for n in range(3)]  # of meta: a target's name means nothing there
TESTS = [*OTHERS, *CHECKS, "suites/test_one.py::test_of_no_target", *LONG]


class Worker:
    """What a scheduler sees of a worker: it runs what it is sent, in that order."""

    shutting_down = False

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.queue: list[int] = []
        self.ran: list[str] = []

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        """Take tests."""
        self.queue += indices

    def shutdown(self) -> None:
        """Take no more."""
        self.shutting_down = True


def spread(
    tests: Sequence[str], workers: int, scheduler: type[Spread] = Spread, deadly: Sequence[str] = ()
) -> list[Worker]:
    """Workers that have run tests of equal length, or died over one and were replaced."""
    option = SimpleNamespace(loadscopereorder=True)
    chosen = SimpleNamespace(targets=tuple(TARGETS), full_size_targets=())
    values = {"tx": ["popen"] * workers, "dist": "load"}
    config: Any = SimpleNamespace(option=option, stash={SELECTION: chosen}, getvalue=values.get)
    nodes: list[Any] = [Worker(f"gw{n}") for n in range(workers)]
    schedule = scheduler(config)
    for node in nodes:
        schedule.add_node(node)
    for node in nodes:
        schedule.add_node_collection(node, tests)
    schedule.schedule()
    while any(node.queue for node in nodes) and len(nodes) < len(tests):
        for node in [node for node in nodes if node.queue]:
            index = node.queue.pop(0)
            node.ran.append(tests[index])
            if tests[index] in deadly:
                node.queue = []
                assert schedule.remove_node(node) == tests[index]
                nodes.append(Worker(f"gw{len(nodes)}"))
                schedule.add_node(nodes[-1])
                schedule.add_node_collection(nodes[-1], tests)
                schedule.schedule()
            else:
                schedule.mark_test_complete(node, index)
    return nodes


def units(ran: Sequence[str]) -> list[str]:
    """What a worker ran, as targets and files in their order, each run of equals told once."""
    names = [
        max((str(t) for t in TARGETS if f"[{t}-text]" in test), key=len, default=test.split("::")[0]) for test in ran
    ]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
def test_every_test_runs_once(workers: int) -> None:
    """However many workers there are, every test runs once, on one of them."""
    assert sorted(test for node in spread(TESTS, workers) for test in node.ran) == sorted(TESTS)


def test_shared_models_stay_together() -> None:
    """All checks of a target, across files, run on one worker, and a worker goes on with the reference it began."""
    ran = [units(node.ran) for node in spread(TESTS, 2)]
    for target in map(str, TARGETS):
        assert sum(found.count(target) for found in ran) == 1
    assert [found[:3] for found in ran] == [[str(t) for t in TARGETS[:3]], [str(t) for t in TARGETS[3:]]]


@pytest.mark.parametrize("deadly", [[CHECKS[0]], [CHECKS[7], OTHERS[5]], [LONG[2]]], ids=["first", "two", "last"])
def test_deaths(deadly: list[str]) -> None:
    """A test that kills its worker is not run again, and all others run once, on the workers that are left or new."""
    assert sorted(test for node in spread(TESTS, 2, deadly=deadly) for test in node.ran) == sorted(TESTS)


def test_a_worker_replaced_wrongly_is_seen() -> None:
    """What xdist's own scheduler does about a death, planted, runs the deadly test again or loses others."""

    class Unforgiving(Spread):
        def remove_node(self, node: Any) -> str | None:
            return super(Spread, self).remove_node(node)

    ran = [test for node in spread(TESTS, 2, Unforgiving, deadly=[CHECKS[0]]) for test in node.ran]
    assert sorted(ran) != sorted(TESTS)


def test_longest_files_go_first() -> None:
    """After the targets come the files known to take long, then the others."""
    for node in spread(TESTS, 1):
        assert units(node.ran)[6:] == [
            LONGEST[0],
            "suites/meta/test_x.py",
            "suites/meta/test_y.py",
            "suites/test_one.py",
        ]


def test_longest_files_are_there() -> None:
    """Every file that is begun early exists: one that was renamed would silently come last."""
    assert LONGEST
    assert [file for file in LONGEST if not (ROOT / file).is_file()] == []


def test_a_reference_torn_apart_is_seen() -> None:
    """A scheduler that forgets who has which reference, planted, hands it to both workers."""

    class Forgetful(Spread):
        def _assign_work_unit(self, node: Any) -> None:
            super(Spread, self)._assign_work_unit(node)

    ran = [units(node.ran) for node in spread(TESTS, 2, Forgetful)]
    assert [found[:3] for found in ran] != [[str(t) for t in TARGETS[:3]], [str(t) for t in TARGETS[3:]]]


@pytest.mark.parametrize(
    ("cores", "memory", "workers"),
    [(1, 64, 0), (2, 24, 2), (2, 5, 0), (6, 13, 4), (64, 512, MOST)],
    ids=["one core", "two cores", "little memory", "memory for some", "many cores"],
)
def test_automatic_number(cores: int, memory: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-n auto`` is a worker per core that is ours, as far as there is memory; a single one runs no other process."""
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=memory << 30))
    config: Any = SimpleNamespace()
    assert pytest_xdist_auto_num_workers(config) == workers
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "5")
    assert pytest_xdist_auto_num_workers(config) is None, "what the user's variable says"


INNER = """
import os

import pytest


@pytest.mark.parametrize("number", range(2))
def test_it(number, progress, worker_id):
    progress(f"work {number}", 1, 1)
    import torch

    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1"), "not a worker's share"
"""


def test_workers(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-n`` alone spreads by unit; workers tell how far long jobs are, and have but their share of the cores."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("fixtures.options", "fixtures.spreading", "fixtures.checkpoints")
    pytester.makeconftest(f"import os\nos.sched_getaffinity = lambda _: range(3)\npytest_plugins = {list(names)}")
    pytester.makepyfile(INNER)
    run = pytester.runpytest_subprocess("-n", "2", "-v", "-p", "no:cacheprovider")
    assert run.ret == 0, run.stdout.str()
    said = [line for line in run.stderr.lines if line.strip()]
    assert sorted(line.partition(" (gw")[0] for line in said) == ["  work 0: 1 of 1", "  work 1: 1 of 1"]
    assert len({line.partition(" (gw")[2] for line in said}) == 1, "one file, one worker"
