"""One small linear in every layout, tensor by tensor, and artifacts of it."""

from __future__ import annotations

import json
import math

import torch
from safetensors.torch import save_file

from fixtures.core import codebook
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.codebook import CodebookScheme, pseudo_quantize_blocks
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.formats import awq_gemm, bnb_4bit, bnb_8bit
from suites.meta.bnb_parts import blob, said_of

SAID = said_of([4, 32])
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


def opened(folder, parts, **quantization):
    """An artifact of one linear "m.up"."""
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file({f"m.up.{part}": tensor for part, tensor in parts.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def awq_parts():
    """Two groups of 8 inputs for 16 outputs."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    quantized = pseudo_quantize_tensor(weight, Scheme(4, 8), scale_dtype=torch.float16)
    return quantized, awq_gemm.encode(quantized)


def four_bits(shape=(4, 32), absmax=None, **changes):
    """A linear of 128 weights in the 4-bit layout, unless a shape is said."""
    count = math.prod(shape)
    blocks = -(-count // 64)
    return {
        "weight": (torch.arange((count + 1) // 2) % 251).to(torch.uint8)[:, None],
        "weight.absmax": torch.ones(blocks) if absmax is None else absmax,
        "weight.quant_map": codebook.code_book("nf4").clone(),
        "weight.quant_state.bitsandbytes__nf4": blob(SAID | {"shape": shape} | changes),
    }


def nested_parts():
    """The same linear of 128 weights with nested scales."""
    return four_bits(absmax=torch.zeros(2, dtype=torch.uint8), **NESTED) | {
        "weight.nested_absmax": torch.ones(1),
        "weight.nested_quant_map": codebook.dynamic_map().clone(),
    }


def eight_bits(**changes):
    """A linear of two outputs in the 8-bit layout: the second row is one of zeros."""
    codes = torch.tensor([[127, -127, 64], [5, 0, 0]], dtype=torch.int8)
    return {"weight": codes, "SCB": torch.tensor([254.0, 0.0]), "weight_format": torch.tensor(0).byte()} | changes


def stored_linears():
    """One linear of each layout, 24 outputs of 48 inputs: words hold 8 rows, blocks of 64 end with every fourth."""
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    affine = pseudo_quantize_tensor(weight, Scheme(4, 16), scale_dtype=torch.float16)
    blocks = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    four = bnb_4bit.State("nf4", (24, 48), 64)
    return {
        "awq": (awq_gemm.StoredAwq(awq_gemm.encode(affine), affine.scheme), affine, 8),
        "4 bits": (bnb_4bit.Stored4bit(bnb_4bit.pack(blocks.codes), blocks.absmax, four, blocks.absmax / 8), blocks, 4),
        "8 bits": (bnb_8bit.StoredInt8(codes, largest, Scheme(8, -1, zero_point=False)), None, 1),
    }
