"""NVML: cards, and what of their bytes is ours or others'; what it does not tell is None, never 0 or a part."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fixtures.meters import nvml
from fixtures.meters.memory import GIB


class FakeNvmlError(Exception):
    """NVML's own error."""


def fake_nvml(processes: Mapping[int, int | None], *, used: int = GIB, broken: str = "") -> ModuleType:
    """A module like pynvml, of one card on which these processes hold so many bytes."""
    fake = ModuleType("pynvml")
    asked: list[object] = []

    def handle(which: object) -> object:
        asked.append(which)
        if which not in (0, 3, "GPU-abc"):
            raise FakeNvmlError("Invalid Argument")
        return which

    def start() -> None:
        if broken == "init":
            raise FakeNvmlError("Driver Not Loaded")

    def running(_: object) -> list[Any]:
        if broken == "processes":
            raise FakeNvmlError("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in processes.items()]

    vars(fake).update(
        NVMLError=FakeNvmlError, nvmlMemory_v2=2, nvmlInit=start, nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=handle, nvmlDeviceGetHandleByUUID=handle, asked=asked,
        nvmlDeviceGetName=lambda _: b"NVIDIA H200", nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetMemoryInfo=lambda _, version: SimpleNamespace(total=4 * GIB, used=used, version=version),
        nvmlDeviceGetCudaComputeCapability=lambda _: [9, 0],
        nvmlDeviceGetComputeRunningProcesses=running, nvmlDeviceGetGraphicsRunningProcesses=lambda _: [],
    )  # fmt: skip
    return fake


@pytest.fixture
def with_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Puts a fake NVML in place."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*args: Any, **kwargs: Any) -> ModuleType:
        fake = fake_nvml(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


# Cards


def test_card(with_nvml: Callable[..., ModuleType]) -> None:
    """A card tells its name, driver and memory."""
    with_nvml({})
    assert nvml.card() == nvml.Card("NVIDIA H200", "580.1", 4 * GIB, GIB)
    assert nvml.card().free == 3 * GIB


@pytest.mark.parametrize(("visible", "physical"), [("", 0), ("3", 3), ("3,0", 3), ("GPU-abc", "GPU-abc")])
def test_visible_devices(
    visible: str, physical: int | str, with_nvml: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first card is the first one that CUDA sees, which NVML by itself does not know."""
    fake = with_nvml({})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml.card()
    assert fake.asked == [physical]


def test_no_such_card(with_nvml: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is not there, and an NVML that does not start, cost one line."""
    with_nvml({})
    with pytest.raises(nvml.NvmlError, match="Invalid Argument"):
        nvml.card(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(nvml.NvmlError, match="there is no GPU 1"):
        nvml.card(1)
    with_nvml({}, broken="init")
    with pytest.raises(nvml.NvmlError, match="does not start"):
        nvml.card()


def test_capability(with_nvml: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's generation is the visible card's; of one that is not there it is an error, as of everything else."""
    fake = with_nvml({})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert nvml.capability() == (9, 0)
    assert fake.asked == [3]
    with pytest.raises(nvml.NvmlError):
        nvml.capability(1)


def test_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pynvml the command that installs it is named."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.NvmlError, match="pip install nvidia-ml-py"):
        nvml.card()


# Bytes of processes


def test_bytes_by_process(with_nvml: Callable[..., ModuleType]) -> None:
    """Own processes are added up, others' apart from them."""
    with_nvml({10: 5, 11: 7, 12: 100})
    assert nvml.process_bytes({10, 11}) == 12
    assert nvml.bytes_of_others({10, 11}) == 100
    assert nvml.bytes_of_others({10, 11, 12}) == 0


@pytest.mark.parametrize(
    ("processes", "broken"), [({}, ""), ({99: 7}, ""), ({10: None}, ""), ({10: 5, 11: None}, ""), ({}, "processes")]
)
def test_bytes_that_nvml_does_not_tell(
    processes: Mapping[int, int | None], broken: str, with_nvml: Callable[..., ModuleType]
) -> None:
    """Where NVML knows no own process, or hides one's bytes, the answer is None, never 0 or a part."""
    with_nvml(processes, broken=broken)
    assert nvml.process_bytes({10, 11}) is None


def test_others_that_nvml_does_not_tell(with_nvml: Callable[..., ModuleType]) -> None:
    """Another process whose bytes are hidden makes others' bytes unknown."""
    with_nvml({10: 5, 99: None})
    assert nvml.bytes_of_others({10}) is None


def test_ours_are_all_that_the_run_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own processes are the one that runs it and all below it; another run's are strangers."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        monkeypatch.setenv(nvml.RUN, str(os.getpid()))
        assert {os.getpid(), child.pid} <= nvml.ours()
        assert os.getppid() not in nvml.ours()
        monkeypatch.setenv(nvml.RUN, str(child.pid))
        assert nvml.ours() == {os.getpid(), child.pid}
        assert child.stdin is not None
        child.stdin.close()
    monkeypatch.setenv(nvml.RUN, str(child.pid))  # which has ended
    assert os.getpid() in nvml.ours()
