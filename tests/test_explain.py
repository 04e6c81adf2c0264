"""`policy explain`: the sentences follow the policy, and warn of what it does not stop."""

from __future__ import annotations

from nsjail_py import policyfile
from nsjail_py.explain import BEST_EFFORT, LIMITS, sentences
from nsjail_py.policy import BestEffort, Limits, Mount, Policy


def section(policy, heading):
    lines = sentences(policy)
    start = lines.index(f"{heading}:") + 1
    rest = lines[start:]
    return " ".join(rest[: next((i for i, line in enumerate(rest) if not line.startswith("  ")), len(rest))])


def test_every_shipped_policy_has_all_four_sections():
    for name in policyfile.names():
        lines = sentences(policyfile.load(name))
        assert [line for line in lines[1:] if not line.startswith("  ")] == ["allowed:", "limited:", "hidden:", "not stopped:"]
        assert all(line.endswith((".", ":")) for line in lines[1:])


def test_every_limit_and_every_weak_protection_has_a_sentence():
    assert set(LIMITS) == set(Limits.__struct_fields__)
    assert set(BEST_EFFORT) == set(BestEffort.__args__)


def test_the_levels_differ_where_they_should():
    untrusted, trusted = policyfile.load("untrusted"), policyfile.load("trusted")
    assert "512M of memory" in section(untrusted, "limited")
    assert "fails with EPERM" in section(untrusted, "limited")
    assert "network" not in section(untrusted, "allowed")
    assert "network of the host, all of it" in section(trusted, "allowed")
    assert "there is no filter" in section(trusted, "not stopped")
    assert "further programs" in section(policyfile.load("moderate"), "allowed")


def test_own_additions_are_named():
    policy = Policy(mounts=(Mount(source="/data", target="/d", writable=True),), limits=Limits(memory=None))
    assert "/data" in section(policy, "allowed")
    assert "destroy or fill /data" in section(policy, "not stopped")
    assert "Nothing of its own limits memory" in section(policy, "not stopped")
    labels = Policy(apparmor="own-profile", selinux="own_t", best_effort=("apparmor", "selinux"))
    assert "own-profile" in section(labels, "limited") and "own_t" in section(labels, "limited")
    assert "AppArmor profile; the SELinux context" in section(labels, "not stopped")
