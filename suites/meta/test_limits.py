"""Limits: the most specific bound wins, each beside its reason, and no check passes for want of one."""

from __future__ import annotations

import tomllib

import pytest

from fixtures.core.errors import UserError
from fixtures.core.limits import SHIPPED, Limits, load_limits

CASE = ("tiny", "awq", "image")  # weights, quantizer, modality
SHIPPED_LIMITS = [
    f"{suite}.{quantity}" for suite, quantities in tomllib.loads(SHIPPED.read_text()).items() for quantity in quantities
]


def limits_of(limit):
    """Limits with the single entry ``s.q``."""
    return Limits({"s": {"q": {"limit": limit, "why": "Because."}}})


@pytest.fixture
def file(tmp_path):
    """Write a user's limits."""

    def write(text, name="limits.toml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return write


# Which limit


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        pytest.param(1, 1, id="one for all"),
        pytest.param({"default": 1}, 1, id="default alone"),
        pytest.param({"default": 1, "tiny": 2}, 2, id="size before default"),
        pytest.param({"default": 1, "3B": 2}, 1, id="another size"),
        pytest.param({"default": {"awq": 1}, "tiny": 2}, 2, id="size before default's quantizer"),
        pytest.param({"default": 1, "tiny": {"default": 2, "awq": 3}}, 3, id="quantizer before default"),
        pytest.param({"default": 1, "tiny": {"default": 2, "rtn": 3}}, 2, id="the size's default before the default"),
        pytest.param({"default": 1, "tiny": {"rtn": 3}}, 1, id="back to the default"),
        pytest.param({"default": {"default": 1, "awq": 2}}, 2, id="quantizer under default"),
        pytest.param({"default": {"default": 1, "rtn": 2}}, 1, id="default under default"),
        pytest.param({"tiny": {"awq": {"default": 1, "image": 2}}}, 2, id="modality before default"),
        pytest.param({"tiny": {"awq": {"default": 1, "text": 2}}}, 1, id="another modality"),
        pytest.param({"tiny": {"awq": {"text": 1}, "default": 2}}, 2, id="back by one"),
        pytest.param({"tiny": {"awq": {"text": 1}}, "default": 2}, 2, id="back by two"),
        pytest.param({"tiny": {"awq": {"text": 1}}, "default": {"awq": {"image": 2}}}, 2, id="back and down again"),
        pytest.param({"tiny": {"default": {"image": 1}}, "default": {"awq": {"image": 2}}}, 1, id="size weighs most"),
        pytest.param({"tiny": {"awq": 0}, "default": 1}, 0, id="a limit of 0 is one"),
    ],
)
def test_resolution(limit, found):
    """The most specific entry wins, the first of size, quantizer and modality weighing most; default stands for any."""
    assert limits_of(limit)("s.q", *CASE) == found


def test_limit_is_a_float():
    """A limit is a float, also where the file says a whole number."""
    assert type(limits_of(6)("s.q")) is float


@pytest.mark.parametrize("name", ["s.other", "other.q", "s", "q", "", ".q", "s.", "s.q.limit"])
def test_no_such_limit(name):
    """A name without a limit is an error: a check without a bound must not pass."""
    with pytest.raises(UserError, match=rf"^limits\.toml has no limit for {name}$"):
        limits_of(1)(name, *CASE)


@pytest.mark.parametrize(
    "limit",
    [{"3B": 1}, {"tiny": {"rtn": 1}}, {"tiny": {"awq": {"text": 1}}}, {"tiny": {}}, {}, True, "1", None, [1]],
    ids=repr,
)
def test_no_limit_for_a_case(limit):
    """A case without a limit or a default is an error that names it, never another case's limit."""
    with pytest.raises(UserError, match=r"^limits\.toml has no limit for s\.q of tiny-awq-image, and no default$"):
        limits_of(limit)("s.q", *CASE)


def test_why():
    """A limit gives its justification."""
    assert limits_of(1).why("s.q") == "Because."


# Out of files


def test_override(file):
    """A user's file overrides what it names, where it names it, and leaves the rest as shipped."""
    first, *others = SHIPPED_LIMITS

    theirs = load_limits(file(f"[{first}]\nlimit = 0.0123\nwhy = 'Ours is coarse.'"))

    assert theirs(first, *CASE) == 0.0123
    assert theirs.why(first) == "Ours is coarse."
    shipped = load_limits()
    assert theirs.tables.keys() == shipped.tables.keys()
    for suite, _, quantity in (name.partition(".") for name in others):
        assert theirs.tables[suite][quantity] == shipped.tables[suite][quantity]


