/* The cell's control group: limits and counters for all of it together, never used twice. cgroups(7), kernel documents
 * admin-guide/cgroup-v1 and cgroup-v2. Which directories are ours, and what is written, was decided by Python. */
#include "kernel.h"
#include "launcher.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { LEFT_MEMORY = 64 << 20 };

/* What is read of a group, from files that are opened while the cell is made: then its end need not wait for that. */
static const struct {
	int group;
	const char *file;
} counters[][COUNTERS] = {
    [CGROUP_V1] = {[COUNTER_CPU] = {GROUP_CPU, "cpuacct.usage"},
	               [COUNTER_USER] = {GROUP_CPU, "cpuacct.usage_user"},
	               [COUNTER_SYSTEM] = {GROUP_CPU, "cpuacct.usage_sys"},
	               [COUNTER_MEMORY] = {GROUP_MEMORY, "memory.max_usage_in_bytes"},
	               [COUNTER_OOM] = {GROUP_MEMORY, "memory.oom_control"},
	               [COUNTER_PROCESSES] = {GROUP_PIDS, "pids.peak"},
	               [COUNTER_FORKS] = {GROUP_PIDS, "pids.events"}},
    [CGROUP_V2] = {[COUNTER_CPU] = {GROUP_UNIFIED, "cpu.stat"},
	               [COUNTER_MEMORY] = {GROUP_UNIFIED, "memory.peak"},
	               [COUNTER_OOM] = {GROUP_UNIFIED, "memory.events"},
	               [COUNTER_PROCESSES] = {GROUP_UNIFIED, "pids.peak"},
	               [COUNTER_FORKS] = {GROUP_UNIFIED, "pids.events"}},
};

static void name_of(uint32_t number, char *name, size_t size) { snprintf(name, size, "cell-%u", number); }

/* A kernel that does not count one of them has no file for it. */
static int counters_open(uint32_t kind, struct run *run) {
	for (int i = 0; i < COUNTERS; i++) {
		if (!counters[kind][i].file || run->groups[counters[kind][i].group] < 0)
			continue;
		run->counters[i] = openat(run->groups[counters[kind][i].group], counters[kind][i].file, O_RDONLY | O_CLOEXEC);
		if (run->counters[i] < 0 && errno != ENOENT)
			return -1;
	}
	return 0;
}

/* Memory, processes and processor time are counted for every cell. The others only limit: none is made where they have nothing to. */
static int is_used(const struct plan *plan, uint32_t group) {
	const struct cgroup_write *writes = at(plan, plan->cgroup.offset);
	if (group != GROUP_QUOTA && group != GROUP_CPUSET)
		return 1;
	for (uint32_t i = 0; i < plan->cgroup.count; i++)
		if (writes[i].group == group)
			return 1;
	return 0;
}

