"""What candidates are judged on: parts of a panel say of their units what the whole says."""

from __future__ import annotations

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
    for call in panel.calls:  # text alone has the same positions in every row
        cos, _ = call.others["position_embeddings"]
        cos.mul_(1 + 0.1 * torch.arange(len(cos))[:, None, None])
    whole = panel.errors(module)[0, units]
    torch.testing.assert_close(panel.part(units).errors(module)[0], whole, rtol=1e-4, atol=1e-7)
    monkeypatch.setattr(Call, "rows", lambda call, chosen: Call(call.hidden[chosen], _first_rows(call, len(chosen))))
    assert not torch.allclose(panel.part(units).errors(module)[0], whole, rtol=1e-4, atol=1e-7)


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
