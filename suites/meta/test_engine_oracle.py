"""The engine against the plain one: the same exponents, limits and bytes in float32; a fault in any part is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.adapters import Decoder, adapter_for
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model, load_processor
from fixtures.formats import awq_gemm
from fixtures.quantizers import Job, calibration
from fixtures.quantizers.activation_aware import (
    capture,
    clipping,
    engine,
    load_outline,
    outline,
    quantize_layers,
    scaling,
    settling,
)
from fixtures.quantizers.activation_aware.rounding import rounded
from fixtures.quantizers.layers import QuantizedLayer
from fixtures.subjects import shipped
from suites.meta import plain_awq

PER_MODALITY = 2
CASES = [("qwen2_5_vl", "language_model"), ("qwen2_5_omni", "language_model"), ("qwen2_5_omni", "talker")]


@dataclass(frozen=True)
class Case:
    """A decoder of a shipped checkpoint, calibrated on a few samples."""

    reference: HubView
    decoder: Decoder
    processor: Any

    def run(self, quantizing: Callable[..., Iterator[QuantizedLayer]], model: nn.Module) -> list[QuantizedLayer]:
        """All layers by one engine."""
        adapter = self.reference.adapter
        samples = calibration.built_in(adapter, PER_MODALITY)
        feeds = calibration.feeds(adapter, model, self.processor, self.decoder, samples)
        to_quantize = Job(self.reference, Recipe("awq"), ()).to_quantize
        return list(quantizing(model, self.reference, self.decoder, to_quantize, Scheme(), feeds))

    def plain(self) -> list[QuantizedLayer]:
        """By the oracle."""
        return self.run(plain_awq.quantize_layers, self._whole())

    def fast(self) -> list[QuantizedLayer]:
        """By the engine, from disk layer by layer; the talker, which the whole model feeds, from memory."""
        talker = self.decoder.tower == "talker"
        model = self._whole() if talker else load_outline(self.reference, torch.float32)
        return self.run(quantize_layers, model)

    def _whole(self) -> nn.Module:
        return load_model(self.reference.checkpoint, self.reference.adapter, torch.float32)


def case_of(family: str, tower: str) -> Case:
    """One of ``CASES``."""
    checkpoint = Checkpoint(shipped(f"{family}-tiny"))
    adapter = adapter_for(checkpoint)
    (decoder,) = (one for one in adapter.decoders(checkpoint.config) if one.tower == tower)
    return Case(HubView(checkpoint, adapter), decoder, load_processor(checkpoint))


def differences(plain: Sequence[QuantizedLayer], fast: Sequence[QuantizedLayer]) -> list[str]:
    """Where two engines' layers differ: in what they chose, or in any byte that would be written."""
    found = [] if len(plain) == len(fast) else ["count of layers"]
    for one, other in zip(plain, fast, strict=False):
        where = f"layer {one.record['layer']}"
        chosen = [{name: group["exponent"] for name, group in it.record["scaling"].items()} for it in (one, other)]
        if chosen[0] != chosen[1]:
            found.append(f"{where}: exponents {chosen[0]}, {chosen[1]}")
        if one.record["clipping"] != other.record["clipping"]:
            found.append(f"{where}: clipping")
        for kind, before, after in (
            ("codes", packed(one), packed(other)),
            ("changed", one.changed, other.changed),
            ("scales", one.scales, other.scales),
        ):
            if before.keys() != after.keys():
                found.append(f"{where}: names of {kind}")
            found += [f"{name}: {kind}" for name in before if name in after and not same(before[name], after[name])]
    return found


def packed(layer: QuantizedLayer) -> dict[str, Tensor]:
    """The tensors that an artifact would hold."""
    return {
        f"{name}.{part}": tensor
        for name, quantized in layer.quantized.items()
        for part, tensor in awq_gemm.encode(quantized).items()
    }


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, dtype included."""
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(("family", "tower"), CASES)
def test_the_oracle_s_choice(family: str, tower: str) -> None:
    """Exponents, limits, folded tensors and packed bytes are the plain engine's, to the bit; so are the losses."""
    case = case_of(family, tower)
    plain, fast = case.plain(), case.fast()
    assert differences(plain, fast) == []
    for one, other in zip(plain, fast, strict=True):
        for name, group in one.record["scaling"].items():
            assert other.record["scaling"][name]["judged"] == 1
            for loss in ("loss", "loss rtn"):
                assert other.record["scaling"][name][loss] == pytest.approx(group[loss], rel=1e-5)


@pytest.fixture(scope="module")
def vl() -> Case:
    """The case that faults are planted in."""
    return case_of(*CASES[0])


@pytest.fixture(scope="module")
def vl_plain(vl: Case) -> list[QuantizedLayer]:
    """What is right there."""
    return vl.plain()


def _next_candidate(patch: pytest.MonkeyPatch) -> None:
    def racing(*of: Any, real: Any = scaling.racing) -> Any:
        outcome = yield from real(*of)
        return replace(outcome, winner=outcome.winner % 20 + 1)

    patch.setattr(scaling, "racing", racing)


