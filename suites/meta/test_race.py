"""The race between candidates: as good a choice as trying every one on every token, for a fraction of the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme
from fixtures.engines.loading import load_model, load_processor
from fixtures.quantizers import calibration
from fixtures.quantizers.activation_aware import race, scaling
from fixtures.quantizers.activation_aware.capture import decoder_calls, layer_features
from fixtures.quantizers.activation_aware.judging import Panel, Tokens, panel_for
from fixtures.quantizers.activation_aware.pausing import Pausing, alone
from fixtures.quantizers.activation_aware.race import Outcome, Rule

VL = ADAPTERS["qwen2_5_vl"]
WHOLE = Rule(tokens=10**9)
SMALL = Rule(tokens=512)  # half the default, for a calibration set that is small
WORST = 1e-3  # of a loss: what a race may cost


@pytest.fixture(scope="module")
def search_all(tiny_reference: Checkpoint) -> Callable[[Rule], list[Outcome]]:
    """Search the scales of two layers of the shipped model on its whole calibration set, by a rule."""
    model = load_model(tiny_reference, VL, torch.float32)
    (decoder,) = VL.decoders(tiny_reference.config)
    samples = calibration.built_in(VL)
    calls = decoder_calls(
        decoder.modules(model)[0], calibration.feeds(VL, model, load_processor(tiny_reference), decoder, samples)
    )
    inspected = {group.inspected for group in decoder.groups}
    layers = [(module, layer_features(module, calls, inspected)) for module in list(decoder.modules(model))[:3]]

    def search(rule: Rule) -> list[Outcome]:
        outcomes: list[Outcome] = []
        real = scaling.racing

        def listening(*arguments: object) -> Pausing[Outcome]:
            outcomes.append((yield from real(*arguments)))  # type: ignore[arg-type]
            return outcomes[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scaling, "racing", listening)
            for module, features in (layers[0], layers[2]):
                for group in decoder.groups:
                    linears: dict[str, nn.Linear] = {name: module.get_submodule(name) for name in group.linears}  # type: ignore[misc]
                    panel, inputs = panel_for(features, group.inspected), features.inputs[group.linears[0]]
                    inspected = module.get_submodule(group.inspected)
                    alone(scaling.searching(inspected, linears, panel, inputs, Scheme(), lambda scales: scales, rule))
        return outcomes

    return search


@pytest.fixture(scope="module")
def exhaustive(search_all: Callable[[Rule], list[Outcome]]) -> list[Outcome]:
    """Every candidate on every token."""
    return search_all(WHOLE)


def excess(raced: Sequence[Outcome], exhaustive: Sequence[Outcome]) -> float:
    """How much more the worst of the raced choices loses, on all tokens, than the best candidate."""
    pairs = zip(raced, exhaustive, strict=True)
    return max(whole.losses[one.winner] / min(whole.losses) - 1 for one, whole in pairs)


def test_race_finds_the_best(search_all: Callable[[Rule], list[Outcome]], exhaustive: list[Outcome]) -> None:
    """On recorded activations the raced choice loses, on all tokens, at most 0.1 % more than the best there is."""
    raced = search_all(SMALL)
    assert excess(raced, exhaustive) <= WORST
    assert sum(outcome.judged for outcome in raced) / len(raced) < 0.5, "nothing was saved"
    assert all(outcome.judged == 1 for outcome in exhaustive)


def test_race_without_patience_is_caught(
    search_all: Callable[[Rule], list[Outcome]], exhaustive: list[Outcome]
) -> None:
    """Dropping all but the best of the first block, never to be judged on more, costs more than that."""
    assert excess(search_all(Rule(tokens=512, deviations=0)), exhaustive) > WORST


def test_biased_blocks_are_caught(
    search_all: Callable[[Rule], list[Outcome]], exhaustive: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks in the order of the samples, texts first, cost more than that."""

    def in_order(panel: Panel, block: int) -> Pausing[tuple[Tensor, int]]:
        yield
        return torch.arange(len(panel)), 0 if block < len(panel) else len(panel)

    monkeypatch.setattr(race, "_order", in_order)
    assert excess(search_all(SMALL), exhaustive) > WORST


class Given(Tokens):
    """A panel whose candidates' errors are given [candidates, units]."""

    def __init__(self, table: Tensor, size: Tensor) -> None:
        super().__init__(size[:, None], size[:, None])
        self.table = table

    def part(self, units: Tensor) -> Given:
        """The same columns of the table."""
        return Given(self.table[:, units], self.inputs[units, 0])

    def attempt(self, candidates: Sequence[int], part: Panel) -> Tensor:
        """Nothing to compute."""
        assert isinstance(part, Given)
        return part.table[list(candidates)]


def run(table: Tensor, size: Tensor | None = None, rule: Rule | None = None) -> Outcome:
    """A race over a table of errors."""
    panel = Given(table, torch.ones(table.shape[1]) if size is None else size)
    return race.race(panel, panel.attempt, len(table), rule or Rule(tokens=64))


def test_small_panels_are_judged_whole() -> None:
    """Where a first block is a quarter of all, every candidate is judged on everything, and the sums are exact."""
    table = torch.rand(5, 256, generator=torch.Generator().manual_seed(0))
    outcome = run(table)
    assert outcome.judged == 1
    assert outcome.losses == pytest.approx(table.double().sum(1).tolist(), rel=1e-12)
    assert outcome.winner == int(table.sum(1).argmin())


def test_of_equals_the_first_wins() -> None:
    """Candidates that round alike lose alike, and the first of them is taken: no scaling, before any."""
    row = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    assert run(row.expand(3, -1)).winner == 0
    assert run(row[:100].expand(3, -1)).winner == 0


def test_what_is_no_number_never_wins() -> None:
    """A candidate that overflows loses, whether it is the first or not; where all do, no scaling is left."""
    table = torch.rand(3, 4096, generator=torch.Generator().manual_seed(0))
    table[0, 7], table[1, 4000] = math.nan, math.inf
    assert run(table).winner == 2
    outcome = run(torch.full((3, 4096), math.nan))
    assert outcome.winner == 0
    assert math.isnan(outcome.losses[0])


def test_estimates_are_of_all_units() -> None:
    """The losses of a race that ended early are those of all units, within a few per cent."""
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(4, 20000, generator=generator) * torch.tensor([[1.0], [2.0], [3.0], [0.5]])
    outcome = run(table, rule=Rule(tokens=1024))
    assert outcome.judged < 0.2
    assert outcome.losses == pytest.approx(table.sum(1).tolist(), rel=0.05)


@pytest.mark.parametrize("stratum", [True, False])
def test_massive_tokens_are_judged_first(stratum: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tokens of twenty thousand that hold most of the loss decide; without their stratum they would be missed."""
    generator = torch.Generator().manual_seed(0)
    table, size = torch.rand(2, 20000, generator=generator), torch.ones(20000)
    table[1] += 0.1  # plainly worse on nearly all
    massive = torch.randperm(20000, generator=generator)[:10]
    table[0, massive], size[massive] = 1e4, 50.0
    if not stratum:

        def by_lot_alone(*_: object) -> Pausing[tuple[Tensor, int]]:
            yield
            return torch.randperm(20000, generator=generator), 0

        monkeypatch.setattr(race, "_order", by_lot_alone)
    assert (run(table, size).winner == 1) is stratum
