"""What the documents say is true: their examples run, and the generated pages are those of this code."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

import nsjail_py
from nsjail_py.options import EPILOG, parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = [
    pytest.param(block, id=f"{page.name}-{n}")
    for page in PAGES
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]
MAY_FIND = ("doctor", "selftest", "scan", "why")
"""Commands that say by status 1 that this host, a script or a run is not all that it could be."""


def shell_examples() -> list[str]:
    texts = [(ROOT / "README.md").read_text(), EPILOG]
    lines = [line.split("#")[0].strip() for text in texts for line in text.splitlines() if line.lstrip().startswith("nsjail-py ")]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("page", ["policy-reference.md", "reference/commands.md", "reference/api.md"])
def test_what_is_generated_is_of_this_code(page: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    assert (ROOT / "docs" / page).read_text() == pages[page]()


def test_the_page_of_commands_has_every_command() -> None:
    page = (ROOT / "docs/reference/commands.md").read_text()
    (listed,) = parser()._subparsers._group_actions
    assert [name for name in listed.choices if f"## nsjail-py {name}" not in page] == []


def test_the_page_of_the_api_has_every_name_that_is_exported() -> None:
    page = (ROOT / "docs/reference/api.md").read_text()
    names = {*nsjail_py.__all__, *(f"aio.{name}" for name in ("run", "run_python", "communicate", "stream")), "systemd.Resident"} - {"aio"}
    assert [name for name in names if not re.search(rf"`(async )?{re.escape(name)}[`(]", page)] == []
    assert nsjail_py.Cell.__name__ in nsjail_py.__all__


@pytest.mark.parametrize("block", PYTHON)
def test_every_python_example_prints_what_it_says(block: str) -> None:
    says = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.M)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120 * PATIENCE, check=False)
    assert says and done.stdout.splitlines() == says, done.stderr


@pytest.mark.parametrize("line", shell_examples())
def test_every_shell_example_works(line: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # inside, another user reads what is in it
    (tmp_path / "words").write_text("b\na\n")
    (tmp_path / "data.csv").write_text("1,2\n")
    (tmp_path / "hello.py").write_text("print('hello')")
    (tmp_path / "model.py").write_text(
        "import sys, numpy\nprint(numpy.loadtxt(sys.argv[1], delimiter=',') if sys.argv[1:] else numpy.ones(2))"
    )
    (tmp_path / "report.json").write_text(json.dumps(nsjail_py.run_python("import os; os.fork()").to_dict()))
    command = line.replace("nsjail-py", f"'{sys.executable}' -m nsjail_py", 1)
    done = subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300 * PATIENCE, check=False)
    assert (done.stdout or ">" in line) and done.returncode in ((0, 1) if line.split()[1] in MAY_FIND else (0,)), done.stderr


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_where_a_change_goes_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"[\w/.-]+\.(?:py|c|h|toml|md|sh)\b", text[text.index("## Where a change goes") :]))
    files = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*") if ".venv" not in path.parts]
    assert names and [name for name in names if not any(f"/{file}".endswith(f"/{name}") for file in files) and "NAME" not in name] == []


def test_the_example_prints_what_the_readme_shows() -> None:
    shown = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    done = subprocess.run(
        [sys.executable, "-m", "nsjail_py", "run", "examples/hello.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    refused = [line for line in done.stdout.splitlines() if ": " in line and not line.startswith(("the whole", "hello"))]
    assert len(refused) == 5 and all(line in shown for line in refused), done.stdout


def test_every_step_has_a_name_that_errors_can_show() -> None:
    from nsjail_py.reports import STEP_NAMES

    header = Path(ROOT / "native" / "plan.h").read_text()
    assert len(STEP_NAMES) == header.count("\tSTEP_")


def test_the_threat_model_maps_every_rule_to_tests_that_exist() -> None:
    from nsjail_py import selftest_promises

    text = (ROOT / "docs" / "threat-model.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 43))
    assert [number for number, held in rows if not re.search(r"::|selftest:|not applicable", held)] == []
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)
    attacks = {promise.attack for promise in selftest_promises.promises("/nowhere", "NAME")}
    assert set(re.findall(r"`selftest:([\w-]+)`", text)) <= attacks


@pytest.mark.parametrize("page", ["learn.md", "audit.md", "oci.md"])
def test_the_tables_within_pages_are_those_of_this_code(page: str) -> None:
    filled = runpy.run_path(str(ROOT / "docs" / "generate.py"))["filled"]
    text = (ROOT / "docs" / page).read_text()
    assert text == filled(page) and text.count("\n| ") > 5


@pytest.mark.parametrize("page", ["learn.md", "oci.md", "alone.md"])
def test_the_shell_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    assert blocks
    for block in blocks if os.geteuid() == 0 else [block for block in blocks if "bundle" not in block]:
        done = subprocess.run(
            ["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120 * PATIENCE, check=False
        )
        assert done.returncode == 0, (block, done.stderr)
