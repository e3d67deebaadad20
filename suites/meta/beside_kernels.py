"""The searches' kernels held against their definitions in plain operations: interpreted on a CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.quantizers.activation_aware import clipping
from fixtures.quantizers.layers import Progress, silent

OUT, IN = 70, 256  # rows that fill no whole program, and two groups or more


@dataclass(frozen=True)
class Found:
    """How far kernels are from their definitions."""

    weights: int  # of a candidate that differ, whichever bit
    lost: int  # rows with a NaN or an infinity that came out finite
    limits: int  # ranges that differ
    beyond: float  # difference of the share that is clipped
    losses: float  # largest relative difference of the clip search's sums
    squares: float  # largest relative difference of a squared distance


def _no_shift(fused: Any) -> None:
    fused.SHIFT = fused.tl.constexpr(0.0)  # codes are not rounded


def _wider_codes(fused: Any) -> None:
    fused._codes = lambda scheme: (scheme.lowest, scheme.highest + 1, scheme.zero_point)


def _no_narrowest(fused: Any) -> None:
    fused.NARROWEST = fused.tl.constexpr(0.0)


def _half_the_columns(fused: Any) -> None:
    real = fused.squares
    fused.squares = lambda answer, wanted: real(answer[..., ::2], wanted[..., ::2])


def _limits_forgotten(fused: Any) -> None:
    real = fused.rounded
    fused.rounded = lambda weight, scheme, limit=None: real(weight, scheme)


def _no_cut(fused: Any) -> None:
    real = fused.ranges
    fused.ranges = lambda weight, grams, scheme, kept: real(weight, grams, scheme, kept[:1])


def _nan_hidden(fused: Any) -> None:
    real = fused.candidates
    fused.candidates = lambda *of: real(*of).nan_to_num(0.0, 0.0, 0.0)


def _one_candidates_scales(fused: Any) -> None:
    real = fused.candidates
    fused.candidates = lambda weight, scales, scheme: real(weight, scales[:1].expand_as(scales), scheme)


FAULTS: dict[str, Callable[[Any], None]] = {
    fault.__name__.strip("_"): fault
    for fault in (
        _no_shift,
        _wider_codes,
        _no_narrowest,
        _half_the_columns,
        _limits_forgotten,
        _no_cut,
        _nan_hidden,
        _one_candidates_scales,
    )
}


def beside(
    scheme: Scheme, dtype: torch.dtype, device: str = "cpu", fault: str = "", *, progress: Progress = silent
) -> Found:
    """Kernels and definitions on the same random weights: wide, narrow, of one sign, zeros, and some not finite."""
    from fixtures.quantizers.activation_aware import fused

    if fault:
        FAULTS[fault](fused)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(OUT, IN, generator=generator) * torch.logspace(-7, 1, OUT)[:, None]).to(dtype)
    weight[3], weight[5], weight[7, :128] = weight[3].abs(), -weight[5].abs(), 0
    scales = torch.rand(3, IN, generator=generator) * 3 + 0.01  # of three candidates
    inputs = torch.randn(512, IN, generator=generator) * torch.rand(IN, generator=generator)
    weight, scales, inputs = weight.to(device), scales.to(device), inputs.to(device)
    plain = torch.stack([(plain_rounding(weight * s, scheme) / s).to(dtype) for s in scales])
    differing = int((fused.candidates(weight, scales, scheme) != plain).sum())
    full = weight.float()
    limit = full.view(OUT, -1, scheme.group_size).abs().amax(-1) * 0.7
    for cut in (None, limit):
        differing += int((fused.rounded(full, scheme, cut) != plain_rounding(full, scheme, cut)).sum())

    broken = weight[:8].clone()
    broken[0, 3], broken[1, 200], broken[2, 9] = float("nan"), float("inf"), -float("inf")
    lost = int(torch.isfinite(fused.candidates(broken, scales, scheme)).all(2)[:, :3].sum())

    grams = clipping.group_grams(inputs, scheme.group_size)
    wanted = plain_ranges(weight.float(), grams, scheme)
    limits, figures = fused.ranges(weight.float(), grams, scheme, clipping.KEPT)
    gaps = ((figures - wanted[1]) / wanted[1])[1:].abs()

    answer = torch.randn(3, 5, 700, generator=generator).to(device, dtype)
    near = answer + torch.randn(3, 5, 700, generator=generator).to(device, dtype) / 8
    distance = (answer.double() - near.double()).square().sum(-1)
    twice = torch.stack([answer, near * 2])  # two candidates' answers to the same
    distance = torch.stack([distance, near.double().square().sum(-1)])
    squares = (fused.squares(twice, near) / distance - 1).abs()
    return Found(
        differing,
        lost,
        int((limits != wanted[0]).sum()),
        float((figures[0] - wanted[1][0]).abs()) / weight.numel(),
        float(gaps.max()),
        float(squares.max()),
    )


def ready_beside(default: torch.dtype, *, progress: Progress = silent) -> bool:
    """Make the kernels ready while torch's default dtype is another, as it is while a model is built."""
    from fixtures.quantizers.activation_aware import fused

    torch.set_default_dtype(default)
    fused.prepare("cpu", torch.bfloat16, Scheme())
    return True


def plain_rounding(weight: Tensor, scheme: Scheme, limit: Tensor | None = None) -> Tensor:
    """What the quantizer itself makes of a weight."""
    return pseudo_quantize_tensor(weight, scheme, limit=limit, scale_dtype=torch.float16).weight


def plain_ranges(weight: Tensor, grams: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The clip search of a weight, range by range over all rows."""
    grouped = weight.reshape(len(weight), len(grams), -1)
    largest = grouped.abs().amax(-1)
    losses = []
    for kept in clipping.KEPT:
        error = (plain_rounding(weight, scheme, largest * kept).view(grouped.shape) - grouped).double()
        losses.append(torch.einsum("rgi,gij,rgj->rg", error, grams.double(), error))
    best = torch.stack(losses).min(0)
    limit = largest * torch.tensor(clipping.KEPT, device=weight.device)[best.indices]
    beyond = (grouped.abs() > limit[..., None]).sum()
    return limit, torch.stack([beyond.double(), best.values.sum(), losses[0].sum()])
