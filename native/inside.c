/* The ladder: what happens inside a cell, one line per step. The order is the security argument (docs/how-it-works.md). */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

_Noreturn void fail(const struct cell *cell, enum step step, int error) {
	struct cell_message message = {.kind = CELL_FAILED, .step = step, .error = (uint32_t)error, .detail = cell->detail};
	message_send(cell, cell->failures, &message, sizeof message, NULL, 0);
	late(cell, SYS_exit_group, 1, 0, 0, 0, 0);
	__builtin_trap();
}

void step(const struct cell *cell, enum step step, int result) {
	if (result < 0)
		fail(cell, step, errno);
}

void become_nobody(const struct cell *cell) {
	step(cell, STEP_IDENTITY, identity_take(cell->plan));
	step(cell, STEP_CAPABILITIES, capabilities_drop());
	step(cell, STEP_NO_NEW_PRIVS, no_new_privs());
	step(cell, STEP_IDENTITY, prctl(PR_SET_DUMPABLE, 0));
}

static void all_rights_end(const struct cell *cell) {
	step(cell, STEP_SECUREBITS, securebits_lock());
	step(cell, STEP_CAPABILITIES, bounding_set_empty());
}

/* With a v2 group the program is born in it: joining later would have to stop every other fork on the machine. */
static pid_t program_start(const struct cell *cell) {
	struct clone_args args = {.exit_signal = SIGCHLD};
	if (cell->cgroup_kind == CGROUP_V2) {
		args.flags |= CLONE_INTO_CGROUP;
		args.cgroup = (uint64_t)cell->groups[GROUP_UNIFIED];
	}
	return sys_clone3(&args);
}

/* The root: what is the same in all cells of a plan is mounted once, by the first of them; the rest by each for itself. */
static void root_make(struct cell *cell) {
	enum step failed;
	if (cell->template >= 0)
		step(cell, STEP_SHARED_ROOT, root_join(cell));
	else {
		failed = root_build(cell);
		step(cell, failed, failed ? -1 : 0);
		step(cell, STEP_PIVOT_ROOT, root_pivot(cell));
		if (root_is_shared(cell))
			step(cell, STEP_SHARED_ROOT, root_share(cell));
	}
	if (!root_is_shared(cell))
		return;
	failed = root_furnish(cell);
	step(cell, failed, failed ? -1 : 0);
}

int unshared(const struct cell *cell, uint64_t others) { return unshare((int)(cell->plan->namespaces & ~others)); }

/* Init, process 1: makes the cell, starts the program's process, and keeps no right at all. */
_Noreturn void cell_main(struct cell *cell) {
	const struct plan *plan = cell->plan;
	int kept[4 + GROUPS] = {cell->launcher, cell->orders, cell->template, cell->proc};
	memcpy(kept + 4, cell->groups, sizeof cell->groups);
	cell->failures = cell->launcher;
	step(cell, STEP_DESCRIPTORS, descriptors_keep(kept, 4 + GROUPS)); /* of the launcher's: other cells', other callers' */
	step(cell, STEP_SESSION, session_new());
	step(cell, STEP_KEYRING, plan->flags & PLAN_TEMPLATE ? keyring_none() : keyring_new());
	step(cell, STEP_PERSONALITY, personality_new());
	step(cell, STEP_PRIORITY, priority_give_up(cell));
	if (cell->rootless)
		step(cell, STEP_USER_NAMESPACE, user_namespace_enter(cell));
	/* Time needs a process of its own to begin in, the cgroup namespace one that has joined; the user's comes last as root; and the
	 * mounts begin as a copy of the shared ones, where there are some. */
	uint64_t mounts = cell->template < 0 ? 0 : CLONE_NEWNS;
	step(cell, STEP_NAMESPACES, unshared(cell, CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWTIME | CLONE_NEWCGROUP | mounts));
	root_make(cell);
	if (plan->namespaces & CLONE_NEWUTS)
		step(cell, STEP_HOSTNAME, sethostname(at(plan, plan->hostname), strlen(at(plan, plan->hostname))));
	if (plan->flags & PLAN_LOOPBACK)
		step(cell, STEP_LOOPBACK, loopback_up());
	step(cell, STEP_GROUPS, groups_clear(cell));
	if (!cell->rootless)
		step(cell, STEP_USER_NAMESPACE, user_namespace_enter(cell));
	step(cell, STEP_NESTED_USERNS, counts_limit(cell));
	if (plan->namespaces & CLONE_NEWTIME)
		step(cell, STEP_TIME_NAMESPACE, unshare(CLONE_NEWTIME));
	int template = (plan->flags & PLAN_TEMPLATE) != 0;
	if (!template)
		all_rights_end(cell);
	step(cell, STEP_PROGRAM_PROCESS, pipe2(cell->gate, O_CLOEXEC));
	pid_t program = program_start(cell);
	step(cell, STEP_PROGRAM_PROCESS, program);
	if (program == 0)
		program_main(cell);
	if (template)
		all_rights_end(cell);
	become_nobody(cell);
	reap(cell, program);
}

/* Not through the C library: where the kernel's clock cannot be read without a system call (acpi_pm, hpet, xen), the filter would see a
 * call of the program's. vdso(7) */
