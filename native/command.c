/* The launcher alone: CMD and what of our environment the plan passes on become the order. */
#include "alone.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

extern char **environ;

static int executable(const char *path) {
	struct stat status;
	if (stat(path, &status) < 0)
		return 0;
	if (S_ISREG(status.st_mode) && access(path, X_OK) == 0)
		return 1;
	errno = EACCES;
	return 0;
}

/* The program's path on the host, as a shell would find it; made absolute, since the launcher stands elsewhere. */
static void program_find(const struct saved *saved, const char *name, char *path, size_t size) {
	if (!strchr(name, '/')) {
		for (const char *place = at(saved, saved->search); place; place = strchr(place, ':') ? strchr(place, ':') + 1 : NULL) {
			int length = (int)strcspn(place, ":");
			if (snprintf(path, size, "%.*s/%s", length, place, name) < (int)size && executable(path))
				return;
		}
		give_up(STATUS_NOT_FOUND, "%s: no such program", name);
	}
	char directory[2048] = "";
	if (*name != '/' && !getcwd(directory, sizeof directory))
		give_up(STATUS_SETUP, "working directory: %s", strerror(errno));
	if (snprintf(path, size, "%s%s%s", directory, *directory ? "/" : "", name) >= (int)size)
		give_up(STATUS_CANNOT_EXECUTE, "%s: %s", name, strerror(ENAMETOOLONG));
	if (!executable(path))
		give_up(errno == EACCES ? STATUS_CANNOT_EXECUTE : STATUS_NOT_FOUND, "%s: %s", name, strerror(errno));
}

static int same_file(const char *one, const char *other) {
	struct stat a, b;
	return stat(one, &a) == 0 && stat(other, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

static int is_visible(const struct saved *saved, const char *path) {
	const uint64_t *directories = at(saved, saved->visible.offset);
	for (uint32_t i = 0; i < saved->visible.count; i++) {
		const char *directory = at(saved, (uint32_t)directories[i]);
		if (!strncmp(path, directory, strlen(directory)))
			return 1;
	}
	return 0;
}

/* What CMD is inside. A plan that is for any program has a place for its path on the host. */
static const char *program_choose(struct saved *saved, const char *name) {
	static char path[SAVED_SLOT];
	program_find(saved, name, path, sizeof path);
	if (saved->program) {
		const char *compiled = at(saved, saved->program);
		if (!same_file(path, compiled))
			give_up(STATUS_CANNOT_EXECUTE, "%s: the plan is for %s: compile one for it: nsjail-py compile", name, compiled);
		return at(saved, saved->inside);
	}
	memcpy((char *)saved + saved->plan.offset + saved->slot, path, strlen(path) + 1);
	return is_visible(saved, path) ? path : at(saved, saved->inside);
}

static uint32_t put_string(char *block, uint32_t *end, const char *text) {
	uint32_t offset = *end, size = (uint32_t)strlen(text) + 1;
	memcpy(block + offset, text, size);
	*end += size;
	return offset;
}

static void put_strings(char *block, struct span *span, uint32_t *table, uint32_t *end, char *const *texts) {
	span->offset = *table;
	for (span->count = 0; texts[span->count]; span->count++) {
		uint64_t offset = put_string(block, end, texts[span->count]);
		memcpy(block + *table + span->count * sizeof offset, &offset, sizeof offset);
	}
	*table += (span->count + 1) * (uint32_t)sizeof(uint64_t);
}

static size_t length_of(char *const *texts) {
	size_t size = sizeof(uint64_t);
	for (; *texts; texts++)
		size += sizeof(uint64_t) + strlen(*texts) + 1;
	return size;
}

static int same_name(const char *variable, const char *other) {
	size_t length = strcspn(variable, "=");
	return !strncmp(variable, other, length) && (other[length] == '=' || !other[length]);
}

/* Full of zeros. */
static void *room(size_t size) {
	void *made = calloc(1, size);
	if (!made)
		give_up(STATUS_SETUP, "order: %s", strerror(errno));
	return made;
}

/* The plan's variables; those that are passed on as we have them take the place of its own. */
static char **environment_make(const struct saved *saved) {
	const uint64_t *fixed = at(saved, saved->environment.offset), *passed = at(saved, saved->passed.offset);
	char **made = room(((size_t)saved->environment.count + saved->passed.count + 1) * sizeof *made);
	uint32_t count = 0;
	for (uint32_t i = 0; i < saved->passed.count; i++)
		for (char **own = environ; *own; own++)
			if (strchr(*own, '=') && same_name(*own, at(saved, (uint32_t)passed[i]))) {
				made[count++] = *own;
				break;
			}
	uint32_t first = count;
	for (uint32_t i = 0; i < saved->environment.count; i++) {
		char *variable = (char *)at(saved, (uint32_t)fixed[i]);
		int taken = 0;
		for (uint32_t k = 0; k < first; k++)
			taken |= same_name(variable, made[k]);
		if (!taken)
			made[count++] = variable;
	}
	return made;
}

struct order *order_make(struct saved *saved, char **arguments) {
	static const uint32_t numbers[] = {0, 1, 2, 0};
	const char *program = program_choose(saved, arguments[0]);
	char **variables = environment_make(saved);
	size_t texts = strlen(program) + 1 + length_of(arguments) + length_of(variables);
	size_t size = (sizeof(struct order) + sizeof numbers + texts + 7) / 8 * 8;
	if (size > MAX_BLOCK)
		give_up(STATUS_SETUP, "order: arguments and environment are too long");
	struct order *order = room(size);
	*order = (struct order){.magic = ORDER_MAGIC, .version = FORMAT_VERSION, .size = (uint32_t)size};
	uint32_t table = sizeof *order, count = 0;
	order->descriptors = (struct span){.offset = table, .count = PIPES};
	memcpy((char *)order + table, numbers, sizeof numbers);
	table += sizeof numbers;
	for (char **each = arguments; *each; each++)
		count++;
	for (char **each = variables; *each; each++)
		count++;
	uint32_t end = table + (count + 2) * (uint32_t)sizeof(uint64_t);
	order->program = put_string((char *)order, &end, program);
	put_strings((char *)order, &order->argv, &table, &end, arguments);
	put_strings((char *)order, &order->environment, &table, &end, variables);
	free(variables);
	return order;
}
