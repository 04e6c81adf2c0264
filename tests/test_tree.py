"""A minimal root holds what one program needs and nothing else, is built once, and is never seen half made."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from elfmaker import elf as made

from nsjail_py import Mount, cachedir, compiled, elf, interpreter, run, run_python, tree, treebuild
from nsjail_py.errors import PolicyError, SetupError

TRUE = os.path.realpath("/bin/true")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of trees, empty."""
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/roots"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory):
    """A tree of the running interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSJAIL_PY_CACHE", str(tmp_path_factory.mktemp("python") / "cache"))
        yield tree.python_tree(interpreter.inspect())


def files(path: Path) -> list[Path]:
    return [Path(here, name) for here, _, names in os.walk(path) for name in names]


def unfinished(store: Path) -> list[str]:
    return [name for name in os.listdir(store) if name.startswith(".new-")]


def test_the_interpreter_and_its_library_keep_their_paths(python):
    found = interpreter.inspect()
    assert os.access(f"{python.path}{found.executable}", os.X_OK)
    assert any(os.path.isfile(f"{python.path}{folder}/os.py") for folder in found.stdlib)


def test_no_shell_and_no_other_program_is_there(python):
    programs = {path.name for path in files(python.path) if path.parent.name in ("bin", "sbin")}
    assert programs == {os.path.basename(interpreter.inspect().executable)}


def test_what_only_development_needs_is_not_there(python):
    folders = {name for _, names, _ in os.walk(python.path) for name in names}
    assert not folders & tree.UNWANTED
    assert not [path for path in files(python.path) if "libtk" in path.name or path.name.startswith("_tkinter")]


def test_names_that_are_the_jails_own_are_not_there(python):
    assert not {entry.name for entry in python.entries} & tree.PRIVATE


def test_links_at_the_top_are_those_of_the_host(python):
    for entry in python.entries:
        assert (entry.link is not None) == (python.path / entry.name).is_symlink()
        if entry.link is not None:
            assert entry.link == os.readlink(f"/{entry.name}").lstrip("/")
            assert (python.path / entry.name).resolve().is_relative_to(python.path)


def test_everybody_may_read_everything_and_nobody_becomes_another(python):
    for path in files(python.path):
        if not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) in (0o644, 0o755), path
    assert all(stat.S_IMODE(os.stat(here).st_mode) == 0o755 for here, _, _ in os.walk(python.path))


def test_every_module_has_its_compiled_form(python):
    tag = sys.implementation.cache_tag
    missing = [
        path
        for path in files(python.path)
        if path.suffix == ".py"
        and path.parent.name in ("json", "asyncio")
        and not (path.parent / f"__pycache__/{path.stem}.{tag}.pyc").exists()
    ]
    assert not missing


def test_the_accounts_inside_are_the_jails_user_and_nobody(python):
    lines = (python.path / "etc/passwd").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["jail", "nobody"]


def test_modules_with_libraries_work_inside():
    code = "import json, sqlite3, decimal, ssl, zlib, ctypes, multiprocessing, lzma, bz2, hashlib; print(ssl.OPENSSL_VERSION)"
    result = run_python(code)
    assert result.ok, (result.summary, result.stderr)


@pytest.mark.parametrize(
    ("imports", "code"),
    [(("numpy",), "import numpy; print(numpy.ones(3).sum())"), (("pandas", "matplotlib"), "import pandas, matplotlib; print('3.0')")],
)
def test_listed_distributions_work_inside(imports, code):
    result = run_python(code, imports=imports, env={"OPENBLAS_NUM_THREADS": "1", "MPLCONFIGDIR": "/tmp"})
    assert result.ok, (result.summary, result.stderr)
    assert result.stdout == b"3.0\n"


def test_a_distribution_that_is_not_listed_is_not_there():
    result = run_python("import numpy")
    assert b"No module named 'numpy'" in result.stderr


def test_a_program_comes_with_its_libraries_and_its_locale_only(store):
    found = tree.program_tree(TRUE)
    names = {path.name for path in files(found.path) if path.parent.name != "etc" and tree.LOCALE not in str(path)}
    assert "true" in names
    assert all(name == "true" or ".so" in name for name in names)


def test_a_program_behind_links_is_a_copy_at_the_path_that_was_asked_for(store, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to("/bin/true")
    (tmp_path / "program").symlink_to(tmp_path / "link")
    monkeypatch.setattr(tree, "SYSTEM", f"{tmp_path}/")
    monkeypatch.setattr(tree, "PRIVATE", frozenset())
    inside = Path(f"{tree.program_tree(str(tmp_path / 'program')).path}{tmp_path}/program")
    assert inside.read_bytes() == Path("/bin/true").read_bytes()
    assert not inside.is_symlink()


def test_programs_from_elsewhere_with_the_same_libraries_share_a_tree(store, tmp_path):
    for name in ("one", "two"):
        shutil.copy(TRUE, tmp_path / name)
    one, two = (tree.program_tree(str(tmp_path / name)) for name in ("one", "two"))
    assert one == two
    assert not [path for path in files(one.path) if path.name in ("one", "two")]


def test_a_script_brings_the_program_that_its_first_line_names(store, tmp_path):
    script = tmp_path / "script"
    script.write_text(f"#!{TRUE} -x\n")
    assert Path(f"{tree.program_tree(str(script)).path}{TRUE}").exists()


@pytest.mark.parametrize(
    "line", ["#!{secret}", "#!/usr/..{secret}", "#!/usr/bin/../..{secret}", "#!/usr/../../stray", "#!/usr/bin/env ../..{secret}"]
)
def test_a_script_cannot_name_a_file_that_is_no_program(store, tmp_path, line):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    secret.chmod(0o755)
    script = tmp_path / "script"
    script.write_text(line.format(secret=secret) + "\n")
    found = tree.program_tree(str(script))
    assert not [path for path in files(store) if path.name in ("secret", "stray")]
    assert found.path.parent == store


def test_a_script_cannot_name_a_file_of_the_system_that_is_no_program(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "SYSTEM", f"{tmp_path}/")
    monkeypatch.setattr(tree, "PRIVATE", frozenset())
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "secret").chmod(0o755)
    (tmp_path / "script").write_text(f"#!{tmp_path}/secret\n")
    tree.program_tree(str(tmp_path / "script"))
    assert not [path for path in files(store) if path.name == "secret"]


def test_a_program_cannot_bring_the_password_file_of_the_host(store, tmp_path):
    program = tmp_path / "program"
    for data in (made(["/etc/shadow"]), made(["shadow"], "/etc"), made([], None, "/etc/shadow"), made(["shadow"], "/usr/../etc")):
        program.write_bytes(data)
        with pytest.raises(PolicyError, match="not a library"):
            tree.program_tree(str(program))


def test_a_library_that_is_exchanged_after_the_check_is_not_copied(tmp_path):
    secret = tmp_path / "secret.so"
    secret.write_text("a key")
    (tmp_path / "top").mkdir()
    with pytest.raises(PolicyError, match="changed while"):
        treebuild.Builder(tmp_path / "top").copy(str(secret), "/usr/lib/secret.so", named=True)
    assert not [path for path in files(tmp_path / "top") if path.name == "secret.so"]


def test_a_library_may_have_any_name(tmp_path):
    name = os.fsdecode(b"\xff\xfe.so")
    program = tmp_path / "program"
    program.write_bytes(made(["libc.so.6", name], "$ORIGIN", elf.loader(TRUE)))
    program.chmod(0o755)
    (tmp_path / name).write_bytes(made())
    assert run([program]).verdict == "signal"  # there is no code in it


@pytest.mark.parametrize("top", ["in_opt", "tmp_path"])
def test_a_program_may_have_any_name(top, request, cli):
    program = os.fsencode(request.getfixturevalue(top)) + b"/\xff"
    shutil.copyfile(TRUE, program)
    os.chmod(program, 0o755)
    done = subprocess.run([*cli, "exec", "--", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_path_leads_out_of_the_tree(tmp_path):
    (tmp_path / "top").mkdir()
    builder = treebuild.Builder(tmp_path / "top")
    for path in ("/../x", "/usr/../../x", "x", "//x", "/lib/../../x"):
        assert builder.place(path).is_relative_to(tmp_path / "top")


def test_a_fifo_instead_of_a_program_does_not_block(store, tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o755)
    with pytest.raises(PolicyError, match="not a regular file"):
        tree.program_tree(str(tmp_path / "fifo"))


def test_mount_points_are_made_and_give_another_tree(store):
    plain = tree.program_tree(TRUE)
    found = tree.program_tree(TRUE, ("/usr/share/data/", "/usr/share/file"))
    assert found.path != plain.path
    assert (found.path / "usr/share/data").is_dir()
    assert (found.path / "usr/share/file").is_file()


def test_a_mount_may_lie_in_any_directory_that_a_tree_has(tmp_path):
    (tmp_path / "file").write_text("here")
    top = interpreter.inspect().prefix.split("/")[1]
    for target in ("/etc/nsjail-test/file", f"/{top}/nsjail-test/file", "/opt/nsjail-test/file", "/nsjail-test/file"):
        mounts = [Mount(source=str(tmp_path / "file"), target=target)]
        assert run_python(f"print(open('{target}').read())", mounts=mounts).check().stdout == b"here\n"
        if not target.startswith(f"/{top}/") or top == "usr":
            assert run(["/bin/cat", target], mounts=mounts).check().stdout == b"here"


def test_a_tree_is_built_once(store, monkeypatch):
    first = tree.program_tree(TRUE)
    monkeypatch.setattr(treebuild, "build", lambda *_: pytest.fail("it was built again"))
    monkeypatch.setattr(elf, "closure", lambda *_: pytest.fail("it was read again"))
    assert tree.program_tree(TRUE) == first


def test_a_changed_library_gives_another_tree(store, tmp_path, monkeypatch):
    program, library = tmp_path / "program", tmp_path / "liba.so"
    library.write_bytes(made())
    library.chmod(0o755)
    program.write_bytes(made(["liba.so"], "$ORIGIN"))
    monkeypatch.setattr(tree, "SYSTEM", f"{tmp_path}/")
    monkeypatch.setattr(tree, "PRIVATE", frozenset())
    first = tree.program_tree(str(program))
    library.write_bytes(made() + b"new")
    second = tree.program_tree(str(program))
    assert first.path != second.path
    assert Path(f"{second.path}{library}").read_bytes().endswith(b"new")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An installed distribution's only module."""
    site = tmp_path / "site-packages"
    (site / "pk-1.dist-info").mkdir(parents=True)
    (site / "pk-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: pk\nVersion: 1\n")
    (site / "pk-1.dist-info/RECORD").write_text("pk/__init__.py,,\npk-1.dist-info/METADATA,,\npk-1.dist-info/RECORD,,\n")
    (site / "pk").mkdir()
    (site / "pk/__init__.py").write_text("VALUE = 'first'")
    return site / "pk/__init__.py"


