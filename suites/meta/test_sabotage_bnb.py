"""Every check of a bitsandbytes artifact's bytes fails on the fault it exists for, and on no good artifact."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fixtures.adapters import ADAPTERS
from fixtures.audit.pair import Pair
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.targets import Target
from fixtures.faults import bnb, linears, tensors
from fixtures.faults.editing import copied, edit_json
from fixtures.options import Selection
from fixtures.quantizers import recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.verifying import Verify
from suites import test_coverage, test_loading, test_roundtrip
from suites.meta import test_sabotage
from suites.meta.answering import BYTE_CHECKS, listener

if find_spec("bitsandbytes") is None:
    pytest.skip('bitsandbytes is absent: pip install "quantproof[bnb]"', allow_module_level=True)

Fault = Callable[[Path], None]
VL = ADAPTERS["qwen2_5_vl"]
KINDS = ("bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8")
CHECKS = (*BYTE_CHECKS, test_roundtrip.test_tables)


def skip_list(*entries: str) -> Fault:
    """A skip list of these entries only (F03)."""

    def plant(folder: Path) -> None:
        edit_json(folder, "config.json", lambda c: c["quantization_config"].update(llm_int8_skip_modules=list(entries)))

    plant.__name__ = f"skip_list_{'_'.join(entries)}"
    return plant


# kind -> check -> quantity that must not hold -> what is planted
PLANTED: dict[str, dict[Callable[..., None], dict[str, tuple[Fault, ...]]]] = {
    "bnb-nf4": {
        test_roundtrip.test_rounding: {
            "largest error": (
                bnb.nibbles_swapped,
                bnb.flipped_code,
                bnb.absmax_shifted,
                bnb.codes_of_zeros,
                bnb.as_after_a_forward,
            ),
            "largest error at the range's ends": (bnb.nibbles_swapped, bnb.codes_of_zeros),
        },
        test_roundtrip.test_frobenius: {
            "relative Frobenius error, of theory's": (bnb.nibbles_swapped, bnb.absmax_is(torch.nan)),
        },
        test_roundtrip.test_resolution: {
            "coarsest scale, of RTN's": (bnb.absmax_off(0.01), bnb.absmax_off(1.0), bnb.as_after_a_forward),
            "finest scale, of RTN's": (bnb.absmax_off(-0.01), bnb.absmax_is(torch.nan), bnb.as_after_a_forward),
        },
        test_roundtrip.test_clipping: {"clipped weights": (bnb.absmax_off(-0.5), bnb.as_after_a_forward)},
        test_roundtrip.test_codes: {
            "linears with broken scales": (bnb.absmax_is(0.0), bnb.absmax_is(torch.inf), bnb.absmax_is(-1.0)),
            "linears whose codes change when coded again": (bnb.absmax_is(torch.nan),),
        },
        test_roundtrip.test_tables: {
            "tables that are not as published or as stated": (bnb.other_code_book, bnb.state_says(quant_type="fp4")),
        },
        test_coverage.test_every_linear: {
            "linears neither quantized nor kept for a reason": (linears.left_in_full_precision,),
        },
        test_coverage.test_every_tensor: {
            "tensors changed": (tensors.bias_of_ones, tensors.vision_changed, tensors.norm_not_folded),
            "tensors lost": (tensors.dropped_bias,),
            "tensors that belong to nothing": (tensors.stray_tensor,),
        },
        test_coverage.test_size: {"bytes, of those promised": (linears.left_in_full_precision,)},
        test_coverage.test_skip_list_in_transformers: {
            "linears that transformers misjudges": (skip_list("lm_head"), skip_list("visual", "lm_head")),
        },
        test_coverage.test_skip_list_in_vllm: {
            "linears that vLLM misjudges": (skip_list("lm_head"), skip_list("model.visual", "lm_head")),
        },
    },
    "bnb-nf4-dq": {
        test_roundtrip.test_resolution: {
            "coarsest scale, of RTN's": (bnb.nested_absmax_off(0.5), bnb.nested_code_flipped),
            "finest scale, of RTN's": (bnb.nested_offset_lost, bnb.nested_absmax_off(-0.5)),
        },
        test_roundtrip.test_tables: {
            "tables that are not as published or as stated": (bnb.other_nested_map,),
        },
    },
    "bnb-int8": {
        test_roundtrip.test_rounding: {
            "largest error": (bnb.scale_off(0.01), bnb.neighbours_scales, bnb.flipped_byte),
            "largest error at the range's ends": (bnb.scale_off(-0.05),),
        },
        test_roundtrip.test_resolution: {
            "coarsest scale, of RTN's": (bnb.scale_off(0.01), bnb.neighbours_scales),
            "finest scale, of RTN's": (bnb.scale_off(-0.01), bnb.neighbours_scales),
        },
        test_roundtrip.test_clipping: {"clipped weights": (bnb.scale_off(-0.05),)},
    },
}
CASES = [
    pytest.param(kind, fault, check, quantity, id=f"{kind}-{check.__name__}-{quantity}-{number}")
    for kind, checks in PLANTED.items()
    for check, quantities in checks.items()
    for quantity, planted in quantities.items()
    for number, fault in enumerate(planted)
]
# Faults that a header shows: the audit refuses them before it starts.
REFUSED = (
    bnb.state_says(shape=[1, 2]),
    bnb.dropped("weight.absmax"),
    bnb.dropped("weight.quant_map"),
)


@pytest.fixture(scope="module")
def made(tiny_reference: Checkpoint, selection: Selection) -> Callable[[str], Path]:
    """A good artifact of each kind; never to be changed, only copied."""
    return lambda kind: cached_artifact(tiny_reference, recipe_for(kind, None), (), selection.cache)


def target(kind: str) -> Target:
    """The shipped model, quantized by one kind."""
    return Target("qwen2_5_vl", "tiny", kind)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_no_false_alarm(
    kind: str, check: Callable[..., None], made: Callable[[str], Path], audit: Callable[..., Verify]
) -> None:
    """A good artifact is not accused."""
    assert audit(check, made(kind), target(kind)).conclude() == ""


@pytest.mark.parametrize(("kind", "fault", "check", "quantity"), CASES)
def test_fault_is_caught(
    kind: str,
    fault: Fault,
    check: Callable[..., None],
    quantity: str,
    made: Callable[[str], Path],
    audit: Callable[..., Verify],
    tmp_path: Path,
) -> None:
    """A planted fault is caught by the check that exists for it, in the quantity that names it."""
    damaged = copied(made(kind), tmp_path / "damaged")
    fault(damaged)
    measured = {m.quantity: m for m in audit(check, damaged, target(kind)).measurements}
    assert measured[quantity].holds is False, f"{measured[quantity]} should not hold"


def test_every_judged_quantity_has_a_fault(made: Callable[[str], Path], audit: Callable[..., Verify]) -> None:
    """No quantity is judged that no planted fault brings down, here or in AWQ's artifacts."""
    judged = {
        (check.__name__, m.quantity)
        for kind in KINDS
        for check in CHECKS
        for m in audit(check, made(kind), target(kind)).measurements
        if m.bound is not None
    }
    killed = {
        (check.__name__, quantity)
        for checks in (*PLANTED.values(), test_sabotage.PLANTED)
        for check, quantities in checks.items()
        for quantity in quantities
    }
    assert judged - killed == test_sabotage.NOT_BY_BYTES


