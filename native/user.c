/* Who the processes of a cell are: user namespace, ids, capabilities. user_namespaces(7), credentials(7), capabilities(7)
 *
 * As root, the namespace is entered after the mounts and maps one unprivileged host id, never 0. As an ordinary user it comes
 * first, since it gives the right to mount, and maps the user himself. */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>

static int map_self(const struct cell *cell) {
	char line[64];
	/* The files below /proc/self belong to root while we are not dumpable; no program runs yet that could make use of it. */
	if (prctl(PR_SET_DUMPABLE, 1) < 0 || put(AT_FDCWD, "/proc/self/setgroups", "deny") < 0)
		return -1;
	snprintf(line, sizeof line, "%u %u 1", cell->plan->gid, cell->gid);
	if (put(AT_FDCWD, "/proc/self/gid_map", line) < 0)
		return -1;
	snprintf(line, sizeof line, "%u %u 1", cell->plan->uid, cell->uid);
	if (put(AT_FDCWD, "/proc/self/uid_map", line) < 0)
		return -1;
	return prctl(PR_SET_DUMPABLE, 0);
}

/* What is counted for each user (inotify, signals that wait, message queues) counts for the owner of the namespace, too: it is to be the
 * run's own id and not root, whose services would lack what a program holds. What root has stays until identity_take: the rights, of which
 * some hosts ask one for a namespace, and the id for files, which lets the program's process be born in a group of version 2. */
static int owner_become(uid_t owner) {
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct rights[2];
	if (syscall(SYS_setresuid, -1, owner, -1) < 0 || syscall(SYS_capget, &header, rights) < 0)
		return -1;
	rights[0].effective = rights[0].permitted;
	rights[1].effective = rights[1].permitted;
	if (syscall(SYS_capset, &header, rights) < 0)
		return -1;
	setfsuid(0);
	errno = EPERM;
	return setfsuid((uid_t)-1) == 0 ? 0 : -1; /* it tells what was, and never why not */
}

int user_namespace_enter(struct cell *cell) {
	int none = 0;
	if (cell->rootless)
		return map_self(cell); /* made by clone */
	if (owner_become(cell->uid) < 0 || unshare(CLONE_NEWUSER) < 0)
		return -1;
	return launcher_ask(cell->launcher, CELL_NEED_MAP, CELL_MAPPED, NULL, &none);
}

/* The sysctls of the namespace that looks them up are those that are set. namespaces(7), inotify(7), fanotify(7) */
struct count {
	const char *file, *most;
};
static const struct count counts[] = {
    /* An ordinary user's count for himself, and he has 128. */
    {"sys/user/max_inotify_instances", "32"},
    {"sys/user/max_inotify_watches", "8192"},
    {"sys/user/max_fanotify_groups", "32"},
    {"sys/user/max_fanotify_marks", "8192"},
};
/* What is made inside counts here, however deep: each is memory of the kernel's, and a descriptor keeps one. */
static const struct count namespaces[] = {
    {"sys/user/max_user_namespaces", "256"}, {"sys/user/max_mnt_namespaces", "256"},    {"sys/user/max_pid_namespaces", "256"},
    {"sys/user/max_net_namespaces", "256"},  {"sys/user/max_ipc_namespaces", "256"},    {"sys/user/max_uts_namespaces", "256"},
    {"sys/user/max_time_namespaces", "256"}, {"sys/user/max_cgroup_namespaces", "256"},
};
static const struct count no_users[] = {{"sys/user/max_user_namespaces", "0"}};
/* An ordinary user's groups are his own, and the program runs as him: in a namespace that its own root has it could mount and change them. So it
 * gets no other than the one that the policy may give it, in which it has no right. */
static const struct count no_groups[] = {{"sys/user/max_cgroup_namespaces", "0"}},
                          one_group[] = {{"sys/user/max_cgroup_namespaces", "1"}};

