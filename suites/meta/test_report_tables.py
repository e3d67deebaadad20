"""The README's tables are those of the measured run that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.core.errors import UserError
from fixtures.core.results import Result, Run, Table
from reports import store
from reports.__main__ import main
from reports.tables import filled, markdown, merged, narrowed

ROOT = Path(__file__).parents[2]


def run(*tables: Table, quantizer: str = "awq") -> Run:
    target = {"family": "f", "size": "tiny", "quantizer": quantizer}
    return Run({}, [Result("t.py::test", "passed", "", target, tables=tables)])


MEMORY = Table("memory", ("what", "bytes"), (("a|b", 1234567.0), ("c", None)))


def test_merged_over_targets() -> None:
    """A table holds the rows of every target, each once, under the target's name."""
    both = Run({}, [*run(MEMORY, MEMORY).results, *run(MEMORY, quantizer="rtn").results])
    assert merged(both, "memory").rows == (
        ("f-tiny-awq", "a|b", 1234567.0),
        ("f-tiny-awq", "c", None),
        ("f-tiny-rtn", "a|b", 1234567.0),
        ("f-tiny-rtn", "c", None),
    )


def test_markdown() -> None:
    """A table reads as Markdown, its bars escaped and what was not measured left empty."""
    assert markdown(MEMORY) == "| what | bytes |\n| --- | --- |\n| a\\|b | 1234567 |\n| c |  |\n"


def test_cells() -> None:
    """Large numbers are whole, small ones have four digits, and a cached artifact's digest is left out."""
    cells = Table("t", ("a", "b", "c", "d"), ((14313.126, 0.8842684, 3.0, "vl-3b-rtn-4307c4c59df412d7"),))
    assert markdown(cells).splitlines()[-1] == "| 14313 | 0.8843 | 3 | vl-3b-rtn |"


def test_narrowed() -> None:
    """Of the columns those that are named are shown, in that order, and rows that are then equal once."""
    table = Table("t", ("a", "b", "c"), ((1, 2, 3), (1, 5, 3)))
    assert narrowed(table, ["c", "a"]).rows == ((3, 1),)


def test_filled_again_changes_nothing(tmp_path: Path) -> None:
    """A README is filled in from the run it names, and filling it in again leaves it as it is."""
    store.save(run(MEMORY), tmp_path / "run.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: run.json: memory -->\nold\n<!-- end of table -->\nafter\n")
    assert main(["readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "1234567" in text
    assert "old" not in text
    assert filled(text, tmp_path) == text


def test_several_runs_in_one_table(tmp_path: Path) -> None:
    """Rows of runs that are joined by a plus stand under each other, in that order; one that is not there is named."""
    other = Table("memory", MEMORY.columns, (("nf4", 7),))
    store.save(run(MEMORY), tmp_path / "a.json")
    store.save(run(other, quantizer="bnb-nf4"), tmp_path / "b.json")
    text = filled("<!-- table: a.json + b.json: memory: target | bytes -->\n<!-- end of table -->", tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| f-tiny")]
    assert rows == ["| f-tiny-awq | 1234567 |", "| f-tiny-awq |  |", "| f-tiny-bnb-nf4 | 7 |"]
    with pytest.raises(UserError, match=r"cannot read.*gone"):
        filled("<!-- table: a.json + gone.json: memory -->\n<!-- end of table -->", tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<!-- table: run.json: speed -->\n<!-- end of table -->", "no table 'speed'; it has memory"),
        (
            "<!-- table: run.json: memory: size -->\n<!-- end of table -->",
            "no column 'size'; it has target, what, bytes",
        ),
        ("<!-- table: none.json: memory -->\n<!-- end of table -->", "cannot read"),
        ("<!-- table: run.json: memory -->\n", "has no <!-- end of table -->"),
    ],
    ids=["no-table", "no-column", "no-run", "no-end"],
)
def test_what_cannot_be_filled_in(text: str, complaint: str, tmp_path: Path) -> None:
    """A table that does not exist is an error of one line, and the README stays as it was."""
    store.save(run(MEMORY), tmp_path / "run.json")
    with pytest.raises(UserError, match=complaint):
        filled(text, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert main(["readme", str(readme)]) == 2
    assert readme.read_text() == text


def test_columns_that_differ() -> None:
    """Tables of one title with different columns are not put under each other."""
    with pytest.raises(UserError, match="different columns"):
        merged(run(MEMORY, Table("memory", ("what",), ())), "memory")


def test_readme_says_what_was_measured() -> None:
    """The tables in the README are those of the measured runs kept in the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(text, ROOT) == text, "run: python -m reports readme README.md"
