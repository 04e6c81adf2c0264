/* A run from request to report, seen from outside: the cell is cloned, heard, killed and cleared away here. clone(2), pidfd_open(2) */
#include "kernel.h"
#include "launcher.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

static struct run *slot_take(struct launcher *launcher) {
	uint32_t most = launcher->hello.uid_count && launcher->hello.uid_count < MAX_RUNS ? launcher->hello.uid_count : MAX_RUNS;
	for (uint32_t i = 0; i < most; i++) {
		struct run *run = &launcher->runs[i];
		if (run->used)
			continue;
		memset(run, 0, sizeof *run);
		run->used = 1;
		run->index = i;
		run->generation = launcher->sequence++;
		run->channel = run->cell = run->init = run->listener = run->timer = -1;
		for (int group = 0; group < GROUPS; group++)
			run->groups[group] = -1;
		run->report.exit_code = run->report.signal = -1;
		run->start_ns = now_ns();
		return run;
	}
	return NULL;
}

static void held_close(struct run *run) {
	for (int i = 0; i < run->held_count; i++)
		close(run->held[i]);
	run->held_count = 0;
}

static void release(struct launcher *launcher, struct run *run) {
	cgroup_remove(launcher, run);
	held_close(run);
	unwatch(launcher, &run->listener);
	unwatch(launcher, &run->timer);
	unwatch(launcher, &run->cell);
	unwatch(launcher, &run->init);
	if (run->plan)
		munmap((void *)run->plan, run->plan->size);
	run->used = 0;
}

/* The report is the last thing: when the caller has it, nothing of the run is left. */
static void answer(struct launcher *launcher, struct run *run, enum report_kind kind) {
	run->report.kind = kind;
	release(launcher, run);
	message_send(run->channel, &run->report, sizeof run->report, NULL, 0);
	unwatch(launcher, &run->channel);
}

static void refuse(struct launcher *launcher, struct run *run, enum step step, int error) {
	run->report.step = step;
	run->report.error = (uint32_t)error;
	answer(launcher, run, REPORT_FAILED);
}

/* A cell that exists cannot be made whole: it ends, and the report says why. */
static void run_spoil(struct run *run, enum step step, int error) {
	run->report.step = step;
	run->report.error = (uint32_t)error;
	run_kill(run, CAUSE_NONE);
}

static void order_send(struct run *run) {
	struct cell_order order = {.kind = CELL_RUN};
	if (message_send(run->cell, &order, sizeof order, run->held, run->held_count) < 0)
		run_spoil(run, STEP_ORDER, errno);
	held_close(run);
}

static const struct plan *plan_map(int descriptor) {
	struct stat status;
	if (fstat(descriptor, &status) < 0)
		return NULL;
	if ((fcntl(descriptor, F_GET_SEALS) & BLOCK_SEALS) != BLOCK_SEALS || status.st_size <= 0 || status.st_size > MAX_BLOCK) {
		errno = EINVAL;
		return NULL;
	}
	void *block = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
	if (block == MAP_FAILED)
		return NULL;
	if (plan_check(block, (size_t)status.st_size))
		return block;
	munmap(block, (size_t)status.st_size);
	errno = EINVAL;
	return NULL;
}

