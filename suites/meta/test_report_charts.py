"""Charts: a library that is what it claims to be, figures that say their finding, strings that stay text."""

from __future__ import annotations

import hashlib
import json

import pytest

from reports.charts import PLOTLY, embedded, script

DIGEST = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"


def test_the_library_is_the_published_one():
    """The vendored Plotly is, byte by byte, the file of the npm package that vendor/README.md names."""
    assert hashlib.sha256(PLOTLY.read_bytes()).hexdigest() == DIGEST
    assert (PLOTLY.parent / "plotly-LICENSE.txt").read_text().startswith("MIT License")


@pytest.mark.parametrize("end", ["</script>", "</SCRIPT >", "<!--"])
def test_scripts_that_would_end_early_are_refused(tmp_path, end):
    """A script that holds its own end is never inlined."""
    (tmp_path / "a.js").write_text(f"const a = '{end}';")
    with pytest.raises(ValueError, match=r"a\.js cannot be inlined"):
        script(tmp_path / "a.js")


def test_embedded_data_stay_data():
    """No text in embedded data can end the element that holds them, and every text is read back as it was."""
    data = {"</script><script>alert(1)</script>": ["<!--", "&lt;", "\u2028", 1.5, None]}
    text = str(embedded(data))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == data
