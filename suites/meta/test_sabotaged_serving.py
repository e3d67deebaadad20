"""Every quantity that the serving checks judge fails, alone, on a fault of an engine or a server; a sound one holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from fixtures.engines.bad_requests import Refusal
from fixtures.engines.hanging_up import LONG, READ, HungUp, Load
from fixtures.engines.replies import Taught
from fixtures.engines.vllm_logs import Started
from fixtures.meters import nvml
from fixtures.options import Selection
from suites import test_serving
from suites.meta.serving_world import (
    MIB,
    QUANTIZED,
    RIGHT,
    TIE,
    WRONG,
    Check,
    Said,
    World,
    answered,
    disturbed,
    greedy,
    heard,
    in_bfloat16,
)
from suites.meta.test_serving_sabotage import END, LOGPROBS

# -- faults ------------------------------------------------------------------------------------------------------------


def conditions(*names: str, said: Said | None = None, logprobs: Tensor | None = None, alone: bool = False) -> Any:
    """Some of the artifact's conditions answer otherwise, or give other distributions."""

    def fault(world: World) -> None:
        for name in names:
            one = world.artifact[name]
            key = "alone" if alone else "text"
            if said:
                replies = [answered(r.sample, said(n)) for n, r in enumerate(one.greedy[key])]
                one = replace(one, greedy={**one.greedy, key: replies})
            if logprobs is not None:
                one = replace(one, taught={**one.taught, f"{key}-taught": [Taught("s", (0,), logprobs)]})
            world.artifact[name] = one

    return fault


def references(said: Said) -> Any:
    """The reference is answered otherwise by vLLM."""

    def fault(world: World) -> None:
        world.reference["graphs"] = replace(world.reference["graphs"], greedy={"text": greedy(said)})

    return fault


def serves(**changes: Any) -> Any:
    """The server does otherwise."""
    return lambda world: vars(world.server).update(changes)


def all_short(world: World) -> None:
    """Every engine answers with one token: what is compared is nearly nothing."""
    world.transformers = lambda _: (END,)
    world.server.says = lambda *_: (END,)
    references(world.transformers)(world)
    conditions(*world.artifact, said=world.transformers)(world)


def reference_runs(**changes: Tensor) -> Any:
    """The reference's conditions give other distributions."""

    def fault(world: World) -> None:
        for name, logprobs in changes.items():
            taught = {"text-taught": [Taught("s", (0,), logprobs)]}
            world.reference[name] = replace(world.reference[name], taught=taught)

    return fault


def is_its_reference(world: World) -> None:
    """Where the artifact should have been, the reference was served, in float16 and in bfloat16."""
    for name in ("eager", "bfloat16"):
        world.artifact[name] = replace(world.artifact[name], taught=world.reference[name].taught)


def with_itself(world: World) -> None:
    """Where the reference should have been, the artifact was served."""
    for name in ("eager", "bfloat16"):
        world.reference[name] = replace(world.reference[name], taught=world.artifact[name].taught)


def float16_after_all(world: World) -> None:
    """An engine that was told bfloat16 and computes in float16."""
    started = replace(world.artifact["bfloat16"].started, dtype="float16")
    world.artifact["bfloat16"] = replace(world.artifact["bfloat16"], started=started)


def twice_the_error(world: World) -> None:
    """What is served is further from its reference than its weights are, in float16 and in bfloat16 alike."""
    conditions("eager", logprobs=TWICE)(world)
    world.artifact["bfloat16"] = in_bfloat16(TWICE, 1000, "machete")


def kernel_unnamed(world: World) -> None:
    """Marlin was forced, and a fallback taken."""
    world.artifact["marlin"] = replace(world.artifact["marlin"], started=Started(1.0, (1,), 1, ("marlin", "awq")))


def ran(world: World, **kernels: str) -> None:
    """Conditions whose logs name other kernels; "" names none."""
    for name, kernel in kernels.items():
        started = Started(1.0, (1,), 1, (kernel,) if kernel else ())
        world.artifact[name] = replace(world.artifact[name], started=started)


