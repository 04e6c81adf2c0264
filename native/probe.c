/* Questions to the kernel, asked without changing anything. landlock_create_ruleset(2), seccomp(2), user_namespaces(7) */
#include "kernel.h"

#include <errno.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>

#include "probe.h"

static int call_errno(int call) {
	static const long numbers[PROBE_CALLS] = {
	    [PROBE_CLONE3] = SYS_clone3,       [PROBE_CLOSE_RANGE] = SYS_close_range, [PROBE_PIDFD_OPEN] = SYS_pidfd_open,
	    [PROBE_OPEN_TREE] = SYS_open_tree, [PROBE_FSOPEN] = SYS_fsopen,           [PROBE_MOUNT_SETATTR] = SYS_mount_setattr,
	};
	if (call < 0 || call >= PROBE_CALLS)
		return EINVAL;
	/* No descriptor, no pointer, no flag and no size of it is good; for close_range the first is above the last. */
	return syscall(numbers[call], -1L, 0L, -1L, 0L, 0L) < 0 ? errno : 0;
}

static int landlock_version(int flags) {
	long answer = syscall(SYS_landlock_create_ruleset, NULL, 0, flags);
	return answer < 0 ? -errno : (int)answer;
}

static int notify(int unused) {
	struct seccomp_notif_sizes sizes;
	(void)unused;
	return syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes) < 0 ? -errno : sizes.seccomp_notif;
}

static int actions(int unused) {
	static const uint32_t numbers[PROBE_ACTIONS] = {
	    [PROBE_KILL_PROCESS] = SECCOMP_RET_KILL_PROCESS,
	    [PROBE_KILL_THREAD] = SECCOMP_RET_KILL_THREAD,
	    [PROBE_TRAP] = SECCOMP_RET_TRAP,
	    [PROBE_ERRNO] = SECCOMP_RET_ERRNO,
	    [PROBE_USER_NOTIF] = SECCOMP_RET_USER_NOTIF,
	    [PROBE_TRACE] = SECCOMP_RET_TRACE,
	    [PROBE_LOG] = SECCOMP_RET_LOG,
	    [PROBE_ALLOW] = SECCOMP_RET_ALLOW,
	};
	int there = 0;
	(void)unused;
	for (int i = 0; i < PROBE_ACTIONS; i++)
		if (syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &numbers[i]) == 0)
			there |= 1 << i;
	return there;
}

/* Under a filter the answer may be death: then a child asks. Without one, asking costs no fork. */
static int ask(int (*question)(int), int argument) {
	struct clone_args args = {.exit_signal = 0};
	if (prctl(PR_GET_SECCOMP) == 0)
		return question(argument);
	int *answer = mmap(NULL, sizeof *answer, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (answer == MAP_FAILED)
		return -errno;
	*answer = -PROBE_KILLED;
	pid_t child = sys_clone3(&args);
	if (child < 0 && errno == ENOSYS)
		child = (pid_t)syscall(SYS_clone, 0, NULL, NULL, NULL, NULL); /* RestrictNamespaces= of systemd */
	if (child == 0) {
		*answer = question(argument);
		_exit(0);
	}
	int result = child < 0 ? -errno : 0;
	while (child > 0 && waitpid(child, NULL, __WALL) < 0 && errno == EINTR)
		;
	if (child > 0)
		result = *answer;
	munmap(answer, sizeof *answer);
	return result;
}

int probe_call(int call) {
	int answer = ask(call_errno, call);
	return answer < 0 ? -answer : answer;
}

int probe_landlock_abi(void) {
	enum { VERSION = 1 };
	int answer = ask(landlock_version, VERSION);
	return answer == -ENOSYS || answer == -EOPNOTSUPP ? 0 : answer;
}

int probe_landlock_errata(void) {
	enum { ERRATA = 2 };
	int answer = ask(landlock_version, ERRATA);
	return answer < 0 ? 0 : answer;
}

int probe_notify(void) { return ask(notify, 0); }

int probe_actions(void) {
	int answer = ask(actions, 0);
	return answer < 0 ? 0 : answer;
}

long long probe_swap(void) {
	struct sysinfo info;
	return sysinfo(&info) < 0 ? -errno : (long long)info.totalswap * info.mem_unit;
}

/* The errno that the child left with. It takes no signal of its parent's, so that nobody else learns of it. */
static int outcome(pid_t child) {
	int status = 0;
	if (child < 0)
		return errno;
	while (waitpid(child, &status, __WALL) < 0)
		if (errno != EINTR)
			return errno;
	return WIFEXITED(status) ? WEXITSTATUS(status) : PROBE_KILLED;
}

int probe_userns(int namespaces) {
	struct clone_args args = {.exit_signal = 0};
	pid_t child = sys_clone3(&args);
	if (child == 0)
		_exit(unshare(CLONE_NEWUSER) < 0 || (namespaces && unshare(namespaces) < 0) ? errno : 0);
	return outcome(child);
}

static int mount_proc(int pids_only) {
	int context = sys_fsopen("proc");
	if (context < 0 || (pids_only && sys_fsconfig(context, FSCONFIG_SET_STRING, "subset", "pid") < 0))
		return -1;
	return sys_fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL) < 0 || sys_fsmount(context, 0) < 0 ? -1 : 0;
}

int probe_proc(int pids_only) {
	struct clone_args args = {.flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID};
	pid_t child = sys_clone3(&args);
	if (child == 0)
		_exit(mount_proc(pids_only) < 0 ? errno : 0);
	return outcome(child);
}
