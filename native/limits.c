/* Resource limits, soft and hard alike. A hard limit that is lower already stays: only privilege could raise it. getrlimit(2) */
#include "ladder.h"

#include <errno.h>
#include <sys/resource.h>
#include <sys/syscall.h>

int limits_apply(const struct cell *cell) {
	const struct resource_limit *limits = at(cell->plan, cell->plan->limits.offset);
	for (uint32_t i = 0; i < cell->plan->limits.count; i++) {
		long resource = limits[i].resource;
		struct rlimit64 now, wanted = {.rlim_cur = limits[i].value, .rlim_max = limits[i].value};
		if (late(cell, SYS_prlimit64, 0, resource, 0, (long)&now, 0) < 0)
			return -1;
		if (now.rlim_max < wanted.rlim_max)
			wanted.rlim_cur = wanted.rlim_max = now.rlim_max;
		if (now.rlim_cur == wanted.rlim_cur && now.rlim_max == wanted.rlim_max)
			continue; /* a job has most of them from its template, and may not touch them all */
		if (late(cell, SYS_prlimit64, 0, resource, (long)&wanted, 0, 0) < 0)
			return -1;
	}
	return 0;
}

/* Of our own, as much as takes no right. */
void limit_most(int resource) {
	struct rlimit limit;
	if (getrlimit((unsigned)resource, &limit) < 0)
		return;
	limit.rlim_cur = limit.rlim_max;
	setrlimit((unsigned)resource, &limit);
}
