"""Checkpoint folders: read exactly, or refused in one line that names the file and says what to do."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from fixtures.core.checkpoint import Checkpoint, read_header, read_json
from fixtures.core.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {FIRST: {"a.weight": torch.arange(8.0).reshape(2, 4)}, SECOND: {"b.weight": torch.ones(3, dtype=torch.int32)}}
REMEDIES = ("copy it again", "copy them again", "copy the folder again", "give the folder", "don't trust", "remove one")
MANY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@pytest.fixture
def single(tmp_path):
    """Write a checkpoint of a single file, of the bytes given."""

    def write(data):
        (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
        (tmp_path / SINGLE).write_bytes(data)
        return tmp_path

    return write


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in two shards; tests break it."""
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    for shard, tensors in SHARDS.items():
        save_file(tensors, tmp_path / shard)
    write_index(tmp_path, {name: shard for shard, tensors in SHARDS.items() for name in tensors})
    return tmp_path


def write_index(folder, weight_map):
    """Write an index with this weight map."""
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))


# Read exactly


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.uint8, torch.int64, torch.bool],
    ids=str,
)
def test_load(single, dtype):
    """A tensor comes back in the dtype and with the bits that were saved."""
    saved = {"x": torch.linspace(-3, 3, 12).reshape(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype)}

    checkpoint = Checkpoint(single(save(saved)))

    for name, tensor in saved.items():
        loaded = checkpoint.load(name)
        assert (loaded.dtype, loaded.shape) == (dtype, tensor.shape)
        assert torch.equal(loaded, tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].parameters == tensor.numel()
        assert checkpoint.tensors[name].bytes == tensor.numel() * tensor.element_size()


def test_not_a_number(single):
    """NaN, infinity and the sign of zero survive loading: what is broken on disk is seen."""
    broken = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=torch.float16)

    loaded = Checkpoint(single(save({"x": broken}))).load("x")

    assert torch.equal(loaded.view(torch.int16), broken.view(torch.int16))


def test_shards(sharded):
    """Tensors of every shard are found, each in its own, and loaded from there."""
    checkpoint = Checkpoint(sharded)

    assert {name: info.shard for name, info in checkpoint.tensors.items()} == {"a.weight": FIRST, "b.weight": SECOND}
    assert torch.equal(checkpoint.load("a.weight"), SHARDS[FIRST]["a.weight"])
    assert torch.equal(checkpoint.load("b.weight"), SHARDS[SECOND]["b.weight"])
    assert checkpoint.model_type == "tiny"
    assert checkpoint.name == sharded.name


def test_tensor_beside_the_index(sharded):
    """A tensor that a shard holds and the index does not name is seen all the same."""
    save_file(SHARDS[FIRST] | {"extra": torch.zeros(1)}, sharded / FIRST)

    assert Checkpoint(sharded).tensors["extra"].shard == FIRST


def test_index_of_a_single_file(single):
    """An index that names only the single file contradicts nothing."""
    folder = single(save({"a": torch.ones(2)}))
    write_index(folder, {"a": SINGLE})

    assert set(Checkpoint(folder).tensors) == {"a"}


def test_metadata_is_no_tensor(single):
    """A header's metadata is not taken for a tensor, and an empty tensor is one."""
    header = {"__metadata__": {"format": "pt"}, "x": entry(), "empty": entry(shape=(0, 4), offsets=(0, 0))}

    assert set(Checkpoint(single(raw(header, bytes(8)))).tensors) == {"x", "empty"}


def test_no_such_tensor(sharded):
    """A tensor that is not there is refused by name."""
    with pytest.raises(CheckpointError, match=r"has no tensor c\.weight$"):
        Checkpoint(sharded).load("c.weight")


def test_broken_after_it_was_opened(sharded):
    """A shard that breaks between the header's reading and the tensor's is refused, too."""
    checkpoint = Checkpoint(sharded)
    (sharded / FIRST).write_bytes(b"broken")

    with pytest.raises(CheckpointError, match=FIRST):
        checkpoint.load("a.weight")


@pytest.mark.parametrize(("config", "found"), [({}, None), ({"quantization_config": {"bits": 4}}, {"bits": 4})])
def test_quantization(sharded, config, found):
    """A reference has no quantization_config; an artifact's is given as it stands."""
    (sharded / "config.json").write_text(json.dumps(config))

    assert Checkpoint(sharded).quantization == found


# Refused: the folder


