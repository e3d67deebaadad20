"""What candidates are judged on: parts of a panel say of their units what the whole says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.engines.loading import load_model, load_processor
from fixtures.quantizers import calibration
from fixtures.quantizers.activation_aware import capture, judging
from fixtures.quantizers.activation_aware.capture import Call, decoder_calls, layer_features
from fixtures.quantizers.activation_aware.judging import Panel, Samples, Tokens, panel_for

VL = ADAPTERS["qwen2_5_vl"]


@pytest.fixture(scope="module")
def judged(tiny_reference: Checkpoint) -> dict[str, tuple[nn.Module, Panel]]:
    """A layer's modules, each slightly off, and what they are judged on: samples of every modality, in batches."""
    model = load_model(tiny_reference, VL, torch.float32)
    batches = calibration.batches(VL, load_processor(tiny_reference), calibration.built_in(VL, 6))
    halves = [{"input_ids": batch["input_ids"][rows]} for batch in batches for rows in (slice(2), slice(2, None))]
    (decoder,) = VL.decoders(tiny_reference.config)
    layer = decoder.modules(model)[1]
    calls = decoder_calls(layer, [partial(model, **half, use_cache=False) for half in halves if len(half["input_ids"])])
    features = layer_features(layer, calls, {"self_attn", "mlp", "mlp.down_proj"})
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(1 + 0.1 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)))
    return {name: (layer.get_submodule(name), panel_for(features, name)) for name in ("self_attn", "mlp")}


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
@torch.no_grad()
def test_parts_are_of_the_whole(name: str, judged: dict[str, tuple[nn.Module, Panel]]) -> None:
    """Every unit's error is the same in any part, be its rows cut out of a batch or joined with another's."""
    module, panel = judged[name]
    assert isinstance(panel, Samples if name == "self_attn" else Tokens)
    whole, sizes = panel.errors(module)[0], panel.sizes()
    assert len(whole) == len(sizes) == len(panel)
    for step in (1, 2, 3, 7):
        units = torch.arange(0, len(panel), step)
        part = panel.part(units)
        torch.testing.assert_close(part.errors(module)[0], whole[units], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(part.sizes(), sizes[units])
    assert panel.part(torch.arange(len(panel))).answers == panel.answers


@torch.no_grad()
def test_calls_are_joined(judged: dict[str, tuple[nn.Module, Panel]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one length are judged in one call, whichever batches they came in; a forward has no more than some."""
    module, panel = judged["self_attn"]
    assert isinstance(panel, Samples)
    lengths = [call.hidden.shape[1] for call in panel.calls]
    assert len(lengths) == len(set(lengths)) < len(panel)
    part = panel.part(torch.arange(0, len(panel), 2))
    assert isinstance(part, Samples)
    assert len(part.calls) <= len(panel.calls)
    whole, forwards = panel.errors(module)[0], []
    hook = module.register_forward_pre_hook(
        lambda *of: forwards.append(Call.of(*of[1:]).hidden.shape), with_kwargs=True
    )
    monkeypatch.setattr(judging, "TOKENS_AT_ONCE", 2 * max(lengths))
    torch.testing.assert_close(panel.errors(module)[0], whole, rtol=1e-4, atol=1e-7)
    hook.remove()
    assert len(forwards) > len(panel.calls)
    assert max(shape[:2].numel() for shape in forwards) <= 2 * max(lengths)


@torch.no_grad()
def test_positions_of_another_row_are_seen(
    judged: dict[str, tuple[nn.Module, Panel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows cut out without their own rotary embeddings would err otherwise."""
    module, panel = judged["self_attn"]
    assert isinstance(panel, Samples)
    units = torch.arange(1, len(panel), 2)
    panel = Samples([_with_own_positions(call) for call in panel.calls], panel.wanted)
    whole = panel.errors(module)[0, units]
    torch.testing.assert_close(panel.part(units).errors(module)[0], whole, rtol=1e-4, atol=1e-7)
    monkeypatch.setattr(Call, "rows", lambda call, chosen: Call(call.hidden[chosen], _first_rows(call, len(chosen))))
    assert not torch.allclose(panel.part(units).errors(module)[0], whole, rtol=1e-4, atol=1e-7)


def _with_own_positions(call: Call) -> Call:
    """Text alone has the same positions in every row; these differ."""
    cos, sin = call.others["position_embeddings"]
    return Call(call.hidden, {**call.others, "position_embeddings": (cos * (1 + call.hidden[..., :1].tanh()), sin)})


def _first_rows(call: Call, count: int) -> dict[str, object]:
    return {**call.others, "position_embeddings": tuple(part[:count] for part in call.others["position_embeddings"])}


@pytest.mark.parametrize(
    ("shape", "dimension"),
    [((4, 9), 0), ((4, 9, 64), 0), ((3, 4, 9, 64), 1), ((4, 1, 9, 9), 0), ((1, 1, 9, 9), None), ((1, 9, 64), None)],
    ids=str,
)
def test_batch_dimensions(shape: tuple[int, ...], dimension: int | None) -> None:
    """Positions, with three axes before them or not, and masks are cut along the batch; what all rows share is not."""
    assert capture._batch_dimension(shape, 4, 9) == dimension
    batch = 3  # as many as there are axes
    assert capture._batch_dimension((3, 3, 9, 64), batch, 9) == 1
    assert capture._batch_dimension((3, 3, 3, 64), batch, 3) == 1  # and as many tokens
    assert capture._batch_dimension((3, 1, 9, 64), 1, 9) == 1  # a batch of one row is no mask's heads
    assert capture._batch_dimension((1, 1, 9, 9), 1, 9) == 0


def test_what_does_not_go_together_stays_apart() -> None:
    """Calls of other lengths, or that share other positions among their rows, are not joined."""

    def call(rows: int, tokens: int, shared: Tensor | None = None, flag: bool = True) -> Call:
        cos = torch.rand(rows, tokens, 8) if shared is None else shared
        return Call(torch.rand(rows, tokens, 16), {"positions": (cos, cos), "causal": flag, "mask": None})

    both = call(2, 5).joined(call(3, 5))
    assert both is not None
    assert both.hidden.shape == (5, 5, 16)
    assert both.others["positions"][0].shape == (5, 5, 8)
    assert call(2, 5).joined(call(2, 6)) is None
    assert call(2, 5).joined(call(2, 5, flag=False)) is None
    assert call(2, 5, torch.rand(1, 5, 8)).joined(call(2, 5, torch.rand(1, 5, 8))) is None
    same = torch.rand(1, 5, 8)
    assert call(2, 5, same).joined(call(2, 5, same)) is not None


LENGTH = 5
KINDS: dict[str, Callable[[Tensor], object]] = {  # what goes along with hidden states, telling whose it is
    "positions": lambda own: own[..., 0],
    "embeddings": lambda own: (own[..., :1], own[..., :2]),
    "three axes": lambda own: torch.stack([own, own, own]),
    "mask": lambda own: own[:, None, :, :1].expand(-1, 1, LENGTH, LENGTH),
}


def _calls(kind: str) -> tuple[list[Call], Tensor, Tensor]:
    """Calls of several lengths and numbers of rows, what they read, and what was answered: the same."""
    calls = []
    for number, (rows, tokens) in enumerate([(2, LENGTH), (1, LENGTH), (3, LENGTH), (2, 4), (1, LENGTH)]):
        hidden = torch.arange(rows * tokens * 3).view(rows, tokens, 3) + 1000.0 * number
        calls.append(Call(hidden, {"own": KINDS[kind](hidden) if tokens == LENGTH else None, "causal": True}))
    together = torch.cat([call.hidden.flatten(0, 1) for call in calls])
    return calls, together, together


class Telling(nn.Module):
    """Attention that answers what it reads, if what goes along is its rows' own, in every repetition."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: Tensor, own: object, causal: bool) -> Tensor:
        assert causal
        if own is not None:
            torch.testing.assert_close(own, KINDS[self.kind](hidden), rtol=0, atol=0)
        return hidden


@pytest.mark.parametrize("most", [LENGTH, 2 * LENGTH, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_own(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined, cut, gathered, repeated: what goes along with a row's hidden states stays with that row."""
    monkeypatch.setattr(judging, "TOKENS_AT_ONCE", most)
    panel = Samples(*judging._together(*_calls(kind)))
    assert [call.hidden.shape[:2] for call in panel.calls] == [(6, LENGTH), (2, 4), (1, LENGTH)]
    assert panel.at_once == min(most, panel.tokens)
    for units in ([0, 3, 5, 7], [2], [8], range(9)):
        part = panel.part(torch.tensor([*units]))
        assert part.answers == sum(4 * 3 if unit in (6, 7) else LENGTH * 3 for unit in units)
        for repeated in (1, 3):
            errors = part.errors(Telling(kind), repeated)
            assert errors.shape == (repeated, len(units))
            assert not errors.any()


def _joined_in_another_order(patch: pytest.MonkeyPatch) -> None:
    real = torch.cat
    patch.setattr(capture.torch, "cat", lambda parts, at=0: real([*parts][::-1], at))


def _cut_from_the_beginning(patch: pytest.MonkeyPatch) -> None:
    real = Call._by_row

    def by_row(call: Call, cut: Callable[[Tensor, int], Tensor]) -> Call:
        found, first = real(call, cut), real(call, lambda tensor, at: tensor.narrow(at, 0, len(cut(call.hidden, 0))))
        return Call(found.hidden, first.others) if len(found.hidden) < len(call.hidden) else found

    patch.setattr(Call, "_by_row", by_row)


@pytest.mark.parametrize("plant", [_joined_in_another_order, _cut_from_the_beginning])
def test_what_is_anothers_is_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were joined in another order than what goes along with them, or cut elsewhere, are told."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_rows_keep_their_own("positions", 2 * LENGTH, monkeypatch)


def test_a_forward_has_one_sample_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample longer than a forward should be is a forward by itself, and counted as long as it is."""
    monkeypatch.setattr(judging, "TOKENS_AT_ONCE", 3)
    panel = Samples(*judging._together(*_calls("positions")))
    assert panel.at_once == LENGTH
    assert not panel.errors(Telling("positions"), 2).any()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2, 1, 5, 5), None),
        (None, torch.ones(2, 1, 5, 5)),
        (3, torch.ones(2, 5)),
        ((torch.ones(2, 5),), None),
        ((torch.ones(2, 5),), (torch.ones(2, 5), torch.ones(2, 5))),
        ([torch.ones(1, 5)], [torch.ones(1, 5)]),
    ],
    ids=["mask-none", "none-mask", "number-tensor", "tuple-none", "tuples of unlike length", "in a list"],
)
def test_unlike_things_are_not_joined(one: object, other: object) -> None:
    """Calls that were given different kinds of things, or what belongs to rows that nobody can tell, stay apart."""
    hidden = torch.rand(2, 5, 3)
    assert Call(hidden, {"it": one}).joined(Call(hidden, {"it": other})) is None


def test_one_mask_of_two_calls_is_theirs_twice() -> None:
    """One tensor given to two calls, with a row for each row of theirs, is there twice when they are joined."""
    hidden, mask = torch.rand(2, 5, 3), torch.rand(2, 1, 5, 5)
    both = Call(hidden, {"mask": mask}).joined(Call(hidden, {"mask": mask}))
    assert both is not None
    assert torch.equal(both.others["mask"], torch.cat([mask, mask]))