static int look(const struct cell *cell, clockid_t clock, uint64_t *ns) {
	struct timespec now;
	if (late(cell, SYS_clock_gettime, clock, (long)&now, 0, 0, 0) < 0)
		return -1;
	*ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
	return 0;
}

/* Version 1: our own thread into each group. Its descriptor was opened by the launcher, whose right counts. */
static int cgroup_join(struct cell *cell) {
	if (cell->cgroup_kind != CGROUP_V1)
		return 0;
	for (int group = 0; group < GROUPS; group++)
		if (cell->groups[group] >= 0 && write(cell->groups[group], "0", 1) != 1)
			return -1;
	return cell->groups[GROUP_CPU] < 0 ? 0 : look(cell, CLOCK_PROCESS_CPUTIME_ID, &cell->joined_ns);
}

/* Nothing runs while init has a right left, or has failed to give one up: then init has told, and goes, and we with it. */
int init_is_ready(const struct cell *cell) {
	char byte;
	close(cell->gate[1]);
	ssize_t size = read(cell->gate[0], &byte, 1);
	if (size == 0)
		late(cell, SYS_exit_group, 1, 0, 0, 0, 0);
	return size == 1 ? 0 : -1;
}

/* The program's descriptors will take the low numbers, as they come. */
int descriptors_clear(struct cell *cell) {
	if (descriptors_keep_also(cell, (int[]){cell->orders, cell->app, cell->ruleset}) < 0)
		return -1;
	int orders = descriptor_high(cell->orders);
	if (orders < 0)
		return -1;
	cell->orders = cell->failures = orders;
	if (cell->app >= 0 && (cell->app = descriptor_high(cell->app)) < 0)
		return -1;
	if (cell->ruleset >= 0 && (cell->ruleset = descriptor_high(cell->ruleset)) < 0)
		return -1;
	return 0;
}

int ready(const struct cell *cell, int *listener) {
	struct cell_message message = {.kind = CELL_READY, .flags = cell->flags};
	int result = message_send(cell, cell->orders, &message, sizeof message, listener, *listener >= 0);
	/* Its number is the first of the program's own. */
	if (*listener >= 0 && late(cell, SYS_close, *listener, 0, 0, 0, 0) < 0)
		return -1;
	return result;
}

/* The moment comes last: where it stands, so does what was used. */
static int stamp(const struct cell *cell) {
	uint64_t used;
	if (look(cell, CLOCK_PROCESS_CPUTIME_ID, &used) < 0)
		return -1;
	cell->stamp->cpu_ns = used - cell->joined_ns;
	return look(cell, CLOCK_MONOTONIC, &cell->stamp->exec_ns);
}

/* The program's process: drops everything, waits for its order, and becomes the program. Nobody has run before it here, and
 * nobody will after it. From the filter on it makes its system calls through late(), which is how the filter knows us. */
_Noreturn void program_main(struct cell *cell) {
	const struct plan *plan = cell->plan;
	struct order *order;
	int descriptors[MAX_FDS], listener = -1;
	cell->failures = cell->orders;
	cell->ruleset = -1;
	step(cell, STEP_CGROUP_JOIN, cgroup_join(cell));
	if (plan->namespaces & CLONE_NEWCGROUP)
		step(cell, STEP_CGROUP_NAMESPACE, unshare(CLONE_NEWCGROUP));
	step(cell, STEP_SESSION, session_new());
	if (plan->flags & PLAN_TEMPLATE)
		step(cell, STEP_CAPABILITIES, rights_keep(plan));
	else
		become_nobody(cell);
	step(cell, STEP_WORK_DIRECTORY, chdir(at(plan, plan->directory)));
	if (plan->flags & PLAN_LANDLOCK)
		step(cell, STEP_LANDLOCK, landlock_prepare(cell));
	step(cell, STEP_PROGRAM_PROCESS, init_is_ready(cell));
	step(cell, STEP_LABEL, label_ask(cell));
	step(cell, STEP_DESCRIPTORS, descriptors_clear(cell));
	if (plan->flags & PLAN_FILTER)
		step(cell, STEP_SECCOMP, filter_install(cell, &listener));
	step(cell, STEP_ORDER, ready(cell, &listener));

	step(cell, STEP_ORDER, order_take(cell, &order, descriptors));
	step(cell, STEP_APP_FILES, app_write(cell, order));
	step(cell, STEP_DESCRIPTORS, descriptors_place(cell, order, descriptors));
	if (plan->flags & PLAN_TEMPLATE)
		step(cell, STEP_DESCRIPTORS, (int)late(cell, SYS_dup3, cell->orders, TEMPLATE_FD, 0, 0, 0));
	char **argv = order_pointers(order, order->argv), **environment = order_pointers(order, order->environment);
	if (plan->flags & PLAN_LANDLOCK)
		step(cell, STEP_LANDLOCK, landlock_apply(cell));
	step(cell, STEP_RESOURCE_LIMITS, limits_apply(cell));
	step(cell, STEP_RESOURCE_LIMITS, stamp(cell)); /* wall_time and cpu_time count from here */
	/* The path is absolute, so the directory does not count. */
	late(cell, SYS_execveat, AT_FDCWD, (long)at(order, order->program), (long)argv, (long)environment, 0);
	fail(cell, STEP_EXEC, errno);
}
