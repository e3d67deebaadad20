"""On a GPU, with vLLM itself: each of two that share a model holds what the ledger says, both ranks on one card."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.engines.server import start_server
from fixtures.memory_under_test import Served, serving_of
from fixtures.meters import nvml
from fixtures.meters.held import Ledger, in_vllm
from fixtures.options import Selection
from fixtures.quantizers import recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects.full_size import full_size
from fixtures.verifying import Verify
from suites import test_memory
from suites.meta import two_ranks
from suites.meta.answering import listener

pytestmark = pytest.mark.gpu
SHARE, KV = 0.2, 4 << 30  # of the card, for each of four ranks; bytes of its KV cache
WITHIN = 240.0  # seconds for a start: it imports vLLM four times at once


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_5_omni"])
def shared(
    vllm_installed: None,
    request: pytest.FixtureRequest,
    selection: Selection,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[Served, Ledger]]:
    """A full-size 3B and its RTN artifact, served side by side over two ranks each; and what one GPU would hold."""
    reference = Checkpoint(full_size(f"{request.param}-3b", selection.cache))
    artifact = cached_artifact(reference, recipe_for("rtn", None), (), selection.cache, device="cuda")
    adapter, folder = ADAPTERS[request.param], tmp_path_factory.mktemp("ranks")
    serving = replace(serving_of(adapter, SHARE, 2), kv_bytes=KV)
    module = (sys.executable, two_ranks.__file__)

    def look(checkpoint: Checkpoint) -> tuple[Served, Ledger]:
        with start_server(checkpoint, serving, folder / checkpoint.name, module=module, within=WITHIN) as server:
            cards = tuple(nvml.process_bytes(two_ranks.pids_of(rank, server.pids())) for rank in (0, 1))
            said = server.started
        alone, each = (in_vllm(checkpoint, adapter, serving.media, said.kernels, gpus) for gpus in (1, 2))
        budget = int(SHARE * nvml.card().total)
        one = Served(checkpoint.name, each, said.weights_by_gpu, said.kv_tokens, said.kernels, cards, budget)
        return one, alone

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(look, (reference, Checkpoint(artifact))))


def judge(served: list[Served], selection: Selection, verify: Verify) -> None:
    """Have the suite's check judge a reference and an artifact over two GPUs."""
    both: Mapping[str, Served] = dict(zip(("reference", "artifact"), served, strict=True))
    test_memory.test_share_of_each_gpu(both, replace(selection, tensor_parallel=2), selection.limits, verify)


def test_each_rank_holds_its_share(shared: list[tuple[Served, Ledger]], selection: Selection, verify: Verify) -> None:
    """What each of two ranks takes is the ledger's share, by vLLM's log and by NVML."""
    served = [one for one, _ in shared]
    for one in served:
        assert len(one.weights_by_gpu) == 2, f"{one.name}: vLLM's log tells of {one.weights_by_gpu} bytes of weights"
        assert None not in one.cards, f"{one.name}: NVML tells of {one.cards} bytes: which processes are a rank's?"
    judge(served, selection, verify)


def test_undivided_model_is_no_share(shared: list[tuple[Served, Ledger]], selection: Selection) -> None:
    """A ledger that divides nothing is not what the ranks hold."""
    verify = listener()
    judge([replace(one, ledger=alone) for one, alone in shared], selection, verify)
    failed = {m.quantity for m in verify.measurements if m.holds is False}
    assert failed == {f"{name}: GPUs that hold other weights than predicted" for name in ("reference", "artifact")}
