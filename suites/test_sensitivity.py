"""Sensitivity: what each layer costs when it alone is quantized, and which are worth keeping in 16 bits.

The reference with one layer of the artifact at a time, norms and linears together, on a few held-out samples of every
modality. The thinker is judged by the text that it answers, the talker by its codes.
"""

from __future__ import annotations

from collections.abc import Sequence

from fixtures.audit.sensitivity import Asked, costliest
from fixtures.core import metrics
from fixtures.core.limits import Limits
from fixtures.core.targets import Target
from fixtures.verifying import Verify


def test_layers_are_the_artifact(layer_costs: Sequence[Asked], limits: Limits, verify: Verify) -> None:
    """All layers swapped together answer as the artifact itself does, and put back as the reference does."""
    left = [f"{unit}: asked in {asked.way}" for asked in layer_costs for unit in sorted(asked.left)]
    units = sum(len(asked.alone) for asked in layer_costs)
    for asked in layer_costs:
        own = None if asked.artifact is None else metrics.mean(metrics.token_kl(asked.reference, asked.artifact))
        verify(
            f"what the layers leave unexplained of its {asked.way}",
            asked.unexplained,
            "share of the distance",
            at_most=limits("sensitivity.unexplained"),
            detail=f"all layers together cost {asked.mixes[0].kl:.4g} nats, the artifact {own} nats",
        )
    verify.none_of("layers not put back", left, among=units)


def test_each_layer_alone(layer_costs: Sequence[Asked], target: Target, limits: Limits, verify: Verify) -> None:
    """No layer alone costs more than it may, and each costs something of its own."""
    alone = [one for asked in layer_costs for one in asked.alone]
    astray = [
        f"{a.unit}: {', '.join(sorted(a.changed)) or 'nothing'} changed" for a in alone if a.changed != {str(a.unit)}
    ]
    for asked in layer_costs:
        worst = costliest(asked.alone)
        verify(
            f"costliest layer's KL of its {asked.way}",
            worst.kl,
            "nats",
            at_most=limits("sensitivity.layer_kl", target.weights, target.quantizer, asked.way),
            detail=f"{worst.unit}, of {asked.mixes[0].kl:.3g} nats of all together",
        )
        verify.note(f"tokens compared in {asked.way}", len(asked.reference))
    verify.none_of("layers swapped with others, or not at all", astray, among=len(alone))
    verify.none_of("layers that change no answer", [str(a.unit) for a in alone if not a.heard], among=len(alone))
    verify.table(
        "Sensitivity",
        ("tower", "layer", "KL nats", "bytes saved"),
        [(a.unit.tower, a.unit.layer, a.kl, a.saved) for a in alone],
    )


def test_mixed_precision(layer_costs: Sequence[Asked], target: Target, limits: Limits, verify: Verify) -> None:
    """Layers kept in 16 bits bring the answers nearer to the reference's."""
    rows: list[tuple[int, str, int, float]] = []
    for asked in layer_costs:
        none, *others = asked.mixes
        if not others:
            continue
        last = others[-1]
        verify(
            f"KL left of its {asked.way} with the costliest layers kept",
            last.kl / none.kl if none.kl else None,
            "of the artifact's",
            at_most=limits("sensitivity.kept", target.weights, target.quantizer, asked.way),
            detail=f"{', '.join(map(str, last.kept))} in 16 bits: {none.kl:.3g} -> {last.kl:.3g} nats",
        )
        rows += [
            (step, ", ".join(map(str, mix.kept)) or f"nothing, asked in {asked.way}", mix.bytes, mix.kl)
            for step, mix in enumerate(asked.mixes)
        ]
    verify.table("Mixed precision", ("step", "kept in 16 bits", "bytes", "KL nats"), rows)
