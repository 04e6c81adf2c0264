/* A cell, seen from outside: cloned, mapped, heard and cleared away. clone(2), user_namespaces(7), pidfd_open(2) */
#include "kernel.h"
#include "launcher.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

struct run *cell_slot(struct launcher *launcher, struct shelf *shelf) {
	uint32_t most = launcher->hello.uid_count && launcher->hello.uid_count < MAX_RUNS ? launcher->hello.uid_count : MAX_RUNS;
	for (uint32_t i = 0; i < most; i++) {
		struct run *run = &launcher->runs[i];
		if (run->used)
			continue;
		memset(run, 0, sizeof *run);
		run->used = 1;
		run->index = i;
		run->generation = launcher->sequence++;
		run->channel = run->cell = run->program = run->init = run->listener = run->timer = -1;
		run->report.exit_code = run->report.signal = -1;
		run->start_ns = now_ns();
		run->shelf = shelf;
		run->plan = shelf->plan;
		shelf->cells++;
		if (i >= launcher->top_run)
			launcher->top_run = i + 1;
		return run;
	}
	return NULL;
}

void cell_release(struct launcher *launcher, struct run *run) {
	cgroup_remove(launcher, run);
	unwatch(launcher, &run->listener);
	unwatch(launcher, &run->timer);
	unwatch(launcher, &run->cell);
	unwatch(launcher, &run->program);
	unwatch(launcher, &run->init);
	run_held_drop(run);
	run->shelf->cells--;
	if (!run->ordered) {
		run->shelf->parked--;
		launcher->parked--;
	}
	run->used = 0;
}

static pid_t cell_clone(const struct launcher *launcher, struct run *run, int cell_end, int program_end) {
	int rootless = launcher->hello.uid_count == 0;
	struct cell cell = {
	    .plan = run->plan,
	    .launcher = cell_end,
	    .orders = program_end,
	    .template = run->shelf->template,
	    .cgroup_kind = run->has_groups ? launcher->hello.cgroup_kind : CGROUP_NONE,
	    .uid = rootless ? geteuid() : launcher->hello.uid_base + run->index,
	    .gid = rootless ? getegid() : launcher->hello.uid_base + run->index,
	    .rootless = rootless,
	    .proc = launcher->proc,
	    .stamp = &launcher->stamps[run->index],
	};
	/* The other namespaces are dear to make, and we have others to listen to: the cell makes them itself. */
	struct clone_args args = {
	    .flags = CLONE_NEWPID | (rootless ? CLONE_NEWUSER : 0) | CLONE_PIDFD,
	    .pidfd = (uint64_t)(uintptr_t)&run->init,
	    .exit_signal = SIGCHLD,
	};
	pid_t pid = cgroup_open(launcher, run, cell.groups) < 0 ? -1 : sys_clone3(&args);
	if (pid == 0)
		cell_main(&cell);
	int error = errno;
	for (int group = 0; group < GROUPS; group++)
		if (cell.groups[group] >= 0)
			close(cell.groups[group]);
	errno = error;
	return pid;
}

int cell_is_job(const struct run *run) { return run->shelf->warm != 0; }

static struct run *template_find(struct launcher *launcher, uint32_t name) {
	for (uint32_t i = 0; i < launcher->top_run; i++) {
		struct run *run = &launcher->runs[i];
		if (run->used && run->template == name && run->execed && run->program >= 0)
			return run;
	}
	errno = ESRCH;
	return NULL;
}

/* A job's cell is made by its template. It is born later: hear_init. */
static int job_clone(struct launcher *launcher, struct run *run, int cell_end, int program_end) {
	struct run *template = template_find(launcher, run->shelf->warm);
	struct cell_order job = {.kind = CELL_JOB, .value = (uint32_t)run->ordered};
	int ends[] = {cell_end, program_end};
	if (!template)
		return -1;
	run->report.flags |= template->report.flags & REPORT_NO_NESTED;
	return message_send(NULL, template->program, &job, sizeof job, ends, 2);
}

