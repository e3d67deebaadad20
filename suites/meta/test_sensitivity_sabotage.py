"""What layers cost is what they cost alone: a swap that is not what it says is caught, and the worst layer named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.audit.pair import Pair
from fixtures.audit.sensitivity import STEPS, Alone, Asked, costliest, mixed_precision
from fixtures.audit.swapping import ELSEWHERE, Swapped, Unit, bytes_saved, units_of
from fixtures.checkpoints import Checkpoint
from fixtures.core.measurement import Measurement
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines.loading import load_model, load_processor
from fixtures.faults.editing import copied, edit_tensor
from fixtures.options import Selection
from fixtures.quantizers.layers import silent
from fixtures.sensitivity_under_test import costs, reached
from fixtures.subjects.samples import draw
from suites import test_sensitivity
from suites.meta.answering import listener

TARGET = Target("qwen2_5_vl", "tiny", "awq")
SAMPLES = [sample for modality in ("text", "image") for sample in draw(modality, "evaluation", 4)]
LAYERS = [Unit("language_model", str(n), f"model.layers.{n}.") for n in range(4)]
UNEXPLAINED = "what the layers leave unexplained of its text"
COSTLIEST = "costliest layer's KL of its text"
ASTRAY = "layers swapped with others, or not at all"
SILENT = "layers that change no answer"
LEFT = "layers not put back"
KEPT = "KL left of its text with the costliest layers kept"


@pytest.fixture(scope="module")
def processor(tiny_reference: Checkpoint) -> Any:
    """The reference's."""
    return load_processor(tiny_reference)


@pytest.fixture(scope="module")
def pair(tiny_reference: Checkpoint, good_artifact: Path) -> Pair:
    """Reference and good artifact."""
    return Pair(tiny_reference, Checkpoint(good_artifact))


Measure = Callable[..., list[Asked]]


@pytest.fixture(scope="module")
def measure(pair: Pair, processor: Any) -> Measure:
    """What the layers of an artifact cost, the good one if none is given, by a way of swapping."""

    def run(
        swapping: type[Swapped] = Swapped, artifact: Path | None = None, samples: Sequence[Sample] = SAMPLES
    ) -> list[Asked]:
        asked = pair if artifact is None else Pair(pair.reference.checkpoint, Checkpoint(artifact))
        return costs(asked, processor, samples, (), "cpu", {}, silent, swapping)

    return run


@pytest.fixture(scope="module")
def good(measure: Measure) -> list[Asked]:
    """The costs of the good artifact's layers."""
    return measure()


def said(layer_costs: Sequence[Asked], selection: Selection) -> dict[str, Measurement]:
    """All that the checks of sensitivity measure, by quantity."""
    verify = listener()
    test_sensitivity.test_layers_are_the_artifact(layer_costs, selection.limits, verify)
    test_sensitivity.test_each_layer_alone(layer_costs, TARGET, selection.limits, verify)
    test_sensitivity.test_mixed_precision(layer_costs, TARGET, selection.limits, verify)
    return {m.quantity: m for m in verify.measurements}


def broken(layer_costs: Sequence[Asked], selection: Selection) -> set[str]:
    """The quantities that do not hold."""
    return {quantity for quantity, m in said(layer_costs, selection).items() if m.holds is False}


class DoesNothing(Swapped):
    """Leaves the reference as it is."""

    def put(self, unit: Unit, *, quantized: bool) -> None:
        """Nothing."""


class SwapsAll(Swapped):
    """Swaps every layer for any."""

    def put(self, unit: Unit, *, quantized: bool) -> None:
        """All of them."""
        for each in self.units:
            super().put(each, quantized=quantized)


class SwapsTheNeighbour(Swapped):
    """Swaps the layer behind the one that is meant."""

    def put(self, unit: Unit, *, quantized: bool) -> None:
        """The next one, of the last the first."""
        super().put(self.units[(self.units.index(unit) + 1) % len(self.units)], quantized=quantized)


class TakesTheNeighboursWeights(Swapped):
    """Puts the artifact's weights of the layer behind into the right place."""

    def load(self, name: str, *, quantized: bool) -> Tensor:
        """The tensor of the next layer, of the last that of the first."""
        unit = next(unit for unit in self.units if unit.holds(name))
        other = self.units[(self.units.index(unit) + 1) % len(self.units)]
        taken = name.replace(unit.prefix, other.prefix) if quantized else name
        return super().load(taken, quantized=quantized)


class ForgetsTheNorms(Swapped):
    """Swaps the linears alone, whose scales the norms do not undo."""

    def load(self, name: str, *, quantized: bool) -> Tensor:
        """A norm of the reference in any case."""
        return super().load(name, quantized=quantized and "norm" not in name)


