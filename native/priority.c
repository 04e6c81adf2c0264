/* No place before others on the host, whatever place its caller has: not for processors, not for disks, and not when memory runs out, where
 * a program that the kernel spares would pass by its memory limit, too. What ranks below others stays there.
 * sched(7), ioprio_set(2), proc_pid_oom_score_adj(5) */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <linux/ioprio.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>

static int processor_shared(void) {
	const struct sched_param none = {0};
	int policy = sched_getscheduler(0);
	if (policy < 0)
		return -1;
	policy &= ~SCHED_RESET_ON_FORK;
	if ((policy == SCHED_FIFO || policy == SCHED_RR || policy == SCHED_DEADLINE) && sched_setscheduler(0, SCHED_OTHER, &none) < 0)
		return -1;
	errno = 0;
	int nice = getpriority(PRIO_PROCESS, 0);
	if (nice < 0 && errno)
		return -1;
	return nice < 0 ? setpriority(PRIO_PROCESS, 0, 0) : 0;
}

/* Class none: the one that goes with the nice value. */
static int disk_shared(void) {
	long now = syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0);
	if (now < 0 && errno == ENOSYS)
		return 0; /* a kernel without block devices */
	if (now < 0 || IOPRIO_PRIO_CLASS(now) != IOPRIO_CLASS_RT)
		return now < 0 ? -1 : 0;
	return syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0) < 0 ? -1 : 0;
}

/* As root before the user namespace: who has the right here makes it the lowest value that can be set later on. */
static int memory_shared(const struct cell *cell) {
	static const char file[] = "self/oom_score_adj";
	char first;
	int fd = openat(cell->proc, file, O_RDONLY | O_CLOEXEC);
	int known = fd >= 0 && read(fd, &first, 1) == 1;
	keep_errno_close(fd);
	if (!known || first != '-')
		return known ? 0 : -1;
	/* The files below /proc/self belong to root while we are not dumpable. */
	if (prctl(PR_SET_DUMPABLE, 1) < 0 || put(cell->proc, file, "0") < 0)
		return -1;
	return prctl(PR_SET_DUMPABLE, 0);
}

int priority_give_up(const struct cell *cell) {
	return processor_shared() < 0 || disk_shared() < 0 || memory_shared(cell) < 0 ? -1 : 0;
}
