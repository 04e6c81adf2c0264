/* A run: an order that meets a cell, from its request to its report. */
#include "kernel.h"
#include "launcher.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

void run_answer(struct launcher *launcher, struct run *run) {
	run->report.kind = run->report.step == STEP_NONE ? REPORT_ENDED : REPORT_FAILED;
	run->report.request_ns = run->start_ns;
	run->report.end_ns = run->end_ns;
	run->report.answer_ns = now_ns();
	message_send(NULL, run->channel, &run->report, sizeof run->report, NULL, 0);
	unwatch(launcher, &run->channel);
	launcher->restock_ns = 0;
}

void run_refuse(int channel, enum step step, int error) {
	struct report report = {.kind = REPORT_FAILED, .step = step, .error = (uint32_t)error, .exit_code = -1, .signal = -1};
	message_send(NULL, channel, &report, sizeof report, NULL, 0);
}

void run_kill(struct run *run, enum cause cause) {
	if (run->report.cause == CAUSE_NONE)
		run->report.cause = cause;
	if (run->init < 0) {
		run->doomed = 1; /* a job that is not born yet, and never is: its template may have been stopped */
		if (run->cell >= 0)
			shutdown(run->cell, SHUT_RDWR);
		return;
	}
	/* The kernel kills all of the pid namespace with it. Were the signal refused: init ends with its socket. */
	if (sys_pidfd_send_signal(run->init, SIGKILL) == 0 || errno == ESRCH)
		return;
	if (run->cell >= 0)
		shutdown(run->cell, SHUT_RDWR);
	if (run->program >= 0)
		shutdown(run->program, SHUT_RDWR);
}

/* A cell that exists cannot be made whole: it ends, and the report says why. */
void run_spoil(struct run *run, enum step step, int error) {
	if (!run->report.step) {
		run->report.step = step;
		run->report.error = (uint32_t)error;
	}
	run_kill(run, CAUSE_NONE);
}

static int order_send(const struct launcher *launcher, const struct run *run, const struct request *request,
                      const int *descriptors, int count) {
	struct {
		struct cell_order head;
		char order[MAX_INLINE];
	} message;
	message.head = (struct cell_order){.kind = CELL_RUN, .value = request->inlined};
	if (request->inlined)
		memcpy(message.order, request + 1, request->inlined);
	struct stamp *stamp = &launcher->stamps[run->index];
	if (cell_is_job(run)) /* it runs from here on: there is no exec that would tell */
		stamp->exec_ns = now_ns();
	int sent = message_send(NULL, run->program, &message, sizeof message.head + request->inlined, descriptors, count);
	if (cell_is_job(run) && sent < 0)
		stamp->exec_ns = 0;
	/* What it says from now on is looked at when it has ended. That it has let go of its socket would wake us when it begins. */
	if (cell_is_job(run) && sent >= 0)
		epoll_ctl(launcher->epoll, EPOLL_CTL_DEL, run->program, NULL);
	return sent;
}

/* A job that is not ready is still asking to be placed: what it is to read then must not be behind its order. */
static int order_hold(struct run *run, const struct request *request, int *descriptors, int count) {
	struct held *held = malloc(sizeof *held);
	if (!held)
		return -1;
	held->request = *request;
	memcpy(held->order, request + 1, request->inlined);
	for (held->count = 0; held->count < count; held->count++) {
		held->descriptors[held->count] = descriptors[held->count];
		descriptors[held->count] = -1;
	}
	run->held = held;
	return 0;
}

void run_held_drop(struct run *run) {
	for (int i = 0; run->held && i < run->held->count; i++)
		close(run->held->descriptors[i]);
	free(run->held);
	run->held = NULL;
}

void run_held_send(struct launcher *launcher, struct run *run) {
	if (!run->held)
		return;
	if (order_send(launcher, run, &run->held->request, run->held->descriptors, run->held->count) < 0)
		run_spoil(run, STEP_ORDER, errno);
	else
		run_execed(launcher, run);
	run_held_drop(run);
}

static int order_give(struct launcher *launcher, struct run *run, const struct request *request, int *descriptors, int count) {
	if (cell_is_job(run) && !run->ready)
		return order_hold(run, request, descriptors, count);
	return order_send(launcher, run, request, descriptors, count);
}

static void begin(struct run *run) {
	run->ordered = 1;
	run->start_ns = run->shelf->used_ns;
}

/* A cell from stock that has the order, or none because its clock cannot be set: no program runs without. One that died in stock is
 * passed over, and its end clears it away. */
static struct run *parked_run(struct launcher *launcher, struct shelf *shelf, const struct request *request, int *descriptors,
                              int count) {
	struct run *run;
	while ((run = shelf_take(launcher, shelf))) {
		begin(run);
		clocks_check(launcher, run);
		if (run->report.step || order_give(launcher, run, request, descriptors, count) == 0)
			return run;
		run->ordered = 0;
		shelf_return(launcher, shelf);
		run_spoil(run, STEP_LOST, 0);
	}
	return NULL;
}