@pytest.mark.parametrize("fault", REFUSED)
def test_broken_parts_are_refused(
    fault: Fault, made: Callable[[str], Path], tiny_reference: Checkpoint, tmp_path: Path
) -> None:
    """An artifact whose parts contradict each other is refused with one line that names the linear."""
    damaged = copied(made("bnb-nf4"), tmp_path / "damaged")
    fault(damaged)
    with pytest.raises(UserError, match=r"model\.layers\.\d\.[a-z_.]+") as refused:
        Pair(tiny_reference, Checkpoint(damaged)).require_same_shapes()
    assert "\n" not in str(refused.value)


def test_library_that_computes_something_else(selection: Selection) -> None:
    """A library that computes another distribution than the stored weights', or NaN, is caught; a good one is not."""
    torch.manual_seed(0)
    decoded = torch.randn(64, 32)
    rounded = decoded + 0.01 * torch.randn_like(decoded)

    def said(library: torch.Tensor) -> bool:
        verify = listener()
        test_loading.test_library_computes_what_is_stored(
            {"text": decoded}, {"text": rounded}, {"text": library}, selection.limits, verify
        )
        return verify.conclude() == ""

    assert said(decoded + 0.01 * torch.randn_like(decoded))
    assert not said(decoded + 0.05 * torch.randn_like(decoded))
    assert not said(decoded * torch.nan)
    verify = listener()
    test_loading.test_library_computes_what_is_stored({}, {}, {}, selection.limits, verify)
    assert verify.conclude()
