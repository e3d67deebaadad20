"""Schemes of rounding: the widths and groups that there are, their codes, and how they are called."""

from __future__ import annotations

import pytest

from fixtures.core.pseudo_quantize import Scheme


@pytest.mark.parametrize("bits", [-4, 0, 1, 5, 6, 7, 16, 32])
def test_no_such_bits(bits):
    """Only widths that exist are accepted."""
    with pytest.raises(ValueError, match=rf"^{bits} bits: must be one of 2, 3, 4, 8$"):
        Scheme(bits)


@pytest.mark.parametrize("group_size", [0, -2, -128])
def test_no_such_group(group_size):
    """Only positive group sizes, and -1 for the whole row, are accepted."""
    with pytest.raises(ValueError, match=rf"group size {group_size}: must be positive, or -1"):
        Scheme(4, group_size)


@pytest.mark.parametrize(
    ("bits", "zero_point", "lowest", "highest"),
    [
        (2, True, 0, 3),
        (3, True, 0, 7),
        (4, True, 0, 15),
        (8, True, 0, 255),
        (2, False, -1, 1),
        (3, False, -3, 3),
        (4, False, -7, 7),
        (8, False, -127, 127),
    ],
)
def test_codes_of_a_scheme(bits, zero_point, lowest, highest):
    """Codes run from 0 to 2^b - 1 around a zero point, or evenly around 0 without one."""
    scheme = Scheme(bits, 128, zero_point)

    assert (scheme.lowest, scheme.highest) == (lowest, highest)


def test_scheme_divides():
    """Only whole groups divide a row; the whole row always does."""
    assert Scheme(4, 128).divides(3584)
    assert not Scheme(4, 128).divides(3420)
    assert Scheme(4, -1).divides(3420)


def test_scheme_speaks():
    """A scheme says its bits, groups and symmetry."""
    assert str(Scheme(4, 128)) == "4-bit g128"
    assert str(Scheme(8, -1, zero_point=False)) == "8-bit per row symmetric"
