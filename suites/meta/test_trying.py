"""Candidates that share a forward err as they do alone, in modules of every kind that AWQ inspects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fixtures.adapters import ADAPTERS
from fixtures.adapters.base import ScalingGroup
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model, load_processor
from fixtures.quantizers import calibration, quantize
from fixtures.quantizers.activation_aware import trying
from fixtures.quantizers.activation_aware.capture import Call, Features, decoder_calls, layer_features
from fixtures.quantizers.activation_aware.judging import Samples, panel_for

VL = ADAPTERS["qwen2_5_vl"]
GROUPS = ("qkv", "gate_up", "down")
CANDIDATES = 5


class Case:
    """A layer of the shipped model, what its modules read, and five candidates for each of its linears."""

    def __init__(self, layer: nn.Module, features: Features, groups: Mapping[str, ScalingGroup]) -> None:
        self.layer = layer
        self.features = features
        self.groups = groups

    def errors(self, name: str, together: int) -> Tensor:
        """The errors of all candidates, so many to a forward."""
        group = self.groups[name]
        linears: dict[str, nn.Linear] = {name: self.layer.get_submodule(name) for name in group.linears}  # type: ignore[misc]

        def weights(chosen: Sequence[int]) -> dict[str, Tensor]:
            factors = 1 + 0.01 * torch.tensor([*chosen])
            return {name: linear.weight.data * factors[:, None, None] for name, linear in linears.items()}

        inspected, panel = self.layer.get_submodule(group.inspected), panel_for(self.features, group.inspected)
        some = panel.part(torch.arange(3, len(panel)))  # not all: samples of several lengths, in several calls
        return trying.errors(inspected, linears, weights, range(CANDIDATES), some, together)


@pytest.fixture(scope="module")
def case(tiny_reference: Checkpoint) -> Case:
    """The second layer, on samples of every modality."""
    model = load_model(tiny_reference, VL, torch.float32)
    (decoder,) = VL.decoders(tiny_reference.config)
    modules = decoder.modules(model)
    samples = calibration.built_in(VL, per_modality=4)
    feeds = calibration.feeds(VL, model, load_processor(tiny_reference), decoder, samples)
    calls = decoder_calls(modules[0], feeds)
    groups = {group.name.rsplit(".", 1)[-1]: group for group in decoder.groups}
    with torch.no_grad():
        layer_features(modules[0], calls, ())
        features = layer_features(modules[1], calls, {group.inspected for group in decoder.groups})
    return Case(modules[1], features, groups)


@pytest.mark.parametrize("together", [2, 3, CANDIDATES, 8])
@pytest.mark.parametrize("group", GROUPS)
@torch.no_grad()
def test_together_as_alone(group: str, together: int, case: Case) -> None:
    """However many candidates share a forward, each errs on every unit as alone; and the module stays as it was."""
    before = {name: tensor.clone() for name, tensor in case.layer.state_dict().items()}
    modules = list(case.layer.modules())
    alone, shared = case.errors(group, 1), case.errors(group, together)
    assert alone.shape == shared.shape
    assert len(alone) == CANDIDATES
    assert torch.allclose(alone[0], torch.zeros_like(alone[0]), atol=1e-6), "the first is the module itself"
    assert (alone[1:].sum(1).diff() > 0).all(), "the candidates must differ"
    torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-6)
    assert list(case.layer.modules()) == modules
    for name, tensor in case.layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def _weights_shifted(patch: pytest.MonkeyPatch) -> None:
    real = trying.Tried.__init__
    patch.setattr(trying.Tried, "__init__", lambda self, weights, bias: real(self, weights.roll(1, 0), bias))


def _one_bias_lost(patch: pytest.MonkeyPatch) -> None:
    real = trying.Tried.__init__
    patch.setattr(trying.Tried, "__init__", lambda self, weights, _bias: real(self, weights, None))


def _rows_interleaved(patch: pytest.MonkeyPatch) -> None:
    real = trying.Tried.forward

    def forward(self: trying.Tried, inputs: Tensor) -> Tensor:
        return real(self, inputs.unflatten(0, (-1, len(self.weights))).transpose(0, 1).flatten(0, 1))

    patch.setattr(trying.Tried, "forward", forward)


@pytest.mark.parametrize(
    "plant", [_weights_shifted, _one_bias_lost, _rows_interleaved], ids=lambda plant: plant.__name__.strip("_")
)
@torch.no_grad()
def test_confused_candidates_are_seen(
    plant: Callable[[pytest.MonkeyPatch], None], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of another candidate, a lost bias, rows in another order: none gives what candidates do alone."""
    alone = case.errors("qkv", 1)
    plant(monkeypatch)
    assert not torch.allclose(case.errors("qkv", CANDIDATES), alone, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_module_is_restored_when_a_forward_fails(case: Case) -> None:
    """A forward that raises leaves the linears in their places, with their own weights."""
    group = case.groups["qkv"]
    linears: dict[str, nn.Linear] = {name: case.layer.get_submodule(name) for name in group.linears}  # type: ignore[misc]
    own = {name: linear.weight.data for name, linear in linears.items()}

    class Failing:
        tokens = 1

        def errors(self, _module: nn.Module, _repeated: int = 1) -> Tensor:
            raise RuntimeError("out of memory")

    for together in (1, 2):
        with pytest.raises(RuntimeError, match="memory"):
            trying.errors(
                case.layer.get_submodule(group.inspected),
                linears,
                lambda chosen: {name: weight.new_zeros(len(chosen), *weight.shape) for name, weight in own.items()},
                [0, 1],
                Failing(),  # type: ignore[arg-type]
                together,
            )
        for name, linear in linears.items():
            assert case.layer.get_submodule(name) is linear
            assert linear.weight.data is own[name] or torch.equal(linear.weight.data, own[name])


@pytest.mark.parametrize(
    ("tokens", "longest", "expected"),
    [(8192, 512, 8), (65536, 512, 8), (2048, 512, 32), (20000, 20000, 3), (200000, 200000, 1)],
)
def test_how_many_share_a_forward(tokens: int, longest: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as keep a forward below 2^27 numbers in a tensor, however long a sample is; one on a CPU; never none."""

    class Wide:
        is_cuda = True
        shape = (2048, 1024)

        def numel(self) -> int:
            return 2048 * 1024

        def element_size(self) -> int:
            return 2

    class Linear:
        weight = Wide()

    samples = Samples(
        [Call(torch.empty(tokens // longest, longest, 0), {})], [torch.empty(tokens // longest, longest, 0)]
    )
    assert trying.how_many({"q": Linear()}, samples) == expected  # type: ignore[dict-item]
    assert trying.how_many({"q": nn.Linear(4, 4)}, samples) == 1
    monkeypatch.setattr(trying, "BYTES_TOGETHER", 3 * 2048 * 1024 * 2)
    assert trying.how_many({"q": Linear()}, samples) == min(expected, 3)  # type: ignore[dict-item]


def test_same_artifact_from_shared_forwards(
    tiny_reference: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine writes the same bytes when candidates share forwards, in float32."""
    samples = calibration.built_in(VL, per_modality=8)
    written = []
    for together in (1, CANDIDATES):
        monkeypatch.setattr(trying, "how_many", lambda *_, together=together: together)
        out = tmp_path / str(together)
        quantize(tiny_reference, Recipe("awq"), samples, out)
        written.append({file.name: file.read_bytes() for file in out.glob("*.safetensors")})
    assert written[0]
    assert written[0] == written[1]


def test_losses_that_are_no_numbers(
    tiny_reference: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no candidate's loss is a number, nothing is written: what came out would be rounding called AWQ."""
    monkeypatch.setattr(trying, "errors", lambda *of: torch.full((len(of[3]), len(of[4])), float("nan")))
    samples = calibration.built_in(VL, per_modality=1)
    with pytest.raises(UserError, match=r"layers\.0\..*: no scales tried have a loss that is a number"):
        quantize(tiny_reference, Recipe("awq"), samples, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