/* It cannot be listened to, so its end is waited for at once. Both sockets go first: init ends without them, too. */
static void abandon(struct launcher *launcher, struct run *run) {
	siginfo_t info;
	unwatch(launcher, &run->cell);
	unwatch(launcher, &run->program);
	if (run->init < 0)
		return; /* a job: it ends with its sockets, and its template waits for it */
	run_kill(run, CAUSE_NONE);
	waitid(P_PIDFD, (id_t)run->init, &info, WEXITED);
	unwatch(launcher, &run->init);
}

/* A template makes one job after the other, and as many may be asked for as there are runs. Only root may have more room than everybody; where
 * there is less, the job that does not fit is an error. unix(7), socket(7) */
static void room_for_jobs(int socket) {
	const int size = MAX_RUNS * 2048;
	if (setsockopt(socket, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) < 0)
		setsockopt(socket, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}

/* A step that fails here: errno is set, and no process is left. */
enum step cell_make(struct launcher *launcher, struct run *run) {
	int init[2], program[2];
	if (cgroup_make(launcher, run) < 0)
		return STEP_CGROUP;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, init) < 0)
		return STEP_CLONE;
	run->cell = init[0];
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, program) < 0) {
		close(init[1]);
		return STEP_CLONE;
	}
	run->program = program[0];
	if (run->template)
		room_for_jobs(run->program);
	int job = cell_is_job(run);
	launcher->stamps[run->index] = (struct stamp){0};
	run->pid = job ? job_clone(launcher, run, init[1], program[1]) : cell_clone(launcher, run, init[1], program[1]);
	int error = errno;
	close(init[1]);
	close(program[1]);
	errno = error;
	if (run->pid < 0)
		return job ? STEP_TEMPLATE : STEP_CLONE;
	run->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (run->timer < 0 || watch(launcher, run->timer, EVENT_TIMER, run) < 0 || watch(launcher, run->cell, EVENT_CELL, run) < 0 ||
	    watch(launcher, run->program, EVENT_PROGRAM, run) < 0 || (!job && watch(launcher, run->init, EVENT_INIT, run) < 0)) {
		error = errno;
		abandon(launcher, run);
		errno = error;
		return STEP_CLONE;
	}
	clocks_check(launcher, run);
	return STEP_NONE;
}

static void map(const struct launcher *launcher, struct run *run) {
	uint32_t host = launcher->hello.uid_base + run->index;
	int error = put_map(run->pid, "gid_map", run->plan->gid, host) < 0 ? errno : 0;
	if (!error)
		error = put_map(run->pid, "uid_map", run->plan->uid, host) < 0 ? errno : 0;
	struct cell_order mapped = {.kind = CELL_MAPPED, .value = (uint32_t)error};
	if (message_send(NULL, run->cell, &mapped, sizeof mapped, NULL, 0) < 0 && errno != EPIPE)
		run_spoil(run, STEP_ID_MAP, errno);
}

/* The host's number of a process that we have a descriptor of, -1 when it is gone; 0 when it cannot be told. proc_pid_fdinfo(5) */
static pid_t pid_of(int pidfd) {
	char path[64], text[256] = {0}, *line;
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", pidfd);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t size = read(fd, text, sizeof text - 1);
	keep_errno_close(fd);
	line = size > 0 ? strstr(text, "Pid:") : NULL;
	return line ? (pid_t)strtol(line + 4, NULL, 10) : 0;
}

static void born(struct launcher *launcher, struct run *run, int pidfd) {
	run->init = pidfd;
	run->pid = pid_of(pidfd);
	int error = errno;
	if (watch(launcher, run->init, EVENT_INIT, run) < 0) {
		run_spoil(run, STEP_CLONE, errno);
		return unwatch(launcher, &run->init); /* nobody hears it: its end is that of its socket, as if it had not been born */
	}
	if (run->pid == 0)
		run_spoil(run, STEP_CLONE, error); /* by its number we look at what it uses: without one no limit would be reached */
	if (run->doomed)
		run_kill(run, CAUSE_NONE);
}

