"""Work in processes of its own: its answer or its error comes home, and nothing of it is left."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import popen_spawn_posix as spawn_posix
from multiprocessing import resource_tracker, spawn
from pathlib import Path
from typing import Any

import psutil
import pytest

from fixtures import fresh
from fixtures.core.errors import UserError
from fixtures.fresh import in_fresh_process, in_fresh_processes
from fixtures.quantizers.layers import Progress, silent

LARGE = bytes(1 << 20)  # more than a pipe holds
HURRY = 300.0  # seconds: what takes longer has waited for something; nothing here takes a tenth of it


def double(number: int, *, progress: Progress) -> int:
    """A work that tells of itself."""
    progress("doubling", number, number)
    return 2 * number


def size(data: bytes, *, progress: Progress) -> int:
    """A work that is given much."""
    return len(data)


def refuse(reason: str, *, progress: Progress) -> None:
    """A work that cannot be done."""
    raise UserError(reason)


def die(*, progress: Progress) -> None:
    """A work that is killed, as for memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def never_end(*, progress: Progress) -> None:
    """A work that somebody has to end."""
    progress("waiting", 0, 1)
    time.sleep(600)


def interrupt_itself(*, progress: Progress) -> None:
    """A work that somebody interrupts, alone."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)


def leave_a_word(file: Path, *, progress: Progress) -> None:
    """A work that fails, and has something left to do when its interpreter exits."""
    atexit.register(lambda: (time.sleep(0.3), file.touch()))
    raise ValueError("no")


def tidy_up(file: Path, *, progress: Progress) -> None:
    """A work that goes on for long, and leaves nothing half done."""
    try:
        for step in range(6000):
            progress("working", step, 6000)
            time.sleep(0.1)
    finally:
        file.touch()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever waits for a process to end by itself waits for minutes, and the test fails."""
    monkeypatch.setattr(fresh, "KILLED_WITHIN", 2 * HURRY)
    before, begun = set(multiprocessing.active_children()), time.monotonic()
    yield
    assert time.monotonic() - begun < HURRY, "somebody was waited for"
    assert set(multiprocessing.active_children()) <= before


def test_side_by_side() -> None:
    """Each work's answer is at its place, and its progress goes to its own listener."""
    told: list[list[tuple[str, int, int]]] = [[], []]
    listeners = [lambda *said, at=at: told[at].append(said) for at in range(2)]
    assert in_fresh_processes({"one": partial(double, 3), "two": partial(double, 4)}, listeners) == [6, 8]
    assert told == [[("doubling", 3, 3)], [("doubling", 4, 4)]]


def test_much_is_given() -> None:
    """A work gets arguments that are larger than a pipe holds."""
    assert in_fresh_process(silent, size, LARGE) == len(LARGE)


@pytest.mark.parametrize(
    ("work", "raised", "said"),
    [
        (partial(refuse, "no room"), UserError, "no room"),
        (partial(die), UserError, r"^one died in its process \(exit code -9"),
        (partial(interrupt_itself), KeyboardInterrupt, None),
    ],
    ids=["refuses", "is killed", "is interrupted"],
)
@pytest.mark.usefixtures("patience")
def test_when_one_fails_the_others_end(work: partial[None], raised: type[BaseException], said: str | None) -> None:
    """What one of several raises, or that it died, is raised; nobody waits for the others, and none is left."""
    with pytest.raises(raised, match=said):
        in_fresh_processes({"other": partial(never_end), "one": work}, [silent, silent])


@pytest.mark.usefixtures("patience")
def test_start_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no further process can be started, those that were are ended."""
    real, started = spawn_posix.Popen._launch, []

    def launch(*of: Any) -> None:
        if started:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(of)
        real(*of)

    monkeypatch.setattr(spawn_posix.Popen, "_launch", launch)
    with pytest.raises(OSError, match="unavailable"):
        in_fresh_processes({"one": partial(never_end), "two": partial(never_end)}, [silent, silent])
    assert started


@pytest.mark.usefixtures("patience")
def test_death_before_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends before it reads what it was given is a death like any other, not waited on for ever."""
    resource_tracker.ensure_running()  # by Python, not by what comes
    monkeypatch.setattr(spawn, "_python_exe", b"/bin/false")
    with pytest.raises(UserError, match=r"size died in its process \(exit code 1"):
        in_fresh_process(silent, size, LARGE)


def test_failing_work_exits_by_itself(tmp_path: Path) -> None:
    """A work that raises is not killed: what it registered for its exit is done; and its error says where it was."""
    with pytest.raises(ValueError, match="no") as raised:
        in_fresh_process(silent, leave_a_word, tmp_path / "word")
    assert (tmp_path / "word").exists()
    assert "in leave_a_word" in "".join(raised.value.__notes__)


def test_listener_that_fails(tmp_path: Path) -> None:
    """Where who listens to progress raises, the work is told so, and cleans up."""

    def refuse_to_listen(what: str, done: int, total: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        in_fresh_process(refuse_to_listen, tidy_up, tmp_path / "tidy")
    assert (tmp_path / "tidy").exists()


STARTS = """
import os, sys, time
if __name__ == "__mp_main__" and sys.argv[1] == "importing":
    print("importing", flush=True)
    time.sleep(600)
from pathlib import Path
from fixtures import fresh
from suites.meta.test_fresh import tidy_up
fresh.KILLED_WITHIN = 600
if __name__ == "__main__":
    try:
        fresh.in_fresh_process(lambda what, *_: print(what, flush=True), tidy_up, Path(sys.argv[2]))
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize(
    ("when", "how"),
    [("importing", signal.SIGINT), ("working", signal.SIGINT), ("working", signal.SIGKILL)],
)
def test_ended_from_outside(when: str, how: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, while a process imports or works, ends both at once and prints no frames; whoever is orphaned ends."""
    (tmp_path / "starts.py").write_text(STARTS, encoding="utf-8")
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "starts.py"), when, str(tmp_path / "tidy")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
        # a job in the background of a script ignores interrupts, and so does all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == f"{when}\n"
        children = psutil.Process(running.pid).children(recursive=True)
        assert children
        if how == signal.SIGINT:
            os.killpg(running.pid, how)
            assert running.stdout.read().replace("working\n", "") == "interrupted\n"
        else:
            running.kill()
            assert "Traceback" not in running.stdout.read()  # closed by the last who holds it
    assert (tmp_path / "tidy").exists() == (when == "working")
    assert not psutil.wait_procs(children, timeout=HURRY)[1]
    assert time.monotonic() - begun < HURRY
