"""Real programs, not only hello: what people run works under the policy that is meant for it."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import nsjail_py

IMPORTS = ("numpy", "pandas", "matplotlib")


def test_numpy_computes() -> None:
    source = "import numpy as np; a = np.arange(250000.).reshape(500, 500); print(int((a @ np.eye(500)).sum()), np.linalg.norm(a) > 0)"
    assert nsjail_py.run_python(source, imports=("numpy",)).check().stdout == b"31249875000 True\n"


def test_pandas_reads_groups_and_writes(tmp_path: Path) -> None:
    source = """
import pandas as pd
pd.DataFrame({"k": ["a", "b"] * 500, "v": range(1000)}).to_csv("in.csv")
print(pd.read_csv("in.csv").groupby("k").v.sum().to_dict())
"""
    assert nsjail_py.run_python(source, imports=("pandas",), memory="1G").check().stdout == b"{'a': 249500, 'b': 250000}\n"


def test_matplotlib_leaves_a_picture_in_the_work_directory(tmp_path: Path) -> None:
    source = "import matplotlib; matplotlib.use('Agg')\nimport matplotlib.pyplot as plt\nplt.plot([1, 3, 2]); plt.savefig('plot.png')"
    nsjail_py.run_python(source, imports=("matplotlib",), workdir=str(tmp_path), memory="1G").check()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.elsewhere(not Path("/usr/lib/locale/C.utf8").exists(), why="the C library has C.UTF-8 elsewhere, or built in")
def test_the_locale_that_the_environment_names_is_there() -> None:
    source = "import locale, sys; print(locale.setlocale(locale.LC_ALL, ''), sys.flags.utf8_mode, open('/dev/null').encoding)"
    assert nsjail_py.run_python(source).check().stdout == b"C.UTF-8 0 UTF-8\n"
    assert nsjail_py.run(["/usr/bin/wc", "-m"], input="\N{EURO SIGN}\n".encode()).check().stdout == b"2\n"
    assert nsjail_py.run(["/usr/bin/perl", "-e", "1"]).check().stderr == b""


def test_only_what_is_imported_is_visible() -> None:
    result = nsjail_py.run_python("import numpy; import pandas", imports=("numpy",))
    assert b"No module named 'pandas'" in result.stderr


def test_sqlite_and_threads_and_asyncio_work_under_untrusted() -> None:
    source = """
import asyncio, concurrent.futures, sqlite3
db = sqlite3.connect("file.db")
db.execute("create table t (x)"); db.executemany("insert into t values (?)", [(i,) for i in range(1000)]); db.commit()
async def main(): return await asyncio.to_thread(lambda: sum(concurrent.futures.ThreadPoolExecutor(4).map(abs, range(-3, 3))))
print(db.execute("select sum(x) from t").fetchone()[0], asyncio.run(main()))
"""
    assert nsjail_py.run_python(source).check().stdout == b"499500 9\n"


def test_multiprocessing_works_under_moderate() -> None:
    source = "import multiprocessing as m\nif __name__ == '__main__':\n  with m.Pool(3) as p: print(sum(p.map(abs, range(-10, 10))))"
    assert nsjail_py.run_python(source, policy="moderate").check().stdout == b"100\n"


def test_a_c_program_is_compiled_inside_and_run_inside(tmp_path: Path) -> None:
    (tmp_path / "p.c").write_text('#include <stdio.h>\nint main(void) { int n; scanf("%d", &n); printf("%d\\n", n * 2); return 3; }\n')
    (tmp_path / "p.c").chmod(0o644)
    compiler = nsjail_py.Jail("moderate", root="system", workdir=str(tmp_path))
    compiler.run(["/usr/bin/gcc", "-O2", "-o", "p", "p.c"]).check()
    result = nsjail_py.run([str(tmp_path / "p")], input=b"21\n")
    assert (result.stdout, result.exit_code) == (b"42\n", 3)


def test_a_shell_script_runs_with_its_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "s.sh"
    script.write_text("#!/bin/sh\necho $1\n")
    script.chmod(0o755)
    assert nsjail_py.run([str(script), "hi"]).check().stdout == b"hi\n"


SUITES = ("json", "math", "re", "collections", "itertools", "decimal", "struct", "zlib", "io")


@pytest.mark.parametrize("name", SUITES)
def test_cpythons_own_tests_pass_inside_as_they_pass_outside(name: str) -> None:
    folder = Path(sysconfig.get_path("stdlib")) / "test"
    if not (folder / "test_math.py").exists():
        pytest.skip("this interpreter was installed without CPython's tests, which Debian has in libpython3.N-testsuite")
    source, args = "from test.libregrtest.main import main; main()", ["-v", f"test_{name}"]
    mounts = [nsjail_py.Mount(source=str(folder), target=str(folder))]
    with subprocess.Popen(
        [sys.executable, "-c", source, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/tmp"
    ) as outside:
        inside = nsjail_py.run_python(
            source,
            args=args,
            policy="moderate",
            mounts=mounts,
            memory="2G",
            wall_time="5m",
            cpu_time="5m",
            output="64M",
            stderr=nsjail_py.STDOUT,
        )
        said = outside.communicate()[0]
    assert (outside.returncode, inside.verdict) == (0, "ok"), said[-2000:] + inside.stdout[-3000:].decode()
    assert ran(inside.stdout.decode()) == ran(said) > 0


def ran(said: str) -> int:
    """How many tests a report of unittest and doctest counts."""
    return sum(map(int, re.findall(r"^Ran (\d+) tests in", said, re.M)))
