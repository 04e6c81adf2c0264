"""The restricted tier computes what it is for, refuses what leads out of it, and is in a jail all the same."""

from __future__ import annotations

import pytest

import nsjail_py
from nsjail_py.layers import guards
from nsjail_py.layers.restricted import evaluate, execute, render

PROGRAM = """
import json
from collections import Counter
class Account:
    def __init__(self, start):
        self.amount = start
    def add(self, more):
        self.amount = self.amount + more
        return self
account = Account(3).add(4)
table = {"a": 1}
table["b"] = [x * 2 for x in range(3)]
total = 0
for name, value in sorted(Counter("abca").items()):
    total += value
try:
    1 / 0
except ZeroDivisionError as error:
    print(error, total)
result = [account.amount, json.dumps(table), math.floor(2.5)]
"""


def test_expressions_templates_and_programs() -> None:
    assert evaluate("price * (1 + vat)", {"price": 10, "vat": 0.5}).value == 15
    assert render("Dear {{ user.name.upper() }}: {{ len(l) }}", {"user": {"name": "a"}, "l": [1]}).value == "Dear A: 1"
    answer = execute(PROGRAM, modules=["json", "collections", "math"])
    assert (answer.value, answer.printed, answer.ok) == ([7, '{"a": 1, "b": [0, 2, 4]}', 2], "division by zero 4\n", True), answer.error


@pytest.mark.parametrize(
    "expression",
    [
        "().__class__",
        "getattr((), '__class__')",
        "getattr(math, '_names')",
        "'{0.real}'.format(1)",
        "'{x.real}'.format_map({'x': 1})",
        "str.format('{0}', 1)",
        "getattr(str, 'format')",
        "(x for x in ()).gi_frame",
        "getattr((x for x in ()), 'gi_frame')",
        "getattr(lambda: 1, '__globals__')",
        "math.sqrt.__self__",
        "getattr(json.JSONDecodeError, 'mro')",
        "json.codecs",
        "operator.attrgetter",
        "random._os",
        "eval('1')",
        "open('/etc/passwd')",
        "__import__('os')",
        "[x for x in (1).__class__.__mro__]",
        "vars()",
        "id(1)",
        "type(1)",
        "datetime.sys",
        "re.enum",
        "str.mro()",
        "list[int].mro",
        "datetime.date.mro()",
        "json.dumps.x",
    ],
)
def test_what_leads_out_is_refused(expression: str) -> None:
    """In this process: what a guard refuses, it must refuse without the jail's help."""
    job = {"kind": "expression", "source": expression, "names": {}, "modules": list(guards.FACADES)}
    answer = guards.run(job)
    assert answer["error"], answer


@pytest.mark.parametrize(
    "source",
    [
        "math.sqrt = 1",
        "str.join = 1",
        "json['x'] = 1",
        "import os",
        "from random import _os",
        "class A:\n    def __getattr__(self, n): pass",
        "from math import *",
        "try: 1/0\nexcept ZeroDivisionError as e: e.__traceback__",
        "try: 1/0\nexcept ZeroDivisionError as e: getattr(e, 'with_traceback')",
        "print(1, file=x)",
        "class S(str): pass\nS('{0.real}').format(1)",
        "class E(Exception): pass\ntry:\n    raise E\nexcept E as e:\n    getattr(e, 'with_traceback')",
        "class A(metaclass=x): pass",
        "match x:\n    case object(real=r): pass",
        "def f():\n    yield 1\ng = f()\ngetattr(g, 'send')",
        "class A: pass\nA.x.y = 1",
        "json.loads.x = 1",
        "import json.decoder",
        "async def f(): pass",
    ],
)
def test_programs_that_reach_out_are_refused(source: str) -> None:
    assert guards.run({"kind": "program", "source": source, "names": {"x": 1}, "modules": list(guards.FACADES)})["error"]


@pytest.mark.parametrize("name", guards.FACADES)
def test_a_facade_gives_no_module_and_nothing_that_takes_names(name: str) -> None:
    import types

    facade = guards.facade(name)
    given = {word: getattr(facade, word) for word in dir(facade)}
    assert len(given) >= len(guards.FACADES[name].split()) - 1  # a new function that an old Python lacks
    assert [word for word, thing in given.items() if word.startswith("_") or isinstance(thing, types.ModuleType)] == []


def test_it_runs_in_a_jail_whose_limits_hold() -> None:
    answer = evaluate("sum(range(10 ** 12))", cpu_time=0.3)
    assert answer.result.verdict is nsjail_py.Verdict.cpu_time and "processor time" in answer.error and not answer.ok


def test_errors_are_told_with_their_type() -> None:
    assert evaluate("1 / 0").error == "ZeroDivisionError: division by zero"
    assert evaluate("1 +").error.startswith("SyntaxError: ")


def test_an_unknown_module_is_told() -> None:
    with pytest.raises(nsjail_py.PolicyError, match="no facade of 'os'"):
        evaluate("1", modules=["os"])


def test_wrapped_builtins_say_what_they_refuse() -> None:
    assert "not below" in execute("open('/etc/passwd')", wrapped=True).error
    assert "import of 'os' is not allowed" in execute("import os", wrapped=True).error
    assert "NameError" in execute("eval('1')", wrapped=True).error
    assert execute("open('/work/a', 'w').write('x')\nresult = open('/work/a').read()", wrapped=True).value == "x"


def test_wrapped_builtins_are_no_boundary_and_the_jail_is() -> None:
    """What docs/layers.md admits."""
    escape = "c = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]\n"
    answer = execute(escape + "c.__init__.__globals__['system']('true')", wrapped=True)
    assert answer.result.denied, answer


OWN_ANSWERS = {
    "nested deep": """b'{"value":' + b"[" * 100_000 + b"]" * 100_000 + b',"printed":"","error":null}'""",
    "of many values": """b'{"value":[' + b"{}," * 1_500_000 + b'{}],"printed":"","error":null}'""",
    "of another kind": """b'{"value":1,"printed":2,"error":null}'""",
}


@pytest.mark.parametrize("what", OWN_ANSWERS)
def test_an_answer_that_the_program_writes_by_itself_is_read_with_bounds(what: str) -> None:
    """Who gets out of the guards can write what he likes."""
    escape = "c = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0].__init__.__globals__\n"
    send = f"said = {OWN_ANSWERS[what]}\nwhile said: said = said[c['write'](1, said):]\nc['_exit'](0)"
    answer = execute(escape + send, wrapped=True)
    assert (answer.value, answer.error, answer.result.ok, answer.ok) == (None, "the answer is not readable", True, False)
