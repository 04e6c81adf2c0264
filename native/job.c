/* A job: forked from a template (template.c), which is a warm interpreter in a jail of its own, into a cell of the job's own.
 *
 * The template has rights in its user namespace, and no others. Its clone (job_init) makes the job's namespaces and mounts, forks the
 * job's process, gives up every right, and becomes a reaper by exec, so that nothing of the interpreter's memory is left in process 1.
 * The job's process (job_program) gives up every right, applies Landlock and filter, waits for its order, and applies the limits; there is
 * no exec behind it, so no late call has a secret here. pid_namespaces(7), capabilities(7) */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>

static int pass_on(int descriptor) { return descriptor < 0 ? 0 : fcntl(descriptor, F_SETFD, 0); }

/* The template waits for nobody, and ignores their ends. */
static int children_are_waited_for(void) { return signal(SIGCHLD, SIG_DFL) == SIG_ERR ? -1 : 0; }

static int born(const struct cell *cell) {
	struct cell_message message = {.kind = CELL_BORN};
	int self = sys_pidfd_open(getpid());
	if (self < 0)
		return -1;
	int result = message_send(NULL, cell->launcher, &message, sizeof message, &self, 1);
	close(self);
	return result;
}

_Noreturn static void become_reaper(struct cell *cell, int reaper, pid_t program) {
	char text[4][16];
	char *arguments[] = {"nsjail-init", text[0], text[1], text[2], text[3], NULL}, *none[] = {NULL};
	int numbers[] = {cell->launcher, cell->scratch, (int)program, cell->gate[1]};
	for (int i = 0; i < 4; i++)
		snprintf(text[i], sizeof text[i], "%d", numbers[i]);
	if (pass_on(cell->launcher) < 0 || pass_on(cell->scratch) < 0 || pass_on(cell->gate[1]) < 0)
		fail(cell, STEP_REAPER, errno);
	syscall(SYS_execveat, reaper, "", arguments, none, AT_EMPTY_PATH);
	fail(cell, STEP_REAPER, errno);
}

/* Into our groups by the files that the launcher has opened: its right counts. The files go at once. */
static int groups_join(const struct cell *cell) {
	int files[GROUPS], count = GROUPS;
	int result = launcher_ask(cell->orders, CELL_NEED_GROUPS, CELL_GROUPS, files, &count);
	for (int i = 0; i < count; i++) {
		if (result == 0 && write(files[i], "0", 1) != 1)
			result = -1;
		keep_errno_close(files[i]);
	}
	return result;
}

/* program is called in the job's process, and does not return. */
_Noreturn void job_init(struct cell *cell, int reaper, void (*program)(void)) {
	const struct plan *plan = cell->plan;
	cell->failures = cell->launcher;
	step(cell, STEP_DESCRIPTORS, descriptors_keep_also(cell, (int[]){cell->launcher, cell->orders, reaper}));
	step(cell, STEP_REAPER, children_are_waited_for());
	step(cell, STEP_CLONE, born(cell));
	step(cell, STEP_SESSION, session_new());
	step(cell, STEP_KEYRING, keyring_new());
	step(cell, STEP_NAMESPACES, unshared(cell, CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWTIME | CLONE_NEWCGROUP));
	cell->root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	step(cell, STEP_MOUNT_ROOT, cell->root);
	enum step failed = root_furnish(cell);
	step(cell, failed, failed ? -1 : 0);
	step(cell, STEP_WORK_DIRECTORY, chdir("/"));
	if (plan->namespaces & CLONE_NEWUTS)
		step(cell, STEP_HOSTNAME, sethostname(at(plan, plan->hostname), strlen(at(plan, plan->hostname))));
	if (plan->flags & PLAN_LOOPBACK)
		step(cell, STEP_LOOPBACK, loopback_up());
	if (plan->namespaces & CLONE_NEWTIME)
		step(cell, STEP_TIME_NAMESPACE, unshare(CLONE_NEWTIME));
	step(cell, STEP_SECUREBITS, securebits_lock());
	step(cell, STEP_CAPABILITIES, bounding_set_empty());
	step(cell, STEP_PROGRAM_PROCESS, pipe2(cell->gate, O_CLOEXEC));
	pid_t pid = fork();
	step(cell, STEP_PROGRAM_PROCESS, pid);
	if (pid == 0) {
		cell->failures = cell->orders;
		/* First of all: the copy that it becomes is memory of its own. */
		step(cell, STEP_CGROUP_JOIN, groups_join(cell));
		program();
		__builtin_trap();
	}
	become_nobody(cell);
	become_reaper(cell, reaper, pid);
}

/* Returns when nothing but the order is missing. listener: of the denied calls; -1 without a filter. */
void job_program(struct cell *cell, int *listener) {
	const struct plan *plan = cell->plan;
	cell->failures = cell->orders;
	cell->secret = 0;
	cell->ruleset = -1;
	step(cell, STEP_PROGRAM_PROCESS, children_are_waited_for());
	if (plan->namespaces & CLONE_NEWCGROUP)
		step(cell, STEP_CGROUP_NAMESPACE, unshare(CLONE_NEWCGROUP));
	step(cell, STEP_SESSION, session_new());
	become_nobody(cell);
	step(cell, STEP_WORK_DIRECTORY, chdir(at(plan, plan->directory)));
	step(cell, STEP_REAPER, init_is_ready(cell)); /* the reaper by now, which cannot be looked into */
	if (plan->flags & PLAN_LANDLOCK)
		step(cell, STEP_LANDLOCK, landlock_prepare(cell));
	cell->app = -1;
	step(cell, STEP_DESCRIPTORS, descriptors_clear(cell));
	if (plan->flags & PLAN_LANDLOCK) {
		step(cell, STEP_LANDLOCK, landlock_apply(cell));
		close(cell->ruleset);
	}
	step(cell, STEP_IDENTITY,
	     prctl(PR_SET_DUMPABLE, 1)); /* as after an exec: there is nothing left to be protected from itself */
	if (plan->flags & PLAN_FILTER)
		step(cell, STEP_SECCOMP, filter_install(cell, listener));
}
