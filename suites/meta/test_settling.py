"""Settling: what helps the inspected module is written, what harms it is not, whatever the searches before promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fixtures.adapters.base import ScalingGroup
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.quantizers.activation_aware.clipping import Clipping
from fixtures.quantizers.activation_aware.judging import Tokens
from fixtures.quantizers.activation_aware.race import Rule, race
from fixtures.quantizers.activation_aware.settling import Finalist, Settled, choices, settle

SCHEME = Scheme(4, 128)
GROUP = ScalingGroup("pair", "norm", ("one", "two"), "")
TOKENS, WIDTH, OUT = 300, 256, 64


class Pair(nn.Module):
    """Two linears that read the same, and whose answers add up."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one, self.two = (nn.Linear(WIDTH, OUT, bias=False) for _ in range(2))
        for linear in (self.one, self.two):
            linear.weight.data = torch.randn(OUT, WIDTH, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        answer: Tensor = self.one(x) + self.two(x)
        return answer


@pytest.fixture
def pair() -> Pair:
    """The module whose linears are settled."""
    return Pair()


@pytest.fixture
def panel(pair: Pair) -> Tokens:
    """Its tokens, and what it answers."""
    inputs = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Tokens(inputs, pair(inputs))


def finalist(pair: Pair, scale: float = 1, **kept: float) -> Finalist:
    """Both linears under one scale for all inputs but the first eight, their ranges cut to a share of the largest."""
    scales = torch.ones(WIDTH)
    scales[:8] = scale
    weights = {name: pair.get_submodule(name).weight.data * scales for name in GROUP.linears}  # type: ignore[operator]
    clips = {
        name: Clipping(weight.view(OUT, -1, 128).abs().amax(-1) * kept.get(name, 1), torch.zeros(3).double())
        for name, weight in weights.items()
    }
    return Finalist({GROUP: scales}, weights, clips)


def settled(pair: Pair, panel: Tokens, *finalists: Finalist, usual: tuple[str, ...] = GROUP.linears) -> Settled:
    """The outcome."""
    return settle(pair, GROUP, panel, finalists, usual, SCHEME)


def test_choices() -> None:
    """AWQ's own comes first, then all, none, and one linear's turned; none comes twice."""
    q, k, v = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
    assert choices((q, k, v), {v, "mlp.up_proj"}) == [{v}, {q, k, v}, set(), {q, v}, {k, v}]
    assert choices(("mlp.down_proj",), {"mlp.down_proj"}) == [{"mlp.down_proj"}, set()]


@pytest.mark.parametrize(
    ("kept", "usual", "clipped"),
    [
        ({"one": 0.9, "two": 0.4}, ("one", "two"), {"one"}),  # a range that harms is dropped, though AWQ would take it
        ({"one": 0.9, "two": 0.9}, ("one",), {"one", "two"}),  # one that helps is taken, though AWQ would not
        ({"one": 0.4, "two": 0.4}, ("one", "two"), set()),
        ({}, ("one",), {"one"}),  # of equals AWQ's
    ],
)
def test_what_helps_is_clipped(
    kept: dict[str, float], usual: tuple[str, ...], clipped: set[str], pair: Pair, panel: Tokens
) -> None:
    """By the module's own error, not by where the range came from."""
    found = settled(pair, panel, finalist(pair, **kept), usual=usual)
    assert set(found.clips) == clipped
    assert found.loss <= found.loss_usual


def test_the_better_finalist(pair: Pair, panel: Tokens) -> None:
    """A runner-up that errs less as written is taken; one that errs more is not."""
    good, bad = finalist(pair), finalist(pair, scale=9)
    assert settled(pair, panel, bad, good).finalist == 1
    assert settled(pair, panel, good, bad).finalist == 0


@torch.no_grad()
def test_losses_are_real(pair: Pair, panel: Tokens) -> None:
    """Both are what a plain computation gives for what is written, scales undone; the module stays as it was."""
    own = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    tried = finalist(pair, scale=1.5, one=0.4, two=0.8)
    found = settled(pair, panel, tried)

    def loss(*clipped: str) -> float:
        error = torch.zeros(TOKENS, OUT).double()
        for name in GROUP.linears:
            limit = tried.clips[name].limit if name in clipped else None
            written = pseudo_quantize_tensor(tried.weights[name], SCHEME, limit=limit, scale_dtype=torch.float16)
            change = written.weight / tried.scales[GROUP] - own[f"{name}.weight"]
            error += panel.inputs.double() @ change.double().t()
        return float(error.square().mean())

    assert found.loss == pytest.approx(loss(*found.clips), rel=1e-4)
    assert found.loss_usual == pytest.approx(loss("one", "two"), rel=1e-4)
    assert all(torch.equal(tensor, own[name]) for name, tensor in pair.state_dict().items())


def test_scales_between_linears_are_undone(pair: Pair) -> None:
    """A linear whose rows another group's scales divide is judged with them multiplied back."""
    rows = torch.linspace(0.5, 2, OUT)
    after = ScalingGroup("after", "two", ("three",), "three")
    plain = finalist(pair)
    both = Finalist(
        {**plain.scales, after: rows}, {**plain.weights, "two": plain.weights["two"] / rows[:, None]}, plain.clips
    )
    for name in GROUP.linears:
        written = both.written(name, Scheme(8, 128), clipped=False)
        torch.testing.assert_close(written, pair.get_submodule(name).weight.data, rtol=0, atol=0.03)


@pytest.mark.parametrize("most", [None, 600])
def test_the_cap_ends_a_tie(most: int | None) -> None:
    """Candidates that no block tells apart are judged on all units, or until the cap."""
    panel = Tokens(torch.randn(4000, 4, generator=torch.Generator().manual_seed(2)), torch.zeros(4000, 1))
    rule = replace(Rule(tokens=300, deviations=50), most=most)
    noise: Callable[[int], torch.Generator] = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    outcome = race(
        panel,
        lambda those, part: torch.stack([torch.rand(len(part), generator=noise(which)) + 1 for which in those]),
        2,
        rule,
    )
    assert outcome.judged == (1 if most is None else 600 / 4000)
