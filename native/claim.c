/* What a caller owns while its launcher runs, as launcher.py and cgroups.py have it: a locked block of host ids, and a directory in
 * each hierarchy of control groups, named so that whoever comes later can tell that its owner is dead. flock(2), cgroups(7) */
#include "alone.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define PREFIX "nsjail_py."
#define OWN_GROUPS "/proc/self/cgroup"
enum { TRIES = 1000, PAUSE_US = 200 };

static void ids_lock(struct claim *claim) {
	const char *locks = at(claim->saved, claim->saved->locks);
	char path[4096];
	if (mkdir(locks, 0755) < 0 && errno != EEXIST)
		give_up(STATUS_SETUP, "uid pool: %s (%s)", strerror(errno), locks);
	for (uint32_t block = 0; block < claim->saved->uid_blocks; block++) {
		snprintf(path, sizeof path, "%s/uids-%u", locks, block);
		claim->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
		if (claim->lock < 0)
			give_up(STATUS_SETUP, "uid pool: %s (%s)", strerror(errno), path);
		claim->uid_base = claim->saved->uid_base + block * claim->saved->uid_block;
		if (flock(claim->lock, LOCK_EX | LOCK_NB) == 0)
			return;
		close(claim->lock);
	}
	give_up(STATUS_SETUP, "uid pool: all %u blocks of host ids are in use", claim->saved->uid_blocks);
}

static size_t read_text(const char *path, char *text, size_t size) {
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = file < 0 ? -1 : read(file, text, size - 1);
	if (file >= 0)
		close(file);
	text[length > 0 ? length : 0] = 0;
	return length > 0 ? (size_t)length : 0;
}

/* When a process was started; 0: errno says why it cannot be known. proc_pid_stat(5), field 22 */
static unsigned long long started(const char *pid) {
	char path[64], text[4096];
	snprintf(path, sizeof path, "/proc/%s/stat", pid);
	char *field = read_text(path, text, sizeof text) ? strrchr(text, ')') : NULL;
	for (int number = 2; field && number < 22; number++)
		field = strchr(field + 1, ' ');
	return field ? strtoull(field, NULL, 10) : 0;
}

/* Where process numbers and times of start mean the same. */
static void view(char *text, size_t size) {
	struct stat pid = {0}, time = {0};
	stat("/proc/self/ns/pid", &pid);
	stat("/proc/self/ns/time", &time);
	snprintf(text, size, "%lu-%lu", (unsigned long)pid.st_ino, (unsigned long)time.st_ino);
}

/* The directory and the cells below it; 0 while there is a process in one. Who has no descriptor left to look into it has made no cell. */
static int removed(const char *path) {
	int top = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	DIR *directory = top < 0 ? NULL : fdopendir(top);
	for (struct dirent *entry; directory && (entry = readdir(directory));)
		if (!strncmp(entry->d_name, "cell-", 5))
			unlinkat(top, entry->d_name, AT_REMOVEDIR);
	if (directory)
		closedir(directory);
	return rmdir(path) == 0 || errno == ENOENT;
}

/* nsjail_py.PID.STARTED.VIEW.RANDOM of a caller that is dead: nobody has its number, or somebody else has. One that cannot be looked at
 * (no descriptor is left, say) is not dead. */
static int is_stale(const char *name, const char *here) {
	char pid[32], seen[64];
	unsigned long long start, now;
	if (strncmp(name, PREFIX, strlen(PREFIX)) != 0 ||
	    sscanf(name + strlen(PREFIX), "%31[0-9].%llu.%63[0-9-].", pid, &start, seen) != 3 || strcmp(seen, here) != 0)
		return 0;
	errno = 0;
	now = started(pid);
	return now ? now != start : errno == ENOENT || errno == ESRCH;
}

static void sweep(const char *parent, const char *here) {
	char path[8192];
	DIR *directory = opendir(parent);
	for (struct dirent *entry; directory && (entry = readdir(directory));) {
		snprintf(path, sizeof path, "%s/%s", parent, entry->d_name);
		if (is_stale(entry->d_name, here))
			removed(path);
	}
	if (directory)
		closedir(directory);
}