class ForgetsTheLinears(Swapped):
    """Swaps the norms alone."""

    def load(self, name: str, *, quantized: bool) -> Tensor:
        """A linear of the reference in any case."""
        return super().load(name, quantized=quantized and "norm" in name)


class SwapsTheHead(Swapped):
    """Changes a tensor that belongs to no layer as well."""

    def put(self, unit: Unit, *, quantized: bool) -> None:
        """The layer, and the last norm."""
        super().put(unit, quantized=quantized)
        with torch.no_grad():
            self.tensors["model.norm.weight"].mul_(2 if quantized else 0.5)


class PutsNothingBack(Swapped):
    """Quantizes layers, and never returns one to 16 bits."""

    def put(self, unit: Unit, *, quantized: bool) -> None:
        """Only what is to be quantized."""
        if quantized:
            super().put(unit, quantized=True)


SABOTAGED: list[tuple[type[Swapped], set[str]]] = [
    (DoesNothing, {UNEXPLAINED, ASTRAY, SILENT, KEPT}),
    (SwapsAll, {ASTRAY}),
    (SwapsTheNeighbour, {ASTRAY}),
    (TakesTheNeighboursWeights, {UNEXPLAINED, COSTLIEST}),
    (ForgetsTheNorms, {UNEXPLAINED, COSTLIEST}),
    (ForgetsTheLinears, {UNEXPLAINED, COSTLIEST}),
    (SwapsTheHead, {ASTRAY}),
    (PutsNothingBack, {ASTRAY, LEFT, KEPT}),
]


def test_no_false_alarm(good: list[Asked], selection: Selection) -> None:
    """A good artifact's layers are not accused, and every judged quantity has a planted fault."""
    judged = {quantity for quantity, m in said(good, selection).items() if m.bound is not None}
    assert broken(good, selection) == set()
    assert judged == {quantity for _, caught in SABOTAGED for quantity in caught}


@pytest.mark.parametrize(("swapping", "caught"), SABOTAGED, ids=[swapping.__name__ for swapping, _ in SABOTAGED])
def test_a_swap_that_is_none_is_caught(
    swapping: type[Swapped], caught: set[str], measure: Measure, selection: Selection
) -> None:
    """A swap that does nothing, too much, or something else is caught by the quantities that exist for it."""
    assert broken(measure(swapping), selection) >= caught


def test_all_layers_are_the_artifact(good: list[Asked]) -> None:
    """All layers swapped give the artifact's own logits, bit for bit, by another way of loading them."""
    (asked,) = good
    assert asked.artifact is not None
    assert asked.together.equal(asked.artifact)
    assert not asked.together.equal(asked.reference)
    assert asked.unexplained == 0
    assert dataclasses.replace(asked, together=asked.reference).unexplained == pytest.approx(1)


def test_every_folded_pair_is_swapped_together(pair: Pair) -> None:
    """What AWQ scales and what it divides for it lie in one layer, so that a layer alone computes what it did."""
    units = units_of(pair)
    assert list(units) == LAYERS
    for layer in pair.adapter.decoder_layers(pair.reference.checkpoint.config):
        unit = next(unit for unit in units if unit.layer == str(layer.index))
        for group in layer.groups:
            names = [f"{layer.prefix}{name}.weight" for name in (group.previous, *group.linears)]
            assert all(unit.holds(name) and name in pair.reference for name in names)


def test_layers_are_told_apart_by_their_whole_number() -> None:
    """Layer 1 is not layer 10."""
    assert LAYERS[1].holds("model.layers.1.mlp.up_proj.weight")
    assert not LAYERS[1].holds("model.layers.10.mlp.up_proj.weight")


def test_bytes_add_up(pair: Pair) -> None:
    """What the layers save is what the artifact takes less than its reference in 16 bits."""
    saved = sum(bytes_saved(pair, unit) for unit in units_of(pair))
    assert saved == pair.reference.checkpoint.bytes - pair.artifact.checkpoint.bytes > 0


