"""Checkpoint folders to break: their bytes, and the one line in which they are refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {FIRST: {"a.weight": torch.arange(8.0).reshape(2, 4)}, SECOND: {"b.weight": torch.ones(3, dtype=torch.int32)}}
REMEDIES = ("copy it again", "copy them again", "copy the folder again", "give the folder", "don't trust", "remove one")


def refusal(path, of=None):
    """The one line in which a folder is refused, about the file ``of``."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    said = str(caught.value)
    assert "\n" not in said, said
    assert str(path if of is None else path / of) in said
    assert any(remedy in said for remedy in REMEDIES), said
    return said


def attempt(read, path):
    """What reading gives and an empty line; or None, and the one line in which the path is refused."""
    try:
        return read(path), ""
    except CheckpointError as error:
        return None, str(error)


def raw(header, body=b"", length=None):
    """The bytes of a safetensors file with a header as given: bytes, or what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write_single(folder, data):
    """Write a checkpoint of a single file, of the bytes given; the folder."""
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / SINGLE).write_bytes(data)
    return folder


def write_index(folder, weight_map):
    """Write an index with this weight map."""
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))


def flipped(data, bits):
    """The bytes with these bits flipped."""
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
