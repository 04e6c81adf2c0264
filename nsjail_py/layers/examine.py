"""The scan's engine: finds in a script what rules.py describes. Its source text is also sent into a jail, to be run there by the
interpreter that will run the script: it must run alone, on Python 3.8. What it parses is the enemy's, and parsers have faults.

It reads what Python will execute: the text after decoding by the declared encoding, and the names after normalisation.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import unicodedata
import warnings
from typing import TYPE_CHECKING, Any

MOST = 1000
"""Findings that are told."""
WORD = re.compile(r"__\w+__|[A-Za-z_]\w*")
NAME = re.compile(r"\w+([.:]\w+)+")
WALK = re.compile(r"\{[^{}]*[.\[][^{}]*\}")
DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")
IMPORTERS = ("__import__", "import_module", "resolve_name", "locate", "run_module", "find_spec")
UTF8 = ("utf-8", "utf-8-sig")
OPAQUE = ("files", "open", "interpreter")
"""Rules whose attribute names are ordinary words inside a string."""

Rule = Any
if TYPE_CHECKING:
    from collections.abc import Iterator

    Found = Iterator[tuple[str, int, int, str]]
    """(rule, line, column in UTF-8 bytes, what was found)"""


class Script:
    """A script as it will be executed. Raises SyntaxError as Python would."""

    def __init__(self, data: bytes, rules: list[Rule], harmless: list[str]) -> None:
        self.data = data
        self.rules = {rule["name"]: rule for rule in rules}
        self.harmless = {f"__{name}__" for name in harmless}
        self.names = {word: rule["name"] for rule in reversed(rules) for word in rule["names"]}
        self.attributes = {word: rule["name"] for rule in reversed(rules) for word in rule["attributes"]}
        self.quotable = {w: name for w, name in self.attributes.items() if name not in OPAQUE and ("_" in w or name == "command")}
        try:
            self.encoding, self.raw = decode(data)
        except SyntaxError:
            ast.parse(data)  # it does not look at all of a comment's bytes, which the codec does
            raise ValueError("bytes that its encoding does not have") from None
        if "\0" in self.raw:
            raise ValueError("a NUL byte")
        # A script is decoded first and then cut into lines, so a decoded "\r" begins a line. compile(), which a warm interpreter uses, does
        # not think so. What either of them would execute is looked at; only what neither takes is a syntax error.
        self.text = lines_ended(self.raw)
        readings: list[str | bytes] = [self.text] if self.encoding in UTF8 else [self.text, data]
        trees, errors = [], []
        for reading in readings:
            try:
                trees.append(ast.parse(reading))
            except SyntaxError as error:
                errors.append(error)
        if not trees:
            raise errors[0]
        self.nodes = [node for tree in trees for node in ast.walk(tree)]

    def findings(self) -> list[tuple[str, int, int, str]]:
        found = []
        for rule in self.rules.values():
            if rule["check"]:
                found += globals()[f"check_{rule['check']}"](self, rule["name"])
        for node in self.nodes:
            found += self.node(node)
            # Annotations that are strings are code for whoever asks for them.
            for name in ("annotation", "returns"):
                note = getattr(node, name, None)
                if isinstance(note, ast.Constant) and isinstance(note.value, str):
                    found += self.quoted(note)
        return sorted(set(found), key=lambda one: one[1:3])[:MOST]

    def quoted(self, note: ast.Constant) -> Found:
        try:
            inner = ast.parse(str(note.value), mode="eval")
        except (SyntaxError, ValueError):
            return
        for node in ast.walk(inner):
            for rule, _, _, what in self.node(node):
                yield rule, note.lineno, note.col_offset, what

    def node(self, node: Any) -> Found:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from self.module(node, alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from self.module(node, node.module or "")
            for alias in node.names:
                yield from self.module(node, f"{node.module}.{alias.name}", below=True)
                yield from self.attribute(node, alias.name)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in IMPORTERS and node.args and (name := folded(node.args[0])):
                yield from self.module(node, name.replace(":", "."))
            for keyword in node.keywords:
                yield from self.attribute(node, keyword.arg or "")
        elif isinstance(node, ast.Name):
            yield from self.name(node)
        elif isinstance(node, ast.Attribute):
            yield from self.attribute(node, node.attr, (node.value.end_lineno or node.lineno, (node.value.end_col_offset or 0) + 1))
        elif type(node).__name__ == "MatchClass":
            for name in node.kwd_attrs:
                yield from self.attribute(node, name)
        elif isinstance(node, (ast.Constant, ast.BinOp)) and (text := folded(node)):
            yield from self.string(node, text)
        elif isinstance(node, ast.ClassDef):
            yield from self.definitions(node)

    def module(self, node: Any, name: str, below: bool = False) -> Found:
        """A module, or something below it that has a rule of its own."""
        for rule in self.rules.values():
            hits = [m for m in rule["modules"] if name == m or (not below and name.startswith(m + "."))]
            if hits:
                yield rule["name"], node.lineno, node.col_offset, f"import of {name}"

    def name(self, node: ast.Name) -> Found:
        if isinstance(node.ctx, ast.Load) and node.id in self.names:
            yield self.names[node.id], node.lineno, node.col_offset, node.id

    def attribute(self, node: Any, name: str, place: tuple[int, int] | None = None) -> Found:
        line, column = place or (node.lineno, node.col_offset)
        if self.is_dunder(name):
            yield "dunder", line, max(0, column), f".{name}"
        elif name in self.attributes:
            yield self.attributes[name], line, max(0, column), f".{name}"

    def is_dunder(self, name: str) -> bool:
        return "dunder" in self.rules and name[:2] == "__" and name[-2:] == "__" and len(name) > 4 and name not in self.harmless

    def string(self, node: Any, text: str) -> Found:
        """Names inside a string: for getattr, for a template, for anything that looks them up later."""
        for word in set(WORD.findall(text[:100_000])):
            if self.is_dunder(word):
                yield "dunder", node.lineno, node.col_offset, f"{word} in a string"
            elif word in self.quotable and (text == word or "_" in word or NAME.fullmatch(text)):
                yield self.quotable[word], node.lineno, node.col_offset, f"{word} in a string"

    def definitions(self, node: ast.ClassDef) -> Found:
        for statement in node.body:
            names = [getattr(statement, "name", "")]
            names += [t.id for t in getattr(statement, "targets", []) if isinstance(t, ast.Name)]
            for rule in self.rules.values():
                for name in names:
                    if name in rule["definitions"]:
                        yield rule["name"], statement.lineno, statement.col_offset, f"definition of {name}"


def decode(data: bytes) -> tuple[str, str]:
    """The encoding and the text, by the rules of PEP 263. Raises SyntaxError for an encoding that is unknown or does not fit."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return encoding, data.decode(encoding)
    except (ValueError, LookupError) as error:
        raise SyntaxError(f"(unicode error) {error}") from None