/* A job's process asks for its groups, and goes into them by itself: since Linux 6.0 a move of somebody else waits for a grace period of
 * RCU, ten milliseconds and more, in which we would hear nobody. It is alone in its thread group, so version 1 takes it as a task. */
static void groups_give(const struct launcher *launcher, struct run *run) {
	const char *file = launcher->hello.cgroup_kind == CGROUP_V1 ? "tasks" : "cgroup.procs";
	struct cell_order given = {.kind = CELL_GROUPS};
	int files[GROUPS], count = 0;
	for (int group = 0; group < GROUPS && run->has_groups && !given.value; group++) {
		if (run->groups[group] < 0)
			continue;
		files[count] = openat(run->groups[group], file, O_WRONLY | O_CLOEXEC);
		if (files[count] < 0)
			given.value = (uint32_t)errno;
		else
			count++;
	}
	if (message_send(NULL, run->program, &given, sizeof given, files, given.value ? 0 : count) < 0 && errno != EPIPE)
		run_spoil(run, STEP_CGROUP_JOIN, errno); /* it would wait for its answer */
	while (count > 0)
		close(files[--count]);
}

static void failed(struct run *run, const struct cell_message *message) {
	if (run->report.step && (run->report.step != STEP_ORDER || run->report.error != EPIPE))
		return; /* the first one counts; but of a socket that was closed this is the reason */
	run->report.step = message->step;
	run->report.error = message->error;
	run->report.detail = message->detail;
}

static void drop(int descriptor) {
	if (descriptor >= 0)
		close(descriptor);
}

/* That it was killed before it took its order shows as one reset of the socket, with the order in it. unix(7) */
static void order_returned(struct launcher *launcher, struct run *run) {
	int error = 0;
	socklen_t size = sizeof error;
	if (getsockopt(run->program, SOL_SOCKET, SO_ERROR, &error, &size) < 0 || error != ECONNRESET)
		return;
	launcher->stamps[run->index].exec_ns = 0;
	run->stamped = 0;
}

/* One message of the program's before it runs; 0 when there is none, -1 when there will be none. Only the end of file says that it
 * runs: what cannot be received could have been anything. */
static int hear_program(struct launcher *launcher, struct run *run) {
	struct cell_message message;
	int sent = -1, count = 1;
	if (run->execed && cell_is_job(run))
		order_returned(launcher, run);
	ssize_t size = message_receive(NULL, run->program, &message, sizeof message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT, &sent, &count);
	if (size < 0 && errno == EAGAIN)
		return 0;
	if (size < 0 && run->report.cause == CAUSE_NONE)
		run_spoil(run, STEP_ORDER, errno);
	if (size != sizeof message) {
		drop(sent);
		return -1;
	}
	if (message.kind == CELL_FAILED)
		failed(run, &message);
	else if (message.kind == CELL_NEED_GROUPS)
		groups_give(launcher, run);
	else if (message.kind == CELL_SERVING && run->template && !run->execed) {
		run_execed(launcher, run);
		run_started(launcher, run);
	} else if (message.kind == CELL_READY && !run->ready) {
		run->ready = 1;
		if (cell_is_job(run)) {
			clocks_job(launcher, run);
			run->report.pid = run_program_pid(run); /* until its program runs it has no children */
		}
		run->report.flags |= message.flags;
		if (count == 1) {
			run->listener = sent;
			int answered = run->plan->flags & PLAN_OBSERVED ? observe(run) : watch(launcher, sent, EVENT_LISTENER, run);
			if (answered < 0)
				run_spoil(run, STEP_SECCOMP, errno); /* a denied call would never return */
		}
		run_held_send(launcher, run);
		return 1;
	}
	drop(sent);
	return 1;
}

static void program_gone(struct launcher *launcher, struct run *run) {
	unwatch(launcher, &run->program);
	if (run->ordered && !run->execed && !run->report.step)
		run_execed(launcher, run);
}

