"""A test that fails, even for want of GPU memory, gives back what it held."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from fixtures import gpus

ROOT = Path(__file__).parents[2]


class Tensor:
    """Stands for what a failed test's frames hold."""


def test_failed_test_gives_back() -> None:
    """What a failed test's frames held is free once the test is over, though pytest keeps its traceback."""
    held: list[weakref.ref[Tensor]] = []

    def fails() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise MemoryError

    try:
        fails()
    except MemoryError as error:
        sys.last_value, sys.last_traceback = error, error.__traceback__  # as pytest does
    gc.collect()
    assert held[0]() is not None
    gpus.release()
    gc.collect()
    assert held[0]() is None


OUT_OF_MEMORY = """
import gc
import weakref

import pytest

HELD = []

class Tensor:
    pass

@pytest.fixture
def batch():
    tensor = Tensor()
    HELD.append(weakref.ref(tensor))
    return tensor

@pytest.mark.gpu
def test_one(batch):
    "Fails for want of memory."
    more = Tensor()
    HELD.append(weakref.ref(more))
    raise MemoryError

@pytest.fixture
def model():
    gc.collect()
    return [held() for held in HELD]

@pytest.mark.gpu
def test_two(model):
    "Has all of it, from its setup on."
    assert model == [None, None]
"""


def test_next_test_has_its_memory(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU test that ran out of memory leaves nothing that the next one would miss."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest('pytest_plugins = ["fixtures.gpus"]')
    pytester.makepyfile(OUT_OF_MEMORY)
    run = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    run.assert_outcomes(passed=1, failed=1)


@pytest.mark.gpu
def test_fragments_are_given_back() -> None:
    """After a test that ran out of GPU memory, torch's allocator holds nothing of it."""
    code = """
import sys, torch
from fixtures import gpus
torch.cuda.set_per_process_memory_fraction(0.1)  # the rest may be others'
def fails():
    blocks = []
    try:
        while True:
            blocks.append(torch.empty(1 << 30, dtype=torch.uint8, device="cuda"))
    finally:
        keep = blocks
try:
    fails()
except torch.OutOfMemoryError as error:
    sys.last_value = error
assert torch.cuda.memory_reserved() > 2 << 30
gpus.release()
assert torch.cuda.memory_reserved() == 0, torch.cuda.memory_reserved()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
