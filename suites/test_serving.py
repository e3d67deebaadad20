"""Serving: vLLM answers with an artifact as transformers does, whatever its kernels, batches and graphs; and survives.

Answers are held against transformers in float32 with the weights as our own code decodes them. Differences are
measured in KL of teacher-forced distributions, against a noise floor: what float16 and another order of sums do where
no kernel decodes; and, of kernels that compute in bfloat16, what that does.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from fixtures.adapters import Adapter
from fixtures.chosen import Selection
from fixtures.core import metrics
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.limits import Limits
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines import bad_requests, hanging_up
from fixtures.engines.bad_requests import Refusal
from fixtures.engines.chat import ask, ask_all
from fixtures.engines.conditions import ALONE, IMAGES, KERNELS, LATER, NEW_TOKENS
from fixtures.engines.hanging_up import HungUp
from fixtures.engines.loading import load_processor
from fixtures.engines.replies import Compared, Reply, Taught, compare, paired
from fixtures.engines.saying import replies
from fixtures.engines.server import Server
from fixtures.formats import BNB_8BIT, format_of
from fixtures.meters import nvml
from fixtures.serving_under_test import Exact, Recordings
from fixtures.verifying import Verify

pytestmark = [pytest.mark.gpu, pytest.mark.served]

ASKED = 8  # samples per modality that a server is asked
AT_ONCE = 16  # requests
BAD = 200  # requests
NoiseOf = Callable[[str], float]  # modality -> nats


def kl(one: Sequence[Taught], other: Sequence[Taught]) -> float:
    """Mean KL per token between two engines' distributions, in nats."""
    return metrics.mean(torch.cat([torch.empty(0), *(metrics.token_kl(a, b) for a, b in paired(one, other))]))


def judge(verify: Verify, compared: Compared, limits: Limits, tokens: str, case: str = "") -> None:
    """Hold greedy answers against each other: no divergence but near ties, not many of these, enough looked at."""
    verify.none_of("divergences that are no near tie", compared.unexcused, among=compared.answers)
    verify("same answers", compared.same_share, "share of answers", at_least=limits("serving.same_answers", case))
    verify("tokens compared", compared.tokens, at_least=limits(tokens))
    rows = [(d.sample, d.place, d.one, d.other, d.gap) for d in compared.divergences]
    verify.table("Divergences", ("sample", "token", "one says", "the other", "nats apart"), rows)


@pytest.fixture(scope="session")
def noise(
    reference_recorded: Recordings,
    artifact_recorded: Recordings,
    reference: Checkpoint,
    artifact: Checkpoint,
    adapter: Adapter,
    exact: Exact,
) -> NoiseOf:
    """What float16 and another order of sums do where no kernel decodes: to the reference, and to the artifact.

    The largest of three: transformers in float32 against vLLM, of each; and vLLM's two ways with the reference.
    """

    @cache
    def of(modality: str) -> float:
        name = f"{modality}-taught"
        eager, graphs, decoded = (
            recorded(condition).taught[name]
            for recorded, condition in (
                (reference_recorded, "eager"),
                (reference_recorded, "graphs"),
                (artifact_recorded, "decoded"),
            )
        )
        of_reference, of_artifact = (exact(one, adapter, modality)[1] for one in (reference, artifact))
        floors = (kl(of_reference, eager), kl(of_artifact, decoded), kl(eager, graphs))
        return torch.tensor(floors, dtype=torch.float64).max().item()  # NaN stays NaN, which max() may lose

    return of


@pytest.fixture(scope="session")
def floor(noise: NoiseOf, artifact: Checkpoint, adapter: Adapter, exact: Exact) -> NoiseOf:
    """The noise floor of what a kernel decodes: with what its own arithmetic does, where that is not float16.

    vLLM computes bitsandbytes' linears in bfloat16. What that does to a model depends on the model, and is measured.
    """

    @cache
    def of(modality: str) -> float:
        if format_of(artifact).method != "bitsandbytes":
            return noise(modality)
        _, said = exact(artifact, adapter, modality)
        moved = [kl(said, rounded) for rounded in exact.in_bfloat16(artifact, adapter, modality)]
        return noise(modality) + metrics.mean(torch.tensor(moved, dtype=torch.float64))

    return of


