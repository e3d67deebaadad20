"""Memory is measured once per run: workers take one another's measurements, but no failures, nor what is another's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from fixtures.core.errors import UserError
from fixtures.meters import nvml
from fixtures.meters.nvml import Card
from fixtures.meters.vram import Job
from fixtures.once_per_run import Found, OncePerRun

ROOT = Path(__file__).parents[2]
CARD = Card("a card", "580.1", 140 << 30, 0)
JOB = Job("1234", "a family", ("text", "image"))

# Two workers, each of which asks for all of it. Of what is named "second", only the second measurement succeeds.
INNER_CONFTEST = """
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures import memory_under_test
from fixtures.engines.process import EngineError
from fixtures.meters import nvml
from fixtures.meters.held import Ledger
from fixtures.meters.memory import Peak, Reading, Record
from fixtures.meters.vram import MeterError
from fixtures.once_per_run import OncePerRun

pytest_plugins = ["fixtures.options", "fixtures.checkpoints", "fixtures.once_per_run", "fixtures.memory_under_test"]
CALLS = Path({calls!r})
RECORD = Record(
    Reading(0, 0, 2, 620), Reading(700, 690, 720, 1340), 690, {{"text": Peak(800, 820, 1500, 30, 16)}}, seconds=0.1
)


def called(what):
    with CALLS.open("a") as stream:
        stream.write(what + "\\n")
    return what.endswith("second") and CALLS.read_text().splitlines().count(what) == 1


def measure(job, progress):
    name = Path(job.checkpoint).name
    if called(f"measure {{name}}"):
        if "crash" in name:
            raise MeterError("it crashed")
        return Record(RECORD.context, RECORD.context, 0, failed="out of memory while loading")
    return RECORD


class Servers:
    def __call__(self, checkpoint, serving):
        if called(f"serve {{checkpoint.digest}}"):
            raise EngineError("no memory is left")
        weights = tuple(range(690, 690 + serving.tensor_parallel))
        return SimpleNamespace(
            started=SimpleNamespace(kernels=("marlin",), weights_by_gpu=weights, kv_tokens=7), pids=lambda: {{1}}
        )

    def stop(self, checkpoint, serving):
        called(f"stop {{checkpoint.digest}}")


memory_under_test.measure = measure
memory_under_test.of_checkpoint = lambda *_: Ledger((), {{}})
memory_under_test.in_vllm = lambda checkpoint, adapter, media, kernels, gpus: Ledger(
    (), {{"of": len(kernels), "gpus": gpus}}
)
memory_under_test.would_fit = lambda *_: ""
nvml.card = lambda index=0: nvml.Card("a card", "580.1", 1 << 40, 0)
nvml.process_bytes = lambda pids, index: 1340 - index


@pytest.fixture(scope="session")
def servers():
    return Servers()


@pytest.fixture(scope="session")
def each_for_itself():
    return lambda what: OncePerRun(None)(what, what, lambda: {{"second": called(f"alone {{what}}")}})
"""
INNER = """
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.errors import UserError

FOLDER = Path({folder!r})
ADAPTER = ADAPTERS["qwen2_5_vl"]


@pytest.mark.parametrize("digest", ["good", "second", "crash-second"])
def test_it(digest, measured_memory, served_memory, each_for_itself, request):
    each_for_itself(digest)
    worker = getattr(request.config, "workerinput", {{}}).get("workerid", "alone")
    path = FOLDER.parent / worker / digest  # what it is depends on no place
    checkpoint = SimpleNamespace(
        digest=digest, name="a checkpoint", path=path, quantization=None, tensors={{}}, config={{}}
    )
    asked = {{
        "measure": lambda: measured_memory(checkpoint, ADAPTER),
        "serve": lambda: served_memory(checkpoint, ADAPTER, 0.25),
    }}
    for what, ask in asked.items():
        try:
            one = ask()
            assert ask() is one
            said = repr(one)
        except UserError as error:
            said = f"{{type(error).__name__}}: {{error}}"
        (FOLDER / f"{{what}} {{digest}} {{worker}}").write_text(said)
