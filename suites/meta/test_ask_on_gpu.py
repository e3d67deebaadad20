"""Asking by hand on a GPU: every engine answers, and says what it takes of the card."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from fixtures.core.checkpoint import Checkpoint
from fixtures.engines.__main__ import main
from fixtures.options import Selection
from fixtures.quantizers import recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects.samples import draw

pytestmark = pytest.mark.gpu


@pytest.fixture
def question(tmp_path: Path) -> list[str]:
    """A picture and what is asked of it, as arguments."""
    (sample,) = draw("image", "evaluation", 1)
    sample.content[0]["image"].save(tmp_path / "a.png")
    return ["--image", str(tmp_path / "a.png"), sample.content[1]["text"]]


def test_compares_on_a_gpu(
    tiny_reference: Checkpoint, good_artifact: Path, question: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference and AWQ artifact answer on the GPU one after the other, each with the card's memory."""
    arguments = ["ask", "--model", str(tiny_reference.path), "--compare", str(good_artifact), "--device", "cuda"]
    assert main([*arguments, *question]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"[a-z]+\d [a-z]+\d", out)
    assert err.count("transformers on cuda in") == 2
    assert err.count("allocator's peak") == 2
    assert out.splitlines()[-1].startswith(("the same, all", "first different at token"))


def test_bitsandbytes_on_a_gpu(
    tiny_reference: Checkpoint, selection: Selection, question: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A bitsandbytes artifact answers by its library's kernels on the GPU."""
    pytest.importorskip("bitsandbytes", reason='bitsandbytes is absent: pip install "quantproof[bnb]"')
    folder = cached_artifact(tiny_reference, recipe_for("bnb-nf4", None), [], selection.cache)
    assert main(["ask", "--model", str(folder), "--device", "cuda", *question]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "Linear4bit" in err


def test_vllm_answers(good_artifact: Path, question: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The server of vLLM answers the same question, token by token, and says what it takes."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install 'quantproof[vllm]'")
    assert main(["ask", "--model", str(good_artifact), "--engine", "vllm", *question]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"[a-z]+\d [a-z]+\d", out)
    assert re.search(r"\d+ tokens of prompt, \d+ of answer, [\d.e+]+ tokens/s, first token after", err)
    assert "tokens of KV cache" in err
