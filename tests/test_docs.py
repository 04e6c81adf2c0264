"""What the documents say is true: their examples run, and the generated pages are those of this code."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_policy_reference_is_generated_from_the_types() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "generate.py"))["reference"]
    assert (ROOT / "docs" / "policy-reference.md").read_text() == reference()


def test_the_python_example_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 and done.stdout.startswith("ok b'42\\n'"), done.stderr


def test_the_example_prints_what_the_readme_shows() -> None:
    shown = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    done = subprocess.run(
        [sys.executable, "-m", "nsjail_py", "run", "examples/hello.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    refused = [line for line in done.stdout.splitlines() if ": " in line and not line.startswith(("the whole", "hello"))]
    assert len(refused) == 5 and all(line in shown for line in refused), done.stdout


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_every_step_has_a_name_that_errors_can_show() -> None:
    from nsjail_py.reports import STEP_NAMES

    header = Path(ROOT / "native" / "plan.h").read_text()
    assert len(STEP_NAMES) == header.count("\tSTEP_")


def test_the_threat_model_maps_every_rule_to_tests_that_exist() -> None:
    from nsjail_py import selftest_promises

    text = (ROOT / "docs" / "threat-model.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 43))
    assert [number for number, held in rows if not re.search(r"::|selftest:|not applicable|code: ", held)] == []
    for file, name in re.findall(r"`(\w+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)
    attacks = {promise.attack for promise in selftest_promises.promises("/nowhere", "NAME")}
    assert set(re.findall(r"`selftest:([\w-]+)`", text)) <= attacks
