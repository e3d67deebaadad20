"""Steady parts, timed by pytest-benchmark night after night, each with its result held against what it should be.

No time is judged here, for machines differ; compare with the nights before on the same one::

    pytest suites/test_steady.py --benchmark-autosave --benchmark-storage=file://reports/benchmarks \
        --benchmark-compare --benchmark-compare-fail=median:100%

(the first time without the last two). Names and groups are stable; what was timed is in ``extra_info``.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fixtures.adapters import adapter_for
from fixtures.core import metrics
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.codebook import CodebookQuantized, CodebookScheme, code_book
from fixtures.core.limits import Limits
from fixtures.core.pseudo_quantize import Scheme
from fixtures.engines.loading import load_model
from fixtures.formats import awq_gemm, bnb_4bit
from fixtures.subjects import shipped
from fixtures.verifying import Verify

OUT, IN = 1024, 2048  # a linear of a 3B model's attention, halved: milliseconds on a core
GROUP, BLOCK = 128, 64
PROMPT = 64  # tokens
WARM_UP, ROUNDS = 2, 10

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.benchmark(group="packing")
@DEVICES
def test_packing(device: str, benchmark: Any, verify: Verify) -> None:
    """Codes packed into AWQ's words are found where the layout has them, one by one."""
    codes = drawn(16, OUT, IN).t().contiguous().to(device)
    words = timed(benchmark, verify, lambda: awq_gemm.pack(codes), device, codes.numel() // 2)

    nibble = {column: place for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    stray = sum(
        int((((words[:, column // 8] >> (4 * nibble[column % 8])) & 15) != codes[:, column]).sum())
        for column in range(codes.shape[1])
    )
    verify("codes that are not in their place", stray, f"of {codes.numel()}", equal_to=0)


@pytest.mark.benchmark(group="dequantization")
@DEVICES
def test_dequantization_awq(device: str, benchmark: Any, verify: Verify) -> None:
    """AWQ's words decode to (code - zero point) x scale."""
    codes, zeros = drawn(16, OUT, IN), drawn(16, OUT, IN // GROUP, seed=1)
    scales = (drawn(2**10, OUT, IN // GROUP, seed=2) + 1).to(torch.float16) / 2**16
    parts = {
        "qweight": awq_gemm.pack(codes.t()).contiguous().to(device),
        "qzeros": awq_gemm.pack(zeros.t()).contiguous().to(device),
        "scales": scales.t().contiguous().to(device),
    }
    scheme = Scheme(4, GROUP)
    weight = timed(benchmark, verify, lambda: awq_gemm.decode(parts, scheme).weight, device, size(*parts.values()))

    spread = [x.repeat_interleave(GROUP, dim=1).double() for x in (zeros, scales)]
    held(verify, weight, (codes.double() - spread[0]) * spread[1])


@pytest.mark.benchmark(group="dequantization")
def test_dequantization_nf4(benchmark: Any, verify: Verify) -> None:
    """Bitsandbytes' bytes decode to the table's value x the block's absmax, the high nibble first."""
    codes = drawn(16, OUT, IN)
    absmax = (drawn(2**10, OUT * IN // BLOCK, seed=1).float() + 1) / 2**16
    packed = bnb_4bit.pack(codes)
    scheme = CodebookScheme("nf4", BLOCK)

    def decode() -> Tensor:
        return CodebookQuantized(bnb_4bit.unpack(packed).reshape(OUT, IN), absmax, scheme).weight

    weight = timed(benchmark, verify, decode, "cpu", size(packed, absmax))
    blocks = code_book("nf4").double()[codes.long()].reshape(-1, BLOCK)
    held(verify, weight, (blocks * absmax.double()[:, None]).reshape(OUT, IN))


@pytest.mark.benchmark(group="decode step")
@DEVICES
def test_decode_step(device: str, benchmark: Any, limits: Limits, verify: Verify) -> None:
    """One more token out of the cache has the logits that a pass over the whole text gives it."""
    reference = Checkpoint(shipped("qwen2_5_vl-tiny"))
    model: Any = load_model(reference, adapter_for(reference), torch.float32, device)
    tokens = (drawn(100, 1, PROMPT + 1) + 20).long().to(device)  # plain words: no picture's
    with torch.inference_mode():
        cache = model(tokens[:, :PROMPT], use_cache=True).past_key_values
        whole = model(tokens, use_cache=False).logits[0, -1]

        def step() -> Tensor:
            logits: Tensor = model(tokens[:, PROMPT:], past_key_values=cache, use_cache=True).logits[0, -1]
            cache.crop(-1)  # the next step is the same one
            return logits

        parameters = size(*model.parameters())
        logits = timed(benchmark, verify, step, device, parameters, tokens=1)
    verify(
        "logit moved most",
        metrics.largest((logits - whole).abs()),
        at_most=limits("steady.logits", device),
        detail=f"token {int((logits - whole).abs().argmax())}",
    )


def timed(
    benchmark: Any, verify: Verify, work: Callable[[], Tensor], device: str, amount: int, tokens: int = 0
) -> Tensor:
    """What ``work`` gives, timed; ``amount`` is the bytes that it reads or writes in coded form."""

    def finished() -> Tensor:
        found = work()
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    found: Tensor = benchmark.pedantic(finished, rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=1)
    benchmark.extra_info.update(
        bytes=amount,
        device=torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    # without statistics, under xdist and with --benchmark-disable, it ran but once
    median = clocked(finished) if benchmark.stats is None else benchmark.stats.stats.median
    verify.note("median time", median * 1e3, "ms")
    verify.note("coded bytes per second", amount / median / 1e9, "GB/s")
    benchmark.extra_info["GB_per_second"] = amount / median / 1e9
    if tokens:
        benchmark.extra_info["tokens_per_second"] = tokens / median
        verify.note("tokens per second", tokens / median)
    return found


def clocked(work: Callable[[], object]) -> float:
    """The median time of work, seconds, in as many rounds as pytest-benchmark is asked for."""
    times = []
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def held(verify: Verify, weight: Tensor, expected: Tensor) -> None:
    """A float32 weight is the expected float64 one, rounded twice."""
    error = (weight.double().cpu() - expected).abs() / expected.abs().amax()
    verify("weight off most, of the largest", metrics.largest(error), at_most=2**-22)


def drawn(below: int, *shape: int, seed: int = 0) -> Tensor:
    """Whole numbers from 0 on, int16, the same in every run."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)


def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