@pytest.fixture
def most_of_kernels(artifact: Checkpoint, target: Target, modality: str, limits: Limits) -> float:
    """How far from the decoded weights a kernel may be, in floors; LLM.int8()'s, which rounds activations, further."""
    return limits("serving.of_kernels", "bnb-int8" if format_of(artifact) is BNB_8BIT else target.quantizer, modality)


# -- offline ---------------------------------------------------------------------------------------------------------


def test_answers_of_transformers(
    artifact_recorded: Recordings,
    artifact: Checkpoint,
    adapter: Adapter,
    exact: Exact,
    modality: str,
    limits: Limits,
    verify: Verify,
) -> None:
    """VLLM's greedy answers are transformers', but for near ties."""
    said, _ = exact(artifact, adapter, modality)
    judge(verify, compare(said, artifact_recorded("graphs").greedy[modality]), limits, "serving.tokens")


def test_reference_answers_of_transformers(
    reference_recorded: Recordings,
    reference: Checkpoint,
    adapter: Adapter,
    exact: Exact,
    modality: str,
    limits: Limits,
    verify: Verify,
) -> None:
    """So are the reference's: prompts, media and positions reach the model as they do in transformers."""
    said, _ = exact(reference, adapter, modality)
    judge(verify, compare(said, reference_recorded("graphs").greedy[modality]), limits, "serving.tokens")


def test_kl_against_fp16(
    artifact_recorded: Recordings,
    reference_recorded: Recordings,
    artifact: Checkpoint,
    reference: Checkpoint,
    adapter: Adapter,
    exact: Exact,
    modality: str,
    limits: Limits,
    verify: Verify,
) -> None:
    """Served, an artifact is as far from its served FP16 reference as its weights are: serving adds nothing."""
    name = f"{modality}-taught"
    served = kl(reference_recorded("graphs").taught[name], artifact_recorded("graphs").taught[name])
    weights = kl(exact(reference, adapter, modality)[1], exact(artifact, adapter, modality)[1])
    kernel = kl(artifact_recorded("decoded").taught[name], artifact_recorded("graphs").taught[name])
    # small KLs add as squared distances do; what the kernel adds is judged by itself, below
    seen, stored, added = (math.sqrt(one) for one in (served, weights, kernel))
    detail = f"served {served:.4g} nats, weights {weights:.4g}, kernel {kernel:.3g}"
    limit = limits("serving.of_weights")
    most, least = (seen / (stored + added), (seen + added) / stored) if stored else (None, None)
    verify("distance to FP16, of what weights and kernel add up to", most, at_most=limit, detail=detail)
    verify("distance to FP16 and kernel, of what the weights make it", least, at_least=1 / limit, detail=detail)
    verify.note("mean token KL against FP16, served", served, "nats")


def test_answers_in_bfloat16(
    artifact_recorded: Recordings,
    artifact: Checkpoint,
    adapter: Adapter,
    exact: Exact,
    modality: str,
    limits: Limits,
    verify: Verify,
) -> None:
    """Served in bfloat16, an artifact's greedy answers are transformers' in float32, but for near ties."""
    said, _ = exact(artifact, adapter, modality)
    judge(verify, compare(said, artifact_recorded("bfloat16").greedy[modality]), limits, "serving.tokens", "bfloat16")


