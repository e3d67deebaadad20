"""What a thread brings home from a GPU beside the search is what was made there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fixtures.quantizers.aside import Aside, made_now, through

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


@pytest.mark.gpu
def test_made_before_it_is_brought_home() -> None:
    """On a GPU what is still being computed is waited for; by an event from before, it would come home unmade."""
    aside, device = Aside(), torch.device("cuda", torch.cuda.current_device())
    stale, made = torch.zeros(2, 1 << 20, device=device)
    early = made_now([made])
    torch.cuda._sleep(1 << 30)  # about half a second's work before it
    made += 1
    late = made_now([made])
    with aside.after(early):
        assert aside.home(made).eq(0).all(), "nobody waited: the fault that the event is for"
    with aside.after(late):
        assert aside.home(made).eq(1).all()
        assert aside.home(stale).eq(0).all()
