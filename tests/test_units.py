"""Sizes and times: what people write is read, what cannot be meant is refused with a reason, and what we print can be read again."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsjail_py.units import MAX_SIZE, MAX_TIME, format_size, format_time, parse_size, parse_time


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("64M", 64 << 20),
        ("64MiB", 64 << 20),
        ("64k", 64 << 10),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("10", 10),
        ("10B", 10),
        (5, 5),
        ("1 K", 1024),
    ],
)
def test_sizes_are_powers_of_1024(written, size):
    assert parse_size(written) == size


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("500ms", 0.5), ("1.5", 1.5), ("2m", 120), ("1h", 3600), ("1d", 86400), ("10s", 10), (0.25, 0.25), (3, 3.0), ("100ms", 0.1)],
)
def test_times_are_seconds(written, seconds):
    assert parse_time(written) == seconds


@pytest.mark.parametrize(
    "written",
    ["", " ", "-1", "nan", "inf", "1e3", "0x10", "1_0", "64MB", "5X", "5 M B", "5\n", "\u0663", "9" * 40, "8388608T", "1.5", -1, 0.5,
     math.nan,     math.inf, pytest.param(10**5000, id="huge"), True, None, [1], b"1"],
)  # fmt: skip
def test_what_is_no_size_is_refused_in_one_line(written):
    with pytest.raises(ValueError, match=r"^size ") as caught:
        parse_size(written)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "written",
    ["", "-1s", "nan", "inf", "1e3", "11y", "4000d", "5M", -1, -0.1, math.nan, math.inf, pytest.param(10**5000, id="huge"), True, None],
)
def test_what_is_no_time_is_refused_in_one_line(written):
    with pytest.raises(ValueError, match=r"^time "):
        parse_time(written)


def test_an_ambiguous_unit_gets_a_hint():
    with pytest.raises(ValueError, match="write M or MiB"):
        parse_size("64MB")


@given(st.integers(0, MAX_SIZE))
def test_printed_sizes_are_read_back_exactly(size):
    assert parse_size(format_size(size)) == size


@given(st.floats(0.001, MAX_TIME))
def test_printed_times_are_read_back(seconds):
    assert parse_time(format_time(seconds)) == pytest.approx(seconds, rel=1e-9)


@given(st.text(max_size=12))
def test_no_text_does_worse_than_a_value_error(text):
    for parse in (parse_size, parse_time):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0