def lines_ended(text: str) -> str:
    """The text with every line end as Python's reader makes it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def folded(node: Any) -> str:
    """The text of a string constant, or of a sum of some; empty for anything else."""
    parts, rest = [], [node]
    while rest:
        one = rest.pop()
        if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Add):
            rest += [one.left, one.right]
        elif isinstance(one, ast.Constant) and isinstance(one.value, (str, bytes)):
            parts.append(one.value if isinstance(one.value, str) else one.value.decode("latin-1"))
        else:
            return ""
    return "".join(reversed(parts))


# ---------------------------------------------------------------- checks, by the name that their rule gives


def check_dunder(script: Script, rule: str) -> Found:
    return iter(())  # asked for with every attribute and string


def check_format(script: Script, rule: str) -> Found:
    for node in script.nodes:
        if isinstance(node, ast.Attribute) and node.attr == "format":
            if not isinstance(node.value, ast.Constant):
                yield rule, node.lineno, node.col_offset, "format of a text that is not in the script"
            elif WALK.search(str(node.value.value)):
                yield rule, node.lineno, node.col_offset, "a template that walks attributes"


def check_metaclass(script: Script, rule: str) -> Found:
    for node in script.nodes:
        if isinstance(node, ast.ClassDef) and any(word.arg == "metaclass" for word in node.keywords):
            yield rule, node.lineno, node.col_offset, f"a metaclass of {node.name}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "type" and len(node.args) == 3:
            yield rule, node.lineno, node.col_offset, "a class made by type()"
        elif isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "type" for base in node.bases):
            yield rule, node.lineno, node.col_offset, f"{node.name} is a metaclass"


def check_encoding(script: Script, rule: str) -> Found:
    if script.encoding not in UTF8:
        yield rule, 1, 0, f"encoding {script.encoding}"


def check_disguise(script: Script, rule: str) -> Found:
    if script.text.isascii():
        return
    try:
        for token in tokenize.generate_tokens(io.StringIO(script.text).readline):
            plain = unicodedata.normalize("NFKC", token.string)
            if token.type == tokenize.NAME and plain != token.string and plain.isascii():
                yield rule, token.start[0], len(token.line[: token.start[1]].encode()), f"{token.string} is {plain}"
    except (tokenize.TokenError, SyntaxError):
        return


def check_hidden_line(script: Script, rule: str) -> Found:
    for match in re.finditer("\r(?!\n)", script.raw):
        yield rule, lines_ended(script.raw[: match.start()]).count("\n") + 1, 0, "a bare carriage return"


def check_direction(script: Script, rule: str) -> Found:
    for match in DIRECTION.finditer(script.text):
        before = script.text[: match.start()]
        column = len(before[before.rfind("\n") + 1 :].encode())
        yield rule, before.count("\n") + 1, column, unicodedata.name(match.group())


def check_star_import(script: Script, rule: str) -> Found:
    for node in script.nodes:
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield rule, node.lineno, node.col_offset, f"from {node.module} import *"


def check_unreadable(script: Script, rule: str) -> Found:
    return iter(())  # such a script does not come so far


# ----------------------------------------------------------------


def examine(data: bytes, rules: list[Rule], harmless: list[str]) -> dict[str, Any]:
    """`findings`, or `syntax_error` with what Python would say of it. Lines and columns begin with 1; columns are characters."""
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the parser thinks of the style is not asked
        try:
            script = Script(data, rules, harmless)
            found, lines = script.findings(), script.text.split("\n")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # A syntax error is one for every reader. Anything else, the interpreter may take differently.
            if isinstance(error, SyntaxError) and b"\0" not in data:
                return {"findings": [], "syntax_error": _syntax_error(error)}
            what = "a NUL byte" if b"\0" in data else str(error) or "too deep for the parser"
            line = data[: max(0, data.find(b"\0"))].count(b"\n") + 1
            found = [(rule["name"], line, 0, what) for rule in rules if rule["check"] == "unreadable"]
    said = []
    for rule, line, column, what in found:
        before = lines[line - 1].encode()[:column] if 0 < line <= len(lines) else b""
        said.append({"rule": rule, "line": line, "column": len(before.decode("utf-8", "replace")) + 1, "what": what})
    return {"findings": said, "syntax_error": None}


def _syntax_error(error: SyntaxError) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "message": error.msg,
        "line": error.lineno,
        "column": error.offset,
        "text": (error.text or "")[:1000],
        "end_line": error.end_lineno,
        "end_column": error.end_offset,
    }


if __name__ == "__main__":
    import base64
    import json

    job = json.load(sys.stdin)
    json.dump(examine(base64.b64decode(job["source"]), job["rules"], job["harmless"]), sys.stdout)
