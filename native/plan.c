/* Is this block safe to read? Every offset, count and string is checked here, once, before any privileged step looks at it. */
#include "blocks.h"

#include <linux/filter.h>
#include <string.h>

static int inside(uint64_t size, uint64_t offset, uint64_t length) { return offset <= size && length <= size - offset; }

static int string_ok(const void *block, uint32_t size, uint32_t offset) {
	return offset && offset < size && memchr((const char *)block + offset, 0, size - offset) != NULL;
}

static int span_ok(uint32_t size, struct span span, size_t element, uint32_t most) {
	if (span.count == 0)
		return 1;
	return span.count <= most && span.offset % 8 == 0 && inside(size, span.offset, (uint64_t)span.count * element);
}

static int strings_ok(const void *block, uint32_t size, struct span span, uint32_t most) {
	if (span.count > most || span.offset % 8 || !inside(size, span.offset, ((uint64_t)span.count + 1) * sizeof(uint64_t)))
		return 0;
	const uint64_t *offsets = at(block, span.offset);
	for (uint32_t i = 0; i < span.count; i++)
		if (offsets[i] > size || !string_ok(block, size, (uint32_t)offsets[i]))
			return 0;
	return offsets[span.count] == 0;
}

static int mounts_ok(const struct plan *plan) {
	const struct mount_step *steps = at(plan, plan->mounts.offset);
	for (uint32_t i = 0; i < plan->mounts.count; i++) {
		const struct mount_step *step = &steps[i];
		int needs_source = step->kind == MOUNT_SYMLINK || step->kind == MOUNT_BIND || step->kind == MOUNT_PART;
		if (step->kind > MOUNT_READONLY || !string_ok(plan, plan->size, step->target))
			return 0;
		if (needs_source && !string_ok(plan, plan->size, step->source))
			return 0;
		if (step->kind == MOUNT_PART && strchr(at(plan, step->source), '/'))
			return 0;
	}
	return 1;
}

static int cgroup_ok(const struct plan *plan) {
	const struct cgroup_write *writes = at(plan, plan->cgroup.offset);
	for (uint32_t i = 0; i < plan->cgroup.count; i++)
		if (writes[i].group >= GROUPS || !string_ok(plan, plan->size, writes[i].file) ||
		    !string_ok(plan, plan->size, writes[i].value) || strchr(at(plan, writes[i].file), '/'))
			return 0;
	return 1;
}

static int paths_ok(const struct plan *plan) {
	const struct path_rule *rules = at(plan, plan->paths.offset);
	for (uint32_t i = 0; i < plan->paths.count; i++)
		if (!string_ok(plan, plan->size, rules[i].path))
			return 0;
	return 1;
}

int plan_check(const void *block, size_t size) {
	const struct plan *plan = block;
	if (size < sizeof *plan || size > MAX_BLOCK || plan->magic != PLAN_MAGIC || plan->version != FORMAT_VERSION ||
	    plan->size != size)
		return 0;
	if (!span_ok(plan->size, plan->mounts, sizeof(struct mount_step), 65536) ||
	    !span_ok(plan->size, plan->paths, sizeof(struct path_rule), 65536) ||
	    !span_ok(plan->size, plan->limits, sizeof(struct resource_limit), 64) ||
	    !span_ok(plan->size, plan->cgroup, sizeof(struct cgroup_write), 64) ||
	    !span_ok(plan->size, plan->filter, sizeof(struct sock_filter), BPF_MAXINSNS - 2 * MAX_LATE) ||
	    !span_ok(plan->size, plan->late, sizeof(uint32_t), MAX_LATE))
		return 0;
	if (plan->shared > plan->mounts.count)
		return 0;
	if (!string_ok(plan, plan->size, plan->hostname) || !string_ok(plan, plan->size, plan->directory))
		return 0;
	if (plan->label && (!string_ok(plan, plan->size, plan->label) || !string_ok(plan, plan->size, plan->label_file) ||
	                    !string_ok(plan, plan->size, plan->label_shown)))
		return 0;
	if ((plan->flags & PLAN_FILTER) && plan->filter.count == 0)
		return 0;
	if ((plan->flags & PLAN_OBSERVED) && (!(plan->flags & PLAN_FILTER) || (plan->flags & (PLAN_TEMPLATE | PLAN_KILL_DENIED))))
		return 0;
	return mounts_ok(plan) && paths_ok(plan) && cgroup_ok(plan);
}