def test_kl_in_bfloat16(
    artifact_recorded: Recordings,
    reference_recorded: Recordings,
    artifact: Checkpoint,
    reference: Checkpoint,
    adapter: Adapter,
    exact: Exact,
    target: Target,
    modality: str,
    limits: Limits,
    verify: Verify,
) -> None:
    """Served in bfloat16, an artifact is as far from its reference there as its weights and bfloat16 make it."""
    name = f"{modality}-taught"
    runs = {"reference": reference_recorded("bfloat16"), "artifact": artifact_recorded("bfloat16")}
    others = [f"{of}: {run.started.dtype}" for of, run in runs.items() if run.started.dtype != "bfloat16"]
    verify.none_of("runs in another type than bfloat16", others, among=len(runs))
    served = kl(*(run.taught[name] for run in runs.values()))
    weights = kl(exact(reference, adapter, modality)[1], exact(artifact, adapter, modality)[1])
    own, moved = (
        kl(recorded("eager").taught[name], recorded("bfloat16").taught[name])
        for recorded in (reference_recorded, artifact_recorded)
    )
    detail = f"served {served:.4g} nats, weights {weights:.4g}, rounding {own:.3g} and {moved:.3g}"
    verify("noise floor in bfloat16", own, "nats", at_most=limits("serving.noise_floor_in_bfloat16"), detail=detail)
    limit = limits("serving.of_noise_floor_in_bfloat16", target.quantizer)
    verify("KL of bfloat16 to float16, of the reference's", moved / own if own else None, at_most=limit, detail=detail)
    # small KLs add as squared distances do; roundings that both sides share cancel
    limit = limits("serving.of_weights_in_bfloat16")
    most, least = (math.sqrt(served / of) if of else None for of in (weights + own + moved, weights))
    where = "distance to the reference in bfloat16"
    verify(f"{where}, of what weights and rounding add up to", most, at_most=limit, detail=detail)
    verify(f"{where}, of what the weights make it", least, at_least=1 / limit, detail=detail)
    verify.note("mean token KL against the reference, served in bfloat16", served, "nats")


def test_kernel_computes_what_is_stored(
    artifact_recorded: Recordings,
    noise: NoiseOf,
    floor: NoiseOf,
    most_of_kernels: float,
    modality: str,
    limits: Limits,
    verify: Verify,
) -> None:
    """The kernel's distributions are those of the weights as we decode them, served in float16."""
    verify("noise floor", noise(modality), "nats", at_most=limits("serving.noise_floor"))
    verify("with what the kernel's arithmetic does", floor(modality), "nats", at_most=limits("serving.kernel_floor"))
    hold(verify, artifact_recorded, ("decoded", "eager"), floor(modality), modality, most_of_kernels)


def test_graphs_are_eager(
    artifact_recorded: Recordings, floor: NoiseOf, target: Target, modality: str, limits: Limits, verify: Verify
) -> None:
    """Compilation and CUDA graphs change nothing beyond rounding."""
    limit = limits("serving.of_noise_floor", target.quantizer)
    hold(verify, artifact_recorded, ("eager", "graphs"), floor(modality), modality, limit)
    recorded = [artifact_recorded(name).greedy[modality] for name in ("eager", "graphs")]
    verify.none_of("divergences that are no near tie", compare(*recorded).unexcused, among=len(recorded[0]))


@pytest.mark.several_kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree(
    artifact_recorded: Recordings,
    floor: NoiseOf,
    most_of_kernels: float,
    kernel: str,
    modality: str,
    verify: Verify,
) -> None:
    """Machete, Marlin and AWQ's plain kernel compute the same: each where it was asked for, held against another."""
    named = artifact_recorded(kernel).started.kernels
    verify.none_of("kernels other than asked for", sorted(set(named) - {kernel}), among=len(named))
    against = another_kernel(artifact_recorded, kernel)
    others = artifact_recorded(against).started.kernels
    verify.none_of("kernels that both sides ran", sorted({kernel, *named} & {*others}), among=len(others))
    rows = [(name, ", ".join(ran) or "none is named") for name, ran in ((kernel, named), (against, others))]
    verify.table("Kernels held against each other", ("asked for", "ran"), rows)
    hold(verify, artifact_recorded, (against, kernel), floor(modality), modality, most_of_kernels)


def another_kernel(recorded: Recordings, kernel: str) -> str:
    """The condition that a kernel is held against: vLLM's own choice, or, where that is this kernel, another forced."""
    forced = [name for name in KERNELS if name not in (kernel, *LATER)]
    others = (name for name in ("eager", *forced) if kernel not in recorded(name).started.kernels)
    return next(others, forced[-1])


def test_alone_is_together(
    artifact_recorded: Recordings,
    floor: NoiseOf,
    target: Target,
    adapter: Adapter,
    selection: Selection,
    limits: Limits,
    verify: Verify,
) -> None:
    """A prompt's answer does not depend on what is served beside it."""
    recorded = artifact_recorded("eager")
    mean = torch.tensor([floor(m) for m in selection.modalities_of(adapter)], dtype=torch.float64).mean().item()
    beside = [t for m in selection.modalities_of(adapter) for t in recorded.taught[f"{m}-taught"][:ALONE]]
    moved = kl(recorded.taught["alone-taught"], beside)
    limit = limits("serving.of_noise_floor", target.quantizer)
    verify("KL of prompts alone, of the noise floor", moved / mean if mean else None, at_most=limit)
    together = [r for m in selection.modalities_of(adapter) for r in recorded.greedy[m][:ALONE]]
    compared = compare(recorded.greedy["alone"], together)
    verify.none_of("divergences that are no near tie", compared.unexcused, among=compared.answers)
    verify.note("same answers", compared.same_share, "share of answers")


