"""The searches' Triton kernels give what their definitions in plain operations give, and tests would see if not."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from fixtures.core.pseudo_quantize import Scheme
from fixtures.fresh import in_fresh_process
from fixtures.quantizers import activation_aware
from fixtures.quantizers.activation_aware import rounding
from fixtures.quantizers.layers import silent
from suites.meta.beside_kernels import FAULTS, OUT, Found, beside, ready_beside

SCHEMES = [Scheme(4, 128), Scheme(4, 64), Scheme(3, 32), Scheme(8, 128, zero_point=False)]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process interprets its kernels; Triton asks when it is imported."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA on Linux: pip install triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def holds(found: Found, ties: int = 0) -> bool:
    """Weights to the bit; sums as far as float32's order of adding moves them, which may decide between equals."""
    sums = found.losses < 1e-5 and found.squares < 1e-5 and found.beyond < 1e-3
    return found.weights == 0 and found.lost == 0 and found.limits <= ties and sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_kernels_are_their_definitions(scheme: Scheme, dtype: torch.dtype) -> None:
    """A fused kernel rounds to the bit as the plain operations do, and its sums are theirs."""
    found = in_fresh_process(silent, beside, scheme, dtype)
    assert holds(found), found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_seen(fault: str) -> None:
    """A kernel with a fault planted in it is told from its definition."""
    found = in_fresh_process(silent, beside, Scheme(), torch.float16, "cpu", fault)
    assert not holds(found), found


def test_kernels_are_made_ready_beside_a_model() -> None:
    """Building a model changes torch's default dtype: kernels that a thread compiles meanwhile are float32's still."""
    assert in_fresh_process(silent, ready_beside, torch.bfloat16)


def test_without_kernels_where_they_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels cannot be made ready, plain operations run, and one warning says why."""
    fused = ModuleType("fused")

    def prepare(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    fused.prepare = prepare  # type: ignore[attr-defined]
    monkeypatch.setattr(activation_aware, "fused", fused, raising=False)
    monkeypatch.setitem(sys.modules, "fixtures.quantizers.activation_aware.fused", fused)
    monkeypatch.setattr(rounding, "_UNUSABLE", [])
    monkeypatch.setattr(rounding, "fusible", lambda *_: not rounding._UNUSABLE)
    with pytest.warns(UserWarning, match="quantizing without kernels, slower: RuntimeError: Failed to find C compiler"):
        rounding.prepare("cpu", torch.bfloat16, Scheme())()
    assert rounding._UNUSABLE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["32", "float16", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_kernels_on_a_gpu(scheme: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same compiled, where ranges that err alike to 6 digits may be told apart otherwise."""
    monkeypatch.delenv("TRITON_INTERPRET")
    found = beside(scheme, dtype, "cuda")  # here: nothing is interpreted
    assert holds(found, ties=OUT // 10), found
