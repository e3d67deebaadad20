"""What changed between two runs, as ``diff`` prints it: the same in every format, safe to read, soon there."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Result, Run
from reports import changes, store
from reports.__main__ import main
from reports.compare import Comparison
from suites.meta.compared_runs import BAD, GOOD, compared, result, valued
from suites.meta.pages import Page

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script> | `tick` ]]> \x00\x1b[31m\ud800\u202e\n\n# x\n|a|"
FORMATS = {"text": changes.text, "markdown": changes.markdown, "html": changes.page}


# The formats


def evil() -> Comparison:
    """Two runs that differ in everything, with markup and control characters in every string."""
    measured = Measurement(EVIL, 3.0, EVIL, Bound("at_most", 4.0), EVIL)
    more: dict[str, Any] = {"modality": EVIL, "requirement": EVIL, "quantizer": EVIL}
    moved = replace(measured, value=5.0), replace(measured, bound=Bound("at_most", 2.0))
    before = [result("passed", measured, name=f"{i}{EVIL}", message=EVIL, **more) for i in range(3)]
    after = [result("failed", m, name=f"{i}{EVIL}", message=EVIL, **more) for i, m in enumerate(moved)]
    lone = [Result(f"{EVIL}::own", "failed", EVIL, message=EVIL)]
    old, new = ({"started": EVIL, "exit_status": EVIL, "machine": {EVIL: f"{i}{EVIL}"}} for i in range(2))
    return Comparison(Run(old, before), Run(new, after + lone))


@pytest.mark.parametrize("name", FORMATS)
def test_formats_say_the_same(name: str) -> None:
    """Each format has every kind of change, and lets neither control characters nor a script through."""
    found = evil()
    text = FORMATS[name](found)
    assert len(changes.sections(found)) == 7
    assert all(table.title.split(" %")[0] in text for table in changes.sections(found))
    assert not [c for c in text if c != "\n" and not c.isprintable() and c != "\u202f"]
    if name != "text":
        assert "<script" not in text


def test_markdown_is_one_of_markdown() -> None:
    """A parser of Markdown finds every cell, and no markup that is not ours."""
    parser = pytest.importorskip("markdown_it", reason="no markdown-it-py: pip install markdown-it-py")
    found = evil()
    tokens = parser.MarkdownIt("commonmark").enable("table").parse(changes.markdown(found))
    assert [t.type for t in tokens].count("td_open") == sum(
        len(t.columns) * len(t.rows) for t in changes.sections(found)
    )
    inner = {child.type for token in tokens for child in token.children or ()}
    assert inner <= {"text", "text_special"}


def test_page() -> None:
    """The page is self-contained, has no script, and allows none."""
    html = changes.page(evil())
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert "script" not in page.tags and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name == "src" or name.startswith("on")]
    assert [value for name, value in page.attributes if name == "href"] == ["data:,"]
    assert "default-src 'none'" in html and "script-src" not in html and "url(" not in html


@pytest.mark.parametrize("name", FORMATS)
def test_thousand_results(name: str) -> None:
    """Two runs of a thousand results that differ everywhere make little text in little time."""
    before = [result("passed", GOOD, name=f"test_{i}") for i in range(1000)]
    after = [result("failed", BAD, name=f"test_{i}", message="E   assert\n" * 1000) for i in range(1000)]
    begun = time.process_time()
    text = FORMATS[name](compared(before, after))
    assert time.process_time() - begun < 5
    assert len(text) < 1_000_000
    assert "test_0" in text


# The command


@pytest.mark.parametrize("name", FORMATS)
def test_command_line(name: str, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """``diff`` prints, or writes where it is told; that something changed is no error."""
    a, b, out = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "sub" / "out"
    store.save(Run({}, [result("passed", GOOD)]), a)
    store.save(Run({}, [result("failed", BAD)]), b)
    arguments = ["diff", str(a), str(b), "--format", name]

    assert main(arguments) == 0
    printed = capsysbinary.readouterr().out.decode()
    assert main([*arguments, "-o", str(out)]) == 0

    assert printed == out.read_text(encoding="utf-8")
    assert "newly failing" in printed


def test_above(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """``--above`` is in percent."""
    for name, value in (("a", 0.0100), ("b", 0.0104)):
        store.save(Run({}, [result("passed", valued(value))]), tmp_path / name)
    for above, expected in (("3", b"1 number changed"), ("3%", b"1 number changed"), ("5", b"nothing changed")):
        assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--above", above]) == 0
        assert capsysbinary.readouterr().out.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a.json", "missing.json"], "cannot read missing.json"),
        (["bad.json", "a.json"], "bad.json is not JSON"),
        (["a.json", "a.json", "--above", "much"], "--above much is no percentage"),
        (["a.json", "a.json", "--above", "-1"], "--above -1 is no percentage"),
        (["a.json", "a.json", "--above", "nan"], "--above nan is no percentage"),
        (["a.json", "a.json", "-o", "a.json"], "is the results.json itself"),
    ],
)
def test_bad_input(arguments, reason, tmp_path, monkeypatch, capsys) -> None:
    """What cannot be compared is refused in one line, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    store.save(Run({}), Path("a.json"))
    Path("bad.json").write_text("{")
    assert main(["diff", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reports: ") and error.count("\n") == 1 and reason in error


def test_reader_has_read_enough(tmp_path: Path) -> None:
    """A reader such as ``head`` that closes the pipe early ends the printing without a traceback."""
    results = [result("failed", BAD, name=f"test_{i}", message="m" * 100) for i in range(3000)]
    store.save(Run({}, results), tmp_path / "b")
    store.save(Run({}, [replace(r, outcome="passed", measurements=(GOOD,)) for r in results]), tmp_path / "a")
    command = [sys.executable, "-m", "reports", "diff", str(tmp_path / "a"), str(tmp_path / "b")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as printing:
        assert printing.stdout and printing.stderr
        printing.stdout.close()
        assert printing.stderr.read() == b""
    assert printing.returncode == 0