def test_a_package_that_was_edited_in_place_gives_another_tree(store, package):
    found = interpreter.inspect()._replace(search=(str(package.parents[1]),))
    first = tree.python_tree(found, ("pk",))
    package.write_text("VALUE = 'edited'")
    second = tree.python_tree(found, ("pk",))
    assert Path(f"{second.path}{found.site}/pk/__init__.py").read_text() == "VALUE = 'edited'"
    assert tree.python_tree(found, ("pk",)) == second != first


@pytest.mark.parametrize("wait", [0.0, 3600.0], ids=["looked at", "not looked at yet"])
def test_a_process_sees_what_was_installed_meanwhile_when_it_looks_again(store, package, monkeypatch, wait):
    compiled._for_python.cache_clear()
    monkeypatch.setattr(compiled, "LOOK_AGAIN", wait)
    found = interpreter.inspect()._replace(search=(str(package.parents[1]),))
    monkeypatch.setattr(interpreter, "inspect", lambda path: found)
    source = "import pk; print(pk.VALUE)"
    assert run_python(source, imports=["pk"]).check().stdout == b"first\n"
    package.write_text("VALUE = 'upgraded'")
    (package.parents[1] / "pk-1.dist-info/RECORD").open("a").write("pk/new.py,,\n")
    assert run_python(source, imports=["pk"]).check().stdout == (b"first\n" if wait else b"upgraded\n")


