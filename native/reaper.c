/* Init, once the program has its own process: reaps, forwards signals, reports, and ends with the program. It has no right, no
 * environment, no descriptor of the program's, and when it ends the kernel kills all that is left in the cell. pid_namespaces(7) */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/statfs.h>
#include <sys/wait.h>
#include <unistd.h>

static void tell(const struct cell *cell, struct cell_message *message) {
	if (message_send(NULL, cell->launcher, message, sizeof *message, NULL, 0) < 0)
		_exit(1);
}

static int disk_full(const struct cell *cell) {
	struct statfs status;
	return cell->scratch >= 0 && fstatfs(cell->scratch, &status) == 0 &&
	       ((status.f_blocks && status.f_bavail == 0) || (status.f_files && status.f_ffree == 0));
}

/* Whoever is left: the caller is told when nobody is, and without a child of ours nobody is. A fork that goes on meanwhile sees the
 * signal before it has a child. */
static void others_end(void) {
	pid_t ended;
	while ((ended = waitpid(-1, NULL, WNOHANG)) >= 0 || errno == EINTR)
		if (ended == 0) {
			kill(-1, SIGKILL);
			waitpid(-1, NULL, 0);
		}
}

/* Whoever waits for the word of it goes first: what is left to do here takes longer than what the launcher does with it. */
_Noreturn static void until_heard(const struct cell *cell) {
	struct cell_order dropped;
	int none = 0;
	while (message_receive(NULL, cell->launcher, &dropped, sizeof dropped, 0, NULL, &none) > 0)
		;
	_exit(0);
}

_Noreturn static void ended(const struct cell *cell, int status) {
	struct rusage usage;
	struct cell_message message = {.kind = CELL_ENDED, .flags = cell->flags, .exit_code = -1, .signal = -1};
	if (WIFEXITED(status))
		message.exit_code = WEXITSTATUS(status);
	else
		message.signal = WTERMSIG(status);
	message.time_ns = now_ns();
	if (disk_full(cell))
		message.flags |= REPORT_DISK_FULL;
	others_end();
	if (getrusage(RUSAGE_CHILDREN, &usage) == 0) {
		message.user_ns = (uint64_t)usage.ru_utime.tv_sec * 1000000000u + (uint64_t)usage.ru_utime.tv_usec * 1000u;
		message.system_ns = (uint64_t)usage.ru_stime.tv_sec * 1000000000u + (uint64_t)usage.ru_stime.tv_usec * 1000u;
		message.peak_memory = (uint64_t)usage.ru_maxrss * 1024u;
	}
	tell(cell, &message);
	until_heard(cell);
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
	if (pid < 0 && errno != ECHILD)
		_exit(1); /* an end that is missed would never be told */
}

static void signal_forward(const struct cell *cell, pid_t program) {
	struct cell_order order;
	int none = 0;
	if (message_receive(NULL, cell->launcher, &order, sizeof order, 0, NULL, &none) != sizeof order)
		_exit(1);
	if (order.kind == CELL_SIGNAL)
		kill(program, (int)order.value);
}

static int children_watch(struct cell *cell) {
	sigset_t children;
	sigemptyset(&children);
	sigaddset(&children, SIGCHLD);
	cell->children = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
	return cell->children < 0 ? -1 : sigprocmask(SIG_BLOCK, &children, NULL);
}

/* A job's process 1, executed anew: the sockets, the scratch, the program, and what to close when nobody can look in any more. */
_Noreturn void reaper_main(char **arguments) {
	int number[4];
	struct cell cell = {0};
	for (int i = 0; i < 4; i++)
		number[i] = atoi(arguments[i]);
	cell.launcher = cell.failures = number[0];
	cell.scratch = number[1];
	cell.gate[1] = number[3];
	if (prctl(PR_SET_DUMPABLE, 0) < 0 || prctl(PR_SET_NAME, "nsjail-init") < 0)
		fail(&cell, STEP_REAPER, errno);
	reap(&cell, number[2]);
}

_Noreturn void reap(struct cell *cell, pid_t program) {
	enum { LAUNCHER, CHILDREN, WATCHED };
	if (children_watch(cell) < 0)
		fail(cell, STEP_PROGRAM_PROCESS, errno);
	struct pollfd watched[WATCHED] = {
	    [LAUNCHER] = {.fd = cell->launcher, .events = POLLIN},
	    [CHILDREN] = {.fd = cell->children, .events = POLLIN},
	};
	int kept[] = {cell->launcher, cell->children, cell->scratch, cell->gate[1]};
	/* What is the program's: its end of a socket must be the last one. */
	if (descriptors_keep(kept, 4) < 0)
		fail(cell, STEP_DESCRIPTORS, errno);
	/* The launcher's death is ours; if it has come already, the socket says so. A job's parent is its template: there only the socket tells. */
	if (cell->plan && prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		fail(cell, STEP_PROGRAM_PROCESS, errno);
	if (write(cell->gate[1], "", 1) != 1)
		fail(cell, STEP_PROGRAM_PROCESS, errno);
	close(cell->gate[1]);
	children_reap(cell, program); /* one may have died before we watched */
	for (;;) {
		if (poll(watched, WATCHED, -1) < 0 && errno != EINTR)
			_exit(1);
		if (watched[LAUNCHER].revents & (POLLHUP | POLLERR))
			_exit(1);
		if (watched[CHILDREN].revents & POLLIN)
			children_reap(cell, program);
		if (watched[LAUNCHER].revents & POLLIN)
			signal_forward(cell, program);
	}
}
