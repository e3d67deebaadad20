"""GPUs of a run: refused where there are none, shared out among workers, given back by every test."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures import gpus
from fixtures.chosen import FULL_SIZE_QUANTIZERS, Selection, select
from fixtures.core.errors import UserError
from fixtures.core.targets import Target
from reports.stash import ABOUT

ROOT = Path(__file__).parents[2]

EXPRESSIONS = {
    "gpu": True,
    "gpu and speech": True,
    "speech and gpu and not full_size": True,
    "(gpu)": True,
    "full_size": True,  # whose tests are all marked gpu
    "full_size and speech": True,
    "gpu or full_size": True,
    "": False,
    "speech": False,
    "not gpu": False,
    "not (gpu or speech)": False,
    "gpu or speech": False,  # selects tests that need none
    "not full_size": False,
    "gpu and not gpu": False,
    "gpus": False,  # another marker
    "gpu and (": False,  # pytest says what is wrong with it
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_only_gpu_tests_are_asked_for(expression: str) -> None:
    """A marker expression asks only for GPU tests when it selects some of them and no others."""
    assert gpus.asks_only_for_gpu(expression) is EXPRESSIONS[expression]


SHARES: dict[str, tuple[list[str], int, list[list[str]]]] = {
    "one each": (["0", "1"], 1, [["0"], ["1"]]),
    "more workers than GPUs": (["0", "1"], 1, [["0"], ["1"], ["0"]]),
    "some of the machine's": (["5", "7"], 1, [["5"], ["7"]]),
    "by UUID": (["GPU-a", "GPU-b"], 1, [["GPU-a"], ["GPU-b"]]),
    "two each": (["0", "1", "2", "3"], 2, [["0", "1"], ["2", "3"], ["0", "1"]]),
    "one left over": (["0", "1", "2"], 2, [["0", "1"], ["0", "1"]]),
    "too few": (["0"], 2, [["0"]]),
    "none": ([], 1, [[]]),
}


@pytest.mark.parametrize("case", SHARES)
def test_shares(case: str) -> None:
    """Every worker has GPUs of its own, and shares them in turn when there are too few."""
    there, each, wanted = SHARES[case]
    assert [gpus.share(there, worker, each) for worker in range(len(wanted))] == wanted


@pytest.mark.parametrize(
    ("variable", "there", "wanted"),
    [
        (None, 2, ["0", "1"]),
        ("1", 1, ["1"]),
        ("3, 1", 2, ["3", "1"]),
        ("0,1", 0, []),  # names GPUs of a machine that has none
        ("", 0, []),
    ],
)
def test_visible(variable: str | None, there: int, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPUs to share out are those that CUDA_VISIBLE_DEVICES names, else all."""
    monkeypatch.setattr(gpus, "count", lambda: there)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(gpus.VISIBLE, variable)
    assert gpus.visible() == wanted


def config_of(workers: int = 0, each: int = 1, **more: Any) -> pytest.Config:
    """As much of a pytest config as GPUs ask for."""
    option = SimpleNamespace(numprocesses=workers, tensor_parallel=each)
    return SimpleNamespace(option=option, **more)  # type: ignore[return-value]


