/* The system call filter, installed last. With a listener: the launcher is told of each denied call. seccomp(2), seccomp_unotify(2) */
#include "ladder.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/syscall.h>
#include <unistd.h>

int filter_install(const struct plan *plan, int *listener) {
	struct sock_fprog program = {
	    .len = (unsigned short)plan->filter.count,
	    .filter = (struct sock_filter *)at(plan, plan->filter.offset),
	};
	*listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	return *listener < 0 ? -1 : 0;
}
