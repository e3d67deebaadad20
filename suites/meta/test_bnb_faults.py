"""What goes wrong with bitsandbytes in the wild is seen in the bytes: planted faults, and saving after a forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures.core.checkpoint import Checkpoint
from fixtures.faults import bnb as faults
from fixtures.faults import linears
from fixtures.faults.editing import copied
from fixtures.verifying import Verify
from suites.meta.bnb_audit import NEEDED, VL, Audit, audit, differing, skip_list

pytestmark = NEEDED

FLAW, CONTRADICTION, SHAPE = "flaws", "contradictions", "misshapen"
PLANTED: list[tuple[str, Callable[[Path], None], str]] = [
    ("bnb-nf4", faults.nibbles_swapped, "largest_error"),
    ("bnb-nf4", faults.flipped_code, "largest_error"),
    ("bnb-fp4", faults.flipped_code, "largest_error"),
    ("bnb-nf4", faults.codes_of_zeros, "largest_error"),
    ("bnb-nf4", faults.codes_of_zeros, "frobenius"),
    ("bnb-nf4", faults.absmax_off(0.01), "coarsest"),
    ("bnb-nf4", faults.absmax_off(-0.01), "finest"),
    ("bnb-fp4", faults.absmax_off(0.01), "coarsest"),
    ("bnb-nf4", faults.absmax_off(1.0), "coarsest"),
    ("bnb-nf4", faults.absmax_off(1.0), "largest_error"),
    ("bnb-nf4", faults.absmax_off(-0.5), "clipped"),
    ("bnb-nf4", faults.absmax_is(math.nan), "largest_error"),
    ("bnb-nf4", faults.absmax_is(math.nan), "broken_scales"),
    ("bnb-nf4", faults.absmax_is(math.inf), "broken_scales"),
    ("bnb-nf4", faults.absmax_is(0.0), "broken_scales"),
    ("bnb-nf4", faults.absmax_is(-0.1), "broken_scales"),
    ("bnb-nf4", faults.absmax_is(math.nan), "recoded"),
    ("bnb-nf4", faults.absmax_shifted, "largest_error"),
    ("bnb-nf4", faults.absmax_shifted, "coarsest"),
    ("bnb-nf4-dq", faults.nibbles_swapped, "largest_error"),
    ("bnb-nf4-dq", faults.absmax_shifted, "coarsest"),
    ("bnb-nf4-dq", faults.nested_code_flipped, "coarsest or finest"),
    ("bnb-nf4-dq", faults.nested_absmax_off(0.5), "coarsest"),
    ("bnb-nf4-dq", faults.nested_absmax_off(0.5), "largest_error"),
    ("bnb-nf4-dq", faults.nested_offset_lost, "finest"),
    ("bnb-nf4-dq", faults.nested_offset_lost, "broken_scales"),
    ("bnb-nf4-dq", faults.other_nested_map, FLAW),
    ("bnb-nf4-dq", faults.other_nested_map, "coarsest or finest"),
    ("bnb-nf4-dq", faults.dropped("weight.nested_absmax"), CONTRADICTION),
    ("bnb-nf4", faults.other_code_book, FLAW),
    ("bnb-nf4", faults.state_says(quant_type="fp4"), FLAW),
    ("bnb-nf4", faults.state_says(quant_type="fp4"), "largest_error"),
    ("bnb-nf4", faults.state_renamed, FLAW),
    ("bnb-nf4", faults.state_says(shape=[256, 512]), SHAPE),
    ("bnb-nf4", faults.state_says(shape=[512, 128]), CONTRADICTION),
    ("bnb-nf4", faults.state_says(blocksize=128), CONTRADICTION),
    ("bnb-nf4", faults.state_says(nested_offset=0.1), CONTRADICTION),
    ("bnb-nf4", faults.dropped("weight.absmax"), CONTRADICTION),
    ("bnb-nf4", faults.dropped("weight.quant_map"), CONTRADICTION),
    ("bnb-nf4", faults.dropped("weight.quant_state.bitsandbytes__nf4"), CONTRADICTION),
    ("bnb-nf4", faults.dropped("weight"), CONTRADICTION),
    ("bnb-nf4", linears.left_in_full_precision, "quantized"),
    ("bnb-nf4", faults.as_after_a_forward, "largest_error"),
    ("bnb-nf4", faults.as_after_a_forward, "coarsest"),
    ("bnb-nf4", faults.as_after_a_forward, FLAW),
    ("bnb-fp4", faults.as_after_a_forward, "largest_error"),
    ("bnb-int8", faults.flipped_byte, "largest_error"),
    ("bnb-int8", faults.scale_off(0.01), "coarsest"),
    ("bnb-int8", faults.scale_off(0.01), "largest_error"),
    ("bnb-int8", faults.scale_off(-0.01), "finest"),
    ("bnb-int8", faults.neighbours_scales, "coarsest"),
    ("bnb-int8", faults.neighbours_scales, "largest_error"),
    ("bnb-int8", faults.scale_off(-2.0), "broken_scales"),
    ("bnb-int8", faults.scale_off(math.nan), "broken_scales"),
    ("bnb-int8", faults.lowest_code, FLAW),
    ("bnb-int8", faults.lowest_code, "recoded"),
    ("bnb-int8", faults.dropped("SCB"), CONTRADICTION),
    ("bnb-int8", faults.dropped("weight_format"), FLAW),
    ("bnb-int8", linears.left_in_full_precision, "quantized"),
]
HOLDS: dict[str, Callable[[Audit], bool]] = {
    "largest_error": lambda a: a.largest_error <= 1.001,
    "frobenius": lambda a: a.frobenius <= 1.01,
    "coarsest": lambda a: a.coarsest <= 1.001,
    "finest": lambda a: a.finest >= 0.999,
    "coarsest or finest": lambda a: a.coarsest <= 1.001 and a.finest >= 0.999,
    "clipped": lambda a: a.clipped == 0,
    "broken_scales": lambda a: a.broken_scales == 0,
    "recoded": lambda a: a.recoded == 0,
    "quantized": lambda a: len(a.quantized) == 28,
    FLAW: lambda a: not a.flaws,
    CONTRADICTION: lambda a: not a.contradictions,
    SHAPE: lambda a: not a.misshapen,
}


def names() -> Iterator[str]:
    """A test's id for every planted fault."""
    for number, (kind, fault, quantity) in enumerate(PLANTED):
        yield f"{kind}-{number}-{getattr(fault, '__name__', 'fault')}-{quantity}"


