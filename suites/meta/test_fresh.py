"""Work in processes of its own: its answer or its error comes home, and nothing of it is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import spawn
from pathlib import Path

import psutil
import pytest

from fixtures.core.errors import UserError
from fixtures.fresh import in_fresh_process, in_fresh_processes
from fixtures.quantizers.layers import Progress, silent

LARGE = bytes(1 << 20)  # more than a pipe holds


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


def test_side_by_side() -> None:
    """Each work's answer is at its place, and its progress goes to its own listener."""
    told: list[list[tuple[str, int, int]]] = [[], []]
    listeners = [lambda *said, at=at: told[at].append(said) for at in range(2)]
    assert in_fresh_processes([partial(double, 3), partial(double, 4)], listeners) == [6, 8]
    assert told == [[("doubling", 3, 3)], [("doubling", 4, 4)]]


def test_much_is_given() -> None:
    """A work gets arguments that are larger than a pipe holds."""
    assert in_fresh_process(silent, size, LARGE) == len(LARGE)


@pytest.mark.parametrize(
    ("work", "said"),
    [(partial(refuse, "no room"), "no room"), (partial(die), r"die died in its process \(exit code -9")],
    ids=["refuses", "is killed"],
)
def test_when_one_fails_the_others_end(work: partial[None], said: str) -> None:
    """What one of several raises, or that it died, is raised; nobody waits for the others, and none is left."""
    before = {process.pid for process in multiprocessing.active_children()}
    with pytest.raises(UserError, match=said):
        in_fresh_processes([partial(never_end), work], [silent, silent])
    assert {process.pid for process in multiprocessing.active_children()} <= before


def test_death_before_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends before it reads what it was given is a death like any other, not waited on for ever."""
    monkeypatch.setattr(spawn, "_python_exe", b"/bin/false")
    with pytest.raises(UserError, match=r"size died in its process \(exit code 1"):
        in_fresh_process(silent, size, LARGE)


def test_interrupted_while_it_imports(tmp_path: Path) -> None:
    """Ctrl-C while a process imports ends both at once and prints none of its frames."""
    (tmp_path / "work.py").write_text("def work(*, progress): progress('working', 0, 1)\n", encoding="utf-8")
    (tmp_path / "starts.py").write_text(
        "import time\n"
        "if __name__ == '__mp_main__':\n"
        "    print('importing', flush=True)\n"
        "    time.sleep(1)\n"
        "from fixtures.fresh import in_fresh_process\n"
        "from work import work\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        in_fresh_process(print, work)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n",
        encoding="utf-8",
    )
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "starts.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "importing\n"
        children = psutil.Process(running.pid).children(recursive=True)
        os.killpg(running.pid, signal.SIGINT)
        assert running.stdout.read() == "interrupted\n"
    assert running.returncode == 0
    assert len(children) >= 1
    assert not psutil.wait_procs(children, timeout=30)[1]
