"""What a run says of its machine: the GPUs that it could use, not all that are in the box."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from reports import about

CARDS = {"0": "GPU-aaa", "1": "GPU-bbb", "2": "GPU-ccc"}


@pytest.fixture
def three_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with three cards, named by their numbers."""
    nvml = ModuleType("pynvml")

    class NVMLError(Exception):
        """As pynvml's."""

    def by_uuid(name: str) -> str:
        found = [number for number, uuid in CARDS.items() if uuid == name]
        if not found:
            raise NVMLError(name)
        return found[0]

    answers = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(CARDS),
        "nvmlDeviceGetHandleByIndex": str,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetName": lambda handle: f"card {handle}",
        "nvmlSystemGetDriverVersion": lambda: b"580.1",
        "nvmlDeviceGetMemoryInfo": lambda _handle: SimpleNamespace(total=140 << 30),
    }
    for name, answer in answers.items():
        setattr(nvml, name, answer)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, "card 0, card 1, card 2"),
        ("1", "card 1"),
        ("2, 0", "card 2, card 0"),
        ("GPU-bbb", "card 1"),
        ("0,7,1", "card 0"),  # as CUDA has it, what follows a card that there is not is hidden
        ("", None),
        ("-1", None),
        ("GPU-zzz", None),
    ],
)
def test_visible_gpus(
    visible: str | None, gpus: str | None, three_cards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run names the GPUs that CUDA_VISIBLE_DEVICES leaves it: nights of one card are not those of a box of three."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = about.machine()
    assert machine.get("gpu") == gpus
    assert machine.get("driver") == ("580.1" if gpus else None)
