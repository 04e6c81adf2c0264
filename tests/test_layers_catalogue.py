"""The bypass catalogue: every payload works when nothing stops it, none touches the host from a jail, and the layers' scores are true."""

from __future__ import annotations

import html.parser
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

from nsjail_py.layers import tables
from nsjail_py.layers.catalogue import payloads
from nsjail_py.layers.report import AUDIT, LAYERS, NONE, POLICY, WITHIN, Report, jailed, report, secret_variable

FAMILIES = {
    *("attributes", "frames", "tracebacks", "generators", "format", "codecs", "pickles", "ctypes", "audit", "imports", "gc", "descriptors"),
    *("decorators", "metaclasses", "encodings", "native"),
}


LONGER = min(PATIENCE, 4.0)
"""As long as an emulated machine takes; not ten times as long, since some payloads never end."""


def chosen(*names: str) -> list[object]:
    found = [one for one in payloads() if one.name in names]
    assert len(found) == len(names)
    return found


@pytest.fixture(scope="module")
def full() -> Iterator[Report]:
    """Every payload, with nothing in its way and under the policy `untrusted`, which has no layer of Python in it."""
    before = set(os.listdir("/var/tmp")), set(os.listdir(tempfile.gettempdir()))
    yield report("untrusted", layers=[POLICY], patience=LONGER)
    left = (set(os.listdir("/var/tmp")) | set(os.listdir(tempfile.gettempdir()))) - before[0] - before[1]
    assert not [name for name in left if "canary" in name]


@pytest.fixture(scope="module")
def few() -> Report:
    names = [
        "os-system",
        "open-read",
        "builtin-self",
        "result-str",
        "endless-loop",
        "format-walk",
        "memoryview-after-free",
        "cached-module-environ",
    ]
    return report("untrusted", only=chosen(*names), patience=LONGER)


def marks(found: Report, name: str) -> dict[str, str]:
    (row,) = [row for row in found.rows if row.payload.name == name]
    return {layer: tables.mark(row.outcomes[layer]) for layer in found.layers}


def test_there_are_more_than_a_hundred_ideas_in_all_families() -> None:
    held = [one for one in payloads() if one.goal != "crash"]
    assert len(held) >= 100
    assert {one.family for one in held} >= FAMILIES
    for key in ("name", "idea", "code"):
        assert len({getattr(one, key) for one in payloads()}) == len(payloads()), key


@pytest.mark.slow
def test_every_payload_works_when_nothing_stops_it(full: Report) -> None:
    assert [(row.payload.name, row.outcomes[NONE]) for row in full.rows if not row.works] == []


@pytest.mark.slow
def test_nothing_happens_to_the_host_under_the_kernels_layers(full: Report) -> None:
    assert [(row.payload.name, row.outcomes[POLICY]) for row in full.rows if row.outcomes[POLICY].effects] == []
    assert full.score(POLICY) == (len(full.rows), len(full.rows))


def test_nothing_happens_to_the_host_from_a_warm_interpreter() -> None:
    """The first payloads of each family, forked from a template that all of them share."""
    import nsjail_py

    seen: dict[str, int] = {}
    with nsjail_py.Jail("untrusted", preload=["json"]) as jail, secret_variable():
        for payload in payloads():
            seen[payload.family] = seen.get(payload.family, 0) + 1
            if seen[payload.family] <= 2 and not payload.needs and payload.family != "exhaustion":
                assert jailed(payload, jail.policy, jail).effects == (), payload.name


def test_a_payload_that_crashes_the_interpreter_is_a_row(few: Report) -> None:
    found = marks(few, "memoryview-after-free")
    assert found["audit hook"] == "CRASHED" and found[POLICY] == "crashed"


def test_the_layers_of_python_are_told_as_they_are(few: Report) -> None:
    assert set(marks(few, "os-system").values()) == {"stopped"}
    assert {layer: mark for layer, mark in marks(few, "endless-loop").items() if layer != POLICY} == dict.fromkeys(LAYERS, "CRASHED")
    assert marks(few, "open-read")["import hook"] == "PASSED"
    assert marks(few, "builtin-self")["wrapped built-ins"] == "PASSED"
    assert marks(few, "result-str")["AST scan"] == "PASSED"
    assert marks(few, "cached-module-environ")["audit hook"] == "PASSED"
    assert marks(few, "format-walk")["RestrictedPython"] == "stopped"
    assert marks(few, "open-read")["native audit hook"] == "PASSED"  # it refuses processes and sockets, and only notes files
    (row,) = [row for row in few.rows if row.payload.name == "os-system"]
    assert row.outcomes["native audit hook"].detail.startswith("PermissionError: os.system: the policy has no processes")


