"""AWQ as plainly as it can be written: the oracle of our engine.

Every candidate is tried on every token, a layer after the other of a model that is loaded whole, and every number is
looked at as soon as it is there. This was our engine until it had to be fast; its arithmetic is what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixtures.adapters.base import Decoder, ScalingGroup
from fixtures.adapters.view import HubView
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.quantizers.activation_aware.capture import Call, Feed, decoder_calls
from fixtures.quantizers.activation_aware.engine import fold
from fixtures.quantizers.activation_aware.scaling import foldable
from fixtures.quantizers.layers import QuantizedLayer

EXPONENTS = [step / 20 for step in range(20)]
RANGES = [1 - step / 20 for step in range(10)]
CLIPPED_ROWS = 1024  # at once


@dataclass
class Heard:
    """What one layer's modules read."""

    linears: dict[str, Tensor]  # [tokens, in]
    calls: dict[str, list[Call]]


@torch.no_grad()
def quantize_layers(
    model: nn.Module,
    reference: HubView,
    decoder: Decoder,
    to_quantize: Collection[str],
    scheme: Scheme,
    feeds: Iterable[Feed],
) -> Iterator[QuantizedLayer]:
    """As the engine's, of the same arguments; the model is loaded whole."""
    modules = decoder.modules(model)
    calls = decoder_calls(modules[0], feeds)
    for layer, module in zip(decoder.layers, modules, strict=True):
        heard = listen(module, calls, [group.inspected for group in layer.groups])
        names = {name.removeprefix(layer.prefix) for name in to_quantize if layer.holds(name)}
        tensors = {
            name: tensor.to(reference.info(layer.prefix + name).torch_dtype)
            for name, tensor in module.state_dict().items()
        }
        ranked = {
            group: search_scales(module, group, tensors[f"{group.previous}.weight"], heard, scheme)
            for group in layer.groups
            if names.issuperset(group.rewritten)
        }
        found = {group: best for group, (best, *_) in ranked.items()}
        usual = {name for name in names if not name.endswith(reference.adapter.never_clipped)}
        clipped: dict[ScalingGroup, list[str]] = {}
        for group, (best, *others) in ranked.items():
            finalists = [best] if usual.issuperset(group.linears) else [best, *others[:1]]
            variants = [{**found, group: finalist} for finalist in finalists]
            at, clipped[group] = settle(module, group, tensors, variants, heard, usual, scheme)
            found[group] = finalists[at]
        folded = fold(tensors, {group: scales for group, (scales, _) in found.items()})
        divided = {name: scales for group, (scales, _) in found.items() for name in group.linears}
        quantized, clips = {}, {}
        for name in sorted(names):
            weight, limit = folded[f"{name}.weight"].float(), None
            kept = [name in clipped[group] for group in found if name in group.linears] or [name in usual]
            if kept[0]:
                inputs = heard.linears[name].float()
                inputs = inputs / divided[name] if name in divided else inputs
                limit, clips[name] = search_clips(weight, inputs, scheme)
            quantized[layer.prefix + name] = pseudo_quantize_tensor(
                weight, scheme, limit=limit, scale_dtype=torch.float16, layer=layer.prefix + name
            )
        changed = {
            layer.prefix + name: tensor.to(tensors[name].dtype)
            for name, tensor in folded.items()
            if name.removesuffix(".weight") not in names and tensor is not tensors[name]
        }
        yield QuantizedLayer(
            quantized,
            changed,
            {layer.prefix + group.name: scales for group, (scales, _) in found.items()},
            {
                "tower": layer.tower,
                "layer": layer.index,
                "scaling": {group.name: record for group, (_, record) in found.items()},
                "clipping": clips,
            },
        )
        calls = [Call(call.run(module), call.others) for call in calls]


def listen(layer: nn.Module, calls: Sequence[Call], inspected: Sequence[str]) -> Heard:
    """What a layer's linears and inspected modules read."""
    inputs: dict[str, list[Tensor]] = {}
    seen: dict[str, list[Call]] = {name: [] for name in inspected}
    with ExitStack() as hooks:
        for name, module in layer.named_modules():

            def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                if name in inputs:
                    inputs[name].append(args[0].flatten(0, -2))
                if name in seen:
                    seen[name].append(Call.of(args, kwargs))

            if isinstance(module, nn.Linear):
                inputs[name] = []
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        for call in calls:
            call.run(layer)
    return Heard({name: torch.cat(parts) for name, parts in inputs.items()}, seen)


