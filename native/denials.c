/* Denied system calls, as the filter reports them: counted by number, answered with an error. seccomp_unotify(2)
 *
 * No answer rests on memory that the program could change: the first exec is let through because it is the first, and is made by
 * program_main, before any of the program's own code has run. */
#include "launcher.h"

#include <errno.h>
#include <linux/seccomp.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

static void record(struct report *report, const struct seccomp_data *call) {
	for (uint32_t i = 0; i < report->denied_count; i++)
		if (report->denied[i].nr == (uint32_t)call->nr) {
			report->denied[i].count++;
			return;
		}
	if (report->denied_count == MAX_DENIED) {
		report->flags |= REPORT_MORE_DENIED;
		return;
	}
	struct denied *denied = &report->denied[report->denied_count++];
	denied->nr = (uint32_t)call->nr;
	denied->arch = call->arch;
	denied->count = 1;
	memcpy(denied->args, call->args, sizeof denied->args);
}

static uint64_t total(const struct report *report) {
	uint64_t sum = 0;
	for (uint32_t i = 0; i < report->denied_count; i++)
		sum += report->denied[i].count;
	return sum;
}

void denials_answer(struct run *run) {
	struct seccomp_notif call;
	struct seccomp_notif_resp answer = {0};
	memset(&call, 0, sizeof call);
	if (ioctl(run->listener, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
		return; /* it died in between */
	answer.id = call.id;
	if ((run->plan->flags & PLAN_EXEC_ONCE) && !run->exec_passed && call.data.nr == SYS_execve) {
		run->exec_passed = 1;
		answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
	} else {
		record(&run->report, &call.data);
		if ((run->plan->flags & PLAN_KILL_DENIED) || total(&run->report) > run->plan->max_denied)
			return run_kill(run, CAUSE_SYSCALL); /* no answer: it never returns from the call */
		answer.error = (uint32_t)call.data.nr >= run->plan->unknown_from ? -ENOSYS : -EPERM;
	}
	ioctl(run->listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
}
