"""What restricted code gets instead of the real thing: facades of modules, guards of RestrictedPython, wrapped built-ins.

Its source text is sent into a jail and run there (restricted.py), so it needs nothing but the standard library and, for the restricted
tier, RestrictedPython. It can be used in an ordinary process as well; that is no jail.

    restricted   RestrictedPython rewrites the code so that every attribute, item and write passes a guard; attributes are
                 only to be had of the types listed here and of classes that the code defines itself
    wrapped      convenience, not safety: the usual dictionary of built-ins with the dangerous ones taken out or wrapped. Anybody who
                 knows `().__class__` leaves it.
"""

from __future__ import annotations

import builtins
import importlib
import io
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

FACADES: dict[str, str] = {
    "math": "acos asin atan atan2 ceil comb copysign cos cosh degrees dist e erf exp fabs factorial floor fmod "
    "fsum gamma gcd hypot inf isclose isfinite isinf isnan isqrt lcm ldexp log log10 log1p log2 modf nan "
    "perm pi pow prod radians remainder sin sinh sqrt tan tanh tau trunc",
    "cmath": "acos asin atan cos e exp inf log nan phase pi polar rect sin sqrt tan",
    "statistics": "correlation fmean geometric_mean harmonic_mean linear_regression mean median median_high median_low "
    "mode multimode pstdev pvariance quantiles stdev variance",
    "random": "betavariate choice choices expovariate gauss randint random randrange sample seed shuffle triangular uniform",
    "json": "dumps loads JSONDecodeError",
    "re": "A DOTALL I IGNORECASE M MULTILINE S X compile error escape findall finditer fullmatch match search split sub subn",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits hexdigits octdigits printable punctuation whitespace capwords",
    "datetime": "date datetime time timedelta timezone MAXYEAR MINYEAR",
    "decimal": "Decimal InvalidOperation ROUND_DOWN ROUND_HALF_EVEN ROUND_HALF_UP ROUND_UP",
    "fractions": "Fraction",
    "itertools": "accumulate chain combinations combinations_with_replacement compress count cycle dropwhile "
    "filterfalse groupby islice pairwise permutations product repeat starmap takewhile tee zip_longest",
    "functools": "cmp_to_key reduce",
    "collections": "Counter OrderedDict defaultdict deque",
    "operator": "add and_ contains countOf eq floordiv ge gt indexOf itemgetter le lt mod mul ne neg not_ or_ pos pow sub truediv xor",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "textwrap": "dedent fill indent shorten wrap",
    "base64": "b16decode b16encode b32decode b32encode b64decode b64encode urlsafe_b64decode urlsafe_b64encode",
    "binascii": "crc32 hexlify unhexlify",
    "hashlib": "md5 sha1 sha256 sha512 sha3_256 blake2b blake2s",
    "unicodedata": "category name normalize",
    "calendar": "isleap monthrange weekday",
    "time": "monotonic perf_counter time",
}
"""Module -> what of it can be had. Left out is whatever takes attribute names, templates or code as text, opens files, or gives away a
module, a frame or a class that does."""
TYPE_NAMES = (
    "str bytes bytearray int float complex bool list dict set frozenset tuple range slice NoneType date datetime "
    "time timedelta timezone Decimal Fraction Pattern Match Counter OrderedDict defaultdict deque Facade Record "
    "dict_keys dict_values dict_items HASH"
)
TYPES = frozenset(TYPE_NAMES.split())
"""Types, by name, whose attributes restricted code may read. Such a class must be a built-in one, a facade's, or ours."""
MOST_PRINTED = 1_000_000


