"""Policies from files, and changed policies: the shipped ones keep their promises, and every fault is told at once, with its place."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsjail_py import policyfile, run
from nsjail_py.errors import PolicyError
from nsjail_py.policy import Limits, Mount, Policy, Python, Syscalls


@pytest.fixture
def write(tmp_path):
    def write(text, name="own.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_the_shipped_policies_are_sound():
    assert policyfile.names() == ["moderate", "trusted", "untrusted"]
    for name in policyfile.names():
        policy = policyfile.load(name)
        assert policy.name == name
        assert policy.description
        assert policyfile.problems(policy) == []
        assert "# Stops:" in policyfile.source(name)


def test_untrusted_promises_the_most():
    policy = policyfile.load("untrusted")
    assert (policy.root, policy.proc, policy.landlock, policy.loopback, policy.exec_in_writable) == ("minimal", "pid", True, False, False)
    assert policy.syscalls is not None
    assert not policy.syscalls.exec
    assert set(policy.namespaces) == {"user", "mount", "pid", "net", "ipc", "uts", "cgroup"}
    assert (policy.limits.memory, policy.limits.cpu_time, policy.limits.wall_time) == (512 << 20, 30.0, 60.0)


def test_a_file_extends_a_policy_entry_by_entry(write):
    policy = policyfile.load(
        write('extends = "untrusted"\nbest_effort = []\nenv = { A = "1" }\n[limits]\nmemory = "1G"\nwall_time = "unlimited"\n')
    )
    assert policy.name == "own"
    assert policy.description == ""
    assert policy.best_effort == ()
    assert policy.limits.memory == 1 << 30
    assert policy.limits.wall_time is None
    assert policy.limits.cpu_time == 30.0
    assert policy.syscalls == policyfile.load("untrusted").syscalls


def test_a_file_extends_a_file_beside_it(write):
    write('extends = "moderate"\nhostname = "base"\n', "base.toml")
    assert policyfile.load(write('extends = "./base.toml"\n')).hostname == "base"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "is not TOML"),
        (b"a = '\xff'", "is not TOML"),
        ("a = " + "[" * 100_000, "is not TOML"),
        ('extends = "own.toml"', "goes round in a circle (own.toml -> own.toml)"),
        ('extends = "untrustd"', 'did you mean "untrusted"?'),
        ("extends = 3", "$.extends: must be the name"),
        ("memry = 3", "$.memry: there is no such field"),
        ("[limits]\nmemry = 3", '$.limits.memry: there is no such field (did you mean \"memory\"?)'),
        ("memory = '1G'", "$.memory: there is no such field (write it under [limits])"),
        ('imports = ["numpy"]', "$.imports: there is no such field (write it under [python])"),
        ('[limits]\nextends = "untrusted"\nloopback = true', "$.limits.extends: there is no such field (write it above the first [table])"),
        ("[limits]\nloopback = true", "$.limits.loopback: there is no such field (write it above the first [table])"),
        ('extend = "untrusted"', '$.extend: there is no such field (did you mean "extends"?)'),
        ('best_effort = ["cgroups"]', 'did you mean "cgroup"?'),
        ("[limits]\nmemory = '64MB'", "$.limits.memory: size '64MB' is ambiguous"),
        ("[limits]\nprocesses = 0", "$.limits.processes: must be more than 0"),
        ("[limits]\nprocesses = true", "$.limits.processes: must be a whole number, not True"),
        ("[limits]\nprocesses = 4194305", "at most 4194304"),
        ("[limits]\nwall_time = nan", "$.limits.wall_time: time nan is not a time"),
        ("[limits]\ncpu_time = 0.0", "$.limits.cpu_time: must be more than 0"),
        ("limits = 3", "$.limits: must be a table"),
        ("loopback = 1", "$.loopback: must be true or false"),
        ('proc = "pidd"', '$.proc: \'pidd\' is not one of its values (allowed: masked, none, pid; did you mean "pid"?)'),
        ('root = "minmal"', 'did you mean "minimal"?'),
        ('root = "/"', 'write root = "host"'),
        ('root = "/a/../b"', '$.root: must not have ".." in it'),
        ('namespaces = ["net"]', "$.namespaces: must have user, mount, pid"),
        ('namespaces = ["user", "mount", "pid"]\nloopback = true', "$.loopback: needs a network of its own"),
        ('hostname = ""', "$.hostname: must have 1 to 64 bytes"),
        (f'hostname = "{"x" * 65}"', "$.hostname: must have 1 to 64 bytes"),
        ('[env]\nA = "\\u0000"', "$.env.A: must not have a NUL"),
        ('[env]\n"A=B" = ""', "$.env.A=B: 'A=B' cannot be the name"),
        ("[env]\nA = 1", "$.env.A: must be text, not 1"),
        ('[syscalls]\nallow = ["@fils"]', "$.syscalls.allow[0]: '@fils' is no set (did you mean \"@files\"?)"),
        ('[python]\nproject = "here"', "$.python.project: must be an absolute path"),
        ("[[mounts]]\nsource = '/a'", "$.mounts[0].target: is missing"),
        ('"a\\n\\u001b[31m" = 1\n[limits]\n"c\\n" = 1', r"$.a\n\x1b[31m: there is no such field"),
        ('[limits]\n"c\\n" = 1\n"memory\\n" = "64MB"', r"$.limits.memory\n: there is no such field"),
        ('[env]\n"A\\nB" = 1', r"$.env.A\nB: must be text"),
        ('extends = "a\\nb"', r"$.extends: a\nb: there is no policy"),
        ('extends = "./a\\nb"', r"b: cannot be read: No such file"),
        ('"a.b" = 1\nloopback = 1', "$.a.b: there is no such field"),
        (f"env.{'.'.join('a' * 1500)} = 1", "nested too deeply"),
        (f"proc.{'.'.join('a' * 1500)} = 1", "nested too deeply"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_file_and_place(write, text, said):
    path = write(text)
    problems = policyfile.check(path)
    assert any(said in problem for problem in problems), problems
    assert all(problem.startswith(f"{path}: ") and problem.isprintable() for problem in problems)


def test_a_long_chain_of_policies_is_told_in_one_line(write):
    for number in range(1000):
        path = write(f'extends = "./{number - 1}.toml"' if number else "", f"{number}.toml")
    [problem] = policyfile.check(path)
    assert problem.endswith("$.extends: more than 16 policies, each extending the next")
    assert policyfile.check(path.with_name("16.toml")) == []


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("data", "must be an absolute path"),
        ("/a/../proc", 'must not have ".."'),
        ("/a\0b", "NUL"),
        *(
            (own, "is the jail's own")
            for own in (
                "/",
                "/proc",
                "/proc/sys",
                "//proc/",
                "/./dev/shm",
                "/dev",
                "/work",
                "/work/",
                "/work/x",
                "/tmp",
                "/tmp/a/b",
                "/app/x",
            )
        ),
        ("/taken", "collides with /taken of $.mounts[0]"),
        ("/taken//below/", "collides"),
        ("/project/x", "collides with /project of $.python.project"),
    ],
)
def test_a_mount_cannot_take_a_place_that_is_not_free(target, said):
    with pytest.raises(PolicyError) as caught:
        policyfile.override(
            policyfile.load("untrusted"), project="/p", mounts=[Mount(source="/a", target="/taken"), Mount(source="/a", target=target)]
        )
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("$.mounts[1].target: ")
    assert said in caught.value.problems[0]


def test_all_faults_are_told_at_once(write):
    path = write('hostname = ""\nproc = "x"\nfoo = 1\n[limits]\nmemory = "?"\nprocesses = 0\n[[mounts]]\nsource = "a"\ntarget = "/proc"\n')
    places = [problem.removeprefix(f"{path}: ").split(":")[0] for problem in policyfile.check(path)]
    assert sorted(places) == [
        "$.foo",
        "$.hostname",
        "$.limits.memory",
        "$.limits.processes",
        "$.mounts[0].source",
        "$.mounts[0].target",
        "$.proc",
    ]


def test_a_wrong_shape_hides_no_other_fault_of_its_table(write):
    path = write("""
