"""GPUs of a run: shared out among workers, refused where there are too few, and told of in the header."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures import gpus
from fixtures.core.errors import UserError
from reports.stash import ABOUT

ROOT = Path(__file__).parents[2]


# Shared out


SHARES: dict[str, tuple[list[str], int, list[list[str]]]] = {
    "one each": (["0", "1"], 1, [["0"], ["1"]]),
    "more workers than GPUs": (["0", "1"], 1, [["0"], ["1"], ["0"]]),
    "some of the machine's": (["5", "7"], 1, [["5"], ["7"]]),
    "by UUID": (["GPU-a", "GPU-b"], 1, [["GPU-a"], ["GPU-b"]]),
    "two each": (["0", "1", "2", "3"], 2, [["0", "1"], ["2", "3"], ["0", "1"]]),
    "one left over": (["0", "1", "2"], 2, [["0", "1"], ["0", "1"]]),
    "too few": (["0"], 2, [["0"]]),
    "none": ([], 1, [[]]),
}


@pytest.mark.parametrize("case", SHARES)
def test_shares(case: str) -> None:
    """Every worker has GPUs of its own, and shares them in turn when there are too few."""
    there, each, wanted = SHARES[case]
    assert [gpus.share(there, worker, each) for worker in range(len(wanted))] == wanted


@pytest.mark.parametrize(
    ("variable", "there", "wanted"),
    [
        (None, 2, ["0", "1"]),
        ("1", 1, ["1"]),
        ("3, 1", 2, ["3", "1"]),
        ("0,1", 0, []),  # names GPUs of a machine that has none
        ("", 0, []),
    ],
)
def test_visible(variable: str | None, there: int, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPUs to share out are those that CUDA_VISIBLE_DEVICES names, else all."""
    monkeypatch.setattr(gpus, "count", lambda: there)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(gpus.VISIBLE, variable)
    assert gpus.visible() == wanted