static pid_t cell_clone(const struct launcher *launcher, struct run *run, int socket) {
	int rootless = launcher->hello.uid_count == 0;
	struct cell cell = {
	    .plan = run->plan,
	    .launcher = socket,
	    .cgroup_kind = run->has_groups ? launcher->hello.cgroup_kind : CGROUP_NONE,
	    .uid = rootless ? geteuid() : launcher->hello.uid_base + run->index,
	    .gid = rootless ? getegid() : launcher->hello.uid_base + run->index,
	    .rootless = rootless,
	};
	if (cgroup_open(launcher, run, cell.groups) < 0)
		return -1;
	/* Time needs a process of its own to begin in, the cgroup namespace one that has joined; the user's comes last as root. */
	uint64_t later = CLONE_NEWTIME | CLONE_NEWCGROUP | (rootless ? 0 : CLONE_NEWUSER);
	struct clone_args args = {
	    .flags = (run->plan->namespaces & ~later) | CLONE_PIDFD,
	    .pidfd = (uint64_t)(uintptr_t)&run->init,
	    .exit_signal = SIGCHLD,
	};
	pid_t pid = sys_clone3(&args);
	if (pid == 0)
		cell_main(&cell);
	int error = errno;
	for (int group = 0; group < GROUPS; group++)
		if (cell.groups[group] >= 0)
			close(cell.groups[group]);
	errno = error;
	return pid;
}

static int run_watch(struct launcher *launcher, struct run *run) {
	run->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	return run->timer < 0 || watch(launcher, run->timer, EVENT_TIMER, run) < 0 ||
	               watch(launcher, run->cell, EVENT_CELL, run) < 0 || watch(launcher, run->init, EVENT_INIT, run) < 0 ||
	               watch(launcher, run->channel, EVENT_CHANNEL, run) < 0
	           ? -1
			   : 0;
}

void run_start(struct launcher *launcher, const struct request *request, int *descriptors, int count) {
	struct run *run = slot_take(launcher);
	if (!run) {
		struct report full = {.kind = REPORT_FAILED, .step = STEP_UID_POOL, .error = EAGAIN};
		message_send(descriptors[2], &full, sizeof full, NULL, 0);
		return;
	}
	run->request_flags = request->flags;
	run->channel = descriptors[2];
	descriptors[2] = -1;
	if (!(run->plan = plan_map(descriptors[0])))
		return refuse(launcher, run, STEP_PLAN, errno);
	if (cgroup_make(launcher, run) < 0)
		return refuse(launcher, run, STEP_CGROUP, errno);
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return refuse(launcher, run, STEP_CLONE, errno);
	run->cell = pair[0];
	run->pid = cell_clone(launcher, run, pair[1]);
	int error = errno;
	close(pair[1]);
	if (run->pid < 0)
		return refuse(launcher, run, STEP_CLONE, error);
	run->held[run->held_count++] = descriptors[1]; /* order first, then the program's own */
	descriptors[1] = -1;
	for (int i = 3; i < count; i++) {
		run->held[run->held_count++] = descriptors[i];
		descriptors[i] = -1;
	}
	if (run_watch(launcher, run) < 0)
		return run_spoil(run, STEP_ORDER, errno);
	if (launcher->hello.uid_count == 0) /* else it first asks for its ids */
		order_send(run);
	clocks_check(launcher, run);
}

void run_kill(struct run *run, enum cause cause) {
	if (run->report.cause == CAUSE_NONE)
		run->report.cause = cause;
	sys_pidfd_send_signal(run->init, SIGKILL); /* and the kernel kills all of the pid namespace */
}

static void map(const struct launcher *launcher, struct run *run) {
	uint32_t host = launcher->hello.uid_base + run->index;
	int error = put_map(run->pid, "gid_map", run->plan->gid, host) < 0 ? errno : 0;
	if (!error)
		error = put_map(run->pid, "uid_map", run->plan->uid, host) < 0 ? errno : 0;
	struct cell_order mapped = {.kind = CELL_MAPPED, .value = (uint32_t)error};
	message_send(run->cell, &mapped, sizeof mapped, NULL, 0);
	order_send(run);
}

static uint32_t program_pid(const struct run *run) {
	char path[64], text[64] = {0};
	snprintf(path, sizeof path, "/proc/%d/task/%d/children", run->pid, run->pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (read(fd, text, sizeof text - 1) < 0)
			text[0] = 0;
		close(fd);
	}
	return (uint32_t)strtoul(text, NULL, 10);
}

