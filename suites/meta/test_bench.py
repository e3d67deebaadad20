"""The bench: same tokens for all, a judge of loss that sees damage, NaN that never wins, runs that can go on later."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fixtures.adapters import ADAPTERS, adapter_for
from fixtures.audit.pair import Pair
from fixtures.bench import measuring
from fixtures.bench.comparison import Spread, ratio, relative
from fixtures.bench.inputs import Inputs, check_read, rows_of, subset, texts_of, tokens_read
from fixtures.bench.judging import Case, Judged, comparable, evenly, judge
from fixtures.bench.losses import GroupLosses, group_losses, loss
from fixtures.bench.measuring import Made, Task, make
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.core.recipe import Recipe
from fixtures.core.stopwatch import phase, phases
from fixtures.engines.loading import load_model, load_processor
from fixtures.faults.editing import copied, edit_tensor
from fixtures.meters.nvml import Card
from fixtures.quantizers import calibration, quantize
from fixtures.quantizers.layers import silent
from fixtures.subjects import shipped
from reports import store

VL = ADAPTERS["qwen2_5_vl"]
REFERENCE = shipped("qwen2_5_vl-tiny")
DOWN = "model.layers.1.mlp.down_proj"
ALL = {"qkv", "gate_up", "down"}


@pytest.fixture(scope="module")
def processor(tiny_reference: Checkpoint) -> Any:
    """The shipped processor."""
    return load_processor(tiny_reference)


@pytest.fixture(scope="module")
def rounded(tiny_reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped reference by RTN: an artifact in a fifth of a second."""
    out = tmp_path_factory.mktemp("rtn") / "artifact"
    quantize(tiny_reference, Recipe("rtn"), (), out)
    return out


@pytest.fixture(scope="module")
def model(tiny_reference: Checkpoint) -> nn.Module:
    """The shipped reference, loaded."""
    return load_model(tiny_reference, VL, torch.float32)


@pytest.fixture
def losses_of(model: nn.Module, processor: Any, tiny_reference: Checkpoint) -> Callable[..., list[GroupLosses]]:
    """The judge of loss, on a sample of every modality."""

    def judged(folders: Mapping[str, Path], layers: frozenset[int] | None = None) -> list[GroupLosses]:
        pairs = {name: Pair(tiny_reference, Checkpoint(folder)) for name, folder in folders.items()}
        (decoder,) = VL.decoders(tiny_reference.config)
        samples = calibration.built_in(VL, per_modality=1)
        feeds = calibration.feeds(VL, model, processor, decoder, samples)
        return list(group_losses(pairs, model, decoder, feeds, layers))

    return judged


# -- the judge of loss -----------------------------------------------------------------------------------------


def test_damaged_linear_loses_more(rounded: Path, losses_of: Callable[..., list[GroupLosses]], tmp_path: Path) -> None:
    """An artifact with one linear's codes damaged loses more in that linear's group, and the same in all others."""
    damaged = copied(rounded, tmp_path / "damaged")
    edit_tensor(damaged, "model.layers.1.self_attn.q_proj.qweight", lambda words: words.roll(1, 0))
    found = losses_of({"good": rounded, "damaged": damaged})

    assert len(found) == 4 * len(ALL)
    for one in found:
        if (one.layer, one.group) == (1, "qkv"):
            assert one.losses["damaged"] > 10 * one.losses["good"] > 0
        else:
            assert one.losses["damaged"] == one.losses["good"] > 0
    compared = relative(found, "damaged", "good")
    assert compared.worst > 10
    assert compared.worst_group == "language_model layer 1, qkv"
    assert compared.no_worse == pytest.approx(11 / 12)
    assert compared.median == 1


def test_compared_with_itself(good_artifact: Path, losses_of: Callable[..., list[GroupLosses]]) -> None:
    """An artifact compared with itself loses exactly as much in every group."""
    found = losses_of({"one": good_artifact, "other": good_artifact})
    compared = relative(found, "one", "other")
    assert (compared.median, compared.worst, compared.no_worse, compared.groups) == (1.0, 1.0, 1.0, 12)


