/* The launcher: one event loop, one thread, no privilege kept from the caller's view and none given to a cell. epoll(7)
 *
 * Theory of operation. The caller spawns us once, with a socket as standard input, and says hello: which host ids and control
 * groups we may use. Each request brings a plan, an order, a channel and the program's descriptors. The plan's shelf (shelf.c) has a
 * cell in stock or we clone one (cell.c), which climbs the ladder (inside.c) and becomes init (reaper.c) and a process that waits
 * for the order (run.c). From there on we only listen: to the cell, to its denied calls (denials.c), to its clocks (clocks.c), to
 * the caller. When init is dead the kernel has killed everything in the cell; we count, clear away and report. When there is nothing
 * to hear we put new cells in stock. When the caller is gone so are we, and with us every cell. */
#include "launcher.h"
#include "alone.h"
#include "kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { CONTROL = 0, EVENTS = 64, SWEEP_MS = 2, MAX_SWEEP_MS = 1024 };

int watch(struct launcher *launcher, int descriptor, enum event event, const struct run *run) {
	uint64_t tag = event;
	if (run)
		tag |= (uint64_t)run->generation << 32 | (uint64_t)run->index << 4;
	struct epoll_event interest = {.events = EPOLLIN, .data.u64 = tag};
	return epoll_ctl(launcher->epoll, EPOLL_CTL_ADD, descriptor, &interest);
}

/* Deleted by name: a cell that is just being cloned holds a copy, which would keep a closed one watched. */
void unwatch(struct launcher *launcher, int *descriptor) {
	if (*descriptor < 0)
		return;
	epoll_ctl(launcher->epoll, EPOLL_CTL_DEL, *descriptor, NULL);
	close(*descriptor);
	*descriptor = -1;
}

/* The caller is gone, or has closed his end. The kernel ends our cells with us; but where their new parent is the caller (process 1 of a
 * container, a subreaper) he would find them dead and never asked for them. */
_Noreturn static void leave(struct launcher *launcher) {
	siginfo_t info;
	for (uint32_t i = 0; i < launcher->top_run; i++)
		if (launcher->runs[i].used && launcher->runs[i].init >= 0 && !cell_is_job(&launcher->runs[i]))
			run_kill(&launcher->runs[i], CAUSE_CALLER);
	for (uint32_t i = 0; i < launcher->top_run; i++)
		if (launcher->runs[i].used && launcher->runs[i].init >= 0 && !cell_is_job(&launcher->runs[i]))
			waitid(P_PIDFD, (id_t)launcher->runs[i].init, &info, WEXITED);
	exit(0);
}

static void request(struct launcher *launcher) {
	static struct {
		struct request head;
		char order[MAX_INLINE];
	} request;
	int descriptors[MAX_FDS + 3], count = MAX_FDS + 3;
	ssize_t size = message_receive(NULL, CONTROL, &request, sizeof request, MSG_CMSG_CLOEXEC, descriptors, &count);
	if (size == 0 && count == 0)
		leave(launcher); /* the caller closed it */
	int least = 5 + (size == sizeof request.head);
	if (size >= (ssize_t)sizeof request.head && request.head.magic == REQUEST_MAGIC && count >= least &&
	    request.head.inlined == (size_t)size - sizeof request.head)
		run_start(launcher, &request.head, descriptors, count);
	else if (count) /* the channel comes first */
		run_refuse(descriptors[0], STEP_REQUEST, size < 0 ? errno : EPROTO);
	for (int i = 0; i < count; i++)
		if (descriptors[i] >= 0)
			close(descriptors[i]);
}

static void dispatch(struct launcher *launcher, uint64_t tag, uint32_t ready) {
	enum event event = tag & 15;
	if (event == EVENT_CALLER)
		leave(launcher);
	if (event == EVENT_CONTROL)
		return request(launcher);
	struct run *run = &launcher->runs[(tag & 0xffffffff) >> 4];
	if (!run->used || run->generation != tag >> 32)
		return;
	switch (event) {
	case EVENT_CHANNEL: return run_command(launcher, run);
	case EVENT_CELL: return cell_heard(launcher, run);
	case EVENT_PROGRAM: return program_heard(launcher, run);
	case EVENT_INIT: return cell_finish(launcher, run);
	case EVENT_LISTENER:
		if (ready & EPOLLIN)
			return denials_answer(launcher, run);
		/* Nobody is left under the filter: before Linux 6.11 a receive would then wait for ever, and we with it. It is closed with
		 * the cell: to take it apart is dear, and somebody waits for the result. */
		epoll_ctl(launcher->epoll, EPOLL_CTL_DEL, run->listener, NULL);
		return;
	default: break;
	}
	uint64_t times;
	if (read(run->timer, &times, sizeof times) > 0)
		clocks_check(launcher, run);
}