static void execed(struct launcher *launcher, struct run *run, const struct cell_message *message) {
	run->execed = 1;
	run->exec_ns = message->time_ns;
	run->report.setup_ns = message->time_ns - run->start_ns;
	run->report.flags |= REPORT_EXECED | message->flags;
	if (run->request_flags & REQUEST_STARTED) {
		struct report started = run->report;
		started.kind = REPORT_STARTED;
		started.pid = run->report.pid = program_pid(run);
		message_send(run->channel, &started, sizeof started, NULL, 0);
	}
	clocks_start(launcher, run);
}

static void ended(struct run *run, const struct cell_message *message) {
	struct report *report = &run->report;
	run->ended = 1;
	report->flags |= message->flags;
	report->exit_code = message->exit_code;
	report->signal = message->signal;
	report->user_ns = message->user_ns;
	report->system_ns = message->system_ns;
	report->peak_memory = message->peak_memory;
	report->cpu_source = report->memory_source = SOURCE_RUSAGE;
	if (run->execed)
		report->wall_ns = message->time_ns - run->exec_ns;
}

/* One message; 0 when there is none. */
static int hear(struct launcher *launcher, struct run *run) {
	struct cell_message message;
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec vector = {.iov_base = &message, .iov_len = sizeof message};
	struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	if (recvmsg(run->cell, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) != sizeof message)
		return 0;
	struct cmsghdr *first = CMSG_FIRSTHDR(&header);
	switch ((enum cell_message_kind)message.kind) {
	case CELL_NEED_MAP: map(launcher, run); break;
	case CELL_LISTENER:
		if (first && run->listener < 0) {
			memcpy(&run->listener, CMSG_DATA(first), sizeof run->listener);
			watch(launcher, run->listener, EVENT_LISTENER, run);
		}
		break;
	case CELL_EXECED: execed(launcher, run, &message); break;
	case CELL_FAILED:
		run->report.step = message.step;
		run->report.error = message.error;
		run->report.detail = message.detail;
		break;
	case CELL_ENDED: ended(run, &message); break;
	case CELL_READY: break;
	}
	return 1;
}

void run_heard(struct launcher *launcher, struct run *run) {
	if (!hear(launcher, run))
		unwatch(launcher, &run->cell); /* closed: init's own end is about to be seen */
}

void run_command(struct launcher *launcher, struct run *run) {
	struct command command;
	(void)launcher;
	if (recv(run->channel, &command, sizeof command, MSG_DONTWAIT) != sizeof command)
		command = (struct command){.cause = CAUSE_CALLER}; /* the caller has let go of it */
	if (command.signal) {
		struct cell_order order = {.kind = CELL_SIGNAL, .value = command.signal};
		message_send(run->cell, &order, sizeof order, NULL, 0);
		return;
	}
	run_kill(run, command.cause == CAUSE_OUTPUT ? CAUSE_OUTPUT : CAUSE_CALLER);
}

void run_finish(struct launcher *launcher, struct run *run) {
	struct report *report = &run->report;
	siginfo_t info;
	waitid(P_PIDFD, (id_t)run->init, &info, WEXITED);
	while (run->cell >= 0 && hear(launcher, run))
		;
	if (!run->ended && run->execed) {
		report->signal = SIGKILL;
		report->wall_ns = now_ns() - run->exec_ns;
	}
	if (run->has_groups) {
		cgroup_report(launcher, run);
		report->cpu_ns = run_cpu(launcher, run);
	} else {
		report->cpu_ns = report->user_ns + report->system_ns;
		if (report->cause == CAUSE_CPU)
			report->cpu_ns = report->observed;
	}
	clocks_final(run);
	if (report->step == STEP_NONE && !run->ended && report->cause == CAUSE_NONE && report->oom_kills == 0)
		report->step = STEP_LOST;
	answer(launcher, run, report->step == STEP_NONE ? REPORT_ENDED : REPORT_FAILED);
}