static int all_limited(const struct cell *cell, const struct count *table, size_t size) {
	for (size_t i = 0; i < size; i++) {
		int fd = openat(cell->proc, table[i].file, O_WRONLY | O_CLOEXEC);
		if (fd < 0 && errno == ENOENT && table == counts)
			continue; /* a kernel without it */
		ssize_t length = (ssize_t)strlen(table[i].most), written = fd < 0 ? -1 : write(fd, table[i].most, (size_t)length);
		keep_errno_close(fd);
		if (written != length)
			return -1;
	}
	return 0;
}

int counts_limit(struct cell *cell) {
#define LIMITED(table) (all_limited(cell, table, sizeof(table) / sizeof *(table)) == 0)
	if (cell->plan->flags & PLAN_NESTED) {
		const struct count *groups = cell->plan->namespaces & CLONE_NEWCGROUP ? one_group : no_groups;
		return LIMITED(namespaces) && (!cell->rootless || all_limited(cell, groups, 1) == 0) && LIMITED(counts) ? 0 : -1;
	}
	if (LIMITED(no_users) && LIMITED(counts))
		return 0;
#undef LIMITED
	cell->flags |= REPORT_NO_NESTED;
	return cell->plan->flags & PLAN_NESTED_OPTIONAL ? 0 : -1;
}

int securebits_lock(void) {
	return prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP |
	                                    SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
	                                    SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED);
}

/* Before the user namespace: inside it the right is gone, or, for an ordinary user, was never there. */
int groups_clear(const struct cell *cell) {
	if (cell->rootless)
		return 0;
	if (setgroups(0, NULL) < 0)
		return -1;
	int left = getgroups(0, NULL);
	if (left > 0)
		errno = EPERM;
	return left == 0 ? 0 : -1;
}

int identity_take(const struct plan *plan) {
	uid_t uid, euid, suid;
	gid_t gid, egid, sgid;
	if (setresgid(plan->gid, plan->gid, plan->gid) < 0 || setresuid(plan->uid, plan->uid, plan->uid) < 0 ||
	    getresgid(&gid, &egid, &sgid) < 0 || getresuid(&uid, &euid, &suid) < 0)
		return -1;
	if (uid != plan->uid || euid != uid || suid != uid || gid != plan->gid || egid != gid || sgid != gid) {
		errno = EPERM;
		return -1;
	}
	return 0;
}

/* All that the kernel knows: it refuses the first number that is none. */
int bounding_set_empty(void) {
	for (unsigned long capability = 0; prctl(PR_CAPBSET_DROP, capability) == 0; capability++)
		;
	return errno == EINVAL && prctl(PR_CAPBSET_READ, 0) == 0 ? 0 : -1;
}

int capabilities_drop(void) {
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {{0}}, read_back[2];
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 || syscall(SYS_capset, &header, none) < 0 ||
	    syscall(SYS_capget, &header, read_back) < 0)
		return -1;
	if (memcmp(none, read_back, sizeof none) != 0) {
		errno = EPERM;
		return -1;
	}
	return 0;
}

/* A template's: what it takes to make namespaces and mounts for its jobs, within its own user namespace, and to give all of it up. They
 * are ambient, since the template is a program that is executed. */
int rights_keep(const struct plan *plan) {
	static const unsigned kept[] = {CAP_SYS_ADMIN, CAP_SETPCAP, CAP_NET_ADMIN};
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct rights[2] = {{0}};
	for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
		rights[0].effective |= 1u << kept[i];
	rights[0].permitted = rights[0].inheritable = rights[0].effective;
	if (prctl(PR_SET_KEEPCAPS, 1) < 0 || identity_take(plan) < 0 || syscall(SYS_capset, &header, rights) < 0)
		return -1;
	for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
		if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, (unsigned long)kept[i], 0, 0) < 0)
			return -1;
	return no_new_privs();
}

int no_new_privs(void) { return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); }
