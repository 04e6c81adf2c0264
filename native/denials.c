/* Denied system calls, as the filter reports them: counted by number, answered with an error. seccomp_unotify(2)
 *
 * The answer is always no, so none rests on memory that the program could change. But a warm job asks before it ends (template.c): that is
 * let go on, unless the end can be told without it. */
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
		report->denied_more++;
		return;
	}
	struct denied *denied = &report->denied[report->denied_count++];
	denied->nr = (uint32_t)call->nr;
	denied->arch = call->arch;
	denied->count = 1;
	memcpy(denied->args, call->args, sizeof denied->args);
}

static uint64_t total(const struct report *report) {
	uint64_t sum = report->denied_more;
	for (uint32_t i = 0; i < report->denied_count; i++)
		sum += report->denied[i].count;
	return sum;
}

/* The last call of a job: its own process, and nobody else, has yet to go. */
static int is_last(const struct launcher *launcher, const struct run *run, const struct seccomp_notif *call) {
	return run->report.cause == CAUSE_NONE && !run->report.step && !run->ended && call->pid == run->report.pid &&
	       call->data.args[0] == 0 && cgroup_only_one(launcher, run);
}

void denials_answer(struct launcher *launcher, struct run *run) {
	struct seccomp_notif call;
	struct seccomp_notif_resp answer = {0};
	memset(&call, 0, sizeof call);
	if (ioctl(run->listener, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
		return; /* it died in between */
	answer.id = call.id;
	if (call.data.nr == SYS_exit_group) {
		if (is_last(launcher, run, &call))
			return cell_left(launcher, run); /* no answer: it never returns from the call */
		answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
		ioctl(run->listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
		return;
	}
	record(&run->report, &call.data);
	if ((run->plan->flags & PLAN_KILL_DENIED) || total(&run->report) > run->plan->max_denied)
		return run_kill(run, CAUSE_SYSCALL); /* no answer: it never returns from the call */
	answer.error = (uint32_t)call.data.nr >= run->plan->unknown_from ? -ENOSYS : -EPERM;
	ioctl(run->listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
}
