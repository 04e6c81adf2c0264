/* Resource limits, soft and hard alike. A hard limit that is lower already stays: only privilege could raise it. getrlimit(2) */
#include "ladder.h"

#include <sys/resource.h>

int limits_apply(const struct plan *plan) {
	const struct resource_limit *limits = at(plan, plan->limits.offset);
	for (uint32_t i = 0; i < plan->limits.count; i++) {
		struct rlimit now, wanted = {.rlim_cur = limits[i].value, .rlim_max = limits[i].value};
		if (getrlimit(limits[i].resource, &now) < 0)
			return -1;
		if (now.rlim_max < wanted.rlim_max)
			wanted.rlim_cur = wanted.rlim_max = now.rlim_max;
		if (setrlimit(limits[i].resource, &wanted) < 0)
			return -1;
	}
	return 0;
}