int cgroup_make(struct launcher *launcher, struct run *run) {
	char name[32];
	run->has_groups = 0;
	for (int group = 0; group < GROUPS; group++)
		run->groups[group] = -1;
	for (int i = 0; i < COUNTERS; i++)
		run->counters[i] = -1;
	if (!(run->plan->flags & PLAN_CGROUP))
		return 0;
	if (launcher->hello.cgroup_kind == CGROUP_NONE) {
		errno = ENODEV;
		return -1;
	}
	name_of(run->generation, name, sizeof name);
	run->has_groups = 1;
	for (int group = 0; group < GROUPS; group++) {
		if (launcher->groups[group] < 0 || !is_used(run->plan, (uint32_t)group))
			continue;
		if (mkdirat(launcher->groups[group], name, 0755) < 0)
			return -1;
		run->groups[group] = openat(launcher->groups[group], name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (run->groups[group] < 0)
			return -1;
	}
	const struct cgroup_write *writes = at(run->plan, run->plan->cgroup.offset);
	for (uint32_t i = 0; i < run->plan->cgroup.count; i++) {
		run->report.detail = i;
		int directory = run->groups[writes[i].group];
		if (directory < 0)
			errno = ENODEV;
		if (directory < 0 || put(directory, at(run->plan, writes[i].file), at(run->plan, writes[i].value)) < 0)
			return -1;
	}
	return counters_open(launcher->hello.cgroup_kind, run);
}

/* What the cell's program joins by: opened with our right, which is what counts when it writes. Where one fails the others are open. */
int cgroup_open(const struct launcher *launcher, const struct run *run, int *descriptors) {
	for (int group = 0; group < GROUPS; group++)
		descriptors[group] = -1;
	for (int group = 0; group < GROUPS; group++) {
		if (run->groups[group] < 0)
			continue;
		descriptors[group] = launcher->hello.cgroup_kind == CGROUP_V1 ? openat(run->groups[group], "tasks", O_WRONLY | O_CLOEXEC)
		                                                              : fcntl(run->groups[group], F_DUPFD_CLOEXEC, 0);
		if (descriptors[group] < 0)
			return -1;
	}
	return 0;
}

/* Busy for a moment after the last process is gone: then it is swept later. */
static int removed(const struct launcher *launcher, const char *name) {
	int gone = 1;
	for (int group = 0; group < GROUPS; group++)
		if (launcher->groups[group] >= 0 && unlinkat(launcher->groups[group], name, AT_REMOVEDIR) < 0 && errno != ENOENT)
			gone = 0;
	return gone;
}

void cgroup_remove(struct launcher *launcher, struct run *run) {
	char name[32];
	if (!run->has_groups)
		return;
	for (int group = 0; group < GROUPS; group++)
		if (run->groups[group] >= 0)
			close(run->groups[group]);
	for (int i = 0; i < COUNTERS; i++)
		if (run->counters[i] >= 0)
			close(run->counters[i]);
	name_of(run->generation, name, sizeof name);
	if (!removed(launcher, name)) {
		launcher->undead++;
		launcher->sweep_ms = 0; /* at once */
	}
	run->has_groups = 0;
}

static int in_use(const struct launcher *launcher, const char *name) {
	char own[32];
	for (int i = 0; i < MAX_RUNS; i++) {
		if (!launcher->runs[i].used || !launcher->runs[i].has_groups)
			continue;
		name_of(launcher->runs[i].generation, own, sizeof own);
		if (!strcmp(own, name))
			return 1;
	}
	return 0;
}

void cgroup_sweep(struct launcher *launcher) {
	launcher->undead = 0;
	for (int group = 0; group < GROUPS; group++) {
		if (launcher->groups[group] < 0)
			continue;
		int copy = openat(launcher->groups[group], ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		DIR *directory = copy < 0 ? NULL : fdopendir(copy);
		if (!directory) {
			if (copy >= 0)
				close(copy);
			launcher->undead++; /* as many as there are: the next time */
			continue;
		}
		for (struct dirent *entry; (entry = readdir(directory));)
			if (!strncmp(entry->d_name, "cell-", 5) && !in_use(launcher, entry->d_name) && !removed(launcher, entry->d_name))
				launcher->undead++;
		closedir(directory);
	}
}

static int get(int counter, char *text, size_t size) {
	ssize_t length = pread(counter, text, size - 1, 0);
	text[length > 0 ? length : 0] = 0;
	return length > 0 ? 0 : -1;
}

/* 0 where nobody counts, or it cannot be read: a figure for the result, on which no limit rests. */
static uint64_t number(int counter) {
	char text[64];
	return counter >= 0 && get(counter, text, sizeof text) == 0 ? strtoull(text, NULL, 10) : 0;
}

/* The number behind key in a file of `key number` lines. */
static uint64_t keyed(const char *text, const char *key) {
	size_t length = strlen(key);
	for (const char *line = text; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
		if (!strncmp(line, key, length) && line[length] == ' ')
			return strtoull(line + length + 1, NULL, 10);
	return 0;
}

static uint64_t event(int counter, const char *key) {
	char text[1024];
	return counter >= 0 && get(counter, text, sizeof text) == 0 ? keyed(text, key) : 0;
}

int cgroup_cpu(const struct launcher *launcher, const struct run *run, uint64_t *used) {
	char text[1024];
	if (get(run->counters[COUNTER_CPU], text, sizeof text) < 0)
		return -1;
	*used = launcher->hello.cgroup_kind == CGROUP_V1 ? strtoull(text, NULL, 10) : keyed(text, "usage_usec") * 1000;
	return 0;
}

static void report_cpu(const struct launcher *launcher, struct run *run) {
	struct report *report = &run->report;
	char text[1024];
	if (run->counters[COUNTER_CPU] < 0 || run_cpu(launcher, run, &report->cpu_ns) < 0)
		return;
	if (launcher->hello.cgroup_kind == CGROUP_V1) {
		report->user_ns = number(run->counters[COUNTER_USER]);
		report->system_ns = number(run->counters[COUNTER_SYSTEM]);
		report->cpu_source = SOURCE_CGROUP1;
	} else if (get(run->counters[COUNTER_CPU], text, sizeof text) == 0) {
		report->user_ns = keyed(text, "user_usec") * 1000;
		report->system_ns = keyed(text, "system_usec") * 1000;
		report->cpu_source = SOURCE_CGROUP2;
	}
}

static uint64_t number_at(int directory, const char *name) {
	int file = openat(directory, name, O_RDONLY | O_CLOEXEC);
	uint64_t value = number(file);
	if (file >= 0)
		close(file);
	return value;
}

/* Up to what is charged at one time, which for what may end in a kill is 8 pages. */
static int reached(int directory, const char *peak, const char *limit) {
	uint64_t most = number_at(directory, limit);
	return most && number_at(directory, peak) + (uint64_t)8 * 4096 >= most;
}

/* The kernel counts a kill at its victim's group, whosever memory had run out: that of a group around it, or the whole host's. Version 2 counts
 * where a limit was met, as `oom`. Of version 1 the peak tells: its count of failed charges stays 0 in newer kernels. */
static int met_memory_limit(const struct launcher *launcher, const struct run *run) {
	int directory = run->groups[GROUP_MEMORY];
	if (launcher->hello.cgroup_kind == CGROUP_V2)
		return event(run->counters[COUNTER_OOM], "oom") > 0;
	return reached(directory, "memory.max_usage_in_bytes", "memory.limit_in_bytes") ||
	       reached(directory, "memory.memsw.max_usage_in_bytes", "memory.memsw.limit_in_bytes");
}

/* Likewise: before Linux 6.11, and on version 1, a refused fork is counted at the group that forks. Without a peak nobody knows. */
static int met_process_limit(const struct launcher *launcher, const struct run *run) {
	int group = launcher->hello.cgroup_kind == CGROUP_V2 ? GROUP_UNIFIED : GROUP_PIDS;
	uint64_t limit = number_at(run->groups[group], "pids.max"), peak = run->report.peak_processes;
	return limit && (!peak || peak >= limit); /* 0 is the word max */
}

/* Whether one task is left in it, which may be let wait; and what the result says of what was used does not rest on its end. With much memory
 * it does: its caller may count on that for the next run. */
int cgroup_only_one(const struct launcher *launcher, const struct run *run) {
	int group = launcher->hello.cgroup_kind == CGROUP_V2 ? GROUP_UNIFIED : GROUP_PIDS;
	return run->has_groups && run->groups[group] >= 0 && run->counters[COUNTER_CPU] >= 0 && run->counters[COUNTER_MEMORY] >= 0 &&
	       number_at(run->groups[group], "pids.current") == 1 && number(run->counters[COUNTER_MEMORY]) <= LEFT_MEMORY;
}

void cgroup_report(const struct launcher *launcher, struct run *run) {
	struct report *report = &run->report;
	report_cpu(launcher, run);
	if (run->counters[COUNTER_MEMORY] >= 0) { /* memory.peak is new in Linux 5.19: without it, the largest process stands */
		report->peak_memory = number(run->counters[COUNTER_MEMORY]);
		report->memory_source = launcher->hello.cgroup_kind == CGROUP_V1 ? SOURCE_CGROUP1 : SOURCE_CGROUP2;
	}
	report->peak_processes = number(run->counters[COUNTER_PROCESSES]);
	uint64_t kills = event(run->counters[COUNTER_OOM], "oom_kill"), denials = event(run->counters[COUNTER_FORKS], "max");
	report->oom_kills = kills && met_memory_limit(launcher, run) ? kills : 0;
	report->outer_oom_kills = kills - report->oom_kills;
	report->process_denials = denials && met_process_limit(launcher, run) ? denials : 0;
	report->outer_process_denials = denials - report->process_denials;
}
