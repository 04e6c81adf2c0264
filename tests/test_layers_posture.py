"""The posture says for which code a policy is fit, and its rows tell the truth about what the jails of this host do."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT
from msgspec.structs import replace

import nsjail_py
from nsjail_py.layers.exposures import EXPOSURES, HOLES
from nsjail_py.layers.posture import LEVELS, Posture, _facts, posture, text
from nsjail_py.layers.posture import html as as_html


def state(found: Posture, name: str) -> str:
    (row,) = [row for row in found.rows if row.name == name]
    return row.state


def changed(**changes: Any) -> Posture:
    from nsjail_py.policyfile import load, override

    return posture(override(load("untrusted"), **changes))


@pytest.mark.parametrize(("name", "level"), [("trusted", "trusted"), ("moderate", "moderately trusted"), ("untrusted", "untrusted")])
def test_the_shipped_policies_are_fit_for_what_they_are_named_after(name: str, level: str) -> None:
    assert posture(name).level == level


def test_exposure_grows_from_level_to_level() -> None:
    assert posture("untrusted").exposure < posture("moderate").exposure < posture("trusted").exposure <= 10


def test_the_four_holes_are_closed_by_named_layers() -> None:
    found = posture("untrusted")
    assert [hole.name for hole in found.holes] == list(HOLES.values())
    for hole in found.holes:
        assert len(hole.layers) >= 2, hole
    assert {hole.state for hole in found.holes} <= {"closed", "narrowed"}
    assert {hole.state for hole in posture("trusted").holes} == {"narrowed", "open"}


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"env_pass": ("HOME",)}, "the caller's environment"),
        ({"proc": "masked"}, "other processes"),
        ({"root": "host"}, "reading files of the host"),
        ({"root": "system"}, "packages"),
        ({"mounts": [{"source": "/usr/share", "target": "/data", "writable": True}]}, "changing files of the host"),
        ({"syscalls": None}, "system calls"),
        ({"landlock": False}, "a second file system layer"),
        ({"memory": None}, "memory"),
        ({"cpu_time": None}, "time"),
        ({"processes": None}, "processes and descriptors"),
        ({"disk": None}, "storage and output"),
        ({"namespaces": ("user", "mount", "pid", "ipc", "uts", "cgroup")}, "network"),
        ({"namespaces": ("user", "mount", "pid", "net", "uts", "cgroup")}, "shared memory and queues"),
    ],
)
def test_every_opening_is_seen_and_told_how_to_close(changes: dict[str, Any], row: str) -> None:
    before, after = posture("untrusted"), changed(**changes)
    assert after.exposure > before.exposure or row in ("packages",), row
    (found,) = [one for one in after.rows if one.name == row]
    assert found.state != "closed" and found.residual and found.change


def test_what_it_says_to_change_leads_to_the_next_level() -> None:
    found = posture("moderate")
    assert found.next_level == "untrusted" and found.changes
    named = {change.partition(":")[0] for change in found.changes}
    assert {"other programs", "programs that it wrote", "new processes", "system calls"} <= named
    strict = nsjail_py.policy("untrusted")
    assert (
        posture(replace(nsjail_py.policy("moderate"), syscalls=strict.syscalls, exec_in_writable=False, landlock=True)).level == "untrusted"
    )


def test_it_agrees_with_what_a_run_reports() -> None:
    result = nsjail_py.run(["/bin/true"])
    found = posture("untrusted")
    assert found.mode == result.mode
    given = {one.name for one in result.protections if one.state == "applied"}
    assert (state(found, "rights of its user") == "closed") is ("own_uid" in given)
    assert (state(found, "memory") == "closed") is ("cgroup" in given)


def test_a_closed_row_is_closed_in_a_real_jail() -> None:
    source = """
import os, socket
def refused(call):
    try: call(); return False
    except OSError: return True
