"""On a GPU: the worker's record is the ledger's, its faults are seen, and memory that runs out is told, not raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from threading import Lock

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.meters.held import of_checkpoint
from fixtures.meters.memory import MIB, Measured, OutOfMemoryError, whole
from fixtures.meters.vram import job_for, loading_dtype, measure
from fixtures.options import Selection
from fixtures.quantizers import recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from suites import test_memory
from suites.meta.answering import listener

pytestmark = pytest.mark.gpu
SLACK = 16 * 1024  # bytes that torch may keep for itself
NEEDS = {"rtn": "awq", "bnb-nf4": "bitsandbytes"}


Run = tuple[str, str, str, float]  # family, quantizer, fault, share of the card's memory that torch may take
GOOD = [(family, quantizer, "", 0.0) for family in ADAPTERS for quantizer in ("", "rtn", "bnb-nf4")]
COPIES = [
    ("qwen2_5_vl", "rtn", "every copy kept", 0.0),
    ("qwen2_5_vl", "rtn", "one copy kept", 0.0),
    ("qwen2_5_vl", "rtn", "copy registered", 0.0),
    ("qwen2_5_vl", "bnb-nf4", "one copy kept", 0.0),
]
IN_32_BITS = ("qwen2_5_vl", "", "loaded in 32 bits", 0.0)
NO_MEMORY = ("qwen2_5_vl", "", "", 1e-5)
AT_ONCE = 6  # workers: each starts its own Python and context, and NVML tells them apart


@pytest.fixture(scope="module")
def measured(selection: Selection) -> Iterator[Callable[[Run], Measured]]:
    """Tiny checkpoints, each measured in a worker of its own; several workers at once."""
    making = Lock()  # transformers sets torch's default dtype and device while it loads: not for two threads

    def look(run: Run) -> Measured:
        family, quantizer, fault, share = run
        adapter, checkpoint = ADAPTERS[family], Checkpoint(shipped(f"{family}-tiny"))
        if quantizer:
            with making:
                checkpoint = Checkpoint(cached_artifact(checkpoint, recipe_for(quantizer, None), (), selection.cache))
        modalities = () if fault else adapter.modalities
        record = measure(job_for(checkpoint, adapter, modalities, fault=fault, memory_share=share), timeout=180)
        return Measured(checkpoint.name, of_checkpoint(checkpoint, adapter, loading_dtype(checkpoint)), record)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = [run for run in (*GOOD, *COPIES, IN_32_BITS, NO_MEMORY) if not run[1] or find_spec(NEEDS[run[1]])]
        futures = {run: pool.submit(look, run) for run in runs}

        def result(run: Run) -> Measured:
            if run not in futures:
                pytest.skip(f"{NEEDS[run[1]]} is not installed")
            return futures[run].result()

        yield result


@pytest.mark.parametrize("run", GOOD, ids=str)
def test_worker_measures_the_ledger(run: Run, measured: Callable[[Run], Measured]) -> None:
    """What a tiny checkpoint asks of the allocator is its ledger's bytes, in blocks; every modality has a peak."""
    one = whole(measured(run))
    assert one.record.in_model == one.ledger.total
    assert 0 <= one.unexplained <= SLACK
    assert one.weights == pytest.approx(one.ledger.in_blocks, rel=0.3)  # tiny tensors leave blocks of 2 MiB unsplit
    at = one.record.loaded
    assert at.allocated <= at.reserved <= at.card
    assert one.record.context.outside > 100 * MIB
    assert set(one.record.peaks) == set(ADAPTERS[run[0]].modalities)
    assert all(peak.allocated > at.allocated and peak.new_tokens == 16 for peak in one.record.peaks.values())


@pytest.mark.parametrize("run", COPIES, ids=str)
def test_copy_beside_codes_is_seen(run: Run, measured: Callable[[Run], Measured]) -> None:
    """A weight kept in 16 bits beside its codes is seen byte by byte: even the smallest of a tiny model."""
    one = whole(measured(run))
    codes = sum(held.bytes for held in one.ledger.held if held.kind == "codes")
    expected = 4 * (codes if run[2] == "every copy kept" else one.ledger.smallest_coded)
    assert one.unexplained == pytest.approx(expected, abs=SLACK)
    assert one.beyond_model == pytest.approx(0 if run[2] == "copy registered" else expected, abs=SLACK)


def test_every_copy_fails_the_check(measured: Callable[[Run], Measured], selection: Selection) -> None:
    """The suite's own check fails on all copies kept, and on no good artifact."""
    for run, holds in ((("qwen2_5_vl", "rtn", "", 0.0), True), (COPIES[0], False)):
        verify = listener()
        test_memory.test_no_copy_beside_the_codes({"artifact": measured(run)}, selection.limits, verify)
        assert (verify.conclude() == "") == holds


def test_loaded_in_32_bits_is_seen(measured: Callable[[Run], Measured]) -> None:
    """A reference loaded in 32 bits takes twice its ledger."""
    one = whole(measured(IN_32_BITS))
    assert one.record.in_model == pytest.approx(2 * one.ledger.total, rel=0.01)


def test_out_of_memory_is_told(measured: Callable[[Run], Measured]) -> None:
    """Where torch may take next to nothing, the record says when memory ran out, and how much was free."""
    one = measured(NO_MEMORY)
    assert one.record.failed == "out of memory while loading"
    with pytest.raises(OutOfMemoryError, match="its weights alone need"):
        whole(one)
