"""Two answers on a terminal: columns where it is wide, one after the other elsewhere; nothing commands the terminal."""

from __future__ import annotations

import io
import re

import pytest

from fixtures.engines import columns
from fixtures.engines.columns import OneByOne, SideBySide, cells, harmless, shown_on, wrapped


class Terminal(io.StringIO):
    """What is written to it is a terminal's."""

    def isatty(self) -> bool:
        """It is one."""
        return True

    def rows(self) -> list[str]:
        """What it shows: moves up, carriage returns and erased lines are carried out."""
        rows, row = [""], 0
        for command in re.split(r"(\x1b\[\d*[AK]|\r|\n)", self.getvalue()):
            if command == "\n":
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif up := re.fullmatch(r"\x1b\[(\d+)A", command):
                row -= int(up[1])
                assert row >= 0, "above the screen"
            elif command == "\x1b[K":
                rows[row] = ""
            elif command != "\r":
                rows[row] += command
        return rows


def drawn(left: str, right: str, height: int = 24) -> tuple[list[str], str]:
    """What a terminal shows of two texts said word by word, and all that was written to it."""
    terminal = Terminal()
    shown = SideBySide(terminal, io.StringIO(), ("one", "two"), 43, height)  # columns of 19 or 20 cells
    for text in (left, right):
        shown.begin()
        for piece in re.findall(r"\S+\s*|\s+", text):
            shown.say(piece)
        shown.end()
    return terminal.rows(), terminal.getvalue()


def test_side_by_side() -> None:
    """At the end both texts stand beside each other, whole, each within its column."""
    left, right = "one two three four five six seven", "eins zwei"
    rows, _ = drawn(left, right)
    pairs = [row.split(columns.BETWEEN) for row in rows if columns.BETWEEN in row]
    assert [a.strip() for a, _ in pairs] == ["one", "─" * 19, "one two three four", "five six seven"]
    assert [b.strip() for _, b in pairs] == ["two", "─" * 19, "eins zwei", ""]
    assert all(len(a) == 19 for a, _ in pairs)


def test_taller_than_the_screen() -> None:
    """Texts longer than the screen never move above it while they come, and are whole at the end."""
    left, right = " ".join(f"word{n}" for n in range(60)), " ".join(f"wort{n}" for n in range(70))
    rows, written = drawn(left, right, height=10)
    assert max(int(up) for up in re.findall(r"\x1b\[(\d+)A", written)) <= 8
    titles = max(number for number, row in enumerate(rows) if row.startswith("one "))
    whole = [row.split(columns.BETWEEN) for row in rows[titles + 2 :] if columns.BETWEEN in row]
    assert " ".join(a.strip() for a, _ in whole).split() == left.split()
    assert " ".join(b.strip() for _, b in whole).split() == right.split()


def test_notes_wait_for_the_drawing() -> None:
    """Notes on the same terminal come before the first drawing or behind the last, never between."""
    terminal = Terminal()
    shown = SideBySide(terminal, terminal, ("one", "two"), 43, 24)
    shown.note("early")
    shown.begin()
    shown.say("a")
    shown.note("late")
    shown.end()
    shown.begin()
    shown.say("b")
    shown.end()
    assert "late" not in terminal.getvalue()
    shown.close()
    assert (terminal.rows()[0], terminal.rows()[-2]) == ("early", "late")


@pytest.mark.parametrize(
    ("width", "kind", "titles", "expected"),
    [
        (120, Terminal, 2, SideBySide),
        (80, Terminal, 2, OneByOne),
        (120, io.StringIO, 2, OneByOne),
        (120, Terminal, 1, OneByOne),
    ],
)
def test_where_columns_fit(
    width: int, kind: type[io.StringIO], titles: int, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns are for two answers on a wide terminal; narrow ones, pipes and single answers have none."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    assert type(shown_on(kind(), io.StringIO(), ["a", "b"][:titles])) is expected


def test_one_by_one() -> None:
    """One after the other each answer has its title; a single one is nothing but its text."""
    for titles, expected in ((("a", "b"), "== a\nx y\n== b\nx y\n"), (("a",), "x y\n")):
        out = io.StringIO()
        shown = OneByOne(out, io.StringIO(), titles)
        for _ in titles:
            shown.begin()
            shown.say("x ")
            shown.say("y")
            shown.end()
        assert out.getvalue() == expected


def test_nothing_commands_the_terminal() -> None:
    """A model's escape sequences do not reach a terminal; a file gets the text as it is."""
    text = "a\x1b[2Jb\x07\r\nc\td"
    assert harmless(text, Terminal()) == "a\ufffd[2Jb\ufffd\ufffd\nc\td"
    assert harmless(text, io.StringIO()) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("ab", ["ab"]),
        ("ab cd ef", ["ab cd", "ef"]),
        ("abcdefgh", ["abcdef", "gh"]),
        ("a\nb", ["a", "b"]),
        ("漢字漢字", ["漢字漢", "字"]),
        ("e\u0301a e\u0301a", ["e\u0301a e\u0301a"]),
    ],
)
def test_wraps(text: str, expected: list[str]) -> None:
    """Lines break at blanks where there are any, and count cells, not characters."""
    assert wrapped(text, 6) == expected
    assert all(cells(line) <= 6 for line in expected)