def test_override_of_a_case(file):
    """A user's entry for a case leaves the other cases their limits."""
    first = file("[parity.accuracy_drop]\nlimit = {default = 1, tiny = {awq = 2}}\nwhy = 'First.'", "first.toml")
    second = file("[parity.accuracy_drop]\nlimit = {tiny = {rtn = 3}}\nwhy = 'Second.'", "second.toml")

    limits = load_limits(first, second)

    found = [limits("parity.accuracy_drop", *case) for case in (("tiny", "rtn"), ("tiny", "awq"), ("3B", "awq"))]
    assert found == [3, 2, 1]
    assert limits.why("parity.accuracy_drop") == "Second."


def test_last_override_wins(file):
    """Of several files the last one wins."""
    files = [file(f"[parity.accuracy_drop]\nlimit = {n}\nwhy = 'Because {n}.'", f"{n}.toml") for n in (1, 2)]

    assert load_limits(*files)("parity.accuracy_drop") == 2
    assert load_limits(*reversed(files))("parity.accuracy_drop") == 1


def test_files_are_not_remembered(file):
    """A user's file changes nothing for the next reading of the shipped limits."""
    before = load_limits()
    load_limits(file(f"[{SHIPPED_LIMITS[0]}]\nlimit = {{tiny = 0.0123}}\nwhy = 'Ours is coarse.'"))

    assert load_limits() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[a.b]\nlimit = 1", r"\[a\.b\] needs a limit and a why", id="no why"),
        pytest.param("[a.b]\nlimit = 1\nwhy = ''", r"\[a\.b\] needs a limit and a why", id="empty why"),
        pytest.param('[a.b]\nlimit = 1\nwhy = " \\n\\t"', r"\[a\.b\] needs a limit and a why", id="blank why"),
        pytest.param("[roundtrip.clipped]\nwhy = ''", r"\[roundtrip\.clipped\] needs", id="shipped why emptied"),
        pytest.param("[a.b]\nwhy = 'Because.'", r"\[a\.b\] needs a limit and a why", id="no limit"),
        pytest.param("[a]\nb = 1", r"\[a\.b\] needs a limit and a why", id="no table"),
        pytest.param("[parity.top]\nlimit = 1\nwhy = 'x'", "did you mean 'parity.top1'", id="misspelt"),
        pytest.param("a = 1", "a is not a table of limits", id="no suite"),
        pytest.param("[a.b]\nlimit = inf\nwhy = 'x'", "not a finite number", id="infinite"),
        pytest.param("[a.b]\nlimit = nan\nwhy = 'x'", "not a finite number", id="NaN"),
        pytest.param("[a.b]\nlimit = true\nwhy = 'x'", "not a finite number", id="true"),
        pytest.param("[a.b]\nlimit = '1'\nwhy = 'x'", "not a finite number", id="text"),
        pytest.param("[a.b]\nlimit = {}\nwhy = 'x'", "not a finite number", id="no case"),
        pytest.param("[a.b]\nlimit = {default = inf}\nwhy = 'x'", "not a finite number", id="infinite by default"),
        pytest.param("[a.b]\nlimit = {tiny = {awq = [1]}}\nwhy = 'x'", "not a finite number", id="a list"),
        pytest.param("[a.b]\nlimit = ", "is not valid TOML", id="cut off"),
        pytest.param("[a.b]\nlimit = 1\n[a.b]\n", "is not valid TOML", id="twice"),
        pytest.param(b"\xff\xfe", "is not valid TOML", id="not UTF-8"),
        pytest.param("a = " + "[" * 100_000, "is not valid TOML", id="nested"),
    ],
)
def test_bad_file(file, text, said):
    """A file that is no TOML, or has a limit that is no bound or lacks a reason, is refused in one line."""
    with pytest.raises(UserError, match=said) as caught:
        load_limits(file(text))

    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_no_file(tmp_path, name):
    """A file that cannot be read is refused in one line that names it."""
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_limits(tmp_path / name)

    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# As shipped


def test_shipped():
    """The shipped limits load, and there are some."""
    assert load_limits().tables.keys() >= {"roundtrip", "parity"}
    assert SHIPPED_LIMITS


@pytest.mark.parametrize("name", SHIPPED_LIMITS)
def test_shipped_why(name):
    """Every shipped limit says why it is what it is; none is a placeholder."""
    why = load_limits().why(name)

    assert len(why.split()) > 3
    assert "placeholder" not in why.lower()