@pytest.mark.several_gpus
def test_tensor_parallel(
    artifact_recorded: Recordings,
    reference_recorded: Recordings,
    floor: NoiseOf,
    target: Target,
    modality: str,
    limits: Limits,
    verify: Verify,
) -> None:
    """An engine spread over several GPUs answers as on one."""
    limit = limits("serving.of_noise_floor", target.quantizer)
    hold(verify, artifact_recorded, ("eager", "parallel"), floor(modality), modality, limit)
    name = f"{modality}-taught"
    moved = kl(reference_recorded("eager").taught[name], reference_recorded("parallel").taught[name])
    verify.note("the reference's own", moved, "nats")


def hold(
    verify: Verify, recorded: Recordings, pair: tuple[str, str], floor: float, modality: str, limit: float
) -> None:
    """Hold the KL between two conditions against the noise floor."""
    one, other = (recorded(name) for name in pair)
    moved = kl(one.taught[f"{modality}-taught"], other.taught[f"{modality}-taught"])
    verify(
        f"KL of {pair[1]} to {pair[0]}, of the noise floor",
        moved / floor if floor else None,
        at_most=limit,
        detail=f"{moved:.3g} nats, noise {floor:.3g} nats; kernels {other.started.kernels}, {one.started.kernels}",
    )


# -- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(served_samples: Callable[[str], Sequence[Sample]], modality: str) -> Sequence[Sample]:
    """What a server is asked in a modality."""
    if modality in ("audio", "mixed") and not any(map(importlib.util.find_spec, ("soundfile", "av"))):
        pytest.skip("vLLM's server cannot read sound here: pip install 'vllm[audio]'")
    return served_samples(modality)[:ASKED]


def test_server_answers(
    server: Server,
    artifact_recorded: Recordings,
    artifact: Checkpoint,
    asked: Sequence[Sample],
    modality: str,
    limits: Limits,
    verify: Verify,
) -> None:
    """The server answers as vLLM does offline; its prompts are the same tokens, media included."""
    said = ask_all(server, asked, load_processor(artifact), NEW_TOKENS)
    offline = artifact_recorded("eager").greedy[modality][:ASKED]
    judge(verify, compare(offline, said), limits, "serving.server_tokens")


def test_several_at_once(
    server: Server,
    artifact: Checkpoint,
    asked: Sequence[Sample],
    limits: Limits,
    verify: Verify,
) -> None:
    """Requests that come at the same time are answered as those that come one by one."""
    processor = load_processor(artifact)
    one_by_one = ask_all(server, asked, processor, NEW_TOKENS)
    again = [replace(sample, id=f"{sample.id}, again") for sample in asked]
    together = ask_all(server, [*asked, *again], processor, NEW_TOKENS, at_once=AT_ONCE)
    repeated = [*one_by_one, *(replace(r, sample=s.id) for r, s in zip(one_by_one, again, strict=True))]
    judge(verify, compare(repeated, together), limits, "serving.server_tokens")


@pytest.mark.parametrize("count", [2, IMAGES])
def test_several_images(
    server: Server,
    artifact: Checkpoint,
    adapter: Adapter,
    exact: Exact,
    served_samples: Callable[[str], Sequence[Sample]],
    count: int,
    limits: Limits,
    verify: Verify,
) -> None:
    """Several images in one prompt are read as transformers reads them."""
    samples = served_samples("image")
    prompts = [showing_several(samples[start : start + count]) for start in range(ASKED)]
    said = ask_all(server, prompts, load_processor(artifact), NEW_TOKENS)
    judge(
        verify,
        compare(replies(exact.engine(artifact, adapter), prompts, NEW_TOKENS), said),
        limits,
        "serving.few_tokens",
        "several_images",
    )


