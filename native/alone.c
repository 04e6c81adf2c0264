/* The launcher alone: `nsjail-launcher FILE -- CMD [ARGS...]` runs one program in the jail of a saved plan, and no Python.
 *
 * Theory of operation. We are the caller of one run, as launcher.py is of many. The plan's file is read and found good (saved.c); CMD
 * and what of our environment the plan passes on become the order (command.c). Then we fork: the child forgets all that and is the
 * launcher, as if it had been spawned; we claim host ids and control groups (claim.c), say hello, and send the one request. Then we
 * carry its streams (relay.c) until the report is there, clear away, and end as the program did. If we die the launcher sees it, as
 * ever. */
#include "alone.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* One run, and all that belongs to it. */
struct alone {
	struct saved *saved;
	struct order *order;
	int control[2], channel[2];
	int plan, large; /* memory for the launcher: the plan, and an order that is too large for the request */
	int inside[PIPES]; /* the program's ends of its streams */
	pid_t launcher;
	struct claim claim;
	struct relay relay;
};

_Noreturn void give_up(int status, const char *format, ...) {
	char line[1024];
	va_list values;
	va_start(values, format);
	int size = vsnprintf(line, sizeof line - 1, format, values);
	va_end(values);
	size = size < 0 ? 0 : size < (int)sizeof line - 1 ? size : (int)sizeof line - 2;
	for (int i = 0; i < size; i++)
		if ((unsigned char)line[i] < ' ')
			line[i] = '?';
	dprintf(2, "nsjail-launcher: %.*s\n", size, line);
	exit(status);
}

void demand(int result, const char *what) {
	if (result < 0)
		give_up(STATUS_SETUP, "%s: %s", what, strerror(errno));
}

/* Where the caller closed one, /dev/null takes its number: else a descriptor of ours would get it. */
static void streams_open(void) {
	struct stat status;
	for (int number = 0; number < PIPES; number++)
		if (fcntl(number, F_GETFD) < 0)
			demand(open("/dev/null", O_RDWR), "standard streams");
	if (fstat(0, &status) == 0 && S_ISDIR(status.st_mode))
		give_up(STATUS_SETUP, "standard input: is a directory");
}

/* ---------------------------------------------------------------- the launcher */

static int sealed(const char *name, const void *data, size_t size) {
	int descriptor = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	demand(descriptor, name);
	for (size_t done = 0; done < size;) {
		ssize_t written = write(descriptor, (const char *)data + done, size - done);
		demand((int)(written > 0 ? 0 : -1), name);
		done += (size_t)written;
	}
	demand(fcntl(descriptor, F_ADD_SEALS, BLOCK_SEALS | F_SEAL_SEAL), name);
	return descriptor;
}

/* What /proc would show of us in the launcher and in each cell, which are our copies. */
static void forget(int count, char **arguments) {
	static const char name[] = "nsjail-launcher";
	size_t room = strlen(arguments[0]);
	for (char **variable = environ; *variable; variable++)
		memset(*variable, 0, strlen(*variable));
	for (int i = 0; i < count; i++)
		memset(arguments[i], 0, strlen(arguments[i]));
	if (room >= strlen(name))
		memcpy(arguments[0], name, sizeof name);
}

