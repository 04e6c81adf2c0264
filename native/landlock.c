/* Landlock: the file system view once more, as rules that no mount can undo. Kernel document userspace-api/landlock */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>

struct ruleset {
	uint64_t fs, net, scope;
};
struct beneath {
	uint64_t access;
	int32_t parent;
} __attribute__((packed));

enum { RULE_PATH_BENEATH = 1 };

static int allow(struct cell *cell, int ruleset, const struct path_rule *rule) {
	struct beneath beneath = {.access = rule->access};
	beneath.parent = open(at(cell->plan, rule->path), O_PATH | O_CLOEXEC);
	if (beneath.parent < 0)
		return rule->optional && errno == ENOENT ? 0 : -1;
	int result = (int)syscall(SYS_landlock_add_rule, ruleset, RULE_PATH_BENEATH, &beneath, 0);
	int error = errno;
	close(beneath.parent);
	errno = error;
	return result;
}

/* The rules, made ready while nothing waits for them. */
int landlock_prepare(struct cell *cell) {
	const struct plan *plan = cell->plan;
	struct ruleset attributes = {plan->landlock_fs, plan->landlock_net, plan->landlock_scope};
	/* An older kernel knows a shorter structure: the plan was made for this one's, and what it lacks is zero. */
	size_t size = attributes.scope ? 24 : attributes.net ? 16 : 8;
	cell->ruleset = (int)syscall(SYS_landlock_create_ruleset, &attributes, size, 0);
	if (cell->ruleset < 0)
		return -1;
	const struct path_rule *rules = at(plan, plan->paths.offset);
	for (cell->detail = 0; cell->detail < plan->paths.count; cell->detail++)
		if (allow(cell, cell->ruleset, &rules[cell->detail]) < 0)
			return -1;
	return 0;
}

/* The ruleset's descriptor goes at exec. */
int landlock_apply(const struct cell *cell) { return (int)late(cell, SYS_landlock_restrict_self, cell->ruleset, 0, 0, 0, 0); }