def showing_several(samples: Sequence[Sample]) -> Sample:
    """One prompt with the images of several samples."""
    images = [part for sample in samples for part in sample.content if part["type"] == "image"]
    question = [part for part in samples[0].content if part["type"] != "image"]
    return replace(samples[0], id=f"{len(images)} images: {samples[0].id}", content=(*images, *question))


def test_bad_requests(
    server: Server,
    artifact: Checkpoint,
    adapter: Adapter,
    served_samples: Callable[[str], Sequence[Sample]],
    verify: Verify,
) -> None:
    """A request that cannot be served gets a 4xx that says why, and the next good one its answer, as before."""
    sample, processor = served_samples("image")[0], load_processor(artifact)
    before = ask(server, sample, processor, NEW_TOKENS)
    bodies = bad_requests.bad_requests(server, sample, processor, IMAGES, hears="audio" in adapter.modalities)
    refusals, changed = [], []
    for kind, body in bodies.items():
        refusals.append(bad_requests.refused(server, kind, body))
        after = ask(server, sample, processor, NEW_TOKENS)
        changed += [f"after {kind}: {line}" for line in compare([before], [after]).unexcused]
    verify.none_of(
        "bad requests without a clean refusal", [str(r) for r in refusals if not r.clean], among=len(refusals)
    )
    verify.none_of("answers that changed after one", changed, among=len(refusals))
    verify.table("Refusals", ("request", "status", "says"), [(r.kind, r.status, r.message[:120]) for r in refusals])


def test_nothing_is_lost(
    server: Server,
    artifact: Checkpoint,
    adapter: Adapter,
    served_samples: Callable[[str], Sequence[Sample]],
    limits: Limits,
    verify: Verify,
) -> None:
    """Of two hundred bad requests each is refused, or let go of when its client hangs up; none costs memory or work."""
    sample, processor = served_samples("image")[0], load_processor(artifact)
    bodies = bad_requests.bad_requests(server, sample, processor, IMAGES, hears="audio" in adapter.modalities)
    good = bad_requests.chat_request(server.model, sample, processor, max_tokens=NEW_TOKENS)

    def misbehave(times: int) -> tuple[list[Refusal], list[HungUp]]:
        refusals, left, bad = [], [], itertools.cycle(bodies.items())
        for turn in range(times):
            if turn % 4 == 3:
                left.append(hanging_up.hang_up(server, good))
            else:
                refusals.append(bad_requests.refused(server, *next(bad)))
        return refusals, left

    misbehave(2 * len(bodies))  # what is allocated once and kept is no loss
    first: Reply = ask(server, sample, processor, NEW_TOKENS)
    idle, before = hanging_up.let_go(server), used_bytes(server)
    refusals, left = misbehave(BAD)
    after = hanging_up.let_go(server)
    last = ask(server, sample, processor, NEW_TOKENS)
    lost = bad_requests.lost_bytes(before, used_bytes(server))
    unclean = [str(one) for one in refusals if not one.clean]
    verify.none_of("bad requests without a clean refusal", unclean, among=len(refusals))
    verify.none_of("hang-ups on no stream", [str(one) for one in left if not one.mid_stream], among=len(left))
    verify("requests still held", after.held, equal_to=0, detail=f"{after.running:g} run, {after.waiting:g} wait")
    asked_for, read = len(left) * hanging_up.LONG, sum(one.pieces for one in left)
    computed = after.generated - idle.generated
    verify(
        "tokens computed for clients gone, of those they asked for",
        computed / asked_for if computed >= read else None,  # a count that lacks what was read counts nothing
        at_most=limits("serving.for_clients_gone"),
        detail=f"{read} pieces read, {computed:g} tokens computed, {asked_for} asked for",
    )
    count = len(refusals) + len(left)
    verify("memory lost", lost / 2**20, "MiB", at_most=limits("serving.lost_memory"), detail=f"{count} requests")
    verify.none_of("answers that changed", compare([first], [last]).unexcused, among=1)
    verify("alive", server.alive(), equal_to=1)


def used_bytes(server: Server) -> int:
    """What a server holds of the GPU, by process where the driver tells; else what the whole card holds."""
    own = nvml.process_bytes(server.pids())
    return nvml.card().used if own is None else own
