"""Linears in bitsandbytes' layouts, tensor by tensor."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from fixtures.core.checkpoint import Checkpoint
from fixtures.core.codebook import CodebookScheme, code_book, dynamic_map, pseudo_quantize_blocks
from fixtures.core.pseudo_quantize import Scheme
from fixtures.formats import bnb_4bit

LINEAR = "model.layers.0.mlp.down_proj"
NF4, FP4, NESTED_NF4 = CodebookScheme("nf4"), CodebookScheme("fp4"), CodebookScheme("nf4", nested=True)
INT8 = Scheme(8, -1, zero_point=False)
CONFIG_4BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
CONFIG_8BIT = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
STATE = "weight.quant_state.bitsandbytes__nf4"


def drawn(rows=32, columns=128, seed=0):
    """Weights of N(0, 1)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def blob(said):
    """JSON as bitsandbytes packs it into a tensor."""
    return torch.tensor(list((said if isinstance(said, str) else json.dumps(said)).encode()), dtype=torch.uint8)


def said_of(shape=(32, 128), **changes):
    """What the JSON of a plain NF4 linear says."""
    return {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape, **changes}


def plain_parts(weight=None, scheme=NF4):
    """A linear's tensors in the 4-bit layout, without double quantization, by our own rounding."""
    weight = drawn() if weight is None else weight
    quantized = pseudo_quantize_blocks(weight, scheme)
    codes = torch.nn.functional.pad(quantized.codes.reshape(-1), (0, weight.numel() % 2))
    return {
        "weight": bnb_4bit.pack(codes),
        "weight.absmax": quantized.absmax,
        "weight.quant_map": code_book(scheme.kind).clone(),
        f"weight.quant_state.bitsandbytes__{scheme.kind}": blob(said_of(weight.shape, quant_type=scheme.kind)),
    }


def nested_parts():
    """The same, with made-up nested scales."""
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.0}
    return plain_parts() | {
        "weight.absmax": torch.arange(64, dtype=torch.uint8) + 96,
        "weight.nested_absmax": torch.ones(1),
        "weight.nested_quant_map": dynamic_map().clone(),
        STATE: blob(said_of(**nested)),
    }


def int8_parts(weight=None):
    """A linear's tensors in the 8-bit layout."""
    weight = drawn() if weight is None else weight
    largest = weight.abs().amax(1)
    codes = (weight * (127 / largest[:, None])).round().to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def opened(folder, parts, config=CONFIG_4BIT, **settings):
    """An artifact with one linear of the tensors given."""
    quantization = {"bnb_4bit_quant_type": "nf4", **config, **settings}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file({f"{LINEAR}.{part}": tensor.contiguous() for part, tensor in parts.items()}, folder / "model.safetensors")
    return Checkpoint(folder)