@pytest.mark.parametrize(("kind", "fault", "quantity"), PLANTED, ids=list(names()))
def test_fault_is_seen(
    kind: str,
    fault: Callable[[Path], None],
    quantity: str,
    bnb_artifacts: Callable[[str], Path],
    tiny_reference: Checkpoint,
    tmp_path: Path,
) -> None:
    """What holds of a good artifact holds no longer once a fault is planted."""
    holds = HOLDS[quantity]
    damaged = copied(bnb_artifacts(kind), tmp_path / "damaged")
    fault(damaged)

    assert holds(audit(tiny_reference, bnb_artifacts(kind)))
    assert not holds(audit(tiny_reference, damaged))


# Saving after a forward


@pytest.fixture(scope="module")
def after_forward(tiny_reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """What the library saves after a forward, by kind, where the CPU is one on which that matters."""
    from bitsandbytes import functional

    if not getattr(functional, "has_avx512bf16", lambda: False)():
        pytest.skip("this CPU has no AVX512_BF16, for which alone bitsandbytes repacks weights in a forward")
    folder = tmp_path_factory.mktemp("after-forward")

    def saved(kind: str) -> Checkpoint:
        if not (folder / kind).exists():
            faults.corrupt_by_forward(tiny_reference, VL, folder / kind, skip=skip_list(tiny_reference), kind=kind)
        return Checkpoint(folder / kind)

    return saved


def test_saving_after_a_forward_keeps_the_weights(
    bnb_artifacts: Callable[[str], Path], after_forward: Callable[[str], Checkpoint], verify: Verify
) -> None:
    """A model that has run once is saved as one that has not: the same tensors, bit for bit."""
    before, after = Checkpoint(bnb_artifacts("bnb-nf4")), after_forward("bnb-nf4")
    changed = [
        f"{name}: {before.tensors[name].dtype} {list(before.tensors[name].shape)} became "
        f"{after.tensors[name].dtype} {list(after.tensors[name].shape)}"
        for name in differing(before, after)
    ]
    verify.none_of("tensors changed", changed, among=len(before.tensors), advice="save before the first forward")


def skip_if_kept(artifact: Path, after: Checkpoint) -> None:
    """Skip where the library has been mended."""
    if not differing(Checkpoint(artifact), after):
        pytest.skip("this bitsandbytes saves the same tensors after a forward as before it")


def test_audit_sees_what_a_forward_did(
    bnb_artifacts: Callable[[str], Path], after_forward: Callable[[str], Checkpoint], tiny_reference: Checkpoint
) -> None:
    """What saving after a forward does to weights is far beyond what rounding explains, and a flaw says why."""
    skip_if_kept(bnb_artifacts("bnb-nf4"), after_forward("bnb-nf4"))
    found = audit(tiny_reference, after_forward("bnb-nf4").path)

    assert found.largest_error > 10
    assert found.frobenius > 2
    assert len(found.flaws) == 28
    assert "save first" in found.flaws[0]


def test_planted_fault_is_the_real_one(
    bnb_artifacts: Callable[[str], Path], after_forward: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """The fault that is planted by bytes is what the library does, bit for bit."""
    skip_if_kept(bnb_artifacts("bnb-nf4"), after_forward("bnb-nf4"))
    planted = copied(bnb_artifacts("bnb-nf4"), tmp_path / "planted")
    faults.as_after_a_forward(planted)

    assert differing(Checkpoint(planted), after_forward("bnb-nf4")) == []


def test_audit_sees_what_a_forward_did_to_nested_scales(
    bnb_artifacts: Callable[[str], Path], after_forward: Callable[[str], Checkpoint], tiny_reference: Checkpoint
) -> None:
    """With double quantization absmax is in place but rounded twice more: too little to hurt, and seen all the same."""
    skip_if_kept(bnb_artifacts("bnb-nf4-dq"), after_forward("bnb-nf4-dq"))
    found = audit(tiny_reference, after_forward("bnb-nf4-dq").path)

    assert found.flaws == []
    assert 1.001 < found.largest_error < 1.1
    assert found.coarsest > 1.001
    assert found.frobenius < 1.02
