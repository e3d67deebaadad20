"""On a GPU, with vLLM itself: what the serving checks must catch there is planted in artifacts and served."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.engines import conditions, offline
from fixtures.engines.decoded import write_decoded
from fixtures.engines.hanging_up import LET_GO, LONG, READ, UNFINISHED, let_go, load_of, streamed
from fixtures.engines.loading import load_processor
from fixtures.engines.offline import Batch, Recorded
from fixtures.engines.process import EngineError
from fixtures.engines.requests import chat_request
from fixtures.engines.server import start_server
from fixtures.faults.awq_codes import all_scales_off
from fixtures.faults.editing import copied, edit_json
from fixtures.faults.serving import in_memory_names
from fixtures.options import Selection
from fixtures.subjects.samples import draw
from suites.test_serving import kl

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("vllm_installed")]
VL = ADAPTERS["qwen2_5_vl"]
PLAIN = conditions.plain_serving(VL)


@pytest.fixture(scope="module")
def recorded(
    tiny_reference: Checkpoint, good_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Recorded]:
    """The reference, a good artifact and a damaged one, run side by side by vLLM."""
    folder = tmp_path_factory.mktemp("planted")
    damaged = copied(good_artifact, folder / "damaged")
    all_scales_off(0.05)(damaged)
    good = Checkpoint(good_artifact)
    wanted = {
        "reference": conditions.Condition(tiny_reference, PLAIN),
        "graphs": conditions.Condition(tiny_reference, replace(PLAIN, eager=False)),
        "good": conditions.Condition(good, PLAIN),
        "damaged": conditions.Condition(Checkpoint(damaged), PLAIN),
        "decoded": conditions.Condition(write_decoded(good, folder / "decoded"), PLAIN),
    }
    runs = conditions.Runs(folder)
    runs.begin(list(wanted.values()), [Batch("taught", tuple(draw("image", "evaluation", 16)), taught=True)])
    found = {name: runs.recorded(condition) for name, condition in wanted.items()}
    runs.close()
    return found.__getitem__


def test_damaged_layer_is_seen_through_the_kernel(recorded: Callable[[str], Recorded], selection: Selection) -> None:
    """Scales of one linear off by a twentieth move what vLLM computes far beyond its noise; a good kernel does not."""
    taught = {name: recorded(name).taught["taught"] for name in ("reference", "graphs", "good", "damaged", "decoded")}
    noise = kl(taught["reference"], taught["graphs"])
    limit = selection.limits("serving.of_kernels", "awq", "image")
    assert kl(taught["decoded"], taught["good"]) < limit * noise
    assert kl(taught["decoded"], taught["damaged"]) > limit * noise


def test_in_memory_names_are_refused(good_artifact: Path, tmp_path: Path) -> None:
    """An artifact with transformers' in-memory names, which transformers loads, is refused by vLLM, and we say why."""
    artifact = copied(good_artifact, tmp_path / "artifact")
    in_memory_names(artifact)
    with pytest.raises(EngineError, match="tensors have transformers' in-memory names") as refused:
        start_server(Checkpoint(artifact), PLAIN, tmp_path / "log")
    assert "model.embed_tokens.weight on the hub" in str(refused.value)
    assert "modules_to_not_convert is ['model.visual', 'lm_head'], by which vLLM takes visual." in str(refused.value)


def test_impossible_config_is_told(good_artifact: Path, tmp_path: Path) -> None:
    """Weights that do not fit their config are reported in vLLM's own words, in a few lines."""
    artifact = copied(good_artifact, tmp_path / "artifact")
    edit_json(artifact, "config.json", lambda config: config["text_config"].update(hidden_size=192))
    with pytest.raises(EngineError, match="vLLM does not run") as caught:
        offline.run(
            Checkpoint(artifact), PLAIN, [Batch("text", tuple(draw("text", "evaluation", 1)))], tmp_path / "log"
        )
    assert len(str(caught.value).splitlines()) < 10


def test_those_who_left_are_told_from_those_who_stay(good_artifact: Path, tmp_path: Path) -> None:
    """VLLM's own count has an answer as long as its client stays, longer than a check waits, and not once it left."""
    sample, artifact = draw("image", "evaluation", 1)[0], Checkpoint(good_artifact)
    with start_server(artifact, PLAIN, tmp_path) as server:
        good = chat_request(server.model, sample, load_processor(artifact), max_tokens=8)
        idle = let_go(server)
        with streamed(server, {**good, **UNFINISHED}) as found:
            time.sleep(LET_GO)
            assert (found.mid_stream, load_of(server).held) == (True, 1)
        gone = let_go(server)
        assert (idle.held, gone.held) == (0, 0)
        assert READ <= gone.generated - idle.generated < LONG


def test_server_gives_its_memory_back(good_artifact: Path, tmp_path: Path) -> None:
    """Once a server is closed the card has the memory back that it took."""
    from fixtures.meters import nvml

    before = nvml.card().used
    with start_server(Checkpoint(good_artifact), PLAIN, tmp_path) as server:
        taken = nvml.card().used - before
        assert server.started.kernels in {("machete",), ("marlin",)}
    assert taken > 2**30
    assert nvml.card().used - before < 64 * 2**20