def _stale_layer(patch: pytest.MonkeyPatch) -> None:
    real, last = outline._fetch, []

    def fetch(reference: Any, home: Any, copies: Any, layer: Any) -> Any:
        last.append(real(reference, home, copies, layer))
        return last[-2] if len(last) == 3 else last[-1]

    patch.setattr(outline, "_fetch", fetch)


def _calls_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        engine, "layer_features", lambda module, calls, names: capture.layer_features(module, [*calls], names)
    )


def _grams_of_unscaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clipping, "group_grams", lambda x, size, _scales=None, real=clipping.group_grams: real(x, size))


def _first_pieces_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clipping, "group_grams", lambda x, *of, real=clipping.group_grams: real(x[:100], *of))


def _inputs_confused(patch: pytest.MonkeyPatch) -> None:
    def keep(shelf: Any, name: str, tensor: Tensor, real: Any = capture._Shelf.keep) -> None:
        alike = (other for other, seen in shelf._passing if seen.shape == tensor.shape)
        shelf.same.setdefault(name, next(alike, name))
        real(shelf, name, tensor)

    patch.setattr(capture._Shelf, "keep", keep)


def _rows_overwritten(patch: pytest.MonkeyPatch) -> None:
    def end_call(shelf: Any, rows: int) -> None:
        shelf._passing.clear()
        for kept in shelf.kept.values():
            kept[rows:] = 0  # never written: it might hold, by chance, what a run before left there

    patch.setattr(capture._Shelf, "end_call", end_call)


def _scales_in_32_bits(patch: pytest.MonkeyPatch) -> None:
    exact = lambda weight, scheme, limit=None: pseudo_quantize_tensor(weight, scheme, limit=limit).weight  # noqa: E731
    patch.setattr(clipping, "rounded", exact)


def _limits_too_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clipping, "rounded", lambda weight, scheme, _limit: rounded(weight, scheme))


def _not_settled(patch: pytest.MonkeyPatch) -> None:
    def first(*of: Any, real: Any = settling.race) -> Any:
        outcome = real(*of)
        return replace(outcome, winner=0)

    patch.setattr(settling, "race", first)


def _settled_for_the_worst(patch: pytest.MonkeyPatch) -> None:
    def worst(*of: Any, real: Any = settling.race) -> Any:
        outcome = real(*of)
        return replace(outcome, winner=max(range(len(outcome.losses)), key=outcome.losses.__getitem__))

    patch.setattr(settling, "race", worst)


scaling_of = scaling.Scaling


def _one_finalist(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scaling, "Scaling", lambda *of: scaling_of(*of[:5]))


def _runner_up_s_ranges_of_the_first(patch: pytest.MonkeyPatch) -> None:
    def settle(layer: Any, group: Any, panel: Any, finalists: Any, *of: Any, real: Any = settling.settle) -> Any:
        stale = [replace(finalist, clips=finalists[0].clips) for finalist in finalists]
        return real(layer, group, panel, stale, *of)

    patch.setattr(settling, "settle", settle)


def _previous_group_s_rows_forgotten(patch: pytest.MonkeyPatch) -> None:
    def of(group: Any, tensors: Any, scales: Any, *others: Any, real: Any = settling.Finalist.of) -> Any:
        return real(group, tensors, {group: scales[group]}, *others)

    patch.setattr(settling.Finalist, "of", of)


@pytest.mark.parametrize(
    "plant",
    [
        _next_candidate,
        _stale_layer,
        _calls_stay,
        _grams_of_unscaled,
        _first_pieces_only,
        _inputs_confused,
        _rows_overwritten,
        _scales_in_32_bits,
        _limits_too_late,
        _not_settled,
        _settled_for_the_worst,
        _one_finalist,
        _runner_up_s_ranges_of_the_first,
        _previous_group_s_rows_forgotten,
    ],
    ids=lambda plant: plant.__name__.strip("_"),
)
def test_faults_in_the_engine_are_seen(
    plant: Callable[[pytest.MonkeyPatch], None],
    vl: Case,
    vl_plain: list[QuantizedLayer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault planted in any part of the engine makes it differ from the plain one."""
    plant(monkeypatch)
    assert differences(vl_plain, vl.fast())


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(4, -1), Scheme(3, 32), Scheme(8, 64, zero_point=False)])
@pytest.mark.parametrize("clipped", [False, True])
def test_rounding_without_codes(scheme: Scheme, clipped: bool) -> None:
    """The searches' rounding is the quantizer's to the bit, for groups of one sign, of zeros, and huge or tiny ones."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator) * torch.logspace(-8, 4, 96)[:, None]
    weight[3], weight[5], weight[7, :128] = weight[3].abs(), -weight[5].abs(), 0
    groups = 1 if scheme.group_size == -1 else 256 // scheme.group_size
    limit = weight.reshape(96, groups, -1).abs().amax(-1) * 0.7 if clipped else None
    exact = pseudo_quantize_tensor(weight, scheme, limit=limit, scale_dtype=torch.float16).weight
    before = weight.clone()
    assert torch.equal(rounded(weight, scheme, limit), exact)
    assert torch.equal(weight, before), "it must leave the weight as it was"