"""


def run_inner(pytester: pytest.Pytester, *arguments: str) -> tuple[Counter[str], dict[str, list[str]]]:
    """How often each thing was measured in a run, and what its workers were told of it."""
    calls, folder = pytester.path / "calls", pytester.path / "said"
    calls.write_text("")
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    pytester.makeconftest(INNER_CONFTEST.format(calls=str(calls)))
    pytester.makepyfile(INNER.format(folder=str(folder)))
    basetemp = f"--basetemp={pytester.path / 'base'}"  # the same for every run
    run = pytester.runpytest_subprocess(*arguments, basetemp, "-p", "no:cacheprovider", timeout=300)  # no wait for ever
    assert run.ret == 0, run.stdout.str()
    said: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        said.setdefault(file.name.rpartition(" ")[0], []).append(file.read_text())
    return Counter(calls.read_text().splitlines()), said


MEASURED, SERVED = "Measured(name='a checkpoint', ", "Served(name='a checkpoint', "


def test_two_workers_measure_once(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers measure a checkpoint once and are told the same; they take no failure, and nothing of former runs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for _ in range(2):
        calls, said = run_inner(pytester, "-n", "2", "--dist", "each")
        assert (calls["measure good"], calls["serve good"], calls["stop good"]) == (1, 1, 1)
        assert calls["alone good"] == 2, "workers that share nothing, planted, are seen"
        assert said["measure good"] == said["measure good"][:1] * 2
        assert said["measure good"][0].startswith(MEASURED)
        assert "Peak(allocated=800, " in said["measure good"][0]
        assert said["serve good"] == said["serve good"][:1] * 2
        assert said["serve good"][0].startswith(SERVED)
        assert "kv_per_token={'of': 1, 'gpus': 1}" in said["serve good"][0], "a ledger of the kernels that were named"
        assert "kernels=('marlin',), cards=(1340,), budget=274877906944" in said["serve good"][0]
        for what, failure in {
            "measure second": "OutOfMemoryError",
            "measure crash-second": "MeterError",
            "serve second": "EngineError",
        }.items():
            assert calls[what] == 2, what
            first, second = sorted(said[what], key=lambda told: told.startswith((MEASURED, SERVED)))
            assert first.startswith(f"{failure}: ")
            assert second.startswith((MEASURED, SERVED))


def test_one_process_measures_once(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without workers a checkpoint is measured once, too, its failure is known, and nothing is written anywhere."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    calls, said = run_inner(pytester)
    assert (calls["measure good"], calls["serve good"], calls["measure second"]) == (1, 1, 1)
    assert said["measure second"][0].startswith("OutOfMemoryError: ")
    assert [file.name for file in pytester.path.rglob("measured-*")] == []


def test_servers_over_two_gpus(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--tensor-parallel 2`` servers spread over two GPUs, whose weights, cards and ledgers are told of."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    _, said = run_inner(pytester, "--tensor-parallel", "2")
    assert "kv_per_token={'of': 1, 'gpus': 2}" in said["serve good"][0]
    assert "weights_by_gpu=(690, 691), kv_tokens=7, " in said["serve good"][0]
    assert "cards=(1340, 1339), " in said["serve good"][0]


# -- by itself ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a card into this machine; by default one like any other."""

    def put(**changes: object) -> None:
        monkeypatch.setattr(nvml, "card", lambda index=0: replace(CARD, **changes))  # type: ignore[arg-type]

    put()
    return put


def counted(folder: Path | None, key: object = JOB, found: Found | None = None) -> int:
    """How often a new worker measures that asks once, and is told what was found."""
    calls: list[object] = []

    def measure() -> Found:
        calls.append(key)
        return found or {"bytes": 700}

    assert OncePerRun(folder)("a checkpoint", key, measure) == (found or {"bytes": 700})
    return len(calls)


