"""A good artifact to damage, and a way to hear what a check says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.audit.coverage import changed_tensors, linear_states
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import audit_linears
from fixtures.checkpoints import read_scales, read_search
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.targets import Target
from fixtures.options import Selection
from fixtures.quantizers import calibration, recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.verifying import Verify
from suites.meta.answering import listener
from suites.meta.bnb_audit import made_once
from suites.meta.browsing import WIDE, started

SUBJECT = "qwen2_5_vl-tiny"
TARGET = Target("qwen2_5_vl", "tiny", "awq")


@pytest.fixture(scope="session")
def tiny_reference() -> Checkpoint:
    """The shipped reference."""
    return Checkpoint(shipped(SUBJECT))


@pytest.fixture(scope="session")
def good_artifact(tiny_reference: Checkpoint, selection: Selection) -> Path:
    """A good artifact of the shipped reference, by our AWQ; never to be changed, only copied."""
    samples = calibration.built_in(ADAPTERS["qwen2_5_vl"])
    recipe = recipe_for("awq", None, calibration=calibration.digest(samples))
    return cached_artifact(tiny_reference, recipe, samples, selection.cache)


@pytest.fixture(scope="session")
def bnb_artifacts(tiny_reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An artifact of the shipped reference by bitsandbytes' kind, made once; never to be changed, only copied."""
    return partial(made_once, tiny_reference, tmp_path_factory.mktemp("bnb"))


@pytest.fixture(scope="session")
def audit(tiny_reference: Checkpoint, selection: Selection) -> Callable[..., Verify]:
    """Run one check of the suites on an artifact folder, and return what it said."""

    def run(
        check: Callable[..., None], folder: Path, target: Target = TARGET, reference: Checkpoint = tiny_reference
    ) -> Verify:
        artifact = Checkpoint(folder)
        pair = Pair(reference, artifact)
        available: dict[str, Callable[[], Any]] = {
            "pair": lambda: pair,
            "linears": lambda: linear_states(pair),
            "tensor_changes": lambda: list(changed_tensors(pair)),
            "linear_errors": lambda: list(audit_linears(pair)),
            "recorded_scales": lambda: read_scales(artifact),
            "search_record": lambda: read_search(artifact),
            "limits": lambda: selection.limits,
            "selection": lambda: selection,
            "target": lambda: target,
        }
        verify = listener()
        wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
        check(**{name: verify if name == "verify" else available[name]() for name in wanted})
        return verify

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for the tests of a module; longer, its event loop would be in the way of others' tests."""
    with started() as browser:
        yield browser


@pytest.fixture
def browse(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page, without a network; whatever it says in the console fails the test."""
    said: list[str] = []
    contexts = []

    def opened(html: str, viewport: Any = WIDE, scheme: str = "light", fragment: str = "", **options: Any) -> Any:
        (tmp_path / "index.html").write_text(html, encoding="utf-8")
        context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(f"{(tmp_path / 'index.html').as_uri()}{fragment}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
