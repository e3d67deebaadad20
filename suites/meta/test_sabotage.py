"""Every check of an artifact's bytes fails on the fault it exists for, and on no good artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.adapters.base import Linear
from fixtures.audit.coverage import changed_tensors, folded_names
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import audit_linears
from fixtures.audit.splitting import widest_split
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme
from fixtures.core.recipe import Recipe
from fixtures.faults import awq_codes, linears, records, settings, tensors
from fixtures.faults.editing import copied, edit_tensor, set_at
from fixtures.faults.places import vision
from fixtures.options import Selection
from fixtures.quantizers import calibration, quantize
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import subject
from fixtures.verifying import Verify
from suites import test_calibration, test_coverage, test_roundtrip
from suites.meta.answering import listener

Audit = Callable[[Callable[..., None], Path], Verify]

# check -> quantity that must not hold -> what is planted
PLANTED = {
    test_roundtrip.test_rounding: {
        "largest error": (
            awq_codes.wrong_nibble_order,
            awq_codes.zero_off_by_one,
            awq_codes.neighbours_scales,
            awq_codes.scale_off(0.05),
            awq_codes.scale_off(0.01),
            awq_codes.scale_off(-0.01),
            awq_codes.all_scales_off(0.02),
            awq_codes.all_zero_weights,
            awq_codes.flipped_bit,
            awq_codes.rows_not_folded,
            tensors.norm_not_folded,
        ),
        "largest error at the range's ends": (awq_codes.end_codes_moved,),
    },
    test_roundtrip.test_frobenius: {
        "relative Frobenius error, of theory's": (
            awq_codes.wrong_nibble_order,
            awq_codes.zero_off_by_one,
            awq_codes.nan_scale,
        ),
    },
    test_roundtrip.test_resolution: {
        "coarsest scale, of RTN's": (awq_codes.one_bit_fewer, awq_codes.all_scales_off(1.0), awq_codes.nan_scale),
        "finest scale, of RTN's": (awq_codes.all_scales_off(-0.66), awq_codes.zero_scale, awq_codes.nan_scale),
    },
    test_roundtrip.test_clipping: {"clipped weights": (awq_codes.all_scales_off(-0.66),)},
    test_roundtrip.test_codes: {
        "linears with broken scales": (awq_codes.infinite_scale, awq_codes.zero_scale, awq_codes.nan_scale),
        "linears whose codes change when coded again": (
            awq_codes.infinite_scale,
            awq_codes.zero_scale,
            awq_codes.nan_scale,
        ),
        "weights looked at": (linears.nothing_quantized,),
    },
    test_coverage.test_every_linear: {
        "linears neither quantized nor kept for a reason": (
            linears.left_in_full_precision,
            linears.kept_beside_codes,
            linears.dropped_codes,
            linears.vision_quantized,
        ),
        "quantized linears": (linears.nothing_quantized,),
    },
    test_coverage.test_every_tensor: {
        "tensors lost": (linears.dropped_codes, tensors.dropped_bias),
        "tensors that belong to nothing": (tensors.stray_tensor,),
        "tensors changed": (
            tensors.bias_of_ones,
            tensors.vision_changed,
            tensors.final_norm_changed,
            tensors.untied_head,
            tensors.vision_in_fp8,
        ),
    },
    test_coverage.test_size: {
        "bytes, of those promised": (linears.left_in_full_precision, linears.kept_beside_codes),
    },
    test_coverage.test_folded_norms: {
        "norms that no positive scales explain": (tensors.negative_norm,),
        "norm over reference, off the recorded scales": (tensors.norm_not_folded, records.no_scales_record),
    },
    test_coverage.test_ties: {"head tied to the embedding": (settings.tie_flag_flipped,)},
    test_coverage.test_skip_list_in_transformers: {
        "linears that transformers misjudges": (
            linears.vision_quantized,
            settings.skip_list("visual"),
            settings.skip_list("visual", "model.visual", "lm_head", "up_proj"),
        ),
    },
    test_coverage.test_skip_list_in_vllm: {
        "linears that vLLM misjudges": (
            linears.vision_quantized,
            settings.skip_list(),
            settings.skip_list("model.visual"),
            settings.skip_list("visual", "model.visual", "lm_head", "layers.1"),
        ),
    },
    test_coverage.test_settings: {
        "config: settings that differ": (settings.other_epsilon,),
        "generation settings: settings that differ": (settings.other_end_of_turn,),
        "tokenizer: settings that differ": (settings.other_tokenizer, settings.other_merges),
        "chat template: settings that differ": (settings.other_chat_template,),
        "processor: settings that differ": (settings.more_pixels,),
        "side files: settings that differ": (settings.other_voices,),
    },
    test_calibration.test_search_record: {
        "scaling groups that came out worse": (records.worse_scaling, records.no_record),
        "clipped linears that came out worse": (records.worse_clipping, records.no_record),
    },
}
CASES = [
    pytest.param(fault, check, quantity, id=f"{check.__name__}-{quantity}-{fault.__name__}")
    for check, quantities in PLANTED.items()
    for quantity, planted in quantities.items()
    for fault in planted
]


@pytest.mark.parametrize("check", PLANTED, ids=lambda check: check.__name__)
def test_no_false_alarm(check: Callable[..., None], good_artifact: Path, audit: Audit) -> None:
    """A good artifact is not accused."""
    assert audit(check, good_artifact).conclude() == ""


@pytest.mark.parametrize(("fault", "check", "quantity"), CASES)
def test_fault_is_caught(
    fault: Callable[[Path], None],
    check: Callable[..., None],
    quantity: str,
    good_artifact: Path,
    audit: Audit,
    tmp_path: Path,
) -> None:
    """A planted fault is caught by the check that exists for it, in the quantity that names it."""
    damaged = copied(good_artifact, tmp_path / "damaged")
    fault(damaged)
    measured = {m.quantity: m for m in audit(check, damaged).measurements}
    assert measured[quantity].holds is False, f"{measured[quantity]} should not hold"


def test_every_judged_quantity_has_a_fault(good_artifact: Path, audit: Audit) -> None:
    """No quantity is judged that no planted fault brings down: a check that cannot fail is a defect."""
    judged = {
        (check.__name__, m.quantity)
        for check in PLANTED
        for m in audit(check, good_artifact).measurements
        if m.bound is not None
    }
    killed = {(check.__name__, quantity) for check, quantities in PLANTED.items() for quantity in quantities}
    assert judged - killed == NOT_BY_BYTES


# Every int32 word unpacks to eight codes and packs to itself again, so no artifact brings this down; a wrong packing
# routine does: test_awq_gemm.
NOT_BY_BYTES = {("test_codes", "linears whose words do not survive unpacking and packing")}


@pytest.mark.parametrize(("group_size", "most"), [(128, 2), (64, 4), (-1, 1)])
def test_groups_that_do_not_split(
    group_size: int, most: int, tiny_reference: Checkpoint, selection: Selection, tmp_path: Path
) -> None:
    """More GPUs than o_proj's 256 inputs have groups for are refused, and so are any beyond one for rows (F13)."""
    quantize(tiny_reference, Recipe("rtn", Scheme(4, group_size)), (), tmp_path / "artifact")
    pair = Pair(tiny_reference, Checkpoint(tmp_path / "artifact"))
    for gpus in (1, 2, 4, 8):
        verify = listener()
        test_coverage.test_splits_over_gpus(pair, replace(selection, tensor_parallel=gpus), verify)
        assert (verify.conclude() == "") == (gpus <= most)
    assert "o_proj" in verify.conclude()