/* Its standard input is the socket, as from launcher.py; all else it closes itself. */
static void become_launcher(const struct alone *alone, int count, char **arguments) {
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	forget(count, arguments);
	free(alone->order);
	if (null < 0 || dup2(alone->control[1], 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
		_exit(1);
}

static void pipes_make(struct alone *alone) {
	for (int number = 0; number < PIPES; number++) {
		int ends[2], ours = number == 0;
		demand(pipe2(ends, O_CLOEXEC), "standard streams");
		alone->inside[number] = ends[!ours];
		alone->relay.pipes[number] = ends[ours];
		demand(fcntl(ends[ours], F_SETFL, O_NONBLOCK), "standard streams");
	}
}

static void hello_send(const struct alone *alone) {
	const struct saved *saved = alone->saved;
	const struct saved_group *groups = at(saved, saved->groups.offset);
	struct hello hello = {
	    .magic = HELLO_MAGIC,
	    .version = FORMAT_VERSION,
	    .cgroup_kind = saved->cgroup_kind,
	    .uid_base = alone->claim.uid_base,
	    .uid_count = saved->locks ? saved->uid_block : 0,
	    .caller = (uint32_t)getpid(),
	};
	for (uint32_t i = 0; i < saved->groups.count; i++)
		hello.groups |= 1u << groups[i].group;
	message_send(NULL, alone->control[0], &hello, sizeof hello, alone->claim.groups, (int)saved->groups.count);
}

/* Before anything is claimed: who gives up here leaves nothing. */
static void blocks_seal(struct alone *alone) {
	alone->plan = sealed("plan", at(alone->saved, alone->saved->plan.offset), alone->saved->plan.count);
	if (alone->order->size > MAX_INLINE)
		alone->large = sealed("order", alone->order, alone->order->size);
}

/* That either does not arrive is heard on the channel. */
static void request_send(const struct alone *alone) {
	struct {
		struct request head;
		char order[MAX_INLINE];
	} request;
	uint32_t size = alone->order->size <= MAX_INLINE ? alone->order->size : 0;
	int descriptors[PIPES + 3] = {alone->channel[1], alone->plan}, count = 2;
	for (int number = 0; number < PIPES; number++)
		descriptors[count++] = alone->inside[number];
	if (!size)
		descriptors[count++] = alone->large;
	request.head = (struct request){.magic = REQUEST_MAGIC, .inlined = size, .plan = 1};
	memcpy(request.order, alone->order, size);
	message_send(NULL, alone->control[0], &request, sizeof request.head + size, descriptors, count);
	close(alone->channel[1]);
	for (int number = 0; number < PIPES; number++)
		close(alone->inside[number]);
}

/* Its cells are gone when it is; then nothing is left of the run. */
static void clear(struct alone *alone) {
	close(alone->control[0]);
	close(alone->relay.channel);
	while (waitpid(alone->launcher, NULL, 0) < 0 && errno == EINTR)
		;
	claim_release(&alone->claim);
}

/* ---------------------------------------------------------------- the end */

static int has_limit(const struct plan *plan, uint32_t resource) {
	const struct resource_limit *limits = at(plan, plan->limits.offset);
	for (uint32_t i = 0; i < plan->limits.count; i++)
		if (limits[i].resource == resource)
			return 1;
	return 0;
}

static const char *clock_limit(const struct report *report) {
	switch ((enum cause)report->cause) {
	case CAUSE_WALL: return "wall_time: the program ran";
	case CAUSE_CPU: return "cpu_time: the program used processor time";
	case CAUSE_IDLE: return "idle: the program did nothing";
	default: return NULL;
	}
}

/* The limit that ended it, most telling cause first, as in reports.py; NULL: none did. */
static const char *limit_reached(const struct alone *alone, const struct report *report) {
	const struct plan *plan = at(alone->saved, alone->saved->plan.offset);
	int failed = report->exit_code != 0;
	if (report->cause == CAUSE_MEMORY || (report->cause == CAUSE_NONE && report->oom_kills))
		return "memory: the program ran out of memory";
	if (report->cause == CAUSE_OUTPUT || alone->relay.exceeded)
		return "output: the program wrote more than it may";
	if (report->cause == CAUSE_SYSCALL || (report->signal == SIGSYS && plan->flags & PLAN_FILTER))
		return "syscall: the program made a denied system call";
	if ((report->signal == SIGXFSZ && has_limit(plan, RLIMIT_FSIZE)) || (failed && report->flags & REPORT_DISK_FULL))
		return "disk: the program filled its disk space";
	return failed && report->process_denials ? "processes: the program was refused more processes or threads" : NULL;
}

static void failed_step(const struct alone *alone, const struct report *report) {
	const struct saved *saved = alone->saved;
	const struct plan *plan = at(saved, saved->plan.offset);
	const uint64_t *names = at(saved, saved->steps.offset);
	const char *name = report->step < saved->steps.count ? at(saved, (uint32_t)names[report->step]) : "unknown step";
	const struct mount_step *mount = at(plan, plan->mounts.offset);
	const char *said = report->error ? strerror((int)report->error) : "it ended by itself";
	int mounts = report->step >= STEP_MOUNT_TARGET && report->step <= STEP_MOUNT_MASK && report->detail < plan->mounts.count;
	if (mounts)
		give_up(STATUS_SETUP, "%s: %s (on %s)", name, said, (const char *)at(plan, mount[report->detail].target));
	give_up(STATUS_SETUP, "%s: %s", name, said);
}

_Noreturn static void finish(const struct alone *alone) {
	const struct report *report = &alone->relay.report;
	const char *limit = limit_reached(alone, report);
	if (report->kind == REPORT_FAILED && report->step != STEP_EXEC)
		failed_step(alone, report);
	if (report->kind == REPORT_FAILED && !report->oom_kills)
		give_up(report->error == ENOENT ? STATUS_NOT_FOUND : STATUS_CANNOT_EXECUTE, "exec_failed: %s (%s)",
		        strerror((int)report->error), (const char *)at(alone->order, alone->order->program));
	if (clock_limit(report))
		give_up(STATUS_LIMIT, "%s for %.3f s", clock_limit(report), (double)report->observed / 1e9);
	if (alone->relay.stopped) /* however the program came to its end in the same moment */
		exit(128 + alone->relay.stopped);
	if (limit)
		give_up(STATUS_LIMIT, "%s", limit);
	for (int number = 1; number < PIPES; number++)
		if (alone->relay.refused[number])
			give_up(STATUS_SETUP, "%s: %s", number == 1 ? "standard output" : "standard error",
			        strerror(alone->relay.refused[number]));
	exit(report->signal > 0 ? 128 + report->signal : report->exit_code);
}

void alone(int count, char **arguments) {
	static struct alone alone;
	streams_open();
	if (getauxval(AT_SECURE))
		give_up(STATUS_SETUP, "the launcher must not be set-user-id");
	if (count < 4 || strcmp(arguments[2], "--") != 0)
		give_up(STATUS_SETUP, "usage: nsjail-launcher FILE -- CMD [ARGS...]");
	limit_most(RLIMIT_NOFILE); /* whatever others of this user's keep on its way, we are to pass descriptors on. unix(7) */
	alone.saved = saved_open(arguments[1]);
	alone.claim.saved = alone.saved;
	alone.relay.limit = alone.saved->output;
	alone.order = order_make(alone.saved, arguments + 3);
	demand(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, alone.control), "launcher");
	alone.launcher = fork();
	demand(alone.launcher, "launcher");
	if (alone.launcher == 0)
		return become_launcher(&alone, count, arguments);
	close(alone.control[1]);
	demand(alone.relay.signals = signals_take(), "signals");
	demand(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, alone.channel), "request");
	pipes_make(&alone);
	blocks_seal(&alone);
	alone.relay.channel = alone.channel[0];
	claim_make(&alone.claim);
	hello_send(&alone);
	request_send(&alone);
	relay_run(&alone.relay);
	clear(&alone);
	finish(&alone);
}
