"""Every way in, once, and what came of it: what a fresh installation is tried with (test_packaging.py), on any supported Python."""

from __future__ import annotations

import asyncio
import sys

import nsjail_py

VERSION = "import sys; print('%d.%d' % sys.version_info[:2], end='')"

if __name__ == "__main__":
    assert nsjail_py.run(["/bin/true"]).check().stdout == b""
    own = "{}.{}".format(*sys.version_info)
    seen = [nsjail_py.run_python(VERSION), asyncio.run(nsjail_py.aio.run_python(VERSION))]
    with nsjail_py.Jail("untrusted", preload=["json"]) as jail:
        seen += [jail.run_python(f"assert 'json' in __import__('sys').modules; {VERSION}") for _ in range(3)]
    assert [result.check().stdout.decode() for result in seen] == [own] * len(seen), seen
    with nsjail_py.JailExecutor("untrusted", 2) as pool:
        assert list(pool.map(pow, range(5), [2] * 5)) == [0, 1, 4, 9, 16]
    print("every way in works on Python", own)