def test_published_sizes_split(
    tiny_reference: Checkpoint, good_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 72B's 29568 inputs are 231 groups, which no two GPUs share; padded to 29696 they are 232, which eight do."""
    pair = Pair(tiny_reference, Checkpoint(good_artifact))
    for inputs, most in ((29568, 1), (29696, 8), (18944, 4), (11008, 2)):
        down = Linear("model.layers.0.mlp.down_proj", "language_model", inputs, 8192, False)
        monkeypatch.setattr(Pair, "linears", property(lambda _, down=down: (down,)))
        assert widest_split(pair)[0] == most
    monkeypatch.setattr(Pair, "linears", property(lambda _: ()))
    assert widest_split(pair) == (0, "nothing that vLLM serves is quantized")


def test_overflow_in_a_cast_is_caught(tiny_reference: Checkpoint, good_artifact: Path, tmp_path: Path) -> None:
    """A number beyond float16's range that a saver cast to it is lost, though a cast gives the same infinity (F07)."""
    reference = copied(tiny_reference.path, tmp_path / "reference")
    damaged = copied(good_artifact, tmp_path / "damaged")
    for folder in (reference, damaged):
        edit_tensor(folder, f"{vision(folder)}.weight", lambda weight: set_at(weight, (0, 0), 1e5))
    verify = listener()
    pair = Pair(Checkpoint(reference), Checkpoint(damaged))
    test_coverage.test_every_tensor(pair, list(changed_tensors(pair)), verify)
    assert verify.conclude() == ""
    edit_tensor(damaged, f"{vision(damaged)}.weight", lambda weight: weight.half())
    verify = listener()
    pair = Pair(Checkpoint(reference), Checkpoint(damaged))
    test_coverage.test_every_tensor(pair, list(changed_tensors(pair)), verify)
    assert "1 numbers are beyond its range and became infinite" in verify.conclude()


def test_head_of_its_own_is_missed(selection: Selection, tmp_path: Path) -> None:
    """An untied checkpoint that lost its head is caught; a good one is not accused."""
    reference = Checkpoint(subject("qwen2_5_vl-tiny_untied", selection.cache / "subjects"))
    good = cached_artifact(reference, Recipe("rtn"), (), selection.cache)
    damaged = copied(good, tmp_path / "damaged")
    tensors.dropped_head(damaged)
    for folder, holds in ((good, True), (damaged, False)):
        verify = listener()
        test_coverage.test_ties(Pair(reference, Checkpoint(folder)), verify)
        assert {m.quantity: m.holds for m in verify.measurements}["heads of its own"] is holds


def test_kept_linear_is_not_scaled(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """Where the group size fits down_proj alone, up_proj is kept and stays as it is."""
    samples = calibration.built_in(ADAPTERS["qwen2_5_vl"], per_modality=2)
    quantize(tiny_reference, Recipe("awq", Scheme(4, 512)), samples, tmp_path / "artifact")
    pair = Pair(tiny_reference, Checkpoint(tmp_path / "artifact"))
    assert {name.rsplit(".", 1)[-1] for name in pair.quantized} == {"down_proj"}
    assert list(changed_tensors(pair)) == []
    assert not [name for name in folded_names(pair) if "up_proj" in name]
    assert max(error.largest_error for error in audit_linears(pair)) <= 1.001


def test_every_check_is_sabotaged() -> None:
    """Every check of the byte-level suites is in the list of what is sabotaged."""
    checks = {
        function
        for module in (test_roundtrip, test_coverage, test_calibration)
        for name, function in vars(module).items()
        if name.startswith("test_")
    }
    elsewhere = {
        test_coverage.test_splits_over_gpus,  # test_groups_that_do_not_split: any number of GPUs may be asked for
        test_calibration.test_search_gain,  # these three: test_sabotaged_answers
        test_calibration.test_replay,
        test_calibration.test_held_out,
        test_roundtrip.test_tables,  # test_sabotage_bnb: AWQ's layout has no tables
    }
    assert checks - PLANTED.keys() == elsewhere