print(refused(os.fork), refused(socket.socket), refused(lambda: os.execv('/bin/sh', ['sh'])), refused(lambda: open('/etc/hostname', 'w')))
"""
    found = posture("untrusted")
    assert {state(found, name) for name in ("new processes", "network", "other programs", "changing files of the host")} == {"closed"}
    assert nsjail_py.run_python(source).stdout.split() == [b"True"] * 4


def test_what_this_host_cannot_give_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsjail_py import compiled

    monkeypatch.setattr(compiled, "landlock_abi", lambda: 0)
    found = posture("untrusted")
    assert any("Landlock" in one for one in found.refused) and found.level != "untrusted"
    assert "REFUSED here: landlock_fs: this kernel has no Landlock" in text(found)


def test_every_row_says_what_is_left() -> None:
    for name in ("trusted", "moderate", "untrusted"):
        for row in posture(name).rows:
            assert row.residual and (row.enforced or row.badness) and (row.change or row.badness <= 0.25), row
    assert len({one.name for one in EXPOSURES}) == len(EXPOSURES)


def test_the_command(cli: list[str], tmp_path: Path) -> None:
    done = subprocess.run([*cli, "posture", "untrusted", "--html", tmp_path / "p.html"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("policy untrusted, mode "), done.stderr
    tags: list[str] = []
    reader = html.parser.HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    reader.feed((tmp_path / "p.html").read_text())
    assert tags.count("tr") == 1 + len(EXPOSURES) + len(HOLES) and "script" not in tags
    done = subprocess.run([*cli, "posture", "moderate", "--json", "--require", "untrusted"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert said["level"] in LEVELS and len(said["rows"]) == len(EXPOSURES) and len(said["holes"]) == 4
    done = subprocess.run([*cli, "posture", "untrustd"], capture_output=True, text=True, check=False)
    assert done.returncode == 125 and 'did you mean "untrusted"' in done.stderr


def test_names_in_a_policy_are_escaped_in_the_page() -> None:
    found = changed(env_pass=("<script>",))
    assert "<script" not in as_html(found) and "&lt;script&gt;" in as_html(found)


def test_a_result_refers_to_the_posture_of_its_policy() -> None:
    result = nsjail_py.run_python("print(1)")
    found = result.posture
    assert found is not None and found == posture("untrusted") and found is nsjail_py.run_python("print(2)").posture
    assert "settled" not in result.to_dict() and json.dumps(result.to_dict())


def test_the_json_of_a_result_names_the_policy_and_its_level(cli: list[str], tmp_path: Path) -> None:
    script, report = tmp_path / "a.py", tmp_path / "report.json"
    script.write_text("print(1)")
    done = subprocess.run([*cli, "run", "--policy", "trusted", "--json", "--report", report, script], capture_output=True, check=True)
    found = posture("trusted")
    expected = {"policy": "trusted", "level": found.level, "exposure": found.exposure}
    assert json.loads(done.stdout)["posture"] == json.loads(report.read_text())["posture"] == expected
    assert replace(nsjail_py.run_python("print(1)"), settled=None).to_dict()["posture"] is None


def test_no_posture_is_judged_for_a_result_that_nobody_asks() -> None:
    source = "import sys, nsjail_py; nsjail_py.run_python('print(1)'); print('nsjail_py.layers.posture' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, check=True).stdout == b"False\n"


@pytest.mark.skipif(not IS_ROOT, reason="a bundle's user ids are root's to give")
@pytest.mark.parametrize("runtime", [*filter(shutil.which, ("crun", "runc", "runsc"))])
def test_nothing_is_closed_by_what_a_runtime_does_not_give(runtime: str) -> None:
    strict = nsjail_py.policy("untrusted")
    assert strict.syscalls
    policy = replace(strict, backend=f"oci:{runtime}", landlock=False, syscalls=replace(strict.syscalls, exec=True))
    facts, _, refused = _facts(policy)
    assert facts.states == {one.name: one.state for one in nsjail_py.run(["/bin/true"], policy=policy).protections}
    assert facts.reasons["own_uid"] and not refused
    assert state(posture(policy), "rights of its user") != "closed"


def test_the_posture_says_when_a_backend_cannot_give_what_the_policy_requires() -> None:
    from nsjail_py import policyfile

    found = posture(replace(policyfile.load("untrusted"), backend="oci:no-such-runtime"))
    assert any(one.startswith("backend: ") for one in found.refused)