def test_search_wins(
    good_artifact: Path, rounded: Path, losses_of: Callable[..., list[GroupLosses]], tiny_reference: Checkpoint
) -> None:
    """AWQ's scales are undone, so that its loss is that of its weights: far below RTN's in every group."""
    found = losses_of({"awq": good_artifact, "rtn": rounded})
    assert relative(found, "awq", "rtn").worst < 0.2
    assert relative(found, "rtn", "awq").no_worse == 0
    layers = {name: Checkpoint(folder) for name, folder in (("awq", good_artifact), ("rtn", rounded))}
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(layers["awq"].load(norm), tiny_reference.load(norm)), "no scales to undo"


@torch.no_grad()
def test_loss_of_a_linear(
    rounded: Path,
    losses_of: Callable[..., list[GroupLosses]],
    model: nn.Module,
    processor: Any,
    tiny_reference: Checkpoint,
) -> None:
    """The loss is the mean square of what the weight's error makes of the inputs, as hooks on a plain run see them."""
    weight = tiny_reference.load(f"{DOWN}.weight").float()
    error = pseudo_quantize_tensor(weight, Scheme(), scale_dtype=torch.float16).weight - weight
    (decoder,) = VL.decoders(tiny_reference.config)
    linear = decoder.modules(model)[1].get_submodule("mlp.down_proj")
    squares: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: squares.append((args[0] @ error.T).double().square()))
    for batch in calibration.batches(VL, processor, calibration.built_in(VL, per_modality=1)):
        model(**batch, use_cache=False)
    hook.remove()

    expected = torch.cat([one.flatten() for one in squares]).mean().item()
    (found,) = [one for one in losses_of({"rtn": rounded}) if (one.layer, one.group) == (1, "down")]
    assert found.losses["rtn"] == pytest.approx(expected, rel=1e-4)


def test_reference_stays(rounded: Path, losses_of: Callable[..., list[GroupLosses]], model: nn.Module) -> None:
    """Judging leaves the loaded reference as it was, and judges the same again; chosen layers cost no others."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = losses_of({"rtn": rounded})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert losses_of({"rtn": rounded}) == found
    assert losses_of({"rtn": rounded}, frozenset({1, 2})) == [one for one in found if one.layer in {1, 2}]


def test_what_is_not_quantized_has_no_loss(model: nn.Module, tiny_reference: Checkpoint) -> None:
    """A group that an artifact keeps in full precision has the loss NaN, not 0, and nothing heard has none either."""
    (decoder,) = VL.decoders(tiny_reference.config)
    layer, group = decoder.modules(model)[0], decoder.groups[0]
    assert math.isnan(loss(layer, group, {}, []))
    assert math.isnan(loss(layer, group, {group.linears[0]: layer.get_parameter(f"{group.linears[0]}.weight")}, []))


def test_other_linears_are_refused(rounded: Path, tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """Artifacts that quantize other linears, or by another scheme, or are none, are not held against each other."""
    finer = tmp_path / "finer"
    quantize(tiny_reference, Recipe("rtn", Scheme(4, 64)), (), finer)
    pairs, refused = comparable(tiny_reference, {"a": rounded, "b": rounded, "finer": finer, "none": tmp_path})
    assert sorted(pairs) == ["a", "b"]
    assert "by another scheme" in refused["finer"]
    assert "config.json" in refused["none"]


def test_judge(rounded: Path, good_artifact: Path, tmp_path: Path) -> None:
    """Losses and KL of all artifacts come from one judge, who says on how many tokens, and survive being written."""
    said: list[str] = []
    case = Case(
        str(REFERENCE),
        {"awq": str(good_artifact), "rtn": str(rounded), "none": str(tmp_path)},
        Inputs("", 3, 40),
        tokens=60,
        layers=2,
        held_out=2,
    )
    found = judge(case, progress=lambda what, _done, _total: said.append(what))
    assert sorted(found.refused) == ["none"]
    assert {one.layer for one in found.groups} == {0, 3}
    assert found.tokens == 80  # two texts: no sample is cut
    assert found.held_out_tokens > 0
    assert 0 < found.kl["awq"] < found.kl["rtn"]
    assert said
    assert Judged.from_json(json.loads(json.dumps(store.plain(found.to_json())))) == found


def test_layers_are_spread_evenly() -> None:
    """Some layers of many are the first, the last and what lies between; all where no number is given."""
    assert sorted(evenly(36, 4)) == [0, 12, 23, 35]
    assert sorted(evenly(36, 1)) == [0]
    assert evenly(4, 0) == evenly(4, 9) == {0, 1, 2, 3}


# -- comparing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(1.0, 2.0, 0.5), (0.0, 0.0, 1.0), (3.0, 0.0, math.inf), (0.0, 2.0, 0.0)],
)
def test_ratio(ours: float, theirs: float, expected: float) -> None:
    """A loss over another's; equal ones are 1, also where both are 0, and any loss is infinitely more than none."""
    assert ratio(ours, theirs) == expected


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_nan_never_wins(broken: float) -> None:
    """One loss that is no number, on either side, makes the whole comparison none, and its group is not won."""
    fine, odd = {"a": 1.0, "b": 2.0}, {"a": broken, "b": 2.0}
    groups = [GroupLosses("t", 0, "qkv", fine), GroupLosses("t", 0, "down", odd)]
    for pair in (("a", "b"), ("b", "a")):
        found = relative(groups, *pair)
        assert math.isnan(found.median)
        assert math.isnan(found.worst)
        assert found.worst_group == "t layer 0, down"
    assert relative(groups, "a", "b").no_worse == 0.5
    assert math.isnan(relative([], "a", "b").worst)
    assert math.isnan(relative([GroupLosses("t", 0, "qkv", {"a": 1.0})], "a", "absent").worst)