void run_start(struct launcher *launcher, const struct request *request, int *descriptors, int count) {
	struct shelf *shelf = shelf_find(launcher, request, descriptors[1]);
	if (!shelf)
		return run_refuse(descriptors[0], STEP_PLAN, errno);
	struct run *run = parked_run(launcher, shelf, request, descriptors + 2, count - 2);
	int parked = run != NULL;
	if (!parked) {
		if (!(run = cell_slot(launcher, shelf)))
			return run_refuse(descriptors[0], STEP_UID_POOL, EAGAIN);
		begin(run);
	}
	run->template = run->plan->flags & PLAN_TEMPLATE ? request->template : 0;
	run->channel = descriptors[0];
	descriptors[0] = -1;
	enum step failed = parked ? STEP_NONE : cell_make(launcher, run);
	if (failed) {
		run->report.step = failed;
		run->report.error = (uint32_t)errno;
		cell_release(launcher, run);
		return run_answer(launcher, run);
	}
	/* A cell that is dead already has told why: its step comes behind. */
	if ((!parked && order_give(launcher, run, request, descriptors + 2, count - 2) < 0 && errno != EPIPE) ||
	    watch(launcher, run->channel, EVENT_CHANNEL, run) < 0)
		return run_spoil(run, STEP_ORDER, errno);
	if (cell_is_job(run) && !run->held && !run->report.step)
		run_execed(launcher, run);
}

uint32_t run_program_pid(const struct run *run) {
	char path[64], text[64] = {0};
	snprintf(path, sizeof path, "/proc/%d/task/%d/children", run->pid, run->pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	errno = 0; /* with it, nothing read is no child */
	if (read(fd, text, sizeof text - 1) < 0)
		text[0] = 0;
	keep_errno_close(fd);
	return (uint32_t)strtoul(text, NULL, 10);
}

static void signal_send(const struct run *run, uint32_t number) {
	struct cell_order order = {.kind = CELL_SIGNAL, .value = number};
	message_send(NULL, run->cell, &order, sizeof order, NULL, 0);
}

void run_started(struct launcher *launcher, struct run *run) {
	run->report.pid = run_program_pid(run);
	if (run->has_groups)
		cgroup_report(launcher, run); /* so far */
	struct report report = run->report;
	report.kind = REPORT_STARTED;
	message_send(NULL, run->channel, &report, sizeof report, NULL, 0);
}

void run_execed(struct launcher *launcher, struct run *run) {
	struct stamp stamp = launcher->stamps[run->index];
	run->execed = 1;
	run->stamped = stamp.exec_ns != 0;
	run->exec_ns = run->stamped ? stamp.exec_ns : now_ns();
	run->cpu_base = run->stamped ? stamp.cpu_ns : UINT64_MAX; /* without a program nothing is a program's */
	run->report.setup_ns = run->exec_ns - run->start_ns;
	int unlabelled = run->stamped ? label_missing(run) : 0;
	if (unlabelled)
		run_spoil(run, STEP_LABEL, unlabelled);
	if (run->asked)
		run_started(launcher, run);
	for (uint32_t number = 1; run->early_signals && number <= 64; number++)
		if (run->early_signals & (1ull << (number - 1)))
			signal_send(run, number);
	clocks_start(launcher, run);
}

void run_command(struct launcher *launcher, struct run *run) {
	struct command command;
	if (recv(run->channel, &command, sizeof command, MSG_DONTWAIT) != sizeof command) {
		command = (struct command){.cause = CAUSE_CALLER};                 /* the caller has let go of it, and says no more: */
		epoll_ctl(launcher->epoll, EPOLL_CTL_DEL, run->channel, NULL); /* that would be heard until all is cleared away */
	}
	if (!command.signal && command.cause == CAUSE_NONE) {
		run->asked = 1;
		if (run->execed)
			run_started(launcher, run);
		return;
	}
	if (command.signal && !run->execed) {
		run->early_signals |= command.signal <= 64 ? 1ull << (command.signal - 1) : 0;
		return;
	}
	if (command.signal)
		return signal_send(run, command.signal);
	/* With a template its jobs end, and by the same word. */
	for (uint32_t i = 0; run->template && i < launcher->top_run; i++) {
		struct run *job = &launcher->runs[i];
		if (job->used && job->ordered && job->shelf->warm == run->template && job->report.cause == CAUSE_NONE)
			job->report.cause = CAUSE_CALLER;
	}
	run_kill(run, command.cause == CAUSE_OUTPUT ? CAUSE_OUTPUT : CAUSE_CALLER);
}

/* Of user and system time the kernel knows how often it met the one and the other at its tick, from the cell's begin on. So they are shares
 * of what the program has used, as the kernel makes them of what a process has. times(2) */
static void shares(struct report *report) {
	double system = (double)report->system_ns, both = system + (double)report->user_ns;
	report->system_ns = both > 0 ? (uint64_t)((double)report->cpu_ns * (system / both)) : 0;
	report->user_ns = report->cpu_ns - report->system_ns;
}

/* Every process of the payload is gone: what it has used will not change any more. */
void run_count(struct launcher *launcher, struct run *run) {
	struct report *report = &run->report;
	if (report->step) { /* there was no program: how its process ended says nothing */
		report->exit_code = report->signal = -1;
	} else if (run->stamped) {
		report->wall_ns = (run->ended ? run->end_ns : now_ns()) - run->exec_ns;
		if (!run->ended)
			report->signal = SIGKILL;
	}
	/* Who has waited for them has counted processor times, too: they stand where no group does. */
	report->cpu_ns = cpu_since(run, report->user_ns + report->system_ns);
	if (run->has_groups)
		cgroup_report(launcher, run);
	else if (report->cause == CAUSE_CPU)
		report->cpu_ns = report->observed;
	shares(report);
	if (report->step == STEP_NONE && (!run->ended || !run->stamped) && report->cause == CAUSE_NONE && !report->oom_kills &&
	    !report->outer_oom_kills) {
		report->step = STEP_LOST;
		if (report->signal == SIGSYS) /* before it ran: by no filter of ours */
			report->error = EPERM;
		if (report->signal == SIGXFSZ) /* by the caller's hard limit */
			report->error = EFBIG;
	}
	if (launcher->stamps[run->index].exec_ns)
		report->flags |= REPORT_BEGAN;
	clocks_final(run);
	unwatch(launcher, &run->timer);
}
