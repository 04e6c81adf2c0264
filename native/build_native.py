"""The cffi extension: the plan's structures as C has them, and a few questions to the kernel."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HEADERS = ("plan.h", "probe.h", "audit.h")


def declarations(header: str) -> str:
    """A header as cffi parses it: without the preprocessor's lines, of which none matters."""
    return "\n".join(line for line in (HERE / header).read_text().splitlines() if not line.startswith("#"))


ffibuilder = FFI()
for header in HEADERS:
    ffibuilder.cdef(declarations(header))
ffibuilder.set_source(
    "nsjail_py._native",
    "".join(f'#include "{header}"\n' for header in HEADERS),
    sources=["native/probe.c"],
    include_dirs=[str(HERE)],
    define_macros=[("_GNU_SOURCE", None)],
    py_limited_api=True,
)