def test_spread() -> None:
    """Several runs are told as their mean with least and most; one, or none, without."""
    assert str(Spread.of([1.0, 2.0, 3.0])) == "2.00 (1.00 to 3.00)"
    assert str(Spread.of([28.25])) == "28.2"
    assert str(Spread.of([])) == str(Spread.of([1.0, math.nan])) == ""


# -- the same tokens -------------------------------------------------------------------------------------------


def test_texts_are_as_long_as_asked(processor: Any) -> None:
    """Calibration texts have exactly the tokens asked for, differ, and are the same every time."""
    samples = texts_of(VL, processor, 5, 48)
    lengths = [VL.encode(processor, one, with_answer=False).inputs["input_ids"].shape[1] for one in samples]
    assert lengths == [48] * 5
    assert len(rows_of(VL, processor, samples)) == 5
    assert calibration.digest(samples) == calibration.digest(texts_of(VL, processor, 5, 48))


def test_subset_is_of_every_modality(processor: Any) -> None:
    """Fewer tokens are taken from every modality in turn, and counted."""
    samples = calibration.built_in(VL, per_modality=4)
    chosen, tokens = subset(VL, processor, samples, 1)
    assert [one.modality for one in chosen] == [VL.modalities[0]]
    everything, total = subset(VL, processor, samples, 10**6)
    assert len(everything) == len(samples)
    assert total > tokens > 0
    some, _ = subset(VL, processor, samples, total // 2)
    assert {one.modality for one in some} == set(VL.modalities)


def test_tokens_are_watched_where_they_are_looked_up() -> None:
    """What a model reads is seen in its embedding, other embeddings are not, and torch's own is put back."""
    own, words, other = functional.embedding, nn.Embedding(50, 4), nn.Embedding(60, 4)
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with tokens_read(50) as read:
        looked_up = words(rows)
        other(rows + 1)
        words(rows[0])  # no batch: codes or positions
    assert torch.equal(looked_up, words.weight[rows])
    assert len(read) == 2
    assert functional.embedding is own
    check_read(frozenset(read), read, speaks=False)


def test_other_tokens_are_seen() -> None:
    """Sequences that were not read, or others that were, are an error; one who speaks may read what it said, too."""
    expected = frozenset({"a", "b"})
    with pytest.raises(UserError, match="1 of 2 sequences were not read, and 0 others"):
        check_read(expected, {"a"}, speaks=True)
    with pytest.raises(UserError, match="0 of 2 sequences were not read, and 1 others"):
        check_read(expected, {"a", "b", "c"}, speaks=False)
    check_read(expected, {"a", "b", "c"}, speaks=True)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Our quantizer on three short texts."""
    return Task("awq", str(REFERENCE), str(tmp_path / "artifact"), Inputs("", 3, 40))


def test_peer_of_other_tokens_is_refused(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer that leaves out a sample it was given does not stand beside those that read all of them."""

    def lazy(reference: Checkpoint, recipe: Recipe, samples: Any, out: Path, **others: Any) -> None:
        quantize(reference, recipe, samples[:-1], out, **others)

    monkeypatch.setattr(measuring, "quantize", lazy)
    with pytest.raises(UserError, match="calibrated on other tokens: 1 of 3"):
        make(task, progress=silent)


def test_run_is_measured(task: Task) -> None:
    """A run says where its seconds went, what it held and wrote, and which tokens it read."""
    began = time.perf_counter()
    made = make(task, progress=silent)
    assert set(made.seconds) == {"load", "search", "write"}
    assert all(seconds > 0 for seconds in made.seconds.values())
    assert made.total < time.perf_counter() - began
    assert made.cpu_seconds > 0
    assert made.peaks["memory"] > 50e6
    assert made.bytes == Checkpoint(task.out).bytes
    assert len(made.read) == 64
    assert Made.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_run_that_takes_too_long(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run beyond its time is ended in one line that says how far it came."""

    def endless(*_: Any, progress: Callable[[str, int, int], None], **__: Any) -> None:
        progress("layer", 3, 36)
        time.sleep(30)

    monkeypatch.setattr(measuring, "quantize", endless)
    with pytest.raises(UserError, match="not finished within 1 s: layer, 3 of 36"):
        make(replace(task, timeout=1.0), progress=silent)


def test_card_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that a card holds during the work, beyond what was there before, is seen though it is given back."""
    used = iter([100, 300, 900, *[200] * 1000])
    monkeypatch.setattr(measuring.nvml, "card", lambda _index: Card("", "", 1000, next(used)))
    monkeypatch.setattr(measuring, "SAMPLED_EVERY", 0.001)
    with measuring._card_watched("cuda") as found:
        time.sleep(0.1)
    assert found == {"card": 800}
    with measuring._card_watched("cpu") as found:
        pass
    assert found == {}


# -- phases ----------------------------------------------------------------------------------------------------


def test_every_second_counts_once() -> None:
    """A phase inside another has its seconds to itself; together they are what passed."""
    began = time.perf_counter()
    with phases() as spent, phase("search"):
        time.sleep(0.02)
        for _ in range(2):
            with phase("write"):
                time.sleep(0.03)
                with phase("load"):
                    time.sleep(0.01)
    passed = time.perf_counter() - began
    assert spent["write"] >= 0.06
    assert 0.02 <= spent["load"] < 0.06
    assert sum(spent.values()) == pytest.approx(passed, abs=0.01)


def test_only_the_watched_thread_counts() -> None:
    """What another thread does meanwhile costs the work no time, and without a watcher nothing is counted."""

    def beside() -> None:
        with phase("load"):
            time.sleep(0.05)

    with phases() as spent:
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    assert spent == {}
    beside()
    assert spent == {}


# -- llm-compressor --------------------------------------------------------------------------------------------


def test_llm_compressor(
    rounded: Path,
    losses_of: Callable[..., list[GroupLosses]],
    tiny_reference: Checkpoint,
    processor: Any,
    tmp_path: Path,
) -> None:
    """Llm-compressor's own scales and codes come through: its artifact loses far less than RTN in every group."""
    pytest.importorskip("llmcompressor", reason="pip install llmcompressor, in an environment of its own")
    samples = texts_of(adapter_for(tiny_reference), processor, 8, 64)
    quantize(tiny_reference, Recipe("llm-compressor"), samples, tmp_path / "artifact")
    assert relative(losses_of({"theirs": tmp_path / "artifact", "rtn": rounded}), "theirs", "rtn").worst < 0.5


def test_llm_compressor_reads_one_modality(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """What it cannot be calibrated on is refused in one line, as is its absence, and nothing is written."""
    samples = calibration.built_in(VL, per_modality=1)
    omni = Checkpoint(shipped("qwen2_5_omni-tiny"))
    with pytest.raises(UserError, match=r"of one modality|needs llmcompressor"):
        quantize(tiny_reference, Recipe("llm-compressor"), samples, tmp_path / "artifact")
    with pytest.raises(UserError, match="run for one decoder"):
        quantize(omni, Recipe("llm-compressor"), samples, tmp_path / "artifact")
    assert not list(tmp_path.iterdir())
