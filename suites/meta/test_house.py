"""The house's rules: what may import what, and that every test says what it requires."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKENDS = {"vllm", "awq", "bitsandbytes", "gptqmodel", "llmcompressor", "compressed_tensors"}
MODULES = sorted(
    file
    for folder in ("fixtures", "reports", "suites")
    for file in (ROOT / folder).rglob("*.py")
    if file.name[0] != "."
)
TESTS = [
    (file, node)
    for file in MODULES
    if file.name.startswith("test_")
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


def imported(file: Path, *, anywhere: bool) -> Iterator[str]:
    """Modules that a file imports, at its top level or anywhere."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def within(folder: str) -> list[Path]:
    """Modules under a folder of the project."""
    return [file for file in MODULES if (ROOT / folder) in file.parents]


def test_every_test_states_its_requirement() -> None:
    """Every test has a docstring that starts with a sentence."""
    silent = [f"{file.name}::{node.name}" for file, node in TESTS if not (ast.get_docstring(node) or "").strip()]
    halting = [
        f"{file.name}::{node.name}"
        for file, node in TESTS
        if (doc := ast.get_docstring(node)) and not doc.split("\n\n")[0].rstrip().endswith((".", "?", "!"))
    ]
    assert len(TESTS) > 100
    assert (silent, halting) == ([], [])


def test_every_check_verifies() -> None:
    """Every check of the suites speaks through ``verify``."""
    checks = [(file, node) for file, node in TESTS if file.parent == ROOT / "suites"]
    mute = [f"{file.name}::{node.name}" for file, node in checks if "verify" not in [a.arg for a in node.args.args]]
    assert checks
    assert mute == []


def test_core_never_imports_pytest() -> None:
    """fixtures.core is values and pure functions: no pytest, and nothing of the house but itself."""
    for file in within("fixtures/core"):
        names = set(imported(file, anywhere=True))
        assert not {name for name in names if name.split(".")[0] in {"pytest", "_pytest", "suites", "reports"}}
        assert not {name for name in names if name.startswith("fixtures.") and not name.startswith("fixtures.core")}


def test_reports_import_only_values() -> None:
    """Reports knows nothing of the house but core's value objects."""
    for file in within("reports"):
        names = {name for name in imported(file, anywhere=True) if name.split(".")[0] in {"fixtures", "suites"}}
        assert all(name.startswith("fixtures.core") for name in names), file


def test_fixtures_never_import_suites() -> None:
    """Dependencies point one way: suites to fixtures, never back."""
    for file in within("fixtures"):
        assert not [name for name in imported(file, anywhere=True) if name.split(".")[0] == "suites"], file


@pytest.mark.parametrize("folder", ["fixtures", "reports", "suites"])
def test_backends_are_imported_lazily(folder: str) -> None:
    """No module but the oracle's own tests needs vLLM, AutoAWQ, bitsandbytes or GPTQModel to be imported."""
    files = [file for file in within(folder) if file.name != "test_peer_autoawq.py"]  # skipped where there is none
    assert files
    for file in files:
        assert not [name for name in imported(file, anywhere=False) if name.split(".")[0] in BACKENDS], file


def test_no_module_is_named_after_a_library() -> None:
    """A module called like a library would shadow it when run as a script."""
    assert not [file for file in MODULES if file.stem in BACKENDS | {"torch", "transformers", "pytest", "safetensors"}]
