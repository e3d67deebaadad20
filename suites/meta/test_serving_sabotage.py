"""What the serving checks must see: planted in replies and distributions, and asked of the checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.chosen import Selection
from fixtures.core.targets import Target
from fixtures.engines.offline import Recorded
from fixtures.engines.replies import Reply, Taught, compare, paired
from fixtures.engines.vllm_logs import Started
from fixtures.verifying import Verify
from suites import test_serving
from suites.meta.answering import listener

END = 9
TOP: dict[int, float] = {1: -0.7, 2: -0.8, 3: -2.0, 4: -3.0, 5: -4.0}


def reply(*said: int, prompt: tuple[int, ...] = (0,), top: dict[int, float] | None = None, sample: str = "s") -> Reply:
    """A reply whose tokens were all among a few likely ones."""
    return Reply(sample, prompt, said, tuple({END: -0.9, **(TOP if top is None else top)} for _ in said))


# -- greedy answers --------------------------------------------------------------------------------------------------


def test_same_answers() -> None:
    """Answers that are the same are the same, every token counted."""
    compared = compare([reply(1, 2, END)], [reply(1, 2, END)])
    assert (compared.same, compared.tokens, compared.unexcused, compared.same_share) == (1, 3, [], 1.0)


def test_near_tie_is_excused() -> None:
    """Where both find the other's token likely, the first difference is a near tie, told with how near."""
    compared = compare([reply(1, 2, END)], [reply(2, 4, 4, END)])
    assert compared.unexcused == []
    assert (compared.same, compared.tokens) == (0, 1)
    assert compared.divergences[0].gap == pytest.approx(0.1)
    assert "0.100 nats apart" in str(compared.divergences[0])


UNKNOWN = {7: -0.1, 11: -3.0, 12: -3.1, 13: -3.2, 14: -3.3, 15: -3.4}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (reply(1, END), reply(7, END, top=UNKNOWN)),  # a wrong token that the one does not know
        (reply(1, 2, END), reply(1, 2)),  # cut before its end of turn
        (reply(1, 2, END), reply()),  # empty
        (reply(), reply()),  # both empty
        (reply(1, END), reply(2, END, top={**TOP, 2: math.nan})),  # no number
        (reply(1, END), reply(6, END, top={**TOP, 6: -5.0})),  # sixth of the other's own
        (reply(1, END), reply(1, END, prompt=(1,))),  # another prompt
    ],
    ids=["unknown token", "cut short", "empty", "both empty", "NaN", "sixth", "other prompt"],
)
def test_other_answers_are_seen(one: Reply, other: Reply) -> None:
    """A difference that no rounding explains is seen from either side, and never counts as the same."""
    for pair in ((one, other), (other, one)):
        compared = compare(*([reply] for reply in pair))
        assert len(compared.unexcused) == 1
        assert compared.same == 0


def test_nothing_compared_is_nothing() -> None:
    """Without answers there is no share of same ones, and answers to other samples are never compared."""
    assert math.isnan(compare([], []).same_share)
    with pytest.raises(ValueError, match="not to the same samples"):
        compare([reply(1)], [])
    with pytest.raises(ValueError, match="not to the same samples"):
        compare([reply(1)], [reply(1, sample="another")])


# -- the checks, on recordings that are damaged ----------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
LOGPROBS = torch.randn(200, 32, generator=GENERATOR).log_softmax(-1)


def moved(by: float) -> Tensor:
    """The distributions, moved a little."""
    return (LOGPROBS + by * torch.randn(LOGPROBS.shape, generator=torch.Generator().manual_seed(1))).log_softmax(-1)


NOISE = test_serving.kl([Taught("s", (0,), LOGPROBS)], [Taught("s", (0,), moved(1e-3))])


def recording(
    logprobs: Tensor, said: tuple[int, ...] = (1, 2, END), kernels: tuple[str, ...] = ("marlin",)
) -> Recorded:
    """What an engine is said to have replied."""
    answers = [reply(*said, sample=f"s{number}") for number in range(40)]
    return Recorded(Started(1.0, (1,), 1, kernels), {"text": answers}, {"text-taught": [Taught("s", (0,), logprobs)]})


def said_by(check: Callable[..., None], selection: Selection, **given: Any) -> Verify:
    """What a check of the suite says of recordings."""
    verify = listener()
    target = Target("qwen2_5_vl", "tiny", "awq")
    most = selection.limits("serving.of_kernels", "awq", "text")
    known = {"limits": selection.limits, "modality": "text", "target": target, "most_of_kernels": most}
    floors = dict.fromkeys(("noise", "floor"), lambda _: NOISE)
    available = {"verify": verify, **known, **floors, **given}
    check(**{name: available[name] for name in check.__code__.co_varnames[: check.__code__.co_argcount]})
    return verify


