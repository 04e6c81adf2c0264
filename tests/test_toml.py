"""What is written as TOML means what it was made from, in one line that can be printed."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsjail_py import toml
from nsjail_py.errors import PolicyError


@given(st.text())
def test_a_string_is_read_as_it_was(text: str) -> None:
    for value in (text, f'\N{GRINNING FACE}{text}\x1b\x7f\x85\u2028"\\'):
        written = toml.string(value)
        assert tomllib.loads(f"a = {written}") == {"a": value}
        assert written.isprintable()


def test_what_is_not_unicode_is_refused() -> None:
    with pytest.raises(PolicyError, match="not valid Unicode"):
        toml.string("\udcff")


@given(st.text())
def test_a_comment_ends_with_its_line(text: str) -> None:
    said = toml.comment(text)
    assert tomllib.loads(f"a = 1 # {said}\n") == {"a": 1}
    assert said.isprintable() and len(said) <= 1000