OTHERS = {
    "another checkpoint": replace(JOB, checkpoint="1235"),
    "another dtype": replace(JOB, dtype="bfloat16"),
    "other modalities": replace(JOB, modalities=("text",)),
    "another share": replace(JOB, memory_share=0.5),
    "something else of the same checkpoint": ("1234", "served"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_thing_is_measured_anew(other: str, tmp_path: Path) -> None:
    """A measurement is nobody's but the very thing's that was measured, however little another differs."""
    assert [counted(tmp_path), counted(tmp_path), counted(tmp_path, OTHERS[other])] == [1, 0, 1]


@pytest.mark.parametrize("change", [{"name": "another card"}, {"driver": "581.0"}, {"total": 80 << 30}], ids=str)
def test_another_card_is_measured_anew(change: dict[str, object], tmp_path: Path, card: Callable[..., None]) -> None:
    """A card of another kind, memory or driver takes no other's measurement; what is used of it makes no difference."""
    assert counted(tmp_path) == 1
    card(**change)
    assert counted(tmp_path) == 1
    card(used=7 << 30)
    assert counted(tmp_path) == 0


def test_a_card_without_a_name_shares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NVML says nothing of the card, every worker measures for itself."""

    def silent_card(index: int = 0) -> Card:
        raise UserError("NVML does not answer")

    monkeypatch.setattr(nvml, "card", silent_card)
    assert [counted(tmp_path), counted(tmp_path)] == [1, 1]
    assert list(tmp_path.iterdir()) == []


def test_half_a_file_is_not_believed(tmp_path: Path) -> None:
    """Of a file that was cut anywhere, or is yet to be finished, nothing is taken: it is measured and written anew."""
    assert counted(tmp_path) == 1
    (file,) = tmp_path.glob("*.json")
    written = file.read_bytes()
    assert json.loads(written) == {"bytes": 700}
    for length in range(len(written)):
        file.write_bytes(written[:length])
        assert counted(tmp_path) == 1, written[:length]
        assert file.read_bytes() == written
    file.rename(file.with_suffix(".partial"))  # of a worker that died as it wrote
    assert counted(tmp_path) == 1
    assert [found.name for found in tmp_path.iterdir() if not found.name.endswith(".lock")] == [file.name]


def test_a_failure_is_not_shared(tmp_path: Path) -> None:
    """Whether a measurement raises or says that it does not hold for others, the next worker measures, unhindered."""

    def failing() -> Found:
        raise UserError("it crashed")

    with pytest.raises(UserError, match="it crashed"):
        OncePerRun(tmp_path)("a checkpoint", JOB, failing)
    assert all(FileLock(lock).acquire(timeout=0) for lock in tmp_path.glob("*.lock"))
    failed: Found = {"bytes": 0, "failed": "out of memory"}
    assert OncePerRun(tmp_path)("a checkpoint", JOB, lambda: failed, lambda found: not found["failed"]) == failed
    assert [counted(tmp_path), counted(tmp_path)] == [1, 0]


# Measures in a process of its own, as memory is, until it is told to go on.
MEASURING = """
import subprocess, sys
from pathlib import Path

from fixtures.meters import nvml
from fixtures.meters.nvml import Card
from fixtures.meters.vram import Job
from fixtures.once_per_run import OncePerRun


def measure():
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=sys.stdin, start_new_session=True)
    print("measuring", started.pid, flush=True)
    started.wait()
    return {{"bytes": "measured by the first"}}


nvml.card = lambda index=0: {card!r}
OncePerRun(Path({folder!r}))("a checkpoint", {job!r}, measure)
"""


@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies"])
def test_what_another_is_measuring_is_waited_for(dies: bool, tmp_path: Path) -> None:
    """A worker waits for what another is measuring, and says so; should that one die, it measures itself."""
    source = MEASURING.format(card=CARD, folder=str(tmp_path), job=JOB)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [sys.executable, "-c", source], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdin is not None
    assert first.stdout is not None
    said: list[tuple[str, int, int]] = []
    lost = threading.Timer(300, first.kill)  # else a wait of which nothing is said would have no end
    lost.start()
    with first:
        word, child = first.stdout.readline().split()
        assert word == "measuring"

        def progress(what: str, done: int, total: int) -> None:
            said.append((what, done, total))
            if len(said) == 1 and dies:
                first.kill()  # and what it started lives on, as an orphan would
            elif len(said) == 1:
                first.stdin.write("\n")  # type: ignore[union-attr]
                first.stdin.flush()  # type: ignore[union-attr]

        found = OncePerRun(tmp_path, progress)("a checkpoint", JOB, lambda: {"bytes": "measured by the second"})
        if dies:
            os.kill(int(child), signal.SIGKILL)  # it is there still: it had no part in the lock
    lost.cancel()
    assert found == {"bytes": f"measured by the {'second' if dies else 'first'}"}
    told = "a checkpoint, measured by another worker"
    assert {what for what, _, _ in said} == {told}
    assert said[0] == (told, 0, 1)
    assert said[-1] == (told, 1, 1)