REFUSED = {
    "none": (0, 0, 1, "no usable GPU"),
    "too many workers": (2, 3, 1, "-n 3: 3 workers need 3 GPUs, 1 each, and there are 2: use -n 2"),
    "workers that spread": (2, 2, 2, "-n 2: 2 workers need 4 GPUs, 2 each, and there are 2: use -n 1"),
    "too wide a spread": (1, 0, 2, "--tensor-parallel 2 needs 2 GPUs; there is 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_machine_cannot_do(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of GPU tests that wants more GPUs than there are is refused, saying what would do."""
    there, workers, each, said = REFUSED[case]
    monkeypatch.setattr(gpus, "visible", lambda: [str(index) for index in range(there)])
    with pytest.raises(UserError) as caught:
        gpus.require(config_of(workers, each))
    assert said in str(caught.value)


def test_what_the_machine_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many workers as GPUs are welcome; a worker, which has but its own GPU, counts no others."""
    monkeypatch.setattr(gpus, "visible", lambda: ["0", "1"])
    gpus.require(config_of(2, 1))
    gpus.require(config_of(0, 2))
    monkeypatch.setattr(gpus, "visible", lambda: ["1"])
    gpus.require(config_of(2, 1, workerinput={"workerid": "gw1"}))


FAKE_GPUS = """
from fixtures import gpus

pytest_plugins = ["fixtures.gpus"]
gpus.count = lambda: len((os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(","))
"""
WHO_HAS_WHAT = """
import os
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("number", range(8))
def test_it(number, worker_id):
    ask = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    said = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    with open({shared!r}, "a") as stream:
        stream.write(f"{{worker_id}} {{os.environ.get('CUDA_VISIBLE_DEVICES')}} {{said}}\\n")
"""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, {"gw0 0 0", "gw1 1 1"}),
        ("4,6", {"gw0 4 4", "gw1 6 6"}),
    ],
)
def test_workers_are_pinned(
    given: str | None, wanted: set[str], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With -n 2 each worker sees one GPU of its own of those the run was given, and so does whatever it starts."""
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if given:
        monkeypatch.setenv(gpus.VISIBLE, given)
    pytester.makeconftest(f"import os\n{FAKE_GPUS}")
    shared = pytester.path / "said"
    pytester.makepyfile(WHO_HAS_WHAT.format(shared=str(shared)))
    run = pytester.runpytest_subprocess("-n", "2", "--dist", "each", "-p", "no:cacheprovider")
    assert run.ret == 0, run.stdout.str()
    assert set(shared.read_text().splitlines()) == wanted


BAD_CHOICES = {
    "unknown size": (["--size", "8b"], "unknown size '8b' (known: 3b, 7b)"),
    "unknown kernel": (["--kernel", "marlinn"], "unknown kernel 'marlinn'; did you mean 'marlin'?"),
    "no GPU at all": (["--tensor-parallel", "0"], "--tensor-parallel 0: must be at least 1"),
    "size of somebody's own": (
        ["--family", "qwen2_5_vl", "--reference", "fixtures/subjects/checkpoints/qwen2_5_vl-tiny", "--size", "3b"],
        "a --reference has its own size",
    ),
}


def chosen(*arguments: str, only_gpu: bool = False) -> Selection:
    """What a command line chooses."""
    from _pytest.config import get_config

    config = get_config()
    config.pluginmanager.import_plugin("fixtures.options")
    config.pluginmanager.import_plugin("fixtures.checkpoints")
    option = config._parser.parse_known_args(list(arguments))
    return select(SimpleNamespace(option=option, rootpath=ROOT), only_gpu=only_gpu)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_bad_choice(case: str) -> None:
    """A size, a kernel or a number of GPUs that does not exist is refused, with the nearest that does."""
    arguments, said = BAD_CHOICES[case]
    with pytest.raises(UserError) as caught:
        chosen(*arguments)
    assert said in str(caught.value)


def test_full_size_targets() -> None:
    """Full size means 3b of every family, quantized the two default ways, unless the user says otherwise."""
    default = chosen().full_size_targets
    families = ("qwen2_5_vl", "qwen2_5_omni")
    assert default == tuple(Target(f, "3b", q) for f in families for q in FULL_SIZE_QUANTIZERS)
    other = chosen("--size", "7b", "--size", "3b", "--family", "qwen2_5_omni", "--quantizer", "awq")
    assert [str(target) for target in other.full_size_targets] == ["qwen2_5_omni-7b-awq", "qwen2_5_omni-3b-awq"]


def test_full_size_is_made_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-size subjects are made on the GPU, tiny ones where --device says; one's own there in a run of GPU tests."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    tiny, large = Target("qwen2_5_vl", "tiny", "rtn"), Target("qwen2_5_vl", "3b", "rtn")
    assert [chosen().device_for(target) for target in (tiny, large)] == ["cpu", "cuda"]
    assert [chosen("--device", "cuda:1").device_for(target) for target in (tiny, large)] == ["cuda:1", "cuda:1"]
    own = ("--family", "qwen2_5_vl", "--reference", str(ROOT / "fixtures/subjects/checkpoints/qwen2_5_vl-tiny"))
    (mine,) = chosen(*own).full_size_targets
    assert not chosen(*own).is_full_size(mine)
    assert [chosen(*own, only_gpu=only_gpu).device_for(mine) for only_gpu in (False, True)] == ["cpu", "cuda"]


MARKED = """
import pytest

@pytest.mark.gpu
@pytest.mark.full_size
def test_large(target): "Is large."

def test_small(target): "Is small."
"""


def collected(pytester: pytest.Pytester, *arguments: str, source: str = MARKED) -> pytest.RunResult:
    """A run of two tests with targets under this project's options."""
    pytester.makeconftest('pytest_plugins = ["fixtures.gpus", "fixtures.options"]')
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess(*arguments, "-p", "no:cacheprovider")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, wherever this runs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(gpus.VISIBLE, "")


@pytest.mark.usefixtures("elsewhere")
def test_marked_tests_get_full_size_targets(pytester: pytest.Pytester) -> None:
    """Tests marked full_size are about full-size targets, others about the tiny ones."""
    anywhere = MARKED.replace("@pytest.mark.gpu\n", "")
    choices = ("--size", "7b", "--family", "qwen2_5_vl")
    said = collected(pytester, "--collect-only", "-q", *choices, source=anywhere).stdout.str()
    large = [line for line in said.splitlines() if "test_large[" in line]
    small = [line for line in said.splitlines() if "test_small[" in line]
    assert [line.partition("[")[2] for line in large] == ["qwen2_5_vl-7b-rtn]", "qwen2_5_vl-7b-bnb-nf4]"]
    assert small
    assert not [line for line in small if "7b" in line]


ORDERED = """
import pytest
pytestmark = [pytest.mark.gpu, pytest.mark.full_size]

@pytest.mark.parametrize("regime", "ab")
def test_large(target, regime): "Is large."

def test_step(target): "Is a step."

def test_senses(target, modality): "Has senses."
"""


def test_order_of_what_needs_a_gpu(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a GPU runs file by file, and in each target by target: whatever a target started is started once."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(test_other=ORDERED, seen="import torch\ntorch.cuda.device_count = lambda: 1")
    run = collected(pytester, "-p", "seen", "--collect-only", "-q", "--family", "qwen2_5_vl", source=ORDERED)
    lines = [line for line in run.stdout.lines if "::" in line]
    places = [(line.partition("::")[0], "nf4" in line) for line in lines]
    assert len(places) == 2 * 2 * 6
    assert places == sorted(
        places, key=lambda place: (list(dict.fromkeys(f for f, _ in places)).index(place[0]), place[1])
    )


@pytest.mark.usefixtures("elsewhere")
def test_without_a_gpu(pytester: pytest.Pytester) -> None:
    """Without a GPU a plain run leaves out what needs one, and says in one line how to run it."""
    run = collected(pytester, "--collect-only", "-q", "--family", "qwen2_5_vl", "--quantizer", "rtn")
    assert "test_small[" in run.stdout.str()
    assert "test_large[" not in run.stdout.str()
    run = collected(pytester, "--family", "qwen2_5_vl", "--quantizer", "rtn", "-k", "large")
    (line,) = [line for line in run.stdout.lines if "that need a GPU left out" in line]
    assert "run them with -m gpu" in line
    assert run.ret == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("expression", ["gpu and full_size", "full_size", "gpu and not speech"])
def test_gpu_asked_for_without_gpu(expression: str, pytester: pytest.Pytester) -> None:
    """Asking for GPU tests alone, in whatever words, is an error of one line where there is no GPU."""
    run = collected(pytester, "-m", expression)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in run.stderr.lines if line.strip()]
    assert "no usable GPU" in line


CARDS: dict[str, tuple[int | None, str]] = {
    "nobody": (0, "NVIDIA H200, 139.0 GiB, driver 580.1, used by nobody else"),
    "others": (3 << 30, "NVIDIA H200, 139.0 GiB, driver 580.1, OTHERS HOLD 3.0 GiB"),
    "hidden": (None, "NVIDIA H200, 139.0 GiB, driver 580.1, 5.0 GiB in use at the start"),
}


@pytest.mark.parametrize("case", CARDS)
def test_header_tells_of_others(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header and the report say what a card is and what others hold of it, or that this cannot be known."""
    from fixtures.meters import nvml

    others, said = CARDS[case]
    monkeypatch.setattr(gpus, "visible", lambda: ["0"])
    monkeypatch.setattr(nvml, "card", lambda index=0: nvml.Card("NVIDIA H200", "580.1", 139 << 30, 5 << 30))
    monkeypatch.setattr(nvml, "bytes_of_others", lambda own, index=0: others)
    config: Any = SimpleNamespace(stash=pytest.Stash())
    assert gpus.pytest_report_header(config) == [f"gpu 0: {said}"]
    assert config.stash[ABOUT] == {"gpus at start": {"gpu 0": said}}


class Tensor:
    """Stands for what a failed test's frames hold."""


def test_failed_test_gives_back() -> None:
    """What a failed test's frames held is free once the test is over, though pytest keeps its traceback."""
    held: list[weakref.ref[Tensor]] = []

    def fails() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise MemoryError

    try:
        fails()
    except MemoryError as error:
        sys.last_value, sys.last_traceback = error, error.__traceback__  # as pytest does
    gc.collect()
    assert held[0]() is not None
    gpus.release()
    gc.collect()
    assert held[0]() is None


OUT_OF_MEMORY = """
import gc
import weakref

import pytest

HELD = []

class Tensor:
    pass

@pytest.fixture
def batch():
    tensor = Tensor()
    HELD.append(weakref.ref(tensor))
    return tensor

@pytest.mark.gpu
def test_one(batch):
    "Fails for want of memory."
    more = Tensor()
    HELD.append(weakref.ref(more))
    raise MemoryError

@pytest.fixture
def model():
    gc.collect()
    return [held() for held in HELD]

@pytest.mark.gpu
def test_two(model):
    "Has all of it, from its setup on."
    assert model == [None, None]
"""


def test_next_test_has_its_memory(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU test that ran out of memory leaves nothing that the next one would miss."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest('pytest_plugins = ["fixtures.gpus"]')
    pytester.makepyfile(OUT_OF_MEMORY)
    run = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    run.assert_outcomes(passed=1, failed=1)


# -- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_asking_costs_no_memory() -> None:
    """Counting and measuring GPUs makes no CUDA context: NVML does not know the process that did."""
    code = (
        "import os; from fixtures import gpus; from fixtures.meters import nvml; "
        "assert gpus.has_gpu(); print(gpus.described(0)); assert os.getpid() not in nvml.by_process()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.gpu
def test_fragments_are_given_back() -> None:
    """After a test that ran out of GPU memory, torch's allocator holds nothing of it."""
    code = """
import sys, torch
from fixtures import gpus
torch.cuda.set_per_process_memory_fraction(0.1)  # the rest may be others'
def fails():
    blocks = []
    try:
        while True:
            blocks.append(torch.empty(1 << 30, dtype=torch.uint8, device="cuda"))
    finally:
        keep = blocks
try:
    fails()
except torch.OutOfMemoryError as error:
    sys.last_value = error
assert torch.cuda.memory_reserved() > 2 << 30
gpus.release()
assert torch.cuda.memory_reserved() == 0, torch.cuda.memory_reserved()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
