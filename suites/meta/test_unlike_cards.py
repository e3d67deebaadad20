"""In a box of unlike cards a number means one card to CUDA, to NVML and to the report; no GPU is needed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import fixtures
from fixtures.meters import nvml
from reports import about

ROOT = Path(__file__).parents[2]
ORDER, VISIBLE = "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"
CARDS = {"GPU-aaa": "Tesla T4", "GPU-bbb": "NVIDIA H200"}  # by their place on the bus
SLICES = {"MIG-ccc": "NVIDIA H200 MIG 1g.18gb"}  # which have no number
FASTEST = ["GPU-bbb", "GPU-aaa"]


def cuda_sees() -> list[str]:
    """The visible cards' names in CUDA's order, as the two variables have it when CUDA starts."""
    order = list(CARDS) if os.environ.get(ORDER) == "PCI_BUS_ID" else FASTEST
    given = os.environ.get(VISIBLE)
    asked = order if given is None else [order[int(name)] if name.isdecimal() else name for name in given.split(",")]
    return [(CARDS | SLICES)[uuid] for uuid in asked]


@pytest.fixture
def nvml_of_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML, which knows neither variable."""
    fake = ModuleType("pynvml")
    vars(fake).update(
        NVMLError=LookupError, nvmlMemory_v2=2, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(CARDS), nvmlDeviceGetHandleByIndex=lambda index: list(CARDS)[index],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid, nvmlDeviceGetName=(CARDS | SLICES).__getitem__,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetMemoryInfo=lambda _handle, version=1: SimpleNamespace(total=1 << 30, used=version),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)


@pytest.mark.usefixtures("nvml_of_the_box")
@pytest.mark.parametrize("order", [None, "FASTEST_FIRST", "PCI_BUS_ID"])
@pytest.mark.parametrize("visible", [None, "0", "1", "1,0", "GPU-bbb", "GPU-bbb,0", "MIG-ccc"])
def test_a_number_is_one_card(visible: str | None, order: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order was asked for, what is read and reported is of the cards that CUDA computes on."""
    for name, value in ((ORDER, order), (VISIBLE, visible)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    importlib.reload(fixtures)  # as a process begins
    seen = cuda_sees()
    assert [nvml.card(index).name for index in range(len(seen))] == seen
    assert about.machine()["gpu"] == ", ".join(seen)


@pytest.mark.usefixtures("nvml_of_the_box")
def test_other_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, CUDA's first card is another than NVML's: the comparison can fail."""
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.delenv(ORDER, raising=False)
    assert cuda_sees()[0] != nvml.card(0).name


def test_what_is_started_has_the_order() -> None:
    """A process that uses any module of ours has the order, and so has what it starts."""
    say = f"import os; print(os.environ.get({ORDER!r}))"
    start = f"import fixtures.core.errors, subprocess, sys; subprocess.run([sys.executable, '-c', {say!r}], check=True)"
    environment = {name: value for name, value in os.environ.items() if name != ORDER} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "PCI_BUS_ID"