class Facade:
    """A module of which only the listed names can be had, and nothing changed."""

    __slots__ = ("_names",)

    def __init__(self, names: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_names", dict(names))

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_names")[name]
        except KeyError:
            raise AttributeError(f"the facade of this module has no {name!r}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a facade cannot be changed")

    def __dir__(self) -> list[str]:
        return sorted(object.__getattribute__(self, "_names"))


class Record(dict[str, Any]):
    """A dictionary from outside whose entries are also attributes, as templates like them."""


class Refused(Exception):
    """A guard said no."""


def facade(name: str) -> Facade:
    """The facade of a module. Raises ImportError for a module that has none."""
    if name not in FACADES:
        raise ImportError(f"no module {name!r} here; there are: {', '.join(sorted(FACADES))}")
    module = importlib.import_module(name)
    return Facade({word: getattr(module, word) for word in FACADES[name].split() if hasattr(module, word)})


def importer(allowed: Iterable[str]) -> Callable[..., Facade]:
    """An `__import__` that gives facades of the allowed modules."""
    names = frozenset(allowed)

    def guarded_import(name: str, globals: object = None, locals: object = None, fromlist: object = (), level: int = 0) -> Facade:
        if type(name) is not str or level or name not in names:
            raise ImportError(f"import of {str(name)!r} is not allowed here; allowed: {', '.join(sorted(names)) or 'none'}")
        return facade(name)

    return guarded_import


# ---------------------------------------------------------------- the restricted tier


def guarded_getattr(thing: Any, name: Any, *default: Any) -> Any:
    from RestrictedPython.Guards import safer_getattr

    if type(name) is not str or name.startswith("_") or name == "mro":
        raise Refused(f"attribute {str(name)!r}: names that begin with _, and mro, are refused")
    if isinstance(thing, Record) and name in thing:
        return thing[name]
    kind = thing if isinstance(thing, type) else type(thing)
    own = isinstance(kind, OwnClass) or isinstance(thing, BaseException)
    if not own and (kind.__name__ not in TYPES or not (kind in (Facade, Record) or kind.__module__ in LIBRARY)):
        raise Refused(f"attribute {name!r}: those of {kind.__name__} are refused")
    if isinstance(thing, BaseException) and name not in (
        "args",
        "add_note",
        "exceptions",
        "code",
        "errno",
        "msg",
        "pos",
        "strerror",
        "value",
    ):
        raise Refused(f"attribute {name!r} of an exception is refused")
    missing = object()
    found = safer_getattr(thing, name, missing)  # type: ignore[no-untyped-call]
    if found is missing:
        if default:
            return default[0]
        raise AttributeError(f"{kind.__name__} has no attribute {name!r}")
    return found


LIBRARY = frozenset({*FACADES, "builtins", "_hashlib", "_blake2", "_sha3", "_sha2", "_md5", "_sha1", "_decimal", "_pydecimal"})


class OwnClass(type):
    """The type of classes that restricted code defines: their instances may be written to."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> OwnClass:
        return super().__new__(cls, name, bases, {**body, "_guarded_writes": True})


SIGNS = {"+": "add", "-": "sub", "*": "mul", "/": "truediv", "//": "floordiv", "%": "mod", "**": "pow", "|": "or", "&": "and", "^": "xor"}
INPLACE = {f"{sign}=": getattr(operator, f"i{name}") for sign, name in SIGNS.items()}
MORE_BUILTINS = (
    "all any ascii bytearray bytes dict enumerate filter format frozenset iter list map max min next reversed set sorted sum tuple zip"
)


class Printer:
    """RestrictedPython makes one for each scope that prints; all write to one place."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write

    def _call_print(self, *things: Any, sep: str | None = None, end: str | None = None, file: object = None, flush: bool = False) -> None:
        if file is not None:
            raise Refused("print: file= is refused")
        text = io.StringIO()
        print(*things, sep=sep, end=end, file=text)
        self.write(text.getvalue())


def restricted_globals(names: Mapping[str, Any], modules: Iterable[str], write: Callable[[str], object]) -> dict[str, Any]:
    """The global variables for restricted code: names, facades of modules, guards."""
    from RestrictedPython.Eval import default_guarded_getitem, default_guarded_getiter
    from RestrictedPython.Guards import full_write_guard, guarded_iter_unpack_sequence, guarded_unpack_sequence, safe_builtins

    allowed = tuple(modules)
    tools = {name: thing for name, thing in safe_builtins.items() if name != "id"}
    tools |= {name: getattr(builtins, name) for name in MORE_BUILTINS.split() if name != "format"}
    tools |= {"getattr": guarded_getattr, "__import__": importer(allowed)}
    return {
        **{name: facade(name) for name in allowed},
        **names,
        "__builtins__": tools,
        "__name__": "restricted",
        "__metaclass__": OwnClass,
        "_getattr_": guarded_getattr,
        "_getitem_": default_guarded_getitem,
        "_getiter_": default_guarded_getiter,
        "_iter_unpack_sequence_": guarded_iter_unpack_sequence,
        "_unpack_sequence_": guarded_unpack_sequence,
        "_write_": full_write_guard,
        "_inplacevar_": lambda sign, left, right: INPLACE[sign](left, right),
        "_apply_": lambda function, *args, **words: function(*args, **words),
        "_print_": lambda getattr_=None: Printer(write),
    }


def compiled(source: str | bytes, mode: Literal["eval", "exec"]) -> Any:
    """Restricted code, compiled. Raises SyntaxError with everything that RestrictedPython refuses."""
    from RestrictedPython.compile import compile_restricted

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that what is printed is never read
        return compile_restricted(source, "<restricted>", mode)


PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)