def held(verify: Verify) -> bool:
    """Whether all that was judged holds, and something was."""
    return not verify.conclude()


OTHERS: dict[str, Recorded] = {
    "a layer's scales off": recording(moved(0.05)),
    "NaN": recording(torch.full_like(LOGPROBS, math.nan)),
    "one NaN": recording(LOGPROBS.clone().index_fill(0, torch.tensor([7]), math.nan)),
    "nothing": Recorded(Started(1.0, (1,), 1, ("marlin",)), {"text": []}, {"text-taught": []}),
}


@pytest.mark.parametrize("fault", [None, "a layer's scales off", "NaN", "one NaN"])
@pytest.mark.parametrize(
    "check", [test_serving.test_kernel_computes_what_is_stored, test_serving.test_graphs_are_eager]
)
def test_moved_distributions_are_seen(check: Callable[..., None], fault: str | None, selection: Selection) -> None:
    """A kernel or a graph that computes something else, or no number, does not hold; rounding does."""
    good, other = recording(LOGPROBS), OTHERS[fault] if fault else recording(moved(1e-3))
    recorded = {"decoded": good, "eager": other if check.__name__.endswith("stored") else good, "graphs": other}
    assert held(said_by(check, selection, artifact_recorded=recorded.__getitem__)) == (fault is None)


@pytest.mark.parametrize(
    ("noise", "floor", "holds"),
    [
        (NOISE, NOISE, True),
        (NOISE, 100 * NOISE, True),  # of a kernel that computes in bfloat16
        (1e-2, 1e-2, False),
        (1e-2, NOISE, False),
        (NOISE, 1e-2, False),
        (NOISE, math.inf, False),
        (math.nan, NOISE, False),
        (NOISE, math.nan, False),
        (0.0, 0.0, False),
    ],
)
def test_a_floor_that_excuses_anything_is_seen(noise: float, floor: float, holds: bool, selection: Selection) -> None:
    """A noise floor that is high, no number or nothing does not hold: all would be within it; nor does the kernel's."""
    recorded = {"decoded": recording(LOGPROBS), "eager": recording(moved(1e-3))}
    check = test_serving.test_kernel_computes_what_is_stored
    floors = {"noise": lambda _: noise, "floor": lambda _: floor}
    assert held(said_by(check, selection, artifact_recorded=recorded.__getitem__, **floors)) == holds


FLOORS = {"reference in float32": 0, "artifact in float32": 1, "reference, eager": 2, "graphs": 3, "decoded": 4}


@pytest.mark.parametrize("broken", [None, *FLOORS])
def test_noise_is_the_largest_of_what_moves_without_a_kernel(broken: str | None) -> None:
    """The floor is the largest of its three distances, and NaN in any of what it is made of is not lost."""
    logprobs = [LOGPROBS, LOGPROBS, moved(1e-3), moved(1e-3), moved(2e-3)]
    if broken:
        logprobs[FLOORS[broken]] = torch.full_like(LOGPROBS, math.nan)
    said = [recording(one) for one in logprobs]
    exact = {"reference": said[0], "artifact": said[1]}
    floor = test_serving.noise.__wrapped__(
        {"eager": said[2], "graphs": said[3]}.__getitem__,
        {"decoded": said[4]}.__getitem__,
        "reference",
        "artifact",
        None,
        lambda checkpoint, *_: ([], exact[checkpoint].taught["text-taught"]),
    )("text")
    if broken:
        assert math.isnan(floor)
    else:
        assert floor == test_serving.kl(said[1].taught["text-taught"], said[4].taught["text-taught"]) > NOISE


@pytest.mark.parametrize(
    ("other", "holds"),
    [
        (recording(moved(1e-3)), True),
        (recording(moved(1e-3), kernels=("machete",)), False),  # what was forced was not used
        (recording(moved(1e-3), kernels=("marlin", "awq")), False),  # a fallback
        (recording(moved(1e-3), kernels=()), False),
        (recording(moved(0.05)), False),
    ],
)
def test_other_kernels_are_seen(other: Recorded, holds: bool, selection: Selection) -> None:
    """A kernel that was not the one asked for, or computes something else, does not hold."""
    recorded = {"eager": recording(LOGPROBS, kernels=("machete",)), "marlin": other}
    recorded["awq"] = recording(LOGPROBS, kernels=("awq",))
    said = said_by(test_serving.test_kernels_agree, selection, artifact_recorded=recorded.__getitem__, kernel="marlin")
    assert held(said) == holds