def test_changed_tensors_are_seen(pair: Pair, tiny_reference: Checkpoint) -> None:
    """One element changed in a layer, NaN included, or outside of all, is seen where it is, and gone when undone."""
    model = load_model(tiny_reference, pair.adapter, torch.float32)
    swapped = Swapped(pair, model, units_of(pair))
    assert swapped.changed() == set()
    for name, where in (("model.layers.2.mlp.up_proj.weight", "language_model 2"), ("model.norm.weight", ELSEWHERE)):
        flat = swapped.tensors[name].data.view(-1)
        before = float(flat[0])
        for value in (before + 1, math.nan):
            flat[0] = value
            assert swapped.changed() == {where}
        flat[0] = before
        assert swapped.changed() == set()


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_damaged_layer_is_named(
    layer: int, measure: Measure, good_artifact: Path, selection: Selection, tmp_path: Path
) -> None:
    """One layer with a linear of wrong scales is the costliest of the table, and the first to be kept."""
    damaged = copied(good_artifact, tmp_path / "damaged")
    name = f"model.layers.{layer}.mlp.down_proj.scales"
    edit_tensor(damaged, name, lambda scales: scales * 3)
    layer_costs = measure(artifact=damaged)
    found = said(layer_costs, selection)
    assert found[COSTLIEST].holds is False
    assert found[COSTLIEST].detail.startswith(f"language_model {layer},")
    assert layer_costs[0].mixes[1].kept == (LAYERS[layer],)
    assert found[UNEXPLAINED].holds  # what is wrong is the artifact, not the swap


def test_nan_weights_are_the_worst(measure: Measure, good_artifact: Path, selection: Selection, tmp_path: Path) -> None:
    """A layer of NaN fails, is named, and is the first to be kept."""
    damaged = copied(good_artifact, tmp_path / "damaged")
    edit_tensor(damaged, "model.layers.1.mlp.up_proj.scales", lambda scales: scales * math.nan)
    layer_costs = measure(artifact=damaged)
    found = said(layer_costs, selection)
    assert {UNEXPLAINED, COSTLIEST, KEPT} <= broken(layer_costs, selection)
    assert found[COSTLIEST].detail.startswith("language_model 1,")
    assert layer_costs[0].mixes[1].kept == (LAYERS[1],)
    assert not math.isnan(layer_costs[0].mixes[1].kl)


def test_nothing_measured_does_not_hold(selection: Selection) -> None:
    """Without layers no check holds."""
    for check in (test_sensitivity.test_layers_are_the_artifact, test_sensitivity.test_mixed_precision):
        verify = listener()
        given = (TARGET,) if check is test_sensitivity.test_mixed_precision else ()
        check([], *given, selection.limits, verify)
        assert verify.conclude()


def test_mixed_precision_is_measured_anew() -> None:
    """The greedy choice counts what a layer brings beside those kept, per byte, and never sums what each costs alone.

    Layers 0 and 1 do the same damage, which one of them alone does as well: keeping one brings nothing.
    """

    def cost(quantized: Collection[Unit]) -> float:
        shared = 1.0 if {LAYERS[0], LAYERS[1]} & set(quantized) else 0.0
        return shared + 0.2 * (LAYERS[2] in quantized) + 0.3 * (LAYERS[3] in quantized)

    saved = {LAYERS[0]: 100, LAYERS[1]: 100, LAYERS[2]: 10, LAYERS[3]: 100}
    mixes = mixed_precision(LAYERS, saved, cost, 1000, cost(LAYERS))
    assert [mix.kept for mix in mixes[:3]] == [(), (LAYERS[2],), (LAYERS[2], LAYERS[3])]
    assert [mix.kl for mix in mixes[:3]] == pytest.approx([1.5, 1.3, 1.0])
    assert [mix.bytes for mix in mixes[:3]] == [1000, 1010, 1110]
    assert len(mixes) == STEPS + 1
    assert len(mixed_precision(LAYERS[:2], saved, cost, 1000, 1.0)) == 2  # one stays quantized


def test_nan_costs_most() -> None:
    """The costliest layer is one of NaN, wherever it stands."""
    alone = [Alone(unit, kl, frozenset(), True, 1) for unit, kl in zip(LAYERS, (1.0, math.nan, 2.0), strict=False)]
    assert costliest(alone).unit == LAYERS[1]


def test_towers_are_asked_of_what_they_read() -> None:
    """A tower that no prompt reaches is left out: an eye without pictures, an ear without sound, the vocoder always."""
    text, image, audio = (draw(modality, "evaluation", 1) for modality in ("text", "image", "audio"))
    asked = {"visual": image, "audio_tower": audio}
    for tower in ("visual", "audio_tower", "token2wav", "language_model"):
        unit = Unit(tower, "0", f"{tower}.0.")
        heard = {
            name: reached(unit, samples) for name, samples in {"text": text, "image": image, "audio": audio}.items()
        }
        always = tower == "language_model"
        assert heard == {
            "text": always,
            "image": always or asked.get(tower) is image,
            "audio": always or asked.get(tower) is audio,
        }