def high_floor(world: World) -> None:
    """A noise floor that would excuse anything."""
    world.floor = 5e-4


def coarse_arithmetic(world: World) -> None:
    """A kernel's arithmetic said to be so coarse that it would excuse anything."""
    world.arithmetic = 3e-3


def kind_of(refusal: Refusal) -> Callable[[str], Refusal]:
    """One kind of bad request is taken another way."""
    return lambda kind: refusal if kind == "bad 7" else Refusal(kind, 400, "what was asked is wrong")


def number_of(sample: str) -> int:
    """``2 images: s7, again`` -> 7."""
    return int(sample.partition(",")[0].rpartition("s")[2])


ONE_WRONG: Said = lambda number: WRONG if number == 3 else RIGHT  # noqa: E731 - a value beside its peers
MOSTLY_TIES: Said = lambda number: TIE if number % 8 else RIGHT  # noqa: E731
MANY_TIES: Said = lambda number: TIE if number % 8 > 2 else RIGHT  # noqa: E731
OFF = disturbed(QUANTIZED, 0.05)  # a layer's scales off
OFF_ANOTHER_WAY = disturbed(QUANTIZED, 0.05, seed=5)  # than quantizing does
DIVERGED, SAME, TOKENS = "divergences that are no near tie", "same answers", "tokens compared"
KL = "KL of {} to {}, of the noise floor"
ALONE = "KL of prompts alone, of the noise floor"
FURTHER = "distance to FP16, of what weights and kernel add up to"
NEARER = "distance to FP16 and kernel, of what the weights make it"
FLOOR = "noise floor in bfloat16"
ROUNDED = "KL of bfloat16 to float16, of the reference's"
FURTHER_ROUNDED = "distance to the reference in bfloat16, of what weights and rounding add up to"
NEARER_ROUNDED = "distance to the reference in bfloat16, of what the weights make it"
TWICE = disturbed(LOGPROBS, 0.04)
HALF = disturbed(LOGPROBS, 0.01)


def of_server(said: Said, *, together: bool = False) -> Any:
    """The server answers some samples otherwise; ``together``: only where it is asked several at once."""
    return serves(says=lambda sample, turn, at_once: said(number_of(sample)) if at_once > 1 or not together else RIGHT)