def test_no_folder(tmp_path):
    """A folder that is not there is refused."""
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_file_for_a_folder(tmp_path):
    """A file in place of a folder is refused."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    assert "not a folder" in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("lost", "said"),
    [("config.json", "has no config.json"), (INDEX, f"neither {SINGLE} nor {INDEX}")],
    ids=["config", "weights"],
)
def test_lost_file(sharded, lost, said):
    """A folder without config or weights is refused."""
    (sharded / lost).unlink()

    assert said in refusal(sharded)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"nothing", b'{"a": 1'], ids=range(6))
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_no_json(sharded, file, data):
    """A config or an index that is not JSON is refused, naming it."""
    (sharded / file).write_bytes(data)

    assert "not valid JSON" in refusal(sharded, file)


@pytest.mark.parametrize("data", ["[]", "null", '"text"', "4"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_no_json_object(sharded, file, data):
    """A config or an index that is JSON, but no object, is refused."""
    (sharded / file).write_text(data)

    assert "not a JSON object" in refusal(sharded, file)


@pytest.mark.parametrize("file", ["config.json", INDEX, FIRST])
def test_folder_for_a_file(sharded, file):
    """A folder in place of a file is refused, naming it."""
    (sharded / file).unlink()
    (sharded / file).mkdir()

    assert "cannot be read" in refusal(sharded, file)


def test_read_json(tmp_path):
    """A JSON file that is not there is refused; one that is gives its object."""
    (tmp_path / "good.json").write_text('{"a": "\u00e9"}', encoding="utf-8")

    assert read_json(tmp_path / "good.json") == {"a": "\u00e9"}
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_json(tmp_path / "none.json")


# Refused: the index


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}'])
def test_empty_weight_map(sharded, index):
    """An index that maps nothing is refused: a checkpoint of no tensors would agree with any."""
    (sharded / INDEX).write_text(index)

    assert "has no weight_map" in refusal(sharded, INDEX)


def test_missing_shard(sharded):
    """An index naming a missing shard is refused, naming it and how many tensors it held."""
    (sharded / SECOND).unlink()

    assert f"names {SECOND}, which is missing (1 tensors)" in refusal(sharded, INDEX)


@pytest.mark.parametrize(
    "shard",
    [
        "../x",
        "..",
        ".",
        "",
        "/etc/passwd",
        "sub/x",
        "./x",
        "..\\x",
        "C:\\x",
        None,
        4,
        ["x"],
        {},
        "a\0b",
        "a\nb",
        "x" * 256,
        "\u00e9" * 200,
    ],
    ids=repr,
)
def test_index_leads_astray(sharded, shard):
    """An index that points outside its folder, or at what no file can be called, is refused."""
    write_index(sharded, {"a.weight": FIRST, "b.weight": shard})

    assert "points outside its folder: 'b.weight'" in refusal(sharded, INDEX)


def test_index_does_not_reach_outside(sharded, tmp_path_factory):
    """Not even a good file outside the folder is read."""
    outside = tmp_path_factory.mktemp("outside") / SECOND
    shutil.move(sharded / SECOND, outside)
    write_index(sharded, {"a.weight": FIRST, "b.weight": str(outside)})

    assert "points outside its folder" in refusal(sharded, INDEX)


def test_shard_lacks_a_tensor(sharded):
    """A shard that lacks what the index says it holds is refused, naming the tensor."""
    write_index(sharded, {"a.weight": FIRST, "b.weight": SECOND, "c\n.weight": SECOND})

    assert rf"{SECOND} holds 'c\n.weight', which it does not" in refusal(sharded, INDEX)


@pytest.mark.parametrize("mapped", [FIRST, SECOND, None])
def test_tensor_in_two_shards(sharded, mapped):
    """A tensor in two shards is refused, whichever the index names: engines would read different ones."""
    save_file(SHARDS[FIRST] | {"c.weight": torch.zeros(2)}, sharded / FIRST)
    save_file(SHARDS[SECOND] | {"c.weight": torch.ones(2)}, sharded / SECOND)
    weight_map = {"a.weight": FIRST, "b.weight": SECOND} | ({"c.weight": mapped} if mapped else {})
    write_index(sharded, weight_map)

    said = refusal(sharded, INDEX)

    assert "both hold 'c.weight'" in said
    assert FIRST in said
    assert SECOND in said


def test_single_file_beside_shards(sharded):
    """A single file beside an index of shards is refused: transformers would read the one, vLLM the others."""
    save_file({"a.weight": torch.zeros(2, 4)}, sharded / SINGLE)

    assert "has both" in refusal(sharded)


# Refused: the shards


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


def flipped(data, bits):
    """The bytes with these bits flipped."""
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


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


# The digest


def test_digest_of_a_copy(sharded, tmp_path_factory):
    """A copy of another name has the same digest: the content makes it this checkpoint."""
    copy = shutil.copytree(sharded, tmp_path_factory.mktemp("copies") / "of_another_name")

    assert Checkpoint(copy).digest == Checkpoint(sharded).digest
    assert len(Checkpoint(copy).digest) == 64


@pytest.mark.parametrize("file", ["config.json", FIRST, SECOND])
def test_digest_of_every_byte(sharded, file):
    """Another byte anywhere in config or shards is another digest, or no checkpoint."""
    path = Path(sharded) / file
    whole = path.read_bytes()
    seen = {Checkpoint(sharded).digest}
    for place in range(len(whole)):
        path.write_bytes(flipped(whole, [8 * place]))
        try:
            digest = Checkpoint(sharded).digest
        except CheckpointError:
            continue
        assert digest not in seen, place
        seen.add(digest)
    assert len(seen) > 8


def test_digest_of_names(sharded):
    """The shards' names are part of the digest, also where their order stays."""
    before = Checkpoint(sharded).digest
    (sharded / FIRST).rename(sharded / "model-00000.safetensors")
    write_index(sharded, {"a.weight": "model-00000.safetensors", "b.weight": SECOND})

    assert Checkpoint(sharded).digest != before


def test_digest_of_swapped_shards(sharded):
    """Which shard holds which bytes is part of the digest."""
    before = Checkpoint(sharded).digest
    (sharded / FIRST).rename(sharded / "x")
    (sharded / SECOND).rename(sharded / FIRST)
    (sharded / "x").rename(sharded / SECOND)
    write_index(sharded, {"a.weight": SECOND, "b.weight": FIRST})

    assert Checkpoint(sharded).digest != before
