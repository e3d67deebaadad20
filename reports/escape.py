"""Strings from outside as they can stand in a terminal, in Markdown or in XML and are read as text, nothing else."""

from __future__ import annotations

import html
import re

# What XML 1.0 forbids, what drives a terminal (C0, C1), and what turns the reading direction of the text around it.
_UNPRINTABLE = re.compile(
    r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
# What GitHub's Markdown reads within a line, addresses and formulas too.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~#$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def printable(text: str) -> str:
    r"""``text`` with every character that is no text written out: ``\x1b``, ``\ud800``."""
    return _UNPRINTABLE.sub(lambda found: _written(ord(found[0])), text.replace("\r\n", "\n"))


def inline(text: object, characters: int = 300) -> str:
    """``text`` as one line of printable characters, cut where it is longer than ``characters``."""
    line = " ".join(printable(str(text)).split())
    return line if len(line) <= characters else f"{line[: characters - 3]}..."


def markdown(text: object, characters: int = 300) -> str:
    """``text`` as one line of Markdown that shows it as it is, in a table too.

    Characters that Markdown reads are written as references, which it never reads as markup; an underscore within a
    word is none of them, so that names stay legible in the source.
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", inline(text, characters))


def summary(text: object, characters: int = 300) -> str:
    """``text`` as one line of HTML within Markdown, where Markdown itself reads nothing."""
    return html.escape(inline(text, characters))


def preformatted(text: str) -> str:
    """``text`` with its lines as they are, as a block of HTML within Markdown."""
    return f"<pre>{html.escape(printable(text))}</pre>"


def _written(point: int) -> str:
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}"
