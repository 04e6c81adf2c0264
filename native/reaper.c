/* Init, once the program has its own process: reaps, forwards signals, reports, and ends with the program. It has no right, no
 * environment, no descriptor of the program's, and when it ends the kernel kills all that is left in the cell. pid_namespaces(7) */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/statfs.h>
#include <sys/wait.h>

/* Made before the program shares our table and puts its own descriptors into it. */
int init_descriptors(struct cell *cell) {
	sigset_t children;
	sigemptyset(&children);
	sigaddset(&children, SIGCHLD);
	cell->children = descriptor_high(signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK));
	if (cell->children < 0 || sigprocmask(SIG_BLOCK, &children, NULL) < 0 || pipe2(cell->status, O_CLOEXEC | O_NONBLOCK) < 0)
		return -1;
	cell->status[0] = descriptor_high(cell->status[0]);
	cell->status[1] = descriptor_high(cell->status[1]);
	return cell->status[0] < 0 || cell->status[1] < 0 ? -1 : 0;
}

static void tell(const struct cell *cell, struct cell_message *message, const int *descriptor) {
	message->time_ns = now_ns();
	if (message_send(cell->launcher, message, sizeof *message, descriptor, descriptor ? 1 : 0) < 0)
		_exit(1);
}

/* The program is about to exec: pass its listener on, take a table of our own, and let go of everything that is the program's. */
static void part(const struct cell *cell, const struct cell_message *ready) {
	int kept[] = {cell->launcher, cell->status[0], cell->children, cell->scratch};
	if (ready->listener >= 0) {
		struct cell_message message = {.kind = CELL_LISTENER};
		tell(cell, &message, &ready->listener);
	}
	if (unshare(CLONE_FILES) < 0)
		fail(cell, STEP_DESCRIPTORS, errno);
	descriptors_keep(kept, 4);
}

/* Returns 0 when the program has let go of the pipe: it runs, or it is dead. */
static int records_read(struct cell *cell) {
	struct cell_message record;
	ssize_t size;
	while ((size = read(cell->status[0], &record, sizeof record)) == sizeof record) {
		if (record.kind == CELL_FAILED) {
			tell(cell, &record, NULL);
			_exit(1);
		}
		part(cell, &record);
	}
	return size != 0;
}

static int disk_full(const struct cell *cell) {
	struct statfs status;
	return cell->scratch >= 0 && fstatfs(cell->scratch, &status) == 0 &&
	       ((status.f_blocks && status.f_bavail == 0) || (status.f_files && status.f_ffree == 0));
}

_Noreturn static void ended(const struct cell *cell, int status) {
	struct rusage usage;
	struct cell_message message = {.kind = CELL_ENDED, .flags = cell->flags, .exit_code = -1, .signal = -1};
	if (WIFEXITED(status))
		message.exit_code = WEXITSTATUS(status);
	else
		message.signal = WTERMSIG(status);
	if (getrusage(RUSAGE_CHILDREN, &usage) == 0) {
		message.user_ns = (uint64_t)usage.ru_utime.tv_sec * 1000000000u + (uint64_t)usage.ru_utime.tv_usec * 1000u;
		message.system_ns = (uint64_t)usage.ru_stime.tv_sec * 1000000000u + (uint64_t)usage.ru_stime.tv_usec * 1000u;
		message.peak_memory = (uint64_t)usage.ru_maxrss * 1024u;
	}
	if (disk_full(cell))
		message.flags |= REPORT_DISK_FULL;
	tell(cell, &message, NULL);
	_exit(0);
}

static void children_reap(const struct cell *cell, pid_t program) {
	struct signalfd_siginfo dropped;
	int status;
	pid_t pid;
	while (read(cell->children, &dropped, sizeof dropped) > 0)
		;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == program)
			ended(cell, status);
}

static void signal_forward(const struct cell *cell, pid_t program) {
	struct cell_order order;
	int none = 0;
	if (order_receive(cell->launcher, &order, NULL, &none) < 0)
		_exit(1);
	if (order.kind == CELL_SIGNAL)
		kill(program, (int)order.value);
}

_Noreturn void reap(struct cell *cell, pid_t program) {
	enum { LAUNCHER, STATUS, CHILDREN, WATCHED };
	struct pollfd watched[WATCHED] = {
	    [LAUNCHER] = {.fd = cell->launcher}, /* until the program has its order, what comes there is the program's to read */
	    [STATUS] = {.fd = cell->status[0], .events = POLLIN},
	    [CHILDREN] = {.fd = cell->children, .events = POLLIN},
	};
	/* The launcher's death is ours; if it has come already, the socket says so. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		fail(cell, STEP_PROGRAM_PROCESS, errno);
	for (;;) {
		if (poll(watched, WATCHED, -1) < 0 && errno != EINTR)
			_exit(1);
		if (watched[LAUNCHER].revents & (POLLHUP | POLLERR))
			_exit(1);
		/* What a dead program has still told comes before its death. */
		if (watched[STATUS].fd >= 0 && (watched[STATUS].revents | watched[CHILDREN].revents) && !records_read(cell)) {
			struct cell_message message = {.kind = CELL_EXECED, .flags = cell->flags};
			tell(cell, &message, NULL);
			watched[STATUS].fd = -1;
			watched[LAUNCHER].events = POLLIN;
		}
		if (watched[CHILDREN].revents & POLLIN)
			children_reap(cell, program);
		if (watched[LAUNCHER].revents & POLLIN)
			signal_forward(cell, program);
	}
}
