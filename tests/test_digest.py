"""The digest is SHA-256 whichever module brings it."""

from __future__ import annotations

import hashlib
import sys

import pytest

from nsjail_py import digest


@pytest.mark.parametrize("absent", [(), ("_sha2", "_sha256")], ids=["built in", "from OpenSSL"])
def test_every_source_of_the_digest_gives_the_same(absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    assert digest._module().__name__ in (("hashlib",) if absent else ("_sha2", "_sha256"))
    assert digest.sha256(b"data").digest() == hashlib.sha256(b"data").digest()
    assert digest.sha256(b"data").hexdigest() == hashlib.sha256(b"data").hexdigest()
