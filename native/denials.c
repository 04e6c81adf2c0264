/* Denied system calls, as the filter reports them: counted by number, answered with an error. seccomp_unotify(2)
 *
 * The answer is always no, so none rests on memory that the program could change. */
#include "launcher.h"

#include <errno.h>
#include <linux/seccomp.h>
#include <string.h>
#include <sys/ioctl.h>

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

void denials_answer(struct run *run) {
	struct seccomp_notif call;
	struct seccomp_notif_resp answer = {0};
	memset(&call, 0, sizeof call);
	if (ioctl(run->listener, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
		return; /* it died in between */
	answer.id = call.id;
	record(&run->report, &call.data);
	if ((run->plan->flags & PLAN_KILL_DENIED) || total(&run->report) > run->plan->max_denied)
		return run_kill(run, CAUSE_SYSCALL); /* no answer: it never returns from the call */
	answer.error = (uint32_t)call.data.nr >= run->plan->unknown_from ? -ENOSYS : -EPERM;
	ioctl(run->listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
}