def search_scales(
    layer: nn.Module, group: ScalingGroup, norm: Tensor, heard: Heard, scheme: Scheme
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Scales for a group that lose no more than none, the best first, and the record of how each was found."""
    inspected, calls = layer.get_submodule(group.inspected), heard.calls[group.inspected]
    weights = {name: layer.get_parameter(f"{name}.weight") for name in group.linears}
    originals = {name: weight.data for name, weight in weights.items()}
    wanted = [call.run(inspected).float() for call in calls]
    losses: list[float] = []
    tried = list(proposals(heard.linears[group.linears[0]], [*originals.values()], scheme))
    for at, scales in enumerate(tried):
        if not group.folds_into_linear:
            tried[at] = scales = foldable(scales, norm)
        for name, weight in weights.items():
            scaled = originals[name].float() * scales
            rounded = pseudo_quantize_tensor(scaled, scheme, scale_dtype=torch.float16, layer=name).weight
            weight.data = (rounded / scales).to(originals[name].dtype)
        errors = [(call.run(inspected).float() - w).square().sum() for call, w in zip(calls, wanted, strict=True)]
        losses.append(float(torch.stack(errors).double().sum()) / sum(output.numel() for output in wanted))
    for name, weight in weights.items():
        weight.data = originals[name]
    ranking = [at for at in sorted(range(len(tried)), key=losses.__getitem__) if losses[at] <= losses[0]]
    return [
        (
            tried[at],
            {
                "exponent": EXPONENTS[at - 1] if at else None,
                "loss": losses[at],
                "loss rtn": losses[0],
                "losses": losses,
            },
        )
        for at in ranking
    ]


def settle(
    layer: nn.Module,
    group: ScalingGroup,
    tensors: Mapping[str, Tensor],
    variants: Sequence[Mapping[ScalingGroup, tuple[Tensor, Any]]],
    heard: Heard,
    usual: set[str],
    scheme: Scheme,
) -> tuple[int, list[str]]:
    """Which of several scalings of a layer, and which linears of a group clipped, err least on every token."""
    inspected, calls = layer.get_submodule(group.inspected), heard.calls[group.inspected]
    weights = {name: layer.get_parameter(f"{name}.weight") for name in group.linears}
    originals = {name: weight.data for name, weight in weights.items()}
    wanted = [call.run(inspected).float() for call in calls]
    own = [name for name in group.linears if name in usual]
    turns = [[name for name in group.linears if (name in own) != (name == turned)] for turned in group.linears]
    sets = [own, [*group.linears], [], *turns]
    losses: dict[tuple[int, int], float] = {}
    for at, variant in enumerate(variants):
        folded = fold(tensors, {other: scales for other, (scales, _) in variant.items()})
        inputs = heard.linears[group.linears[0]].float() / variant[group][0]
        limits = {name: search_clips(folded[f"{name}.weight"], inputs, scheme)[0] for name in group.linears}
        for number, clipped in enumerate(sets):
            for name, weight in weights.items():
                limit = limits[name] if name in clipped else None
                rounded = pseudo_quantize_tensor(
                    folded[f"{name}.weight"], scheme, limit=limit, scale_dtype=torch.float16, layer=name
                ).weight
                rounded = rounded / variant[group][0]
                for other, (scales, _) in variant.items():
                    rounded = rounded * scales[:, None] if other.previous == name else rounded
                weight.data = rounded.to(originals[name].dtype)
            errors = [(call.run(inspected).float() - w).square().sum() for call, w in zip(calls, wanted, strict=True)]
            losses[at, number] = float(torch.stack(errors).double().sum())
    for name, weight in weights.items():
        weight.data = originals[name]
    at, number = min(losses, key=losses.__getitem__)  # of equals the first
    return at, sets[number]


def proposals(inputs: Tensor, weights: Sequence[Tensor], scheme: Scheme) -> Iterator[Tensor]:
    """No scaling; then mean|x|^a / mean|w|^(1-a), centred on 1."""
    yield torch.ones(inputs.shape[-1])
    x = inputs.float().abs().mean(0)
    weight = torch.cat([w.float() for w in weights])
    grouped = weight.abs().reshape(-1, weight.shape[1] if scheme.group_size == -1 else scheme.group_size)
    w = (grouped / (grouped.amax(1, keepdim=True) + 1e-6)).reshape(weight.shape).mean(0)
    for exponent in EXPONENTS:
        scales = (x.pow(exponent) / (w.pow(1 - exponent) + 1e-4)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        yield torch.where(torch.isfinite(scales), scales, torch.ones_like(scales))


def search_clips(weight: Tensor, inputs: Tensor, scheme: Scheme) -> tuple[Tensor, Mapping[str, float]]:
    """The best limit [out, groups] for what a weight's groups do to their own inputs, and the record."""
    group_size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    grouped_inputs = inputs.reshape(len(inputs), -1, group_size).transpose(0, 1)
    grams = grouped_inputs.transpose(1, 2) @ grouped_inputs / len(inputs)  # [groups, group size, group size]
    limits, found, unclipped, beyond = [], 0.0, 0.0, 0
    for rows in weight.split(CLIPPED_ROWS):
        grouped = rows.reshape(len(rows), len(grams), group_size)
        largest = grouped.abs().amax(-1)
        losses = []
        for kept in RANGES:
            rounded = pseudo_quantize_tensor(rows, scheme, limit=largest * kept, scale_dtype=torch.float16).weight
            error = (rounded.reshape(grouped.shape) - grouped).transpose(0, 1)
            losses.append(((error @ grams) * error).sum(-1).t())
        best_loss, best_limit = losses[0], largest
        for kept, loss in zip(RANGES[1:], losses[1:], strict=True):  # of equals the widest
            best_limit = torch.where(loss < best_loss, largest * kept, best_limit)
            best_loss = torch.where(loss < best_loss, loss, best_loss)
        limits.append(best_limit)
        found, unclipped = found + float(best_loss.double().sum()), unclipped + float(losses[0].double().sum())
        beyond += int((grouped.abs() > best_limit[..., None]).sum())
    record = {
        "clipped": beyond / weight.numel(),
        "loss": found / len(weight),
        "loss unclipped": unclipped / len(weight),
    }
    return torch.cat(limits), record
