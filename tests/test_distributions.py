"""Imports bring an installed distribution with all that it needs, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsjail_py import distributions, interpreter
from nsjail_py.errors import PolicyError


class Site:
    """A site directory with made-up distributions."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.interpreter = interpreter.inspect()._replace(search=(str(top),))

    def install(self, name: str, *requires: str, files: tuple[str, ...] = (), record: bool = True, **more: str) -> None:
        info = self.top / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n" + "".join(f"Requires-Dist: {one}\n" for one in requires))
        for file, text in more.items():
            (info / file.replace("__", ".")).write_text(text)
        for file in files:
            path = self.top / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if record:
            rows = [*files, f"{info.name}/METADATA", f"{info.name}/RECORD"]
            (info / "RECORD").write_text("".join(f"{row},,\n" for row in rows))

    def closure(self, *names: str) -> list[str]:
        return [one.name for one in distributions.closure(self.interpreter, names)]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_a_distribution_requires_comes_along_and_nothing_else(site):
    site.install("one", "two>=1", "three ; python_version > '2'")
    site.install("two", "Four_x[fast] (>=1)")
    site.install("three")
    site.install("four.x")
    site.install("unrelated")
    assert site.closure("one") == ["four.x", "one", "three", "two"]


def test_extras_and_what_is_not_installed_stay_out(site):
    site.install("one", "two ; extra == 'fast'", "absent", "extra-things ; python_version > '2'")
    site.install("two")
    site.install("extra-things")
    assert site.closure("one") == ["extra-things", "one"]


def test_a_circle_of_requirements_ends(site):
    site.install("one", "two")
    site.install("two", "one")
    assert site.closure("two") == ["one", "two"]


def test_spelling_of_a_name_does_not_matter(site):
    site.install("Some_Thing")
    assert site.closure("some.thing") == ["Some_Thing"]


def test_the_name_that_one_imports_works_too(site):
    site.install("pillow", files=("PIL/__init__.py",))
    site.install("single", files=("alone.py",))
    assert site.closure("PIL") == ["pillow"]
    assert site.closure("alone") == ["single"]


def test_an_unknown_name_gets_the_near_spelling(site):
    site.install("numpy")
    with pytest.raises(PolicyError, match=r"'nunpy' is not installed; did you mean 'numpy'\?"):
        site.closure("nunpy")


def test_an_editable_install_is_pointed_to_project(site):
    site.install("mine", direct_url__json='{"url": "file:///x", "dir_info": {"editable": true}}')
    with pytest.raises(PolicyError, match="--project"):
        site.closure("mine")


def test_a_distribution_without_a_list_of_its_files_is_refused(site):
    site.install("apt-thing", record=False)
    with pytest.raises(PolicyError, match="install it with pip"):
        site.closure("apt-thing")


def test_only_files_inside_the_site_directory_are_taken(site, tmp_path):
    site.install("one", files=("one/__init__.py",))
    record = tmp_path / "one-1.0.dist-info/RECORD"
    record.write_text(record.read_text() + "../../../bin/one,,\n/etc/passwd,,\none/../../escaped,,\n,,\n")
    (tmp_path.parent / "escaped").touch()
    (found,) = distributions.closure(site.interpreter, ["one"])
    relative = {path for _, path in distributions.files(found)}
    assert relative == {"one/__init__.py", "one-1.0.dist-info/METADATA", "one-1.0.dist-info/RECORD"}
