"""Checkpoint folders: read exactly, or refused in one line that names the file and says what to do."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from fixtures.core.checkpoint import Checkpoint, read_json
from fixtures.core.errors import CheckpointError
from suites.meta.checkpoint_files import (
    FIRST,
    INDEX,
    SECOND,
    SHARDS,
    SINGLE,
    entry,
    flipped,
    raw,
    refusal,
    write_index,
    write_single,
)


@pytest.fixture
def single(tmp_path):
    """Write a checkpoint of a single file, of the bytes given."""
    return partial(write_single, tmp_path)


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in two shards; tests break it."""
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    for shard, tensors in SHARDS.items():
        save_file(tensors, tmp_path / shard)
    write_index(tmp_path, {name: shard for shard, tensors in SHARDS.items() for name in tensors})
    return tmp_path


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