@pytest.mark.parametrize("layer", WITHIN)
def test_an_honest_program_runs_under_each_layer(layer: str, tmp_path: Path) -> None:
    """A layer that refuses everything would have the best score."""
    import base64
    import sys

    from nsjail_py.layers.catalogue import HERE

    source = b"import math, json, statistics\ntotal = 0\nfor x in range(4):\n    total += math.sqrt(x * x)\nprint(json.dumps([total, statistics.mean([1, 3])]))\n"
    job = {
        "layer": layer,
        "payload": base64.b64encode(source).decode(),
        "directory": str(tmp_path),
        "bounded": True,
        "path": [str(HERE.parent)],
        "audit": AUDIT,
    }
    done = subprocess.run(
        [sys.executable, "-s", HERE / "application.py"],
        input=json.dumps({**job, "processor": 8, "linger": 0, "end": "e"}).encode(),
        capture_output=True,
        check=False,
    )
    assert b"[6.0, 2" in done.stdout and b"SURVIVED" in done.stderr, done


def test_a_policy_that_does_not_claim_to_stop_it_is_shown_to_let_it_through() -> None:
    found = report("trusted", only=chosen("open-read", "open-write", "os-environ", "subprocess-run"), layers=[POLICY], patience=LONGER)
    assert {row.payload.name: row.outcomes[POLICY].effects for row in found.rows} == {
        "open-read": ("read the file",),
        "open-write": (),
        "os-environ": (),
        "subprocess-run": ("ran a program",),
    }


def test_the_scan_of_a_policy_is_a_part_of_it() -> None:
    from nsjail_py.policyfile import load, override

    found = report(
        override(load("trusted"), scan="refuse"), only=chosen("open-read", "reexported-linecache"), layers=[POLICY], patience=LONGER
    )
    assert [tables.mark(row.outcomes[POLICY]) for row in found.rows] == ["stopped", "PASSED"]
    assert "refused by the scan" in found.rows[0].outcomes[POLICY].detail


def test_a_policy_that_cannot_be_run_has_no_score() -> None:
    import nsjail_py

    with pytest.raises(nsjail_py.JailError):
        report(nsjail_py.Policy(root="/no/such/root"), only=chosen("open-read"), layers=[POLICY])


def test_the_command_prints_a_table_and_writes_a_page(cli: list[str], tmp_path: Path) -> None:
    command = [
        *cli,
        "layers",
        "report",
        "--patience",
        str(LONGER),
        "--only",
        "open-read",
        "--only",
        "utf7-source",
        "--html",
        tmp_path / "r.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "policy untrusted: 2 of 2 stopped" in done.stdout and "open-read" in done.stdout
    page = (tmp_path / "r.html").read_text()
    tags: list[str] = []
    reader = html.parser.HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    reader.feed(page)
    assert tags.count("tr") == 3 and "script" not in tags and "http" not in page.replace("http-equiv", "")
    done = subprocess.run(
        [*cli, "layers", "report", "--patience", str(LONGER), "--only", "open-read", "--json"], capture_output=True, text=True, check=False
    )
    said = json.loads(done.stdout)
    assert said["scores"]["policy"] == {"stopped": 1, "of": 1} and said["rows"][0]["layers"]["none"]["effects"] == ["read the file"]


def test_the_command_says_when_a_policy_lets_something_through(cli: list[str]) -> None:
    done = subprocess.run(
        [*cli, "layers", "report", "--patience", str(LONGER), "--policy", "trusted", "--only", "open-read"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "policy trusted: 0 of 1 stopped" in done.stdout
    done = subprocess.run([*cli, "layers", "report", "--only", "open-rea"], capture_output=True, text=True, check=False)
    assert done.returncode == 125 and 'did you mean "open-read"' in done.stderr
    for factor in ("0", "nan", "long"):
        done = subprocess.run([*cli, "layers", "report", "--patience", factor], capture_output=True, text=True, check=False)
        assert done.returncode == 125 and f"--patience: '{factor}' is no number from 1 to 1000" in done.stderr, done


def test_what_a_payload_says_is_escaped_in_the_page() -> None:
    from msgspec.structs import replace

    evil = replace(chosen("open-read")[0], code="raise ValueError('<script>alert(1)</script>')")
    page = tables.html(report("untrusted", only=[evil], layers=[POLICY], patience=LONGER))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_table_in_the_documents_is_that_of_this_catalogue() -> None:
    page = (ROOT / "docs" / "layers-table.md").read_text()
    shown = [line.split("**")[1] for line in page.splitlines() if line.startswith("| **") and not line.startswith("| **policy")]
    assert shown == [one.name for one in payloads()], "nsjail-py layers report --markdown docs/layers-table.md"
    heads = {line for line in page.splitlines() if line.startswith("| payload |")}
    assert heads == {f"| payload | goal | {' | '.join((*LAYERS, POLICY))} | what happened to the host under `untrusted` |"}
    assert f"| **policy `untrusted`, none of the above** | {len(payloads())} | {len(payloads())} |" in page