/* Our own group of version 1, for a controller: `4:memory:/path` in /proc/self/cgroup. */
static const char *own_group(char *text, const char *controller) {
	size_t length = strlen(controller);
	for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
		char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
		for (char *name = names; name && name < path; name = strpbrk(name + 1, ",:"))
			if (!strncmp(name + 1, controller, length) && strchr(",:", name[1 + length]))
				return path + 1;
	}
	return NULL;
}

/* Below our own group, as it is seen in the mount that the plan knows. */
static int parent_of(const struct claim *claim, const struct saved_group *group, char *parent, size_t size) {
	char text[16384];
	const char *root = at(claim->saved, group->root);
	size_t length = strcmp(root, "/") ? strlen(root) : 0;
	if (!read_text(OWN_GROUPS, text, sizeof text))
		return -1;
	char *own = (char *)own_group(text, at(claim->saved, group->controller));
	errno = ENOENT;
	if (!own)
		return -1;
	own[strcspn(own, "\n")] = 0;
	if (strncmp(own, root, length) != 0 || (own[length] != '/' && own[length]) || strstr(own, "/.."))
		return -1;
	return snprintf(parent, size, "%s%s", (const char *)at(claim->saved, group->mount), own + length) < (int)size ? 0 : -1;
}

/* Version 2 hands controllers on from directory to directory. */
static int hand_on(const struct claim *claim, const char *directory) {
	int top = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
	int result = top < 0 ? -1 : put(top, "cgroup.subtree_control", at(claim->saved, claim->saved->controllers));
	if (top >= 0)
		close(top);
	return result;
}

static int base_of(const struct claim *claim, const struct saved_group *group, char *parent, size_t size) {
	const char *mount = at(claim->saved, group->mount);
	snprintf(parent, size, "%s/nsjail_py", mount);
	if (hand_on(claim, mount) < 0 || (mkdir(parent, 0755) < 0 && errno != EEXIST))
		return -1;
	return hand_on(claim, parent);
}

static int group_make(struct claim *claim, int number, const char *name, const char *here) {
	const struct saved_group *group = (const struct saved_group *)at(claim->saved, claim->saved->groups.offset) + number;
	char parent[4096], *path = claim->paths[number];
	int found = group->controller ? parent_of(claim, group, parent, sizeof parent) : base_of(claim, group, parent, sizeof parent);
	if (found < 0)
		return -1;
	sweep(parent, here);
	if (snprintf(path, sizeof claim->paths[number], "%s/%s", parent, name) >= (int)sizeof claim->paths[number] ||
	    mkdir(path, 0755) < 0)
		return -1;
	if (!group->controller && hand_on(claim, path) < 0)
		return -1;
	claim->groups[number] = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return claim->groups[number] < 0 ? -1 : 0;
}

void claim_make(struct claim *claim) {
	char name[128], here[64], pid[16];
	unsigned token = 0;
	if (claim->saved->locks)
		ids_lock(claim);
	if (!claim->saved->groups.count)
		return;
	if (getrandom(&token, sizeof token, 0) < 0)
		token = (unsigned)now_ns();
	view(here, sizeof here);
	snprintf(pid, sizeof pid, "%d", getpid());
	if (!started(pid)) /* others would take us for dead */
		give_up(STATUS_SETUP, "cgroup: %s (/proc/self/stat)", strerror(errno));
	snprintf(name, sizeof name, PREFIX "%s.%llu.%s.%08x", pid, started(pid), here, token);
	for (int i = 0; i < (int)claim->saved->groups.count; i++)
		if (group_make(claim, i, name, here) < 0) {
			int error = errno;
			claim_release(claim);
			give_up(STATUS_SETUP, "cgroup: %s (%s)", strerror(error), *claim->paths[i] ? claim->paths[i] : OWN_GROUPS);
		}
}

void claim_release(const struct claim *claim) {
	for (uint32_t i = 0; i < claim->saved->groups.count; i++)
		for (int tries = 0; *claim->paths[i] && !removed(claim->paths[i]) && tries < TRIES; tries++)
			usleep(PAUSE_US);
}
