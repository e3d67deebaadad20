"""A sound world of serving, as recordings and a server that are values: for planting faults in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines.bad_requests import Refusal, lost_bytes
from fixtures.engines.hanging_up import LONG, READ, HungUp, Load
from fixtures.engines.offline import Recorded
from fixtures.engines.replies import Reply, Taught
from fixtures.engines.vllm_logs import Started
from fixtures.options import Selection
from suites import test_serving
from suites.meta.answering import listener
from suites.meta.test_serving_sabotage import END, LOGPROBS, NOISE, UNKNOWN, reply

ANSWERS = 40
RIGHT = (1, 2, 3, 1, 2, END)
TIE = (1, 2, 3, 1, 1, END)  # the other of two tokens that are as likely
WRONG = (1, 2, 7, END)
MIB = 1 << 20
Said = Callable[[int], tuple[int, ...]]  # number of an answer -> its tokens
Check = Callable[..., None]


def disturbed(logprobs: Tensor, by: float, seed: int = 1) -> Tensor:
    """Distributions, moved a little."""
    return (logprobs + by * torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


QUANTIZED = disturbed(LOGPROBS, 0.02)


def in_bfloat16(logprobs: Tensor, seed: int, kernel: str) -> Recorded:
    """As it replies in bfloat16: three bits fewer are 64 times the KL."""
    return recording(logprobs, seed, kernel, "bfloat16", 8e-3)


def answered(sample: str, said: tuple[int, ...]) -> Reply:
    """A reply; only who says 7 finds it likely."""
    return reply(*said, sample=sample, top=UNKNOWN if 7 in said else None)


def greedy(said: Said = lambda _: RIGHT) -> list[Reply]:
    """What an engine answers to all samples."""
    return [answered(f"s{number}", said(number)) for number in range(ANSWERS)]


def recording(
    logprobs: Tensor, seed: int, kernel: str = "machete", dtype: str = "float16", noise: float = 1e-3
) -> Recorded:
    """What vLLM replies under one condition, noise included."""
    taught = [Taught("s", (0,), disturbed(logprobs, noise, seed))]
    alone = [Taught("s", (0,), disturbed(taught[0].logprobs, noise, seed + 1))]
    return Recorded(
        Started(1.0, (1,), 1, (kernel,), dtype),
        {"text": greedy(), "alone": greedy()[: test_serving.ALONE]},
        {"text-taught": taught, "alone-taught": alone},
    )


@dataclass
class Served:
    """A server as the checks see it, and what they did to it."""

    model: str = "fake"
    says: Callable[[str, int, int], tuple[int, ...]] = lambda sample, turn, at_once: RIGHT
    refuses: Callable[[str], Refusal] = lambda kind: Refusal(kind, 400, "what was asked is wrong")
    streams: Callable[[int], HungUp] = lambda turn: HungUp(200, READ, "")
    keeps: Callable[[int], Load] = lambda hung_up: Load(0, 0, 2 * READ * hung_up)  # after so many hang-ups
    lost: int = 0  # bytes, with every bad request
    dead: bool = False
    turns: int = 0
    refused: int = 0
    hung_up: int = 0
    kinds: list[str] = field(default_factory=list)  # that were sent

    def alive(self) -> bool:
        """Whether it runs."""
        return not self.dead

    def used(self) -> int:
        """Bytes of the card."""
        return 1000 * MIB + self.lost * (self.refused + self.hung_up)


@dataclass
class World:
    """All that a check of serving looks at; sound, until something is broken."""

    artifact: dict[str, Recorded] = field(
        default_factory=lambda: (
            {
                name: recording(QUANTIZED, 10 * seed, name if name in test_serving.KERNELS else "machete")
                for seed, name in enumerate(("decoded", "eager", "graphs", "marlin", "parallel", "awq"), 1)
            }
            | {"bfloat16": in_bfloat16(QUANTIZED, 1000, "machete")}
        )
    )
    reference: dict[str, Recorded] = field(
        default_factory=lambda: (
            {
                name: recording(LOGPROBS, 100 * seed, "fp16")
                for seed, name in enumerate(("eager", "graphs", "parallel"), 1)
            }
            | {"bfloat16": in_bfloat16(LOGPROBS, 2000, "bf16")}
        )
    )
    exactly: dict[str, Tensor] = field(default_factory=lambda: {"reference": LOGPROBS, "artifact": QUANTIZED})
    transformers: Said = lambda _: RIGHT
    floor: float = NOISE
    arithmetic: float = 0.0  # what a kernel's own does beyond it, in nats
    server: Served = field(default_factory=Served)

    def exact(self, checkpoint: str, *_: object) -> tuple[list[Reply], list[Taught]]:
        """What transformers says."""
        return greedy(self.transformers), [Taught("s", (0,), self.exactly[checkpoint])]

    def ask(self, server: Served, sample: Sample, *_: object, at_once: int = 1) -> Reply:
        """One answer of the server."""
        server.turns += 1
        return answered(sample.id, server.says(sample.id, server.turns, at_once))

    def ask_all(self, server: Served, samples: Sequence[Sample], *_: object, at_once: int = 1) -> list[Reply]:
        """Its answers to several."""
        return [self.ask(server, sample, at_once=at_once) for sample in samples]

    def refuse(self, server: Served, kind: str, _: object) -> Refusal:
        """How it takes a bad request."""
        server.refused += 1
        server.kinds.append(kind)
        return server.refuses(kind)

    def hang_up(self, server: Served, _: object) -> HungUp:
        """A client that goes away."""
        server.hung_up += 1
        return server.streams(server.hung_up)


def samples(modality: str) -> list[Sample]:
    """Samples that show a picture each, and ask something."""
    content = ({"type": "image", "image": None}, {"type": "text", "text": "?"})
    return [Sample(f"s{number}", modality, content, "!") for number in range(16)]


def heard(check: Check, world: World, selection: Selection, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, bool]:
    """Whether what a check judges holds, by quantity."""
    bad = SimpleNamespace(
        bad_requests=lambda *_, **__: {f"bad {number}": {} for number in range(10)},
        chat_request=lambda *_, **__: {},
        refused=world.refuse,
        lost_bytes=lost_bytes,
    )
    leaving = SimpleNamespace(hang_up=world.hang_up, let_go=lambda server: server.keeps(server.hung_up), LONG=LONG)
    replies = lambda _, asked, *__: [  # noqa: E731 - one expression, as transformers' own
        answered(one.id, world.transformers(number)) for number, one in enumerate(asked)
    ]
    for name, stand_in in {
        "ask": world.ask,
        "ask_all": world.ask_all,
        "load_processor": lambda _: None,
        "used_bytes": Served.used,
        "bad_requests": bad,
        "hanging_up": leaving,
        "replies": replies,
    }.items():
        monkeypatch.setattr(test_serving, name, stand_in)
    verify = listener()

    class Exact:
        __call__ = staticmethod(world.exact)
        engine = staticmethod(lambda *_: None)

    given: dict[str, Any] = {
        "artifact_recorded": world.artifact.__getitem__,
        "reference_recorded": world.reference.__getitem__,
        "artifact": "artifact",
        "reference": "reference",
        "adapter": SimpleNamespace(modalities=("text",)),
        "exact": Exact(),
        "noise": lambda _: world.floor,
        "floor": lambda _: world.floor + world.arithmetic,
        "most_of_kernels": selection.limits("serving.of_kernels", "awq", "text"),
        "modality": "text",
        "kernel": "marlin",
        "target": Target("qwen2_5_vl", "tiny", "awq"),
        "selection": SimpleNamespace(modalities_of=lambda _: ["text"]),
        "server": world.server,
        "asked": samples("text")[: test_serving.ASKED],
        "served_samples": samples,
        "count": 2,
        "limits": selection.limits,
        "verify": verify,
    }
    check(**{name: given[name] for name in check.__code__.co_varnames[: check.__code__.co_argcount]})
    return {m.quantity: bool(m.holds) for m in verify.measurements if m.bound}