/* When the program has let go of its socket it runs, or it is dead. */
void program_heard(struct launcher *launcher, struct run *run) {
	if (run->program < 0)
		return; /* an event from before we let go of it */
	if (hear_program(launcher, run) < 0)
		program_gone(launcher, run);
}

/* What it said before it was gone. */
static void program_drain(struct launcher *launcher, struct run *run) {
	while (run->program >= 0 && hear_program(launcher, run) > 0)
		;
	if (run->program >= 0)
		program_gone(launcher, run);
}

/* Nothing but init is left in the cell. Where nothing of the host's was shown inside, the caller need not wait for its end: that is
 * dear, and begins when init's socket is closed. */
static void ended(struct launcher *launcher, struct run *run, const struct cell_message *message) {
	struct report *report = &run->report;
	run->ended = 1;
	run->end_ns = message->time_ns;
	report->flags |= message->flags;
	report->exit_code = message->exit_code;
	report->signal = message->signal;
	report->user_ns = message->user_ns;
	report->system_ns = message->system_ns;
	report->peak_memory = message->peak_memory;
	report->cpu_source = report->memory_source = SOURCE_RUSAGE;
	program_drain(launcher, run);
	if (run->ordered && run->plan->shared) {
		run_count(launcher, run);
		run_answer(launcher, run);
	}
	unwatch(launcher, &run->cell);
}

/* Its job's process waits in its last call, which it will not leave, and nobody else is there. Its end is not waited for: to give back a
 * copy of an interpreter takes the kernel longer than most jobs run. */
void cell_left(struct launcher *launcher, struct run *run) {
	run->ended = 1;
	run->end_ns = now_ns();
	run->report.exit_code = 0;
	program_drain(launcher, run);
	run_count(launcher, run);
	run_answer(launcher, run);
	run_kill(run, CAUSE_NONE);
}

/* One message of init's; 0 when there is none. */
static int hear_init(struct launcher *launcher, struct run *run) {
	struct cell_message message;
	int sent = -1, count = 1;
	if (message_receive(NULL, run->cell, &message, sizeof message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT, &sent, &count) !=
	    sizeof message) {
		drop(sent);
		return 0;
	}
	switch ((enum cell_message_kind)message.kind) {
	case CELL_NEED_MAP: map(launcher, run); break;
	case CELL_SHARED:
		if (count == 1 && run->shelf->template < 0) {
			run->shelf->template = sent;
			return 1;
		}
		break;
	case CELL_FAILED: failed(run, &message); break;
	case CELL_ENDED:
		if (!run->ended)
			ended(launcher, run, &message);
		break;
	case CELL_BORN:
		if (count == 1 && run->init < 0 && cell_is_job(run)) {
			born(launcher, run, sent);
			return 1;
		}
		break;
	case CELL_READY:
	case CELL_SERVING:
	case CELL_NEED_GROUPS: break;
	}
	drop(sent);
	return 1;
}

void cell_drain(struct launcher *launcher, struct run *run) {
	while (run->cell >= 0 && hear_init(launcher, run))
		;
}

void cell_heard(struct launcher *launcher, struct run *run) {
	if (hear_init(launcher, run))
		return;
	unwatch(launcher, &run->cell); /* closed: init's own end is about to be seen */
	if (run->init < 0)
		cell_finish(launcher, run); /* it was never born */
}

void cell_finish(struct launcher *launcher, struct run *run) {
	siginfo_t info = {0};
	if (run->init >= 0)
		waitid(P_PIDFD, (id_t)run->init, &info, WEXITED); /* a job's is not our child, and is waited for by its template */
	program_drain(launcher, run);
	cell_drain(launcher, run);
	if (info.si_code != CLD_EXITED && info.si_status == SIGSYS && !run->report.step)
		run_spoil(run, STEP_LOST, EPERM); /* of a filter that the launcher was born under */
	if (!run->ordered)
		run->shelf->spoiled = 1;
	int answered = run->channel < 0;
	if (!answered)
		run_count(launcher, run);
	cell_release(launcher, run);
	if (!answered)
		run_answer(launcher, run);
}
