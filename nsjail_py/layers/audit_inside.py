"""What an audited script starts through: it adds the hook (native/audit.c), and then is gone from the traceback and from `sys`.

Its text runs alone, inside. It imports only what every interpreter has loaded already: each run pays for it.
`python AUDIT.PY REFUSED SCRIPT ARGS...`
"""

import _imp
import posix
import sys
from _frozen_importlib import ModuleSpec

EXTENSION, PAGE = "/.audit.so", 998


def install(refused: str) -> None:
    extension = _imp.create_dynamic(ModuleSpec("_audit", None, origin=EXTENSION))
    _imp.exec_dynamic(extension)
    words = [one.partition("=") for one in refused.split("\n") if one]
    extension.install(PAGE, {int(kind): text for kind, _, text in words})
    sys.modules.pop("_audit", None)
    posix.close(PAGE)


def start(path: str) -> None:
    main = type(sys)("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    with open(path, "rb") as file:
        source = file.read()
    try:
        exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code is start.__code__:
            trace = trace.tb_next
        hint(error)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)


def hint(error: Exception) -> None:
    """Which line of the policy to change for a module that is not visible."""
    top = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and top and top not in sys.stdlib_module_names:
        error.add_note(f"Only what the policy lists is visible: [python] imports = [..., {top!r}]")


if __name__ == "__main__":
    install(sys.argv[1])
    sys.orig_argv = [*sys.orig_argv[:2], *sys.argv[2:]]
    sys.argv = sys.argv[2:]
    start(sys.argv[0])
