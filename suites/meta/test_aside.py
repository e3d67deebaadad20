"""What a thread brings home from a GPU beside the search is what was made there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.formats import awq_gemm
from fixtures.quantizers.artifact import ShardWriter, store
from fixtures.quantizers.aside import Aside, made_now, through
from fixtures.quantizers.layers import QuantizedLayer

STAGE = 24  # bytes: most tensors below take several pieces


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(60, dtype=torch.int32).view(5, 12),
        torch.arange(60, dtype=torch.int32).view(5, 12).t(),  # as packed words come
        torch.rand(7, generator=torch.Generator().manual_seed(0)),
        torch.rand(13).half(),
        torch.rand(6).bfloat16(),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.tensor([True, False, True]),
    ],
    ids=lambda tensor: f"{str(tensor.dtype)[6:]}{list(tensor.shape)}",
)
def test_whole_in_pieces(tensor: Tensor) -> None:
    """Whatever its shape, strides and dtype, a tensor comes through a stage smaller than itself as it was."""
    waited: list[int] = []
    home = through(tensor, torch.zeros(STAGE, dtype=torch.uint8), lambda: waited.append(1))
    assert home.shape == tensor.shape
    assert home.dtype == tensor.dtype
    assert home.is_contiguous()
    assert torch.equal(home, tensor)
    assert home.data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert len(waited) == max(1, -(-tensor.nbytes // STAGE))


def test_read_only_when_it_has_arrived() -> None:
    """A piece is taken from the stage after the wait for it, not before: until then a GPU may still be writing."""
    stage = torch.zeros(STAGE, dtype=torch.uint8)
    home = through(torch.zeros(STAGE * 2, dtype=torch.uint8), stage, lambda: stage.fill_(7))  # arrives while it waits
    assert home.eq(7).all()


def test_plain_on_a_cpu() -> None:
    """Without a GPU nothing is staged and nothing is waited for."""
    aside, tensor = Aside(), torch.rand(3, 4).t()
    assert made_now([tensor]) is None
    with aside.after(None):
        home = aside.home(tensor)
    assert home.is_contiguous()
    assert torch.equal(home, tensor)


def test_plain_where_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that grants no pinned memory has plain copies, not an end."""

    def refused(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refused)
    assert Aside()._stage is None


@pytest.mark.gpu
def test_made_before_it_is_brought_home() -> None:
    """On a GPU what is still being computed is waited for; by an event from before, it would come home unmade."""
    aside, device = Aside(), torch.device("cuda", torch.cuda.current_device())
    made = torch.zeros(1 << 20, device=device)
    early = made_now([made])
    with aside.after(early):
        aside.home(made)  # stream and stage are there now: making them may wait for all that is queued
    early = made_now([made])
    torch.cuda._sleep(1 << 31)  # about a second's work before it
    made += 1
    late = made_now([made])
    with aside.after(early):
        assert aside.home(made).eq(0).all(), "nobody waited: the fault that the event is for"
    with aside.after(late):
        assert aside.home(made).eq(1).all()


@pytest.mark.gpu
def test_layers_are_stored_when_they_are_made(tmp_path: Path) -> None:
    """A layer that a GPU is still at work on when it is handed over is written as it will be, not as it was."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    wanted = pseudo_quantize_tensor(weight, Scheme(), scale_dtype=torch.float16)
    place = replace(wanted, codes=torch.zeros_like(wanted.codes, device="cuda"), scales=wanted.scales.cuda())
    place = replace(place, zeros=wanted.zeros.cuda())

    def layers() -> Iterator[QuantizedLayer]:
        yield QuantizedLayer({"warm": place})
        torch.cuda._sleep(1 << 31)
        place.codes.copy_(wanted.codes.pin_memory(), non_blocking=True)
        yield QuantizedLayer({"cold": place})

    shards = ShardWriter(tmp_path, 1 << 30)
    store(layers(), shards)
    written = awq_gemm.encode(wanted)
    assert torch.equal(shards.pending["cold.qweight"], written["qweight"])
    assert not torch.equal(shards.pending["warm.qweight"], written["qweight"])


@pytest.mark.gpu
def test_a_thread_makes_no_context_elsewhere() -> None:
    """Work on the second card leaves the first one alone: a context there would take half a gigabyte."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = subprocess.run([sys.executable, "-c", ON_THE_SECOND], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["False", "True"], found.stderr


ON_THE_SECOND = """
from concurrent.futures import ThreadPoolExecutor
import torch
from fixtures.quantizers.aside import Aside, made_now
torch.cuda.set_device(1)
tensor, aside = torch.ones(4, device="cuda:1"), Aside()
def bring():
    with aside.after(made_now([tensor])):
        return aside.home(tensor)
with ThreadPoolExecutor(1) as pool:
    assert pool.submit(bring).result().eq(1).all()
print(*(torch._C._cuda_hasPrimaryContext(card) for card in (0, 1)))
"""
