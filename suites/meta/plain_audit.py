"""The round trip as it is defined: whole matrices, every element, every formula spelt out; slow, and no code shared.

The oracle of the audit that streams. It reads the artifact by safetensors alone and unpacks bytes one nibble at a time.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fixtures.adapters.base import DecoderLayer
from fixtures.audit.folding import ROUNDING, norm_scales
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import LinearError
from fixtures.core.codebook import CodebookQuantized, code_book
from fixtures.core.pseudo_quantize import Quantized
from fixtures.core.rounding import CLIPPED, QuantizedWeight

SUMS = ("frobenius", "frobenius_expected")  # of float64 numbers, added in another order
NARROWEST_RANGE = 1e-5
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Plain:
    """What ``LinearError`` says of a linear, place and packing apart."""

    weights: int
    largest_error: float
    largest_end_error: float
    frobenius: float
    frobenius_expected: float
    clipped: float
    widest_scale: float
    narrowest_scale: float
    recoded: int
    broken_scales: int


def assert_same(found: LinearError, wanted: Plain) -> None:
    """Counts and extremes equal bit for bit, sums to a thousand times float64's precision; NaN equals NaN."""
    for quantity, expected in asdict(wanted).items():
        value = getattr(found, quantity)
        close = math.isclose(value, expected, rel_tol=1e-12) if quantity in SUMS else value == expected
        both_nan = value != value and expected != expected
        assert close or both_nan, f"{found.name}: {quantity} is {value!r}, by the definition {expected!r}"


def plain_audit(pair: Pair) -> dict[str, Plain]:
    """Every quantized linear by name."""
    found = {}
    for layer in pair.adapter.decoder_layers(pair.reference.checkpoint.config):
        found |= _layer(pair, layer)
    for linear in pair.linears:
        if linear.name in pair.quantized and linear.name not in found:
            wanted = pair.reference.load(pair.weight_of(linear.name)).float()
            found[linear.name] = plain_error(_decoded(pair, linear.name), wanted)
    return found


def plain_error(codes: QuantizedWeight, wanted: Tensor) -> Plain:
    """The errors of one linear, held against ``wanted`` [out, in]."""
    if isinstance(codes, Quantized):
        return _affine(codes, wanted)
    assert isinstance(codes, CodebookQuantized)
    return _by_table(codes, wanted)


def _by_table(codes: CodebookQuantized, wanted: Tensor) -> Plain:
    size = codes.scheme.block_size
    book = code_book(codes.scheme.kind)
    values = torch.tensor(sorted(set(book.tolist())))
    gaps = values.diff() / 2
    below, above = torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]])
    flat = wanted.reshape(-1)
    scale = codes.absmax.repeat_interleave(size)[: flat.numel()]
    by_block = codes.slack if codes.slack is not None else torch.zeros_like(codes.absmax)
    slack = by_block.repeat_interleave(size)[: flat.numel()]
    value = book[codes.codes.long()].reshape(-1)
    decoded, place = value * scale, torch.bucketize(value, values)
    edges = (values[:-1] + values[1:]) / 2
    nearest = torch.bucketize(flat / scale, edges)
    error, widest, moved = flat - decoded, scale + slack, value.abs() * slack
    width = torch.where(error < 0, below[place] * widest + moved, above[place] * widest + moved)
    first, last = nearest == 0, nearest == len(values) - 1
    ends = torch.where(first, values[0], values[-1]) * scale
    steps = torch.where(first, 2 * above[0], 2 * below[-1]) * scale
    off_end = (first | last) & (decoded != ends)
    again = values[torch.bucketize(decoded / scale, edges)] * scale
    blocks = torch.nn.functional.pad(flat.abs(), (0, -len(flat) % size)).reshape(-1, size).amax(1)
    within = torch.maximum(torch.minimum(blocks, codes.absmax + by_block), codes.absmax - by_block)
    ratio = torch.where(blocks == 0, 1.0, (within if codes.slack is not None else codes.absmax) / blocks)
    norm = flat.double().square().sum().sqrt()
    return Plain(
        flat.numel(),
        float(torch.where(error == 0, 0.0, error.abs() / width).amax()),
        float(torch.where(off_end, (decoded - ends).abs() / steps, 0.0).amax()),
        float((decoded - flat).double().square().sum().sqrt() / norm),
        float((values[nearest] * scale - flat).double().square().sum().sqrt() / norm),
        float((flat.abs() - widest > steps / 2 * CLIPPED).double().mean()),
        float(ratio.amax()),
        float(ratio.amin()),
        int((again != decoded).sum()),
        int((~torch.isfinite(codes.absmax) | ((blocks > 0) & ~(codes.absmax > 0))).sum()),
    )


