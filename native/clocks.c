/* The clocks of a run: wall, processor, idle; and memory, where no control group holds it. They are kept here, so they hold whatever the
 * caller does. timerfd_create(2)
 *
 * The processor clock cannot fire by itself: the timer is set to the earliest moment at which the rest could be used up by all
 * processors together, and then asked again. So for memory: FILL_RATE is what one processor can fill at most, in bytes per nanosecond. But
 * how long a look at all processes takes is up to the program, and meanwhile we hear nobody: so where no control group counts, a pause
 * follows, LOOK_PAUSE times as long, and LOOK_LATEST_NS at most. */
#include "kernel.h"
#include "launcher.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <time.h>

enum { SETUP_LIMIT_S = 30, NEAREST_NS = 1000000, MEMORY_NEAREST_NS = 10000000, LOOK_AGAIN_NS = 10000000, FILL_RATE = 4 };
enum { LOOK_PAUSE = 10, LOOK_LATEST_NS = 1000000000 };

/* Of what is counted as the run's, that which its program has used, from exec on. */
uint64_t cpu_since(const struct run *run, uint64_t counted) { return counted > run->cpu_base ? counted - run->cpu_base : 0; }

int run_cpu(const struct launcher *launcher, const struct run *run, uint64_t *used) {
	if ((run->counters[COUNTER_CPU] >= 0 ? cgroup_cpu(launcher, run, used) : tree_cpu(run->pid, used)) < 0)
		return -1;
	*used = cpu_since(run, *used);
	return 0;
}

static void set(struct run *run, uint64_t in_ns) {
	if (in_ns < 1)
		in_ns = 1;
	struct itimerspec timer = {.it_value = {(time_t)(in_ns / 1000000000u), (long)(in_ns % 1000000000u)}};
	if (timerfd_settime(run->timer, 0, &timer, NULL) < 0)
		run_spoil(run, STEP_RESOURCE_LIMITS, errno);
}

static uint64_t earlier(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* So long it takes at least to use up the rest. */
static uint64_t fill_ns(const struct launcher *launcher, const struct run *run, uint64_t used) {
	return later((run->plan->memory - used) / (uint64_t)(FILL_RATE * launcher->cpus), MEMORY_NEAREST_NS);
}

/* What we have worked. Not the time that passes: on a busy machine a short look lasts, too. */
static uint64_t worked_ns(void) {
	struct timespec worked = {0};
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &worked);
	return (uint64_t)worked.tv_sec * 1000000000u + (uint64_t)worked.tv_nsec;
}

/* After a look that began then. */
static uint64_t pause_ns(uint64_t began) { return earlier(LOOK_PAUSE * (worked_ns() - began), LOOK_LATEST_NS); }

static int passes(void) { return errno == EMFILE || errno == ENFILE || errno == ENOMEM; }

/* What it has used could not be seen. Where that passes it is looked at again, and the wall clock holds meanwhile. */
static void unseen(struct run *run, uint64_t next) {
	if (passes())
		set(run, earlier(next, LOOK_AGAIN_NS));
	else
		run_spoil(run, STEP_RESOURCE_LIMITS, errno);
}

/* Unless the run has ended, which we may have been too busy to hear. */
static void met(struct launcher *launcher, struct run *run, enum cause cause, uint64_t observed) {
	cell_drain(launcher, run);
	if (run->ended)
		return;
	run->report.observed = observed;
	run_kill(run, cause);
}

void clocks_check(struct launcher *launcher, struct run *run) {
	const struct plan *plan = run->plan;
	uint64_t now = now_ns(), next = UINT64_MAX;
	if (run->ready && !run->ordered)
		return; /* it may wait as long as its shelf likes */
	if (run->ended)
		return; /* in time: what is awaited is the end of init, with what it has mounted */
	if (!run->execed) {
		uint64_t since = now - run->start_ns, limit = (uint64_t)SETUP_LIMIT_S * 1000000000u;
		if (since < limit)
			return set(run, limit - since);
		run->report.step = STEP_SETUP_TIME;
		return run_kill(run, CAUSE_NONE);
	}
	if (plan->wall_ns) {
		uint64_t wall = now - run->exec_ns;
		if (wall >= plan->wall_ns)
			return met(launcher, run, CAUSE_WALL, wall);
		next = plan->wall_ns - wall;
	}
	if (plan->cpu_ns || plan->idle_ns) {
		uint64_t cpu, began = worked_ns(), nearest = NEAREST_NS;
		if (run_cpu(launcher, run, &cpu) < 0)
			return unseen(run, next);
		if (run->counters[COUNTER_CPU] < 0)
			nearest = later(nearest, pause_ns(began));
		if (plan->cpu_ns) {
			if (cpu >= plan->cpu_ns)
				return met(launcher, run, CAUSE_CPU, cpu);
			uint64_t rest = (plan->cpu_ns - cpu) / (uint64_t)launcher->cpus;
			next = earlier(next, later(rest, nearest));
		}
		if (plan->idle_ns) {
			if (cpu > run->cpu_seen + NEAREST_NS) {
				run->cpu_seen = cpu;
				run->cpu_seen_ns = now;
			}
			if (now - run->cpu_seen_ns >= plan->idle_ns)
				return met(launcher, run, CAUSE_IDLE, now - run->cpu_seen_ns);
			next = earlier(next, later(plan->idle_ns - (now - run->cpu_seen_ns), nearest));
		}
	}
	if (plan->memory && !run->has_groups) {
		if (now >= run->memory_due_ns) {
			uint64_t used, began = worked_ns();
			if (tree_memory(run->pid, plan->memory, &used) < 0)
				return unseen(run, next);
			if (used > plan->memory)
				return met(launcher, run, CAUSE_MEMORY, used);
			run->memory_due_ns = now_ns() + later(fill_ns(launcher, run, used), pause_ns(began));
		}
		next = earlier(next, run->memory_due_ns - now);
	}
	uint64_t spent = now_ns() - now;
	if (next != UINT64_MAX)
		set(run, next > spent ? next - spent : 0);
}

/* A job has no exec, and maybe no right to look at a clock: while it waits for its order, what it has used was ours. */
void clocks_job(struct launcher *launcher, struct run *run) {
	if (run_cpu(launcher, run, &launcher->stamps[run->index].cpu_ns) < 0 && !passes())
		run_spoil(run, STEP_RESOURCE_LIMITS, errno);
}

void clocks_start(struct launcher *launcher, struct run *run) {
	run->cpu_seen_ns = run->exec_ns;
	run->memory_due_ns = run->exec_ns + fill_ns(launcher, run, 0);
	clocks_check(launcher, run);
}

/* A program that ended between two looks at the clock is still held to the total. */
void clocks_final(struct run *run) {
	struct report *report = &run->report;
	if (report->cause != CAUSE_NONE || report->step)
		return;
	if (run->plan->cpu_ns && report->cpu_ns > run->plan->cpu_ns) {
		report->cause = CAUSE_CPU;
		report->observed = report->cpu_ns;
	} else if (run->plan->wall_ns && report->wall_ns > run->plan->wall_ns) {
		report->cause = CAUSE_WALL;
		report->observed = report->wall_ns;
	}
}
