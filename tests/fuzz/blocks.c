/* The checks of plan.c against any bytes. The first byte chooses the block. What is found good is read as the launcher reads it, from
 * a copy without a byte to spare: a check that let something bad pass is an overrun here. */
#include "blocks.h"

#include <linux/filter.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static volatile uint64_t sum;

static void text(const void *block, uint32_t offset) { sum += strlen(at(block, offset)); }

static void bytes(const void *block, uint32_t offset, size_t size) {
	for (size_t i = 0; i < size; i++)
		sum += ((const unsigned char *)at(block, offset))[i];
}

static void plan_read(const struct plan *plan) {
	text(plan, plan->hostname);
	text(plan, plan->directory);
	const struct mount_step *steps = at(plan, plan->mounts.offset);
	for (uint32_t i = 0; i < plan->mounts.count; i++) {
		text(plan, steps[i].target);
		if (steps[i].kind == MOUNT_SYMLINK || steps[i].kind == MOUNT_BIND || steps[i].kind == MOUNT_PART)
			text(plan, steps[i].source);
	}
	const struct path_rule *rules = at(plan, plan->paths.offset);
	for (uint32_t i = 0; i < plan->paths.count; i++)
		text(plan, rules[i].path);
	const struct cgroup_write *writes = at(plan, plan->cgroup.offset);
	for (uint32_t i = 0; i < plan->cgroup.count; i++) {
		if (writes[i].group >= GROUPS)
			abort();
		text(plan, writes[i].file);
		text(plan, writes[i].value);
	}
	const struct resource_limit *limits = at(plan, plan->limits.offset);
	for (uint32_t i = 0; i < plan->limits.count; i++)
		sum += limits[i].value + limits[i].resource;
	bytes(plan, plan->filter.offset, plan->filter.count * sizeof(struct sock_filter));
	bytes(plan, plan->late.offset, plan->late.count * sizeof(uint32_t));
	if (plan->shared > plan->mounts.count || plan->late.count > MAX_LATE ||
	    plan->filter.count + 2 * MAX_LATE > BPF_MAXINSNS)
		abort();
}

static void strings(const void *block, struct span span) {
	const uint64_t *offsets = at(block, span.offset);
	for (uint32_t i = 0; i < span.count; i++)
		text(block, (uint32_t)offsets[i]);
	if (offsets[span.count])
		abort();
}

static void order_read(const struct order *order) {
	text(order, order->program);
	strings(order, order->argv);
	strings(order, order->environment);
	const struct order_file *files = at(order, order->files.offset);
	for (uint32_t i = 0; i < order->files.count; i++) {
		const char *name = at(order, files[i].name);
		if (!*name || strchr(name, '/') || !strcmp(name, ".."))
			abort();
		bytes(order, files[i].offset, files[i].size);
	}
	const uint32_t *numbers = at(order, order->descriptors.offset);
	for (uint32_t i = 0; i < order->descriptors.count; i++)
		if (numbers[i] >= MAX_FD_NUMBER)
			abort();
}

static void saved_read(struct saved *saved) {
	const uint32_t texts[] = {saved->release, saved->search,      saved->inside, saved->tree,
	                          saved->program, saved->controllers, saved->locks};
	for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
		if (i < 3 || texts[i])
			text(saved, texts[i]);
	const struct span tables[] = {saved->visible, saved->environment, saved->passed, saved->steps};
	for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
		strings(saved, tables[i]);
	const struct saved_file *sources = at(saved, saved->sources.offset);
	for (uint32_t i = 0; i < saved->sources.count; i++)
		text(saved, sources[i].path);
	const struct saved_group *groups = at(saved, saved->groups.offset);
	for (uint32_t i = 0; i < saved->groups.count; i++) {
		if (groups[i].group >= GROUPS || i >= GROUPS)
			abort();
		if (groups[i].controller)
			text(saved, groups[i].controller);
		text(saved, groups[i].mount);
		text(saved, groups[i].root);
	}
	/* As alone.c does with the path of a program. */
	if (!saved->program)
		memset((char *)saved + saved->plan.offset + saved->slot, 0, SAVED_SLOT);
	else
		plan_read(at(saved, saved->plan.offset));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
	if (size < 1)
		return 0;
	size_t length = size - 1;
	void *block = malloc(length ? length : 1);
	if (!block)
		return 0;
	memcpy(block, data + 1, length);
	/* The size that a block says of itself is the first thing to be compared; let it be right mostly. */
	if (data[0] & 2 && length >= 12)
		((uint32_t *)block)[2] = (uint32_t)length;
	if (data[0] & 4) {
		if (saved_check(block, length))
			saved_read(block);
	} else if (data[0] & 1) {
		if (order_check(block, length))
			order_read(block);
	} else if (plan_check(block, length)) {
		plan_read(block);
	}
	free(block);
	return 0;
}
