/* A plan in a file: whose it is, whether it is whole, and whether this is still the host that it was made for. stat(2), uname(2) */
#include "alone.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#define AGAIN "compile it again: nsjail-py compile"

/* Looked at once it is open, so that nobody can exchange it: only its owner can write it, and that is us. */
static void *read_whole(const char *path, size_t *size) {
	struct stat status;
	int file = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (file < 0 || fstat(file, &status) < 0)
		give_up(STATUS_SETUP, "plan: %s (%s)", strerror(errno), path);
	if (!S_ISREG(status.st_mode) || status.st_uid != geteuid() || status.st_mode & 022)
		give_up(STATUS_SETUP, "plan: %s must be a file that belongs to uid %u and that nobody else can write", path, geteuid());
	if (status.st_size < (off_t)sizeof(struct saved) || status.st_size > MAX_BLOCK)
		give_up(STATUS_SETUP, "plan: %s is not a saved plan", path);
	char *block = calloc(1, (size_t)status.st_size);
	for (*size = 0; block && *size < (size_t)status.st_size;) {
		ssize_t got = read(file, block + *size, (size_t)status.st_size - *size);
		if (got <= 0)
			give_up(STATUS_SETUP, "plan: %s cannot be read", path);
		*size += (size_t)got;
	}
	if (!block)
		give_up(STATUS_SETUP, "plan: %s (%s)", strerror(errno), path);
	close(file);
	return block;
}

/* FNV-1a over words of 64 bits: against damage; against malice the file's owner stands. */
static uint64_t checksum(const struct saved *saved, size_t size) {
	size_t from = offsetof(struct saved, checksum) + sizeof saved->checksum;
	uint64_t sum = 14695981039346656037u, word;
	for (; from + sizeof word <= size; from += sizeof word) {
		memcpy(&word, (const char *)saved + from, sizeof word);
		sum = (sum ^ word) * 1099511628211u;
	}
	return sum;
}

static int same(const struct saved_file *source, const char *path) {
	struct stat status;
	if (stat(path, &status) < 0)
		return source->size == -1;
	return status.st_size == source->size && status.st_mtim.tv_sec * 1000000000 + status.st_mtim.tv_nsec == source->mtime_ns;
}

/* The cached root is marked as used, and so stays; what it was copied from is as it was. */
static void root_check(const struct saved *saved, const char *path) {
	struct stat status;
	const char *tree = at(saved, saved->tree);
	if (saved->tree && (lstat(tree, &status) < 0 || !S_ISDIR(status.st_mode) || status.st_uid != geteuid()))
		give_up(STATUS_SETUP, "plan: %s: its root %s is not in the cache any more; " AGAIN, path, tree);
	if (saved->tree)
		utimensat(AT_FDCWD, tree, NULL, 0);
	const struct saved_file *sources = at(saved, saved->sources.offset);
	for (uint32_t i = 0; i < saved->sources.count; i++)
		if (!same(&sources[i], at(saved, sources[i].path)))
			give_up(STATUS_SETUP, "plan: %s: %s has changed since; " AGAIN, path, (const char *)at(saved, sources[i].path));
}

/* A plan that may be used now, or the end. */
struct saved *saved_open(const char *path) {
	size_t size;
	struct utsname host;
	struct saved *saved = read_whole(path, &size);
	if (saved->magic != SAVED_MAGIC)
		give_up(STATUS_SETUP, "plan: %s is not a saved plan", path);
	if (saved->version != FORMAT_VERSION)
		give_up(STATUS_SETUP, "plan: %s is of another version; " AGAIN, path);
	if (saved->size != size || saved->checksum != checksum(saved, size) || !saved_check(saved, size))
		give_up(STATUS_SETUP, "plan: %s is damaged; " AGAIN, path);
	if (saved->uid != geteuid())
		give_up(STATUS_SETUP, "plan: %s was compiled for uid %u, and this is %u; " AGAIN, path, saved->uid, geteuid());
	if (uname(&host) < 0 || strcmp(host.release, at(saved, saved->release)) != 0)
		give_up(STATUS_SETUP, "plan: %s was compiled under another kernel; " AGAIN, path);
	root_check(saved, path);
	return saved;
}
