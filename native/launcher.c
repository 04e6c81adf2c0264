/* The launcher: one event loop, one thread, no privilege kept from the caller's view and none given to a cell. epoll(7)
 *
 * Theory of operation. The caller spawns us once, with a socket as standard input, and says hello: which host ids and control
 * groups we may use. Each request brings a plan, an order, a channel and the program's descriptors. We clone a cell (cell.c), which
 * climbs the ladder (inside.c) and becomes init (reaper.c) and program. From there on we only listen: to the cell, to its denied
 * calls (denials.c), to its clocks (clocks.c), to the caller. When init is dead the kernel has killed everything in the cell; we
 * count, clear away and report. When the caller is gone so are we, and with us every cell. */
#include "launcher.h"
#include "kernel.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>

enum { CONTROL = 0, EVENTS = 64, SWEEP_MS = 2 };

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

static ssize_t receive(int socket, void *message, size_t size, int *descriptors, int *count) {
	char control[CMSG_SPACE(sizeof(int) * (MAX_FDS + 3))];
	struct iovec vector = {.iov_base = message, .iov_len = size};
	struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	ssize_t received = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
	struct cmsghdr *first = received < 0 ? NULL : CMSG_FIRSTHDR(&header);
	*count = first ? (int)((first->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
	if (*count)
		memcpy(descriptors, CMSG_DATA(first), sizeof(int) * (size_t)*count);
	return header.msg_flags & (MSG_CTRUNC | MSG_TRUNC) ? 0 : received;
}

static void request(struct launcher *launcher) {
	struct request request;
	int descriptors[MAX_FDS + 3], count;
	ssize_t size = receive(CONTROL, &request, sizeof request, descriptors, &count);
	if (size == 0 && count == 0)
		exit(0); /* the caller closed it */
	if (size == sizeof request && request.magic == REQUEST_MAGIC && count >= 6)
		run_start(launcher, &request, descriptors, count);
	for (int i = 0; i < count; i++)
		if (descriptors[i] >= 0)
			close(descriptors[i]);
}

static void dispatch(struct launcher *launcher, uint64_t tag, uint32_t ready) {
	enum event event = tag & 15;
	if (event == EVENT_CALLER)
		exit(0);
	if (event == EVENT_CONTROL)
		return request(launcher);
	struct run *run = &launcher->runs[(tag & 0xffffffff) >> 4];
	if (!run->used || run->generation != tag >> 32)
		return;
	switch (event) {
	case EVENT_CHANNEL: return run_command(launcher, run);
	case EVENT_CELL: return run_heard(launcher, run);
	case EVENT_INIT: return run_finish(launcher, run);
	case EVENT_LISTENER:
		/* Nobody is left under the filter: before Linux 6.11 a receive would then wait for ever, and we with it. */
		return ready & EPOLLIN ? denials_answer(run) : unwatch(launcher, &run->listener);
	default: break;
	}
	uint64_t times;
	if (read(run->timer, &times, sizeof times) > 0)
		clocks_check(launcher, run);
}

static int hello(struct launcher *launcher) {
	int descriptors[MAX_FDS + 3], count, next = 0;
	if (receive(CONTROL, &launcher->hello, sizeof launcher->hello, descriptors, &count) != sizeof launcher->hello ||
	    launcher->hello.magic != HELLO_MAGIC || launcher->hello.version != FORMAT_VERSION)
		return 0;
	for (int group = 0; group < GROUPS; group++)
		launcher->groups[group] = launcher->hello.groups & (1u << group) && next < count ? descriptors[next++] : -1;
	return next == count;
}

static void settle(struct launcher *launcher) {
	struct rlimit files, none = {0, 0};
	cpu_set_t cpus;
	syscall(SYS_close_range, 3, ~0U, 0);
	signals_reset();
	signal(SIGPIPE, SIG_IGN);
	session_new();
	prctl(PR_SET_NAME, "nsjail-launcher");
	prctl(PR_SET_DUMPABLE, 0);
	setrlimit(RLIMIT_CORE, &none);
	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	launcher->cpus = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
	if (chdir("/") < 0)
		exit(1);
}

int main(void) {
	static struct launcher launcher;
	struct epoll_event events[EVENTS];
	settle(&launcher);
	if (!hello(&launcher))
		return 1;
	launcher.epoll = epoll_create1(EPOLL_CLOEXEC);
	launcher.caller = sys_pidfd_open((pid_t)launcher.hello.caller);
	if (launcher.epoll < 0 || launcher.caller < 0 || getppid() != (pid_t)launcher.hello.caller ||
	    watch(&launcher, CONTROL, EVENT_CONTROL, NULL) < 0 || watch(&launcher, launcher.caller, EVENT_CALLER, NULL) < 0)
		return 1;
	for (;;) {
		int count = epoll_wait(launcher.epoll, events, EVENTS, launcher.undead ? SWEEP_MS : -1);
		if (count < 0 && errno != EINTR)
			return 1;
		for (int i = 0; i < count; i++)
			dispatch(&launcher, events[i].data.u64, events[i].events);
		if (launcher.undead)
			cgroup_sweep(&launcher);
	}
}