FAKE_GPUS = """
from fixtures import gpus

pytest_plugins = ["fixtures.gpus"]
gpus.count = lambda: len((os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(","))
"""
WHO_HAS_WHAT = """
import os
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("number", range(8))
def test_it(number, worker_id):
    ask = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    said = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    with open({shared!r}, "a") as stream:
        stream.write(f"{{worker_id}} {{os.environ.get('CUDA_VISIBLE_DEVICES')}} {{said}}\\n")
"""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, {"gw0 0 0", "gw1 1 1"}),
        ("4,6", {"gw0 4 4", "gw1 6 6"}),
    ],
)
def test_workers_are_pinned(
    given: str | None, wanted: set[str], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With -n 2 each worker sees one GPU of its own of those the run was given, and so does whatever it starts."""
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if given:
        monkeypatch.setenv(gpus.VISIBLE, given)
    pytester.makeconftest(f"import os\n{FAKE_GPUS}")
    shared = pytester.path / "said"
    pytester.makepyfile(WHO_HAS_WHAT.format(shared=str(shared)))
    run = pytester.runpytest_subprocess("-n", "2", "--dist", "each", "-p", "no:cacheprovider")
    assert run.ret == 0, run.stdout.str()
    assert set(shared.read_text().splitlines()) == wanted


# Refused


def config_of(workers: int = 0, each: int = 1, **more: Any) -> pytest.Config:
    """As much of a pytest config as GPUs ask for."""
    option = SimpleNamespace(numprocesses=workers, tensor_parallel=each)
    return SimpleNamespace(option=option, **more)  # type: ignore[return-value]


REFUSED = {
    "none": (0, 0, 1, "no usable GPU"),
    "too many workers": (2, 3, 1, "-n 3: 3 workers need 3 GPUs, 1 each, and there are 2: use -n 2"),
    "workers that spread": (2, 2, 2, "-n 2: 2 workers need 4 GPUs, 2 each, and there are 2: use -n 1"),
    "too wide a spread": (1, 0, 2, "--tensor-parallel 2 needs 2 GPUs; there is 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_machine_cannot_do(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of GPU tests that wants more GPUs than there are is refused, saying what would do."""
    there, workers, each, said = REFUSED[case]
    monkeypatch.setattr(gpus, "visible", lambda: [str(index) for index in range(there)])
    with pytest.raises(UserError) as caught:
        gpus.require(config_of(workers, each))
    assert said in str(caught.value)


def test_what_the_machine_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many workers as GPUs are welcome; a worker, which has but its own GPU, counts no others."""
    monkeypatch.setattr(gpus, "visible", lambda: ["0", "1"])
    monkeypatch.setattr(gpus, "why_unusable", lambda: "")
    gpus.require(config_of(2, 1))
    gpus.require(config_of(0, 2))
    monkeypatch.setattr(gpus, "visible", lambda: ["1"])
    gpus.require(config_of(2, 1, workerinput={"workerid": "gw1"}))


BROKEN = {
    "no driver": ("raise RuntimeError('Found no NVIDIA driver')", "RuntimeError: Found no NVIDIA driver"),
    "full": ("raise torch.OutOfMemoryError('CUDA out of memory.')", "OutOfMemoryError: CUDA out of memory."),
    "killed": ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    "hangs": ("import time; time.sleep(600)", "it did not answer within 20 s"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_gpu_that_computes_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is counted but computes nothing is refused in one line that says why; a worker does not try again."""
    broken, said = BROKEN[case]
    monkeypatch.setattr(gpus, "PATIENCE", 20.0)
    monkeypatch.setattr(gpus, "TRY", f"import torch; {broken}")
    monkeypatch.setattr(gpus, "visible", lambda: ["0"])
    with pytest.raises(UserError) as caught:
        gpus.require(config_of())
    assert str(caught.value).startswith("-m gpu: no usable GPU (")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    gpus.require(config_of(workerinput={"workerid": "gw0"}))


# Told of


CARDS: dict[str, tuple[int | None, str]] = {
    "nobody": (0, "NVIDIA H200, 139.0 GiB, driver 580.1, used by nobody else"),
    "others": (3 << 30, "NVIDIA H200, 139.0 GiB, driver 580.1, OTHERS HOLD 3.0 GiB"),
    "hidden": (None, "NVIDIA H200, 139.0 GiB, driver 580.1, 5.0 GiB in use at the start"),
}


@pytest.mark.parametrize("case", CARDS)
def test_header_tells_of_others(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header and the report say what a card is and what others hold of it, or that this cannot be known."""
    from fixtures.meters import nvml

    others, said = CARDS[case]
    monkeypatch.setattr(gpus, "visible", lambda: ["0"])
    monkeypatch.setattr(nvml, "card", lambda index=0: nvml.Card("NVIDIA H200", "580.1", 139 << 30, 5 << 30))
    monkeypatch.setattr(nvml, "bytes_of_others", lambda own, index=0: others)
    config: Any = SimpleNamespace(stash=pytest.Stash(), option=SimpleNamespace())
    assert gpus.pytest_report_header(config) == [f"gpu 0: {said}"]
    assert config.stash[ABOUT] == {"gpus at start": {"gpu 0": said}}


def test_report_tells_how_wide_engines_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over how many GPUs an engine spreads is in the report, where it is not one."""
    monkeypatch.setattr(gpus, "visible", list)
    config: Any = SimpleNamespace(stash=pytest.Stash(), option=SimpleNamespace(tensor_parallel=2))
    assert gpus.pytest_report_header(config) == []
    assert config.stash[ABOUT] == {"engines": {"spread": "over 2 GPUs"}}


@pytest.mark.gpu
def test_asking_costs_no_memory() -> None:
    """Counting and measuring GPUs makes no CUDA context: NVML does not know the process that did."""
    code = (
        "import os; from fixtures import gpus; from fixtures.meters import nvml; "
        "assert gpus.has_gpu(); print(gpus.described(0)); assert os.getpid() not in nvml.by_process()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