s = test_serving
# check, what is broken, and exactly what must not hold
PLANTED: dict[str, tuple[Check, Callable[[World], Any], str]] = {
    "a wrong answer": (s.test_answers_of_transformers, conditions("graphs", said=ONE_WRONG), DIVERGED),
    "near ties": (s.test_answers_of_transformers, conditions("graphs", said=MANY_TIES), SAME),
    "short answers": (s.test_answers_of_transformers, all_short, TOKENS),
    "the reference: a wrong answer": (s.test_reference_answers_of_transformers, references(ONE_WRONG), DIVERGED),
    "the reference: near ties": (s.test_reference_answers_of_transformers, references(MANY_TIES), SAME),
    "the reference: short answers": (s.test_reference_answers_of_transformers, all_short, TOKENS),
    "the server: a wrong answer": (s.test_server_answers, of_server(ONE_WRONG), DIVERGED),
    "the server: near ties": (s.test_server_answers, of_server(MANY_TIES), SAME),
    "the server: short answers": (s.test_server_answers, all_short, TOKENS),
    "at once: a wrong answer": (s.test_several_at_once, of_server(ONE_WRONG, together=True), DIVERGED),
    "at once: near ties": (s.test_several_at_once, of_server(MANY_TIES, together=True), SAME),
    "at once: short answers": (s.test_several_at_once, all_short, TOKENS),
    "several images: a wrong answer": (s.test_several_images, of_server(ONE_WRONG), DIVERGED),
    "several images: near ties": (s.test_several_images, of_server(lambda n: TIE if n % 8 > 1 else RIGHT), SAME),
    "several images: short answers": (s.test_several_images, all_short, TOKENS),
    "twice the error": (s.test_kl_against_fp16, conditions("decoded", "graphs", logprobs=TWICE), FURTHER),
    "half the error": (s.test_kl_against_fp16, conditions("decoded", "graphs", logprobs=HALF), NEARER),
    "bfloat16: a wrong answer": (s.test_answers_in_bfloat16, conditions("bfloat16", said=ONE_WRONG), DIVERGED),
    "bfloat16: near ties": (s.test_answers_in_bfloat16, conditions("bfloat16", said=MOSTLY_TIES), SAME),
    "bfloat16: short answers": (s.test_answers_in_bfloat16, all_short, TOKENS),
    "scales off in bfloat16 alone": (s.test_kl_in_bfloat16, conditions("bfloat16", logprobs=OFF_ANOTHER_WAY), ROUNDED),
    "a reference off in bfloat16": (s.test_kl_in_bfloat16, reference_runs(bfloat16=disturbed(LOGPROBS, 0.1)), FLOOR),
    "float16 after all": (s.test_kl_in_bfloat16, float16_after_all, "runs in another type than bfloat16"),
    "twice the error in bfloat16, too": (s.test_kl_in_bfloat16, twice_the_error, FURTHER_ROUNDED),
    "an artifact that is its reference": (s.test_kl_in_bfloat16, is_its_reference, NEARER_ROUNDED),
    "a reference that is the artifact": (s.test_kl_in_bfloat16, with_itself, NEARER_ROUNDED),
    "a floor that excuses": (s.test_kernel_computes_what_is_stored, high_floor, "noise floor"),
    "arithmetic that excuses": (
        s.test_kernel_computes_what_is_stored,
        coarse_arithmetic,
        "with what the kernel's arithmetic does",
    ),
    "a kernel off": (
        s.test_kernel_computes_what_is_stored,
        conditions("eager", logprobs=OFF),
        KL.format("eager", "decoded"),
    ),
    "graphs off": (s.test_graphs_are_eager, conditions("graphs", logprobs=OFF), KL.format("graphs", "eager")),
    "graphs that answer otherwise": (s.test_graphs_are_eager, conditions("graphs", said=ONE_WRONG), DIVERGED),
    "Marlin off": (s.test_kernels_agree, conditions("marlin", logprobs=OFF), KL.format("marlin", "eager")),
    "a fallback": (s.test_kernels_agree, kernel_unnamed, "kernels other than asked for"),
    "Marlin everywhere": (
        s.test_kernels_agree,
        lambda world: ran(world, eager="marlin", awq="marlin"),
        "kernels that both sides ran",
    ),
    "another side that names no kernel": (
        s.test_kernels_agree,
        lambda world: ran(world, eager=""),
        "kernels that both sides ran",
    ),
    "alone off": (s.test_alone_is_together, conditions("eager", logprobs=OFF, alone=True), ALONE),
    "alone another answer": (s.test_alone_is_together, conditions("eager", said=ONE_WRONG, alone=True), DIVERGED),
    "two GPUs off": (s.test_tensor_parallel, conditions("parallel", logprobs=OFF), KL.format("parallel", "eager")),
    "a 500": (
        s.test_bad_requests,
        serves(refuses=kind_of(Refusal("bad 7", 500, "boom"))),
        "bad requests without a clean refusal",
    ),
    "an answer as if nothing were wrong": (
        s.test_bad_requests,
        serves(refuses=kind_of(Refusal("bad 7", 200, "fine"))),
        "bad requests without a clean refusal",
    ),
    "other answers after a bad request": (
        s.test_bad_requests,
        serves(says=lambda sample, turn, at_once: WRONG if turn == 11 else RIGHT),
        "answers that changed after one",
    ),
    "a 500 among two hundred": (
        s.test_nothing_is_lost,
        serves(refuses=kind_of(Refusal("bad 7", 500, "boom"))),
        "bad requests without a clean refusal",
    ),
    "streams that never had a word": (
        s.test_nothing_is_lost,
        serves(streams=lambda _: HungUp(200, 0, "the stream broke off")),
        "hang-ups on no stream",
    ),
    "one stream refused": (
        s.test_nothing_is_lost,
        serves(streams=lambda turn: HungUp(500, 0, "boom") if turn == 30 else HungUp(200, READ, "")),
        "hang-ups on no stream",
    ),
    "answers that were over": (
        s.test_nothing_is_lost,
        serves(streams=lambda _: HungUp(200, 6, "ended by stop")),
        "hang-ups on no stream",
    ),
    "a server that computes on": (
        s.test_nothing_is_lost,
        serves(keeps=lambda hung_up: Load(hung_up, 0, 2 * READ * hung_up)),
        "requests still held",
    ),
    "requests that wait for ever": (
        s.test_nothing_is_lost,
        serves(keeps=lambda hung_up: Load(0, hung_up > 40, 2 * READ * hung_up)),
        "requests still held",
    ),
    "a server that does not tell": (
        s.test_nothing_is_lost,
        serves(keeps=lambda hung_up: Load(math.nan, math.nan, 2 * READ * hung_up)),
        "requests still held",
    ),
    "answers computed to their end": (
        s.test_nothing_is_lost,
        serves(keeps=lambda hung_up: Load(0, 0, LONG * hung_up)),
        "tokens computed for clients gone, of those they asked for",
    ),
    "a count of tokens that stands still": (
        s.test_nothing_is_lost,
        serves(keeps=lambda _: Load(0, 0, 7)),
        "tokens computed for clients gone, of those they asked for",
    ),
    "a leak": (s.test_nothing_is_lost, serves(lost=MIB), "memory lost"),
    "other answers in the end": (
        s.test_nothing_is_lost,
        serves(says=lambda sample, turn, at_once: WRONG if turn > 1 else RIGHT),
        "answers that changed",
    ),
    "a server that is gone": (s.test_nothing_is_lost, serves(dead=True), "alive"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_fault_fails_what_it_is_for(fault: str, selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every planted fault fails the quantity that it is for, and no other of its check."""
    check, plant, quantity = PLANTED[fault]
    world = World()
    plant(world)
    said = heard(check, world, selection, monkeypatch)
    assert [one for one, holds in said.items() if not holds] == [quantity]


def test_every_quantity_has_a_fault(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound engines hold in every check there is, and every quantity that is judged of them has a planted fault."""
    checks = {check for name, check in vars(test_serving).items() if name.startswith("test_")}
    assert checks == {check for check, _, _ in PLANTED.values()}
    for check in checks:
        said = heard(check, World(), selection, monkeypatch)
        assert [quantity for quantity, holds in said.items() if not holds] == []
        assert said.keys() == {quantity for planted, _, quantity in PLANTED.values() if planted is check}


def test_two_hundred_bad_requests(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server must survive two hundred bad requests after a warm-up; every fourth is a client that hangs up."""
    world = World()
    heard(test_serving.test_nothing_is_lost, world, selection, monkeypatch)
    warm_up = 2 * 10
    assert world.server.refused + world.server.hung_up == warm_up + 200
    assert world.server.hung_up == warm_up // 4 + 50
    assert world.server.kinds[-150:] == [f"bad {number % 10}" for number in range(150)]  # no kind is left out


@pytest.mark.parametrize(("own", "used"), [(7, 7), (0, 0), (None, 99)])
def test_bytes_of_a_server(own: int | None, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's memory is its processes'; only where the driver does not tell, the card's."""
    monkeypatch.setattr(nvml, "process_bytes", lambda _: own)
    monkeypatch.setattr(nvml, "card", lambda: nvml.Card("a card", "1", 100, 99))
    server: Any = SimpleNamespace(pids=frozenset)
    assert test_serving.used_bytes(server) == used