int order_check(const void *block, size_t size) {
	const struct order *order = block;
	if (size < sizeof *order || size > MAX_BLOCK || order->magic != ORDER_MAGIC || order->version != FORMAT_VERSION ||
	    order->size != size)
		return 0;
	if (!string_ok(order, order->size, order->program) || order->argv.count == 0 ||
	    !strings_ok(order, order->size, order->argv, MAX_BLOCK / 8) ||
	    !strings_ok(order, order->size, order->environment, MAX_BLOCK / 8) ||
	    !span_ok(order->size, order->files, sizeof(struct order_file), 1024) ||
	    !span_ok(order->size, order->descriptors, sizeof(uint32_t), MAX_FDS) || order->descriptors.count < 3)
		return 0;
	const struct order_file *files = at(order, order->files.offset);
	for (uint32_t i = 0; i < order->files.count; i++) {
		if (!string_ok(order, order->size, files[i].name) || !inside(order->size, files[i].offset, files[i].size))
			return 0;
		const char *name = at(order, files[i].name);
		if (strchr(name, '/') || !strcmp(name, "..") || !strcmp(name, ".") || !*name)
			return 0;
	}
	const uint32_t *numbers = at(order, order->descriptors.offset);
	for (uint32_t i = 0; i < order->descriptors.count; i++)
		if (i < 3 ? numbers[i] != i : numbers[i] <= numbers[i - 1] || numbers[i] >= MAX_FD_NUMBER)
			return 0;
	return 1;
}

static int saved_strings_ok(const struct saved *saved) {
	const uint32_t needed[] = {saved->release, saved->search, saved->inside};
	const uint32_t optional[] = {saved->tree, saved->program, saved->controllers, saved->locks};
	for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
		if (!string_ok(saved, saved->size, needed[i]))
			return 0;
	for (size_t i = 0; i < sizeof optional / sizeof *optional; i++)
		if (optional[i] && !string_ok(saved, saved->size, optional[i]))
			return 0;
	return strings_ok(saved, saved->size, saved->visible, 4096) && strings_ok(saved, saved->size, saved->environment, 65536) &&
	       strings_ok(saved, saved->size, saved->passed, 65536) && strings_ok(saved, saved->size, saved->steps, 256);
}

static int saved_tables_ok(const struct saved *saved) {
	if (!span_ok(saved->size, saved->plan, 1, MAX_BLOCK) ||
	    !span_ok(saved->size, saved->sources, sizeof(struct saved_file), 65536) ||
	    !span_ok(saved->size, saved->groups, sizeof(struct saved_group), GROUPS))
		return 0;
	const struct saved_file *sources = at(saved, saved->sources.offset);
	for (uint32_t i = 0; i < saved->sources.count; i++)
		if (!string_ok(saved, saved->size, sources[i].path))
			return 0;
	const struct saved_group *groups = at(saved, saved->groups.offset);
	for (uint32_t i = 0; i < saved->groups.count; i++)
		if (groups[i].group >= GROUPS || (i && groups[i].group <= groups[i - 1].group) ||
		    (groups[i].controller && !string_ok(saved, saved->size, groups[i].controller)) ||
		    !string_ok(saved, saved->size, groups[i].mount) || !string_ok(saved, saved->size, groups[i].root))
			return 0;
	return 1;
}

int saved_check(const void *block, size_t size) {
	const struct saved *saved = block;
	if (size < sizeof *saved || size > MAX_BLOCK || saved->magic != SAVED_MAGIC || saved->version != FORMAT_VERSION ||
	    saved->size != size)
		return 0;
	if (!saved_strings_ok(saved) || !saved_tables_ok(saved))
		return 0;
	if (!saved->program && (saved->slot < sizeof(struct plan) || !inside(saved->plan.count, saved->slot, SAVED_SLOT)))
		return 0;
	return plan_check(at(saved, saved->plan.offset), saved->plan.count);
}
