/* Questions to the kernel, asked without changing anything. landlock_create_ruleset(2), user_namespaces(7) */
#include "kernel.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>

#include "probe.h"

int probe_landlock_abi(void) {
	enum { VERSION = 1 };
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, VERSION);
	return abi < 0 ? 0 : (int)abi;
}

/* In a child of its own, which does nothing that is unsafe after a fork of a threaded process. */
int probe_userns(void) {
	int status = 0;
	struct clone_args args = {.exit_signal = 0};
	pid_t child = sys_clone3(&args);
	if (child == 0)
		_exit(unshare(CLONE_NEWUSER) < 0 ? errno : 0);
	if (child < 0)
		return errno;
	while (waitpid(child, &status, __WALL) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) ? WEXITSTATUS(status) : EPERM;
}
