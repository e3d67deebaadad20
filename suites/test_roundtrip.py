"""Round trip: every quantized weight is its reference's, within the bound that theory gives.

The artifact's bytes are decoded by our own code, folded scales undone from the bytes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import LinearError, allowed_excess
from fixtures.core.limits import Limits
from fixtures.core.targets import Target
from fixtures.verifying import Verify

PLACE = ("tower", "layer", "linear")


def test_rounding(linear_errors: Sequence[LinearError], target: Target, limits: Limits, verify: Verify) -> None:
    """No weight is farther from its reference than half a scale; none beyond the codes' range is off their last one."""
    largest = worst(linear_errors, lambda e: e.largest_error)
    at_ends = worst(linear_errors, lambda e: e.largest_end_error)

    verify(
        "largest error",
        largest and largest.largest_error,
        "half scales",
        at_most=limits("roundtrip.largest_error", target.quantizer),
        detail=named(largest),
    )
    verify(
        "largest error at the range's ends",
        at_ends and at_ends.largest_end_error,
        "steps",
        at_most=limits("roundtrip.largest_end_error", target.quantizer),
        detail=named(at_ends),
    )
    verify.table("Error per layer", (*PLACE, "half scales"), rows(linear_errors, lambda e: e.largest_error))


def test_frobenius(linear_errors: Sequence[LinearError], limits: Limits, verify: Verify) -> None:
    """A linear's whole error is no larger than uniform rounding within its scales would make it."""
    sigmas = limits("roundtrip.frobenius_sigmas")

    def over_theory(error: LinearError) -> float:
        return error.frobenius / error.frobenius_expected / allowed_excess(sigmas, error.weights)

    most = worst(linear_errors, over_theory)
    verify("relative Frobenius error, of theory's", most and over_theory(most), at_most=1.0, detail=named(most))
    largest = worst(linear_errors, lambda e: e.frobenius)
    verify.note("largest relative Frobenius error", largest and largest.frobenius, detail=named(largest))
    verify.table("Frobenius error per layer", (*PLACE, "relative"), rows(linear_errors, lambda e: e.frobenius))


def test_resolution(linear_errors: Sequence[LinearError], target: Target, limits: Limits, verify: Verify) -> None:
    """A group's scale is as fine as its bits allow: never coarser than RTN's, never finer than half of it."""
    coarsest = worst(linear_errors, lambda e: e.widest_scale)
    finest = worst(linear_errors, lambda e: -e.narrowest_scale)

    verify(
        "coarsest scale, of RTN's",
        coarsest and coarsest.widest_scale,
        at_most=limits("roundtrip.coarsest_scale", target.quantizer),
        detail=named(coarsest),
    )
    verify(
        "finest scale, of RTN's",
        finest and finest.narrowest_scale,
        at_least=limits("roundtrip.finest_scale", target.quantizer),
        detail=named(finest),
    )


def test_clipping(linear_errors: Sequence[LinearError], target: Target, limits: Limits, verify: Verify) -> None:
    """Few weights lie beyond the range of their codes."""
    most = worst(linear_errors, lambda e: e.clipped)
    verify(
        "clipped weights",
        most and most.clipped,
        "share of a linear",
        at_most=limits("roundtrip.clipped", target.quantizer),
        detail=named(most),
    )
    verify.table("Clipped weights per layer", (*PLACE, "share"), rows(linear_errors, lambda e: e.clipped))


def test_codes(linear_errors: Sequence[LinearError], verify: Verify) -> None:
    """Codes mean one weight each: scales are positive and finite, decoding and coding again gives the same codes."""
    weights = sum(e.weights for e in linear_errors)
    broken = [
        f"{e.name}: {e.broken_scales} scales are zero, negative, NaN or infinite"
        for e in linear_errors
        if e.broken_scales
    ]
    recoded = [f"{e.name}: {e.recoded} of {e.weights} codes" for e in linear_errors if e.recoded]

    verify.none_of("linears with broken scales", broken, among=len(linear_errors))
    verify.none_of("linears whose codes change when coded again", recoded, among=len(linear_errors))
    verify("weights looked at", weights, at_least=1)
    verify.none_of(
        "linears whose words do not survive unpacking and packing",
        [e.name for e in linear_errors if not e.repacked],
        among=len(linear_errors),
    )


@pytest.mark.bitsandbytes
def test_tables(pair: Pair, verify: Verify) -> None:
    """Code books, block sizes and kinds beside the codes are the published ones, and those that the config states."""
    strange = [
        f"{name}: {flaw}"
        for name in sorted(pair.quantized)
        for flaw in pair.layout.flaws(pair.artifact.checkpoint, pair.stored(name))
    ]
    verify.none_of("tables that are not as published or as stated", strange, among=len(pair.quantized))


def worst(errors: Sequence[LinearError], key: Callable[[LinearError], float]) -> LinearError | None:
    """The linear with the largest value, NaN before all others; None when there are no linears."""
    return max(errors, key=lambda e: (key(e) != key(e), key(e)), default=None)


def named(error: LinearError | None) -> str:
    """The offender's name."""
    return error.name if error else "no linear is quantized"


def rows(errors: Sequence[LinearError], key: Callable[[LinearError], float]) -> list[tuple[str, int, str, float]]:
    """(tower, layer, linear, value) for the report's heat map."""
    return [(e.place.tower, e.place.layer, e.place.linear, key(e)) for e in errors]
