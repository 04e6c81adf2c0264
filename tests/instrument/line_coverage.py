"""Line coverage of native/ by the suite: ./dev coverage. It adds the counters up, and compares what no test reaches with uncovered.toml.

python line_coverage.py DIRECTORY
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
BUILT = TOP / "nsjail_py"
LEAST = 85.0


def lines(directory: Path) -> dict[str, dict[int, int]]:
    """How often each line of each file was run."""
    raw = [path for path in directory.glob("*.profraw") if path.stat().st_size]
    merged = directory / "all.profdata"
    subprocess.run(["llvm-profdata", "merge", "--failure-mode=all", "-o", merged, *raw], check=True)
    objects = [BUILT / "nsjail-launcher", BUILT / "_native.abi3.so", BUILT / "_template.abi3.so", *directory.glob("*.object")]
    named = [word for path in objects[1:] for word in ("-object", str(path))]
    command = ["llvm-cov", "export", "-format=lcov", "-instr-profile", merged, objects[0], *named]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[int, int]] = {}
    for line in said.splitlines():
        kind, _, rest = line.partition(":")
        if kind == "SF":
            current = found.setdefault(Path(rest).name, {})
        elif kind == "DA":
            number, count = map(int, rest.split(","))
            current[number] = max(current.get(number, 0), count)
    return {name: counts for name, counts in sorted(found.items()) if (TOP / "native" / name).exists() and name.endswith(".c")}


def function_of(source: list[str], number: int) -> str:
    """The function that a line lies in: its name stands at the margin, before a parenthesis."""
    for line in reversed(source[:number]):
        if found := re.match(r"[A-Za-z_][\w \*]*?(\w+)\(", line):
            return found[1]
    return ""


def main(directory: Path) -> int:
    explained: dict[str, dict[str, tuple[int, str]]] = tomllib.loads((HERE / "uncovered.toml").read_text())
    total = covered = 0
    wrong = []
    for name, counts in lines(directory).items():
        source = (TOP / "native" / name).read_text().splitlines()
        missed = [number for number, count in sorted(counts.items()) if not count]
        total, covered = total + len(counts), covered + len(counts) - len(missed)
        inside = Counter(function_of(source, number) for number in missed)
        allowed = {function: most for function, (most, _) in explained.get(name, {}).items()}
        open_questions = [n for n in missed if inside[function_of(source, n)] > allowed.get(function_of(source, n), 0)]
        print(f"{name:16}{100 * (1 - len(missed) / len(counts)):6.1f} %  {len(missed):4} lines not run, {len(open_questions)} unexplained")
        wrong += [f"native/{name}:{number}: {source[number - 1].strip()}" for number in open_questions]
    rate = 100 * covered / total
    print(f"{'together':16}{rate:6.1f} %  of {total} lines")
    print("\n".join(wrong))
    (directory / "lines.json").write_text(json.dumps({"covered": covered, "total": total, "unexplained": wrong}))
    return 1 if rate < LEAST or wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
