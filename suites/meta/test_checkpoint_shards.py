"""Shards of a checkpoint that are broken: every one is refused in one line, whichever bytes they are."""

from __future__ import annotations

import json
import struct
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fixtures.core.checkpoint import Checkpoint, read_header
from suites.meta.checkpoint_files import (
    INDEX,
    SINGLE,
    attempt,
    entry,
    flipped,
    raw,
    refusal,
    write_single,
)

MANY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def single(tmp_path):
    """Write a checkpoint of a single file, of the bytes given."""
    return partial(write_single, tmp_path)


def test_every_prefix(single):
    """A file cut short anywhere is refused as such, never read in part."""
    whole = save({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.float16)})

    assert set(Checkpoint(single(whole)).tensors) == {"a", "b"}
    for length in range(len(whole)):
        assert "is truncated" in refusal(single(whole[:length]), SINGLE), length


@pytest.mark.parametrize("count", [1, 8, 4096])
def test_trailing_garbage(single, count):
    """Bytes beyond what the header describes are refused."""
    assert "is too long" in refusal(single(save({"a": torch.arange(4.0)}) + b"\0" * count), SINGLE)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, (100 << 20) + 1, 1, 0])
def test_header_length(single, length):
    """A header length that no file has is refused, without reserving memory for it."""
    assert f"a header of {length} bytes" in refusal(single(raw({"a": entry()}, bytes(8), length)), SINGLE)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        pytest.param(b"not JSON", "header that is not JSON", id="text"),
        pytest.param(b'{"a": ', "header that is not JSON", id="cut JSON"),
        pytest.param(b"\xff" * 16, "header that is not JSON", id="bytes"),
        pytest.param(b"[" * 100_000, "header that is not JSON", id="nested lists"),
        pytest.param(b'{"a":' * 100_000, "header that is not JSON", id="nested objects"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "header that is not JSON", id="a number of 5000 digits"),
        pytest.param(json.dumps({"a": entry()}).encode("utf-16"), "header that is not JSON", id="UTF-16"),
        pytest.param(b"\xef\xbb\xbf{}", "header that is not JSON", id="byte order mark"),
        pytest.param(b"[]", "not a JSON object", id="a list"),
        pytest.param(b"42", "not a JSON object", id="a number"),
        pytest.param(b"null", "not a JSON object", id="null"),
        pytest.param(b"{}", "holds no tensors", id="nothing"),
        pytest.param(b'{"__metadata__": {"format": "pt"}}', "holds no tensors", id="only metadata"),
    ],
)
def test_no_header(single, header, said):
    """What is no header is refused."""
    assert said in refusal(single(raw(header)), SINGLE)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(entry(dtype="F33"), id="unknown dtype"),
        pytest.param(entry(dtype="f32"), id="dtype in lower case"),
        pytest.param(entry(dtype=None), id="no dtype"),
        pytest.param(entry(dtype=["F32"]), id="a list of dtypes"),
        pytest.param(entry(shape=(-2,)), id="negative shape"),
        pytest.param(entry(shape=(-1, -2)), id="twice negative shape"),
        pytest.param(entry(shape=(2.0,)), id="a float in the shape"),
        pytest.param(entry(shape=(2.9,)), id="a fraction in the shape"),
        pytest.param(entry(shape=("2",)), id="text in the shape"),
        pytest.param(entry() | {"shape": "2"}, id="text for the shape"),
        pytest.param(entry() | {"shape": 2}, id="a number for the shape"),
        pytest.param(entry(shape=(True, 2)), id="true in the shape"),
        pytest.param(entry(shape=(float("inf"),)), id="an infinite shape"),
        pytest.param(entry(shape=(float("nan"),)), id="a NaN shape"),
        pytest.param(entry(shape=([2],)), id="a nested shape"),
        pytest.param(entry(shape=(2**62, 2**62)), id="a shape beyond 64 bits"),
        pytest.param(entry(shape=(3,)), id="more elements than bytes"),
        pytest.param(entry(shape=(1,)), id="fewer elements than bytes"),
        pytest.param(entry(offsets=(8, 0)), id="offsets backwards"),
        pytest.param(entry(offsets=(-8, 0)), id="negative offsets"),
        pytest.param(entry(offsets=(0, 8, 16)), id="three offsets"),
        pytest.param(entry(offsets=(8,)), id="one offset"),
        pytest.param(entry(offsets=(0.0, 8.0)), id="float offsets"),
        pytest.param(entry(offsets=(0, float("inf"))), id="infinite offsets"),
        pytest.param({"shape": [2], "data_offsets": [0, 8]}, id="lacks dtype"),
        pytest.param({"dtype": "F32", "data_offsets": [0, 8]}, id="lacks shape"),
        pytest.param({"dtype": "F32", "shape": [2]}, id="lacks offsets"),
        pytest.param({}, id="lacks everything"),
        pytest.param(None, id="null"),
        pytest.param([], id="a list"),
        pytest.param("first\nsecond", id="two lines"),
        pytest.param(8, id="a number"),
    ],
)
def test_wrong_entry(single, wrong):
    """A tensor that the header describes wrongly is refused by name."""
    assert "describes 'b.weight' wrongly" in refusal(single(raw({"b.weight": wrong}, bytes(8))), SINGLE)


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [
        pytest.param((0, 8), (0, 8), 8, id="the same bytes"),
        pytest.param((0, 8), (4, 12), 12, id="overlapping"),
        pytest.param((0, 8), (12, 20), 20, id="a hole between"),
        pytest.param((4, 12), (12, 20), 20, id="a hole before"),
        pytest.param((2**62, 2**62 + 8), (0, 8), 16, id="far beyond"),
    ],
)
def test_wrong_offsets(single, first, second, size):
    """Tensors that share bytes or leave some out are refused."""
    header = {"a": entry(offsets=first), "b": entry(offsets=second)}

    assert "overlap others or leave a hole" in refusal(single(raw(header, bytes(size))), SINGLE)