def _affine(codes: Quantized, wanted: Tensor) -> Plain:
    scheme, (rows, groups) = codes.scheme, codes.scales.shape
    step, zero = codes.scales.float()[..., None], codes.zeros[..., None]
    grouped = wanted.reshape(rows, groups, -1)
    whole = codes.codes.reshape(rows, groups, -1)
    decoded = (whole.float() - zero) * step
    low, high = (scheme.lowest - zero) * step, (scheme.highest - zero) * step
    nothing = torch.zeros_like(grouped)
    ends = torch.where(grouped < (low + high) / 2, low, high)
    inside = (grouped > low + step / 2) & (grouped < high - step / 2)
    beyond = grouped - torch.minimum(torch.maximum(grouped, low), high)
    uniform = (step.square() / 12).expand_as(grouped).double().sum()
    if scheme.zero_point:
        spread = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
    else:
        spread = grouped.abs().amax(-1)
    ratio = step[..., 0] / torch.where(spread > NARROWEST_RANGE, spread / scheme.highest, codes.scales)
    again = (torch.round(decoded / step) + zero).clamp(scheme.lowest, scheme.highest).to(torch.int16)
    norm = wanted.double().square().sum().sqrt()
    return Plain(
        wanted.numel(),
        float(torch.where(inside, (decoded - grouped).abs() / (step / 2), nothing).amax()),
        float(torch.where(inside, nothing, (decoded - ends).abs() / step).amax()),
        float((decoded - grouped).double().square().sum().sqrt() / norm),
        float((uniform + beyond.double().square().sum()).sqrt() / norm),
        float((beyond.abs() > step / 2 * CLIPPED).double().mean()),
        float(ratio.amax()),
        float(ratio.amin()),
        int((again != whole).sum()),
        int((~(torch.isfinite(step) & (step > 0))).sum()),
    )


def _decoded(pair: Pair, name: str) -> QuantizedWeight:
    """AWQ's words nibble by nibble; of the other formats the whole linear at once."""
    if pair.layout.method != "awq":
        return pair.load_quantized(name)
    qweight, qzeros, scales = (pair.artifact.load(f"{name}.{part}").clone() for part in ("qweight", "qzeros", "scales"))
    codes, zeros = (_nibbles(words).t().contiguous() for words in (qweight, qzeros))
    assert hasattr(pair.scheme, "bits")
    return Quantized(codes, scales.t().contiguous(), zeros, pair.scheme)  # type: ignore[arg-type]


def _nibbles(words: Tensor) -> Tensor:
    codes = torch.empty(*words.shape, 8, dtype=torch.int16)
    for i, column in enumerate(ORDER):
        codes[..., column] = (words >> (4 * i)) & 15
    return codes.flatten(1)


def _layer(pair: Pair, layer: DecoderLayer) -> dict[str, Plain]:
    prefix = layer.prefix
    names = [n.name.removeprefix(prefix) for n in pair.linears if layer.holds(n.name) and n.name in pair.quantized]
    codes = {name: _decoded(pair, prefix + name) for name in names}
    targets = {name: pair.reference.load(f"{prefix}{name}.weight").float() for name in names}
    groups = layer.groups if pair.layout.folds_scales else ()
    for group in groups:
        for name in group.linears:
            if name in targets and not group.folds_into_linear:
                targets[name] = targets[name] * norm_scales(pair, prefix, group)
    for group in groups:
        before, reader = codes.get(group.previous), codes.get(group.linears[0])
        if group.folds_into_linear and isinstance(before, Quantized) and isinstance(reader, Quantized):
            ratio = _row_scales(targets[group.previous], before, targets[group.linears[0]], reader)
            targets[group.previous] = targets[group.previous] * ratio[:, None]
            targets[group.linears[0]] = targets[group.linears[0]] / ratio
    return {prefix + name: plain_error(codes[name], targets[name]) for name in names}


def _row_scales(before: Tensor, before_codes: Quantized, reader: Tensor, reader_codes: Quantized) -> Tensor:
    low, high = _allowed(before, before_codes)
    low, high = low.amax(1), high.amin(1)
    inverse_low, inverse_high = _allowed(reader, reader_codes)
    low = torch.maximum(low, 1 / inverse_high.amin(0))
    high = torch.minimum(high, 1 / inverse_low.amax(0).clamp(min=1e-30))
    if bool(((low <= 1 + ROUNDING) & (high >= 1 - ROUNDING)).all()):
        return torch.ones_like(low)
    middle = (low.clamp(min=1e-30) * high.clamp(min=1e-30)).sqrt()
    return torch.where(torch.isfinite(middle) & (middle > 0), middle, torch.ones_like(middle))


def _allowed(target: Tensor, codes: Quantized) -> tuple[Tensor, Tensor]:
    step = codes.scales.float().repeat_interleave(target.shape[1] // codes.scales.shape[1], dim=1)
    value = (codes.codes.float() - codes.zeros.repeat_interleave(step.shape[1] // codes.zeros.shape[1], dim=1)) * step
    least = torch.where(codes.codes <= codes.scheme.lowest + 1, -torch.inf, value - step / 2)
    most = torch.where(codes.codes >= codes.scheme.highest - 1, torch.inf, value + step / 2)
    positive = target > 0
    low = torch.where(positive, least, most) / target
    high = torch.where(positive, most, least) / target
    return low.masked_fill(target == 0, -torch.inf).clamp(min=0), high.masked_fill(target == 0, torch.inf)