def test_two_builders_at_once_both_get_the_tree(store):
    found: list[tree.Tree] = []
    threads = [threading.Thread(target=lambda: found.append(tree.program_tree(TRUE))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert not unfinished(store)


def test_a_full_disk_is_an_error_with_advice_and_leaves_nothing(store, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(treebuild, "_copy_bytes", full)
    with pytest.raises(SetupError, match="make room") as caught:
        tree.program_tree(TRUE)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(store) == []


def test_what_a_killed_builder_left_is_swept_away_but_not_what_is_being_built(store):
    tree.program_tree(TRUE)
    old, busy = store / ".new-old", store / ".new-busy"
    for path in (old, busy):
        (path / "usr").mkdir(parents=True)
        os.utime(path, (time.time() - 2 * cachedir.STALE,) * 2)
    with subprocess.Popen(
        ["flock", "-x", str(busy), "-c", "echo locked; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        tree.program_tree(os.path.realpath("/bin/false"))
        holder.communicate(b"\n")
    assert unfinished(store) == [".new-busy"]


def test_the_umask_of_the_caller_does_not_matter(store):
    before = os.umask(0o077)
    try:
        found = tree.program_tree(TRUE)
    finally:
        os.umask(before)
    assert all(stat.S_IMODE(os.stat(here).st_mode) == 0o755 for here, _, _ in os.walk(found.path))


def test_a_damaged_note_is_written_anew(store):
    first = tree.program_tree(TRUE)
    for note in store.glob("*.json"):
        note.write_text("{")
    assert tree.program_tree(TRUE) == first


def test_asking_again_reads_one_note_and_nothing_else(python: tree.Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is noted with the stamps of what it was made from, which are looked at and not read."""
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(python.path.parent.parent))
    found = interpreter.inspect()
    first = tree.python_tree(found)
    opened: list[str] = []
    listening = True
    sys.addaudithook(
        lambda event, given: opened.append(str(given[0])) if listening and event in ("open", "os.listdir", "os.scandir") else None
    )
    assert tree.python_tree(found) == first
    listening = False
    (note,) = [path for path in opened if path != str(first.path)]  # which is marked as in use
    assert note.startswith(str(python.path.parent.parent))
    assert note.endswith(".json")


def test_the_loader_finds_every_library_by_the_trees_own_cache() -> None:
    """A search would try a dozen directories that are not there; and the host's cache would tell what is installed on it."""
    result = run_python("import ssl, sqlite3, decimal", env={"LD_DEBUG": "libs"}).check()
    told = result.stderr.decode()
    assert told.count("search cache=/etc/ld.so.cache") > 3
    assert "system search path" not in told, told


def test_the_trees_cache_names_its_libraries_and_no_others(store: Path) -> None:
    ldconfig = shutil.which("ldconfig", path="/sbin:/usr/sbin")
    if ldconfig is None:
        pytest.skip("ldconfig, which reads the cache, is not installed")
    top = tree.program_tree(TRUE).path
    listed = subprocess.run([ldconfig, "-p", "-C", top / "etc/ld.so.cache"], capture_output=True, text=True, check=True).stdout
    named = {line.partition(" => ")[2] for line in listed.splitlines() if " => " in line}
    assert {os.path.basename(path) for path in named} == {
        path.name for path in files(top) if ".so" in path.suffixes and path.parent.name != "etc"
    }
    assert all((top / path.lstrip("/")).is_file() for path in named)