def rendered(template: str, variables: dict[str, Any]) -> str:
    """The template with the value of each `{{ expression }}` in it."""
    return PLACE.sub(lambda match: str(eval(compiled(match[1].strip(), "eval"), variables)), template)  # noqa: S307  (restricted code)


# ---------------------------------------------------------------- the wrapped built-ins, for convenience

TAKEN_OUT = (
    "breakpoint compile copyright credits delattr eval exec exit globals help input license locals memoryview quit vars __loader__ __spec__"
)


def wrapped_builtins(modules: Iterable[str], directories: Iterable[str] = ("/work", "/tmp")) -> dict[str, Any]:
    """The built-ins without those that reach out; `__import__`, `open`, `getattr` and `setattr` are wrapped. Convenience, not safety."""
    below = tuple(os.path.realpath(directory) + "/" for directory in directories)

    def wrapped_open(file: Any, mode: str = "r", *args: Any, **words: Any) -> Any:
        path = os.fspath(file)
        if type(path) is not str or not os.path.realpath(path).startswith(below):
            raise Refused(f"open: {str(path)!r} is not below {' or '.join(below)}")
        return open(os.path.realpath(path), mode, *args, **words)

    def checked(name: Any) -> str:
        if type(name) is not str or name.startswith("_"):
            raise Refused(f"attribute {str(name)!r} is refused")
        return name

    def wrapped_getattr(thing: Any, name: Any, *default: Any) -> Any:
        return getattr(thing, checked(name), *default)

    def wrapped_setattr(thing: Any, name: Any, value: Any) -> None:
        setattr(thing, checked(name), value)

    tools = {name: thing for name, thing in vars(builtins).items() if name not in TAKEN_OUT.split()}
    return {**tools, "__import__": importer(modules), "open": wrapped_open, "getattr": wrapped_getattr, "setattr": wrapped_setattr}


# ---------------------------------------------------------------- inside the jail


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job of restricted.py: `value`, `printed`, `error`."""
    printed: list[str] = []
    kind, source, modules = job["kind"], job["source"], job["modules"]
    value: Any = None
    error = None
    try:
        names = {name: records(value) for name, value in job["names"].items()}
        if kind == "wrapped":
            variables = {**names, "__builtins__": wrapped_builtins(modules), "__name__": "wrapped"}
            variables["__builtins__"]["print"] = Printer(printed.append)._call_print
            exec(compile(source, "<wrapped>", "exec"), variables)  # noqa: S102  (inside the jail)
            value = variables.get("result")
        else:
            variables = restricted_globals(names, modules, printed.append)
            if kind == "template":
                value = rendered(source, variables)
            elif kind == "expression":
                value = eval(compiled(source.strip(), "eval"), variables)  # noqa: S307  (restricted code)
            else:
                exec(compiled(source, "exec"), variables)  # noqa: S102  (restricted code)
                value = variables.get("result")
    except Exception as fault:
        said = fault.msg if isinstance(fault, SyntaxError) else fault
        error = {"type": type(fault).__name__, "message": "; ".join(said) if isinstance(said, tuple) else str(said)}
    return {"value": plain(value), "printed": "".join(printed)[:MOST_PRINTED], "error": error}


def records(value: Any) -> Any:
    if isinstance(value, dict):
        return Record({name: records(item) for name, item in value.items()})
    return [records(item) for item in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The value for JSON: what is none of its types becomes text."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


if __name__ == "__main__":
    import json

    json.dump(run(json.load(sys.stdin)), sys.stdout)
