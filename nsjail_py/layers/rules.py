"""What the scan looks for, as data: each rule is a severity, a sentence, an advice, and the words that it matches.

high    reaches beneath the language (frames, memory, generated code) or starts programs; harmless scripts have no use for it
medium  reaches beyond the program (files, environment, network), or hides what is executed
low     worth a look

examine.py says what each kind of words is compared with.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["high", "medium", "low"]
SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low")


class Rule(NamedTuple):
    """One thing that the scan finds."""

    name: str
    severity: Severity
    sentence: str
    advice: str
    modules: tuple[str, ...] = ()
    """Modules, with what lies below them, however they are imported by a name that stands in the script."""
    names: tuple[str, ...] = ()
    """Variables that are read."""
    attributes: tuple[str, ...] = ()
    """Attributes that are read, also by a pattern of `match`, by `from ... import`, and by a name inside a string that calls for it."""
    definitions: tuple[str, ...] = ()
    """Methods that a class defines, or attributes that it sets."""
    check: str = ""
    """The name of a check that is more than a comparison of words: examine.py has one function for each."""


HARMLESS_DUNDERS = (
    *("name", "doc", "version", "author", "all", "init", "new", "str", "repr", "len", "iter", "next", "enter", "exit", "call", "hash"),
    *("aenter", "aexit", "aiter", "anext", "await", "bool", "int", "float", "index", "contains", "getitem", "setitem", "delitem", "bytes"),
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs", "and"),
    *("or", "xor", "invert", "lshift", "rshift", "radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "iadd", "isub", "imul"),
    *("round", "post_init", "slots", "main", "future", "missing", "reversed", "copy", "deepcopy", "complex", "divmod", "length_hint"),
)
"""Names between double underscores that ordinary programs define and use."""

RULES: tuple[Rule, ...] = (
    Rule(
        "dunder",
        "high",
        "It reads a special attribute through which any object leads to the whole interpreter.",
        "Use isinstance(), type() or the public function that says what you mean.",
        check="dunder",
    ),
    Rule(
        "frames",
        "high",
        "It reaches for stack frames or for code objects, and through them for the variables of its caller.",
        "Pass what is needed as an argument.",
        modules=("inspect", "faulthandler", "tracemalloc"),
        attributes=(
            *("f_back", "f_globals", "f_locals", "f_builtins", "f_code", "tb_frame", "tb_next", "gi_frame", "gi_code", "gi_yieldfrom"),
            *("cr_frame", "cr_code", "cr_await", "cr_origin", "ag_frame", "ag_code", "ag_await", "_getframe", "_getframemodulename"),
            *(
                "_current_frames",
                "_current_exceptions",
                "settrace",
                "setprofile",
                "walk_stack",
                "walk_tb",
                "exc_info",
                "co_code",
                "co_consts",
            ),
            *("excepthook", "unraisablehook", "CodeType", "FunctionType", "FrameType", "TracebackType", "CellType", "cell_contents"),
        ),
    ),
    Rule(
        "memory",
        "high",
        "It reads or changes memory or objects beneath the language.",
        "There is no safe use of this in a script; leave it out.",
        modules=("gc", "ctypes", "_ctypes", "cffi", "_cffi_backend", "mmap", "_xxsubinterpreters", "_interpreters", "_testcapi"),
        attributes=("ctypes", "ctypeslib", "as_strided", "from_address", "PyObj_FromPtr", "_testcapi"),
        definitions=("__array_interface__", "__array_struct__"),
        names=("__array_interface__",),
    ),
    Rule(
        "code",
        "high",
        "It executes code that is put together while it runs, which no scan can see.",
        "Write the code down, or use a dictionary of functions.",
        modules=("code", "codeop", "timeit", "cProfile", "profile", "pdb", "bdb", "trace", "doctest", "dis", "ast"),
        names=("eval", "exec", "compile", "breakpoint", "execfile"),
        attributes=("get_type_hints", "get_annotations", "ForwardRef", "eval_str", "run_path", "run_module", "runsource", "interact"),
    ),
    Rule(
        "command",
        "high",
        "It starts another program or another process.",
        "In the jail no other program is there; compute it in Python.",
        modules=("subprocess", "pty", "_posixsubprocess", "multiprocessing", "concurrent", "commands", "popen2", "asyncio.subprocess"),
        attributes=(
            *("system", "popen", "posix_spawn", "posix_spawnp", "fork", "forkpty", "fork_exec", "startfile", "Popen", "check_output"),
            *("execl", "execle", "execlp", "execlpe", "execv", "execve", "execvp", "execvpe"),
            *("spawnl", "spawnle", "spawnlp", "spawnlpe", "spawnv", "spawnve", "spawnvp", "spawnvpe"),
        ),
    ),
    Rule(
        "import-machinery",
        "high",
        "It imports by other means than an import statement, so that what it imports need not be named.",
        "Write `import name`.",
        modules=(
            *("importlib", "imp", "_imp", "pkgutil", "runpy", "zipimport", "site", "builtins", "__builtin__", "pydoc"),
            *("_frozen_importlib", "_frozen_importlib_external", "pkg_resources", "unittest.mock"),
        ),
        names=("__import__", "__builtins__", "__loader__", "__spec__", "license", "copyright", "credits", "help"),
        attributes=(
            *("import_module", "load_module", "exec_module", "create_module", "create_builtin", "find_spec", "meta_path", "path_hooks"),
            *(
                "path_importer_cache",
                "modules",
                "resolve_name",
                "builtins",
                "get_data",
                "addsitedir",
                "dictConfig",
                "fileConfig",
                "addpackage",
            ),
        ),
    ),
    Rule(
        "pickle",
        "high",
        "It loads data in a form that may name any function to call.",
        "Use json.",
        modules=("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "copyreg", "dbm"),
        attributes=("allow_pickle", "read_pickle", "to_pickle", "find_class"),
        definitions=("__reduce__", "__reduce_ex__", "__setstate__"),
    ),
    Rule(
        "files",
        "medium",
        "It works on files, through a module made for that.",
        "In the jail only /work, /tmp and the mounts of the policy are there.",
        modules=(
            *("os", "posix", "posixpath", "nt", "shutil", "pathlib", "glob", "tempfile", "fileinput", "linecache", "codecs", "io", "_io"),
            *("tokenize", "sqlite3", "zipfile", "tarfile", "gzip", "bz2", "lzma", "configparser", "logging", "mailbox", "netrc", "filecmp"),
        ),
        attributes=("os", "_os", "posix", "open_code", "FileIO", "fromfile", "tofile", "memmap", "loadtxt", "savetxt", "genfromtxt"),
    ),
    Rule(
        "open",
        "medium",
        "It opens a file.",
        "In the jail only /work, /tmp and the mounts of the policy are there.",
        names=("open",),
        attributes=("open",),
    ),
    Rule(
        "environment",
        "medium",
        "It reads or changes environment variables.",
        "Only what the policy lists under env and env_pass is there.",
        attributes=("environ", "environb", "getenv", "getenvb", "putenv", "_environ"),
    ),
    Rule(
        "network",
        "medium",
        "It uses the network.",
        "Under untrusted there is none; fetch the data outside and mount it.",
        modules=(
            *("socket", "_socket", "ssl", "_ssl", "http", "urllib", "ftplib", "smtplib", "poplib", "imaplib", "telnetlib", "xmlrpc"),
            *("socketserver", "asyncio", "selectors", "requests", "httpx", "aiohttp", "urllib3", "paramiko", "websockets", "webbrowser"),
        ),
    ),
    Rule(
        "interpreter",
        "low",
        "It works on the interpreter itself.",
        "sys.argv and sys.stdin are the usual reasons; leave the rest out.",
        modules=("sys", "threading", "_thread", "signal", "atexit", "weakref", "resource", "platform", "sysconfig", "warnings", "types"),
        attributes=("sys", "_sys", "addaudithook", "setrecursionlimit", "callbacks", "finalize"),
    ),
    Rule(
        "dynamic-attribute",
        "medium",
        "It reads or sets attributes, or variables, whose names are not in the script.",
        "Use a dictionary.",
        names=("getattr", "setattr", "delattr", "vars", "globals", "locals", "dir"),
        attributes=("attrgetter", "methodcaller", "getattr_static"),
    ),
    Rule(
        "format",
        "medium",
        "It formats text by a template that walks attributes, or whose text is not in the script.",
        "Use an f-string, or format a text that is written down.",
        attributes=("format_map", "vformat", "get_field", "LogRecord"),
        check="format",
    ),
    Rule(
        "special-method",
        "medium",
        "A class changes how Python itself looks things up or destroys them.",
        "Ordinary methods do.",
        definitions=(
            *("__del__", "__getattribute__", "__instancecheck__", "__subclasscheck__", "__class_getitem__", "__init_subclass__"),
            *("__prepare__", "__set_name__", "__match_args__", "__fspath__", "__get__", "__class__", "mro"),
        ),
        check="metaclass",
    ),
    Rule(
        "encoding",
        "medium",
        "The script declares an encoding other than UTF-8: people and tools may read it otherwise than Python does.",
        "Save it as UTF-8.",
        check="encoding",
    ),
    Rule(
        "disguise",
        "medium",
        "A name is written in characters that only look like the plain ones; Python takes both for the same.",
        "Write it in plain letters.",
        check="disguise",
    ),
    Rule(
        "hidden-line",
        "medium",
        "A bare carriage return begins a new line for Python, and for few other readers.",
        "Save it with ordinary line ends.",
        check="hidden_line",
    ),
    Rule(
        "direction",
        "medium",
        "A character turns the direction of writing, so that the text looks different from what is executed.",
        "Take it out, or write it as an escape.",
        check="direction",
    ),
    Rule(
        "unreadable",
        "high",
        "It has a NUL byte, or bytes that its encoding does not have, or is nested too deeply for the parser: what it does cannot be told.",
        "Take the byte out; write it in simpler parts.",
        check="unreadable",
    ),
    Rule(
        "star-import",
        "low",
        "It imports names that are not in the script.",
        "Name what is used.",
        check="star_import",
    ),
)


def known() -> frozenset[str]:
    """The names of all rules."""
    return frozenset(rule.name for rule in RULES)