static int hello(struct launcher *launcher) {
	int descriptors[GROUPS], count = GROUPS, next = 0;
	struct hello *hello = &launcher->hello;
	if (message_receive(NULL, CONTROL, hello, sizeof *hello, MSG_CMSG_CLOEXEC, descriptors, &count) != sizeof *hello ||
	    hello->magic != HELLO_MAGIC || hello->version != FORMAT_VERSION)
		return 0;
	for (int group = 0; group < GROUPS; group++)
		launcher->groups[group] = hello->groups & (1u << group) && next < count ? descriptors[next++] : -1;
	return next == count;
}

/* What all cells rest on, or no launcher. */
static void must(int result) {
	if (result < 0)
		exit(1);
}

static void settle(struct launcher *launcher) {
	struct rlimit core = {1, 1};
	cpu_set_t cpus;
	sigset_t none_blocked;
	must((int)syscall(SYS_close_range, 3, ~0U, 0));
	/* Once, for all cells: they are our copies. The C library keeps two for itself and would leave those as they came. */
	for (int number = 1; number < NSIG; number++)
		if (number != SIGKILL && number != SIGSTOP)
			must(sys_signal_default(number));
	sigemptyset(&none_blocked);
	must(sigprocmask(SIG_SETMASK, &none_blocked, NULL));
	must(session_new());
	keyring_none(); /* for cells that can have none of their own; where we cannot either, they fail, and say so */
	prctl(PR_SET_NAME, "nsjail-launcher");
	must(prctl(PR_SET_DUMPABLE, 0));
	setrlimit(RLIMIT_CORE, &core); /* what cells are to have; a hard limit of 0 is the user's own, who cannot raise it */
	limit_most(RLIMIT_NOFILE);
	limit_most(RLIMIT_FSIZE);
	launcher->cpus = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
	must(launcher->proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC));
	launcher->stamps = mmap(NULL, MAX_RUNS * sizeof *launcher->stamps, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(launcher->stamps == MAP_FAILED ? -1 : chdir("/"));
}

int main(int count, char **arguments) {
	static struct launcher launcher;
	struct epoll_event events[EVENTS];
	if (count == 5 && !strcmp(arguments[0], "nsjail-init"))
		reaper_main(arguments + 1);
	if (count > 1)
		alone(count, arguments); /* its child is the launcher */
	settle(&launcher);
	if (!hello(&launcher))
		return 1;
	launcher.epoll = epoll_create1(EPOLL_CLOEXEC);
	launcher.caller = sys_pidfd_open((pid_t)launcher.hello.caller);
	if (launcher.epoll < 0 || launcher.caller < 0 || getppid() != (pid_t)launcher.hello.caller ||
	    watch(&launcher, CONTROL, EVENT_CONTROL, NULL) < 0 || watch(&launcher, launcher.caller, EVENT_CALLER, NULL) < 0)
		return 1;
	for (uint64_t swept_ns = 0;;) {
		int wait_ms = shelves_wait_ms(&launcher);
		if (launcher.undead && (wait_ms < 0 || wait_ms > launcher.sweep_ms))
			wait_ms = launcher.sweep_ms;
		int heard = epoll_wait(launcher.epoll, events, EVENTS, wait_ms);
		if (heard < 0 && errno != EINTR)
			return 1;
		for (int i = 0; i < heard; i++)
			dispatch(&launcher, events[i].data.u64, events[i].events);
		if (heard == 0)
			shelves_tend(&launcher);
		uint64_t now = launcher.undead ? now_ns() : 0;
		if (!launcher.undead || now < swept_ns + (uint64_t)launcher.sweep_ms * 1000000u)
			continue;
		cgroup_sweep(&launcher);
		swept_ns = now;
		launcher.sweep_ms =
		    launcher.sweep_ms ? 2 * launcher.sweep_ms : SWEEP_MS; /* a group that stays is not looked at for ever */
		if (launcher.sweep_ms > MAX_SWEEP_MS)
			launcher.sweep_ms = MAX_SWEEP_MS;
	}
}