@pytest.mark.parametrize(("size", "said"), [(15, "is truncated"), (17, "is too long"), (0, "is truncated")])
def test_wrong_size(single, size, said):
    """A file that is shorter or longer than its header says is refused."""
    header = {"a": entry(offsets=(0, 8)), "b": entry(offsets=(8, 16))}

    assert said in refusal(single(raw(header, bytes(size))), SINGLE)


def test_name_on_two_lines(single):
    """A tensor's name cannot break the error's line."""
    said = refusal(single(raw({"a\nb\u2028c\ud800": entry(dtype="?")}, bytes(8))), SINGLE)

    assert said.splitlines() == [said]
    said.encode()


GOOD = save({"layers.0.weight": torch.arange(8.0).reshape(8, 1), "b": torch.ones(2, dtype=torch.float16)})
HEADER_BITS = 8 * (8 + struct.unpack("<Q", GOOD[:8])[0])


def read_through(folder):
    """Open a folder and load all its tensors, by header."""
    checkpoint = Checkpoint(folder)
    return {name: (info, checkpoint.load(name)) for name, info in checkpoint.tensors.items()}


@MANY
@given(bits=st.lists(st.integers(0, HEADER_BITS - 1), min_size=1, max_size=3, unique=True))
def test_flipped_bits(single, bits):
    """Flipped bits in a header are refused, or leave tensors that are what the header says: never another exception."""
    found, said = attempt(read_through, single(flipped(GOOD, bits)))

    if found is None:
        assert len(said.splitlines()) == 1
        assert SINGLE in said
    else:
        assert all(tuple(tensor.shape) == info.shape for info, tensor in found.values())
        assert sum(info.bytes for info, _ in found.values()) == 8 * 4 + 2 * 2


def test_every_flipped_bit(single):
    """No single bit of a header flips unnoticed: it is refused, or it is another checkpoint by its digest."""
    folder = single(GOOD)
    good = Checkpoint(folder).digest
    for bit in range(HEADER_BITS):
        found, said = attempt(Checkpoint, single(flipped(GOOD, [bit])))
        assert len(said.splitlines()) == 1 if found is None else found.digest != good, bit


@MANY
@given(data=st.binary(max_size=300))
@example(data=b"")
@example(data=b"\x02" + bytes(7) + b"{}")
def test_random_bytes(single, data):
    """Random bytes are no checkpoint."""
    refusal(single(data), SINGLE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(("F32", "I8", "BOOL")) | json_values,
        "shape": st.lists(st.integers(-1, 3), max_size=2) | json_values,
        "data_offsets": st.lists(st.integers(-1, 12), min_size=2, max_size=2) | json_values,
    },
)


@MANY
@given(
    header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | json_values, max_size=3),
    size=st.integers(0, 16),
)
def test_random_header(single, header, size):
    """Whatever JSON stands in a header, it is read to the byte or refused in one line."""
    folder = single(raw(header, bytes(size)))

    found, said = attempt(read_header, folder / SINGLE)

    assert len(said.splitlines()) == 1 if found is None else sum(info.bytes for info in found.values()) == size


@MANY
@given(config=json_values, index=json_values, weight_map=json_values)
def test_random_json(single, config, index, weight_map):
    """Whatever JSON stands in config and index, the folder is read or refused in one line."""
    folder = single(save({"a": torch.ones(1)}))
    (folder / "config.json").write_text(json.dumps(config))
    for content in (index, {"weight_map": weight_map}):
        (folder / INDEX).write_text(json.dumps(content))
        found, said = attempt(Checkpoint, folder)
        assert len(said.splitlines()) == (found is None)
