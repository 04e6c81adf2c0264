"""What programs say takes a bounded share of whoever hears it: answers in JSON, and numbers of system calls."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from conftest import PATIENCE

from nsjail_py import syscalls
from nsjail_py.unpack import MOST_JSON, MOST_LEVELS, check_json

QUOTED = '{"a": "[[[[' + '\\"[[' * 1000 + '\\\\", "b\\u005b": "' + "[,:{" * MOST_JSON + '"}'
NESTED = "[" * MOST_LEVELS + "]" * MOST_LEVELS


@pytest.mark.parametrize("text", [QUOTED, NESTED, "", '"', "]" * 1000 + "[", '{"a": [{}, {"b": [1.5, null]}]}'])
def test_brackets_and_commas_count_outside_of_text_alone(text: str) -> None:
    check_json(text.encode())


DEEP = {
    "arrays": "[" * (MOST_LEVELS + 1),
    "objects": '{"a":' * (MOST_LEVELS + 1),
    "behind closing brackets": "[[]]" * 100 + "[" * (MOST_LEVELS + 1),
    "behind text": '["\\\\", "\\"", "' + "[" * 10 + '",' + "[" * MOST_LEVELS,
}


@pytest.mark.parametrize("what", DEEP)
def test_json_that_is_nested_too_deep_is_told(what: str) -> None:
    with pytest.raises(ValueError, match="more than 200 levels"):
        check_json(DEEP[what].encode())


MANY = {"objects": "{},", "arrays": "[],", "numbers": "1,", "keys": '"":', "text": '"a"', "text that is none": '"\\"'}


@pytest.mark.parametrize("what", MANY)
def test_json_of_too_many_values_is_told(what: str) -> None:
    with pytest.raises(ValueError, match="more than 1048576 values"):
        check_json(("[" + MANY[what] * (1 + 2 * MOST_JSON)).encode())


def test_whatever_is_read_as_json_nests_no_deeper_than_was_counted() -> None:
    """Where one text begins and ends must be the same for both, or brackets hide in what only we take for text."""
    hidden = "[" * 250 + "]" * 250
    for escape in ("\\", "\\u", "\\u1", "\\u12", "\\u1234", "\\x", "\\\\", '\\"', "\n", "\\\n", "\0"):
        for between in ("", "x", ",", ": ", '"', '""', "\\"):
            text = f'{{"a": "{escape}"{between}"b", "c": {hidden}, "d": "{escape}"{between}"{hidden}"}}'.encode()
            try:
                check_json(text)
            except ValueError:
                continue
            with pytest.raises(msgspec.DecodeError):
                msgspec.json.decode(text)


SESSION = """
import sys, nsjail_py
sys.setrecursionlimit(10**8)
said = b'{"value": "x", "more": ' + b"[" * 1_000_000
session = object.__new__(nsjail_py.Session)
session._read = lambda size, deadline: said if size > 16 else len(said).to_bytes(8, "little") + bytes(8) if size else b""
try: session._receive(None)
except nsjail_py.SessionError as error: print(error)
"""


def test_an_answer_of_a_session_is_nested_as_deep_as_any_callers_stack_bears() -> None:
    done = subprocess.run([sys.executable, "-c", SESSION], capture_output=True, timeout=60 * PATIENCE)
    assert b"what it says makes no sense" in done.stdout, (done.returncode, done.stderr[-300:])


def test_names_of_calls_that_programs_choose_are_not_kept_for_ever() -> None:
    for number in range(10_000, 15_000):
        syscalls.name_of(number)
    assert syscalls.name_of.cache_info().currsize <= 1024