def by_kernels(**conditions: str) -> dict[str, Recorded]:
    """Recordings under some conditions, and the kernels that each log names."""
    forced = {"machete": "machete", "marlin": "marlin", "awq": "awq"}
    return {
        name: recording(moved(1e-3) if name in forced else LOGPROBS, kernels=tuple(filter(None, ran.split(","))))
        for name, ran in {**forced, **conditions}.items()
    }


@pytest.mark.parametrize(
    ("kernel", "own", "against"),
    [
        ("marlin", "machete", "eager"),
        ("awq", "machete", "eager"),
        ("machete", "machete", "marlin"),
        ("marlin", "marlin", "awq"),  # as on every card but Hopper: Marlin beside Marlin says nothing
        ("awq", "marlin", "eager"),
        ("machete", "marlin", "eager"),
        ("marlin", "machete,marlin", "awq"),  # by some linears both ran Marlin
        ("awq", "awq", "marlin"),
        ("marlin", "NewestLinearKernel", "eager"),
    ],
)
def test_a_kernel_is_held_against_another(kernel: str, own: str, against: str, selection: Selection) -> None:
    """Whatever vLLM's own choice is, both sides of the comparison ran kernels that the other did not; all is told."""
    recorded = by_kernels(eager=own)
    check = test_serving.test_kernels_agree
    said = said_by(check, selection, artifact_recorded=recorded.__getitem__, kernel=kernel)
    assert held(said)
    assert said.measurements[-1].quantity == f"KL of {kernel} to {against}, of the noise floor"
    (table,) = said.tables
    ran = ", ".join(recorded[against].started.kernels)
    assert table.rows == ((kernel, kernel), (against, ran))
    # the kernel is off, and so is the own choice wherever that ran it: one beside itself would agree
    off = [kernel] + ["eager"] * (kernel in recorded["eager"].started.kernels)
    damaged = {name: replace(recording(moved(0.05)), started=recorded[name].started) for name in off}
    assert not held(said_by(check, selection, artifact_recorded={**recorded, **damaged}.__getitem__, kernel=kernel))


@pytest.mark.parametrize("kernel", ["machete", "marlin", "awq"])
@pytest.mark.parametrize("named", [True, False])
def test_one_kernel_on_both_sides_is_seen(kernel: str, named: bool, selection: Selection) -> None:
    """Where every condition ran one kernel, or the other side names none, nothing was compared: it does not hold."""
    ran = kernel if named else ""
    recorded = by_kernels(**{**dict.fromkeys(("eager", "marlin", "awq", "machete"), ran), kernel: kernel})
    said = said_by(test_serving.test_kernels_agree, selection, artifact_recorded=recorded.__getitem__, kernel=kernel)
    assert [m.quantity for m in said.measurements if m.bound and not m.holds] == ["kernels that both sides ran"]


@pytest.mark.parametrize(
    ("said", "holds"),
    [((1, 2, END), True), ((), False), ((1,), False), ((3, 2, END), False), ((7, 2, END), False)],
    ids=["same", "empty", "cut short", "near ties everywhere", "wrong"],
)
def test_other_answers_do_not_hold(said: tuple[int, ...], holds: bool, selection: Selection) -> None:
    """VLLM's answers must be transformers': empty, short, wrong ones are not, nor are near ties everywhere."""
    exact = recording(LOGPROBS).greedy["text"]
    verify = said_by(
        test_serving.test_answers_of_transformers,
        selection,
        artifact_recorded=lambda _: recording(LOGPROBS, said),
        artifact=None,
        adapter=None,
        exact=lambda *_: (exact, []),
    )
    assert held(verify) == holds


@pytest.mark.parametrize(("artifact", "holds"), [(moved(0.02), True), (moved(0.04), False), (moved(0.005), False)])
def test_serving_that_adds_to_the_error_is_seen(artifact: Tensor, holds: bool, selection: Selection) -> None:
    """An artifact that is further from FP16 when served than its weights are, or nearer, is not served as it is."""
    weights = {"reference": [Taught("s", (0,), LOGPROBS)], "artifact": [Taught("s", (0,), moved(0.02))]}
    verify = said_by(
        test_serving.test_kl_against_fp16,
        selection,
        artifact_recorded=lambda _: recording(artifact),
        reference_recorded=lambda _: recording(LOGPROBS),
        artifact="artifact",
        reference="reference",
        adapter=None,
        exact=lambda checkpoint, *_: ([], weights[checkpoint]),
    )
    assert held(verify) == holds


def test_other_shapes_are_never_compared() -> None:
    """Distributions over other tokens are an error: nothing is cut to fit."""
    one = Taught("s", (0, 1), LOGPROBS)
    for other in (replace(one, prompt=(0, 2)), replace(one, logprobs=LOGPROBS[:-1]), replace(one, sample="t")):
        with pytest.raises(ValueError, match="sample"):
            paired([one], [other])
