"""Tests that need a GPU: which are asked for, about which targets, in which order; and what is said without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures import gpus
from fixtures.chosen import FULL_SIZE_QUANTIZERS, Selection, select
from fixtures.core.errors import UserError
from fixtures.core.targets import Target

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


# What they are about


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


# In a run


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
