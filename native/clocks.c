/* The clocks of a run: wall, processor, idle. They are kept here, so they hold whatever the caller does. timerfd_create(2)
 *
 * The processor clock cannot fire by itself: the timer is set to the earliest moment at which the rest could be used up by all
 * processors together, and then asked again. */
#include "kernel.h"
#include "launcher.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/timerfd.h>
#include <time.h>

enum { SETUP_LIMIT_S = 30, NEAREST_NS = 1000000, DEEPEST = 64 };

/* Without a group: every process below init, and what those had from children that they waited for. proc_pid_children(5) */
static uint64_t tree_cpu(pid_t pid, int depth) {
	char path[64], text[4096];
	struct timespec used;
	uint64_t sum = 0;
	if (depth > DEEPEST)
		return 0;
	if (depth > 0 && clock_gettime((clockid_t)((~(unsigned)pid << 3) | 2), &used) == 0)
		sum = (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
	snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[length > 0 ? length : 0] = 0;
	for (char *next, *word = text;; word = next) {
		pid_t child = (pid_t)strtol(word, &next, 10);
		if (next == word)
			return sum;
		sum += tree_cpu(child, depth + 1);
	}
}

uint64_t run_cpu(const struct launcher *launcher, const struct run *run) {
	uint64_t used = run->has_groups ? cgroup_cpu(launcher, run) : tree_cpu(run->pid, 0);
	return used > run->cpu_base ? used - run->cpu_base : 0;
}

static void set(struct run *run, uint64_t in_ns) {
	if (in_ns < 1)
		in_ns = 1;
	struct itimerspec timer = {.it_value = {(time_t)(in_ns / 1000000000u), (long)(in_ns % 1000000000u)}};
	if (timerfd_settime(run->timer, 0, &timer, NULL) < 0)
		run_spoil(run, STEP_RESOURCE_LIMITS, errno);
}

static uint64_t earlier(uint64_t a, uint64_t b) { return a < b ? a : b; }

void clocks_check(struct launcher *launcher, struct run *run) {
	const struct plan *plan = run->plan;
	uint64_t now = now_ns(), next = UINT64_MAX;
	if (run->ready && !run->ordered)
		return; /* it may wait as long as its shelf likes */
	if (!run->execed) {
		uint64_t since = now - run->start_ns, limit = (uint64_t)SETUP_LIMIT_S * 1000000000u;
		if (since < limit)
			return set(run, limit - since);
		run->report.step = STEP_SETUP_TIME;
		return run_kill(run, CAUSE_NONE);
	}
	if (plan->wall_ns) {
		uint64_t wall = now - run->exec_ns;
		if (wall >= plan->wall_ns) {
			run->report.observed = wall;
			return run_kill(run, CAUSE_WALL);
		}
		next = plan->wall_ns - wall;
	}
	if (plan->cpu_ns || plan->idle_ns) {
		uint64_t cpu = run_cpu(launcher, run);
		if (plan->cpu_ns) {
			if (cpu >= plan->cpu_ns) {
				run->report.observed = cpu;
				return run_kill(run, CAUSE_CPU);
			}
			uint64_t rest = (plan->cpu_ns - cpu) / (uint64_t)launcher->cpus;
			next = earlier(next, rest > NEAREST_NS ? rest : NEAREST_NS);
		}
		if (plan->idle_ns) {
			if (cpu > run->cpu_seen + NEAREST_NS) {
				run->cpu_seen = cpu;
				run->cpu_seen_ns = now;
			}
			if (now - run->cpu_seen_ns >= plan->idle_ns) {
				run->report.observed = now - run->cpu_seen_ns;
				return run_kill(run, CAUSE_IDLE);
			}
			next = earlier(next, plan->idle_ns - (now - run->cpu_seen_ns));
		}
	}
	if (next != UINT64_MAX)
		set(run, next);
}

/* The program runs from now on: what was used before was ours. */
void clocks_start(struct launcher *launcher, struct run *run) {
	run->cpu_base = 0;
	run->cpu_base = run_cpu(launcher, run);
	run->cpu_seen_ns = run->exec_ns;
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
