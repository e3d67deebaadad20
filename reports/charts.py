"""Scripts and charts of a page: the library inlined once, figures as data, nothing fetched and nothing evaluated."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markupsafe import Markup

PLOTLY = Path(__file__).parent / "vendor" / "plotly-4.1.1.min.js"


@dataclass(frozen=True)
class Script:
    """A script as it stands in a page."""

    source: Markup  # ours, never from outside: it is not escaped

    @property
    def hash(self) -> str:
        """What the page's Content-Security-Policy names it by, so that no other script runs."""
        return f"sha256-{base64.b64encode(hashlib.sha256(self.source.encode()).digest()).decode()}"


@cache
def script(file: Path) -> Script:
    """A file as a script.

    Raises:
        ValueError: when it holds what would end the script early within a page.
    """
    source = file.read_text(encoding="utf-8")
    if any(end in source.lower() for end in ("</script", "<!--")):
        raise ValueError(f"{file.name} cannot be inlined: it holds the end of a script or a comment's start")
    return Script(Markup(source))


def scripts(*files: Path) -> tuple[Script, ...]:
    """``files`` as a page's scripts, in this order; hand them to its template as ``scripts``.

    ``head.html`` names their hashes in the page's Content-Security-Policy, ``scripts.html`` inlines them; it belongs at
    the end of the body. With ``PLOTLY`` among them ``Plotly`` is there for those after it.
    """
    return tuple(map(script, files))


def embedded(data: object) -> Markup:
    """``data`` as JSON that may stand in a ``<script type="application/json">``: no text in it can end the script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(escaped)