namespaces = ["net", "usr"]
[limits]
processes = 0
files = "many"
[syscalls]
allow = [3, "@fils"]
[env]
A = 1
"B=" = ""
[python]
imports = ["", 4]
project = "here"
colour = 1
[[mounts]]
source = "a"
[[mounts]]
source = 1
target = "/proc"
""")
    places = [problem.removeprefix(f"{path}: ").split(":")[0] for problem in policyfile.check(path)]
    assert sorted(places) == sorted([
        "$.namespaces[1]", "$.namespaces", "$.limits.processes", "$.limits.files", "$.syscalls.allow[0]", "$.syscalls.allow[1]",
        "$.env.A", "$.env.B=", "$.python.imports[0]", "$.python.imports[1]", "$.python.project", "$.python.colour",
        "$.mounts[0].source", "$.mounts[0].target", "$.mounts[1].source", "$.mounts[1].target",
    ])  # fmt: skip


@pytest.mark.parametrize("path", ["/nowhere.toml", "/", "/a\0b", "untrust", ""])
def test_a_policy_that_cannot_be_read_is_one_error(path):
    with pytest.raises(PolicyError) as caught:
        policyfile.load(path)
    assert len(caught.value.problems) == 1


def test_override_takes_flat_names():
    base = policyfile.override(policyfile.load("untrusted"), env={"A": "1"}, mounts=[Mount(source="/a", target="/a")])
    changed = policyfile.override(
        base, memory="256M", wall_time=None, cpu_time=1, imports=["numpy"], project=Path("/p"), env={"B": "2"},
        mounts=(Mount(source="/b", target="/b"),), hostname="box", syscalls=Syscalls(allow=("@files",)),
    )  # fmt: skip
    assert changed.limits == Limits(
        **{**{f: getattr(base.limits, f) for f in Limits.__struct_fields__}, "memory": 256 << 20, "wall_time": None, "cpu_time": 1.0}
    )
    assert changed.python.imports == ("numpy",)
    assert changed.python.project == "/p"
    assert changed.env == {"A": "1", "B": "2"}
    assert [mount.target for mount in changed.mounts] == ["/a", "/b"]
    assert changed.hostname == "box"
    assert changed.syscalls == Syscalls(allow=("@files",))
    assert policyfile.override(base) == base


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Policy(), policyfile.override(Policy(), memory="512M")),
        (Policy(), Policy(python=Python(), env={}, mounts=())),
        (Policy(limits=Limits(wall_time=1)), Policy(limits=Limits(wall_time=1.0))),
        (Policy(env={"A": "1", "B": "2"}), Policy(env={"B": "2", "A": "1"})),
        (Policy(env_pass=["A"]), Policy(env_pass=["A"])),  # type: ignore[arg-type]
        (Policy(syscalls=Syscalls(allow=["@files"])), Policy(syscalls=Syscalls(allow=["@files"]))),  # type: ignore[arg-type]
        *((one, pickle.loads(pickle.dumps(one))) for one in map(policyfile.load, ("trusted", "moderate", "untrusted"))),
    ],
)
def test_equal_policies_have_one_hash(one: Policy, other: Policy) -> None:
    assert one == other and hash(one) == hash(other) and other in {one}


@pytest.mark.parametrize("changes", [{"env": {"A": "2"}}, {"memory": "1M"}, {"imports": ["json"]}, {"hostname": "x"}])
def test_other_policies_have_another(changes: dict[str, object]) -> None:
    basis = policyfile.override(Policy(), env={"A": "1"})
    assert hash(policyfile.override(basis, **changes)) != hash(basis)


def test_override_refuses_unknown_names_and_knows_near_ones():
    with pytest.raises(PolicyError) as caught:
        policyfile.override(policyfile.load("untrusted"), memori="1G", proceses=3, cpu_time=-1)
    assert len(caught.value.problems) == 3
    assert 'did you mean "memory"?' in str(caught.value)
    assert 'did you mean "processes"?' in str(caught.value)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("capture_output", "captured unless"), ("text", "bytes"), ("encoding", "bytes"), ("check", "result.check()"),
        ("cwd", "/work"), ("shell", '"/bin/sh", "-c"'),
    ],
)  # fmt: skip
def test_what_subprocess_takes_and_we_do_not_is_told_with_what_there_is_instead(name, instead):
    with pytest.raises(PolicyError, match=f"{name}: there is no such setting") as caught:
        run(["/bin/true"], **{name: True})
    assert instead in str(caught.value)


def test_a_policy_made_by_hand_is_checked_by_the_same_rules():
    assert policyfile.problems(Policy(limits=Limits(processes=0), hostname="")) != []
    assert policyfile.problems(Policy(loopback="yes")) == ["$.loopback: must be true or false, not 'yes'"]
    assert policyfile.problems(Policy()) == []
    assert "not valid Unicode" in policyfile.problems(Policy(workdir="/\udcff"))[0]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["memory", "source", "target", "allow", "x"]), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    st.sampled_from(Policy.__struct_fields__ + Limits.__struct_fields__),
)
def test_no_value_does_worse_than_a_policy_error(value, field):
    try:
        policy = policyfile.override(Policy(), **{field: value})
    except PolicyError as error:
        assert error.problems  # noqa: PT017
    else:
        assert policyfile.problems(policy) == []


def test_loading_a_policy_does_not_load_libseccomp():
    code = "import sys; from nsjail_py import policyfile; policyfile.load('untrusted'); sys.exit('pyseccomp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
