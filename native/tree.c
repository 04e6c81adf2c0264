/* What the processes of a cell use together, where no control group knows: each of them is looked at. proc(5)
 *
 * They come and go meanwhile, so it is an estimate; what a process is said to have used is never more than it has. A look that fails
 * for another reason than that the process is gone is an error: nobody would keep the limit. */
#include "launcher.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINES = 3 }; /* of a file in /proc, that are of use */

struct pids {
	pid_t *list;
	size_t count, room;
};

static int gone(void) { return errno == ENOENT || errno == ESRCH; }

static int pids_add(struct pids *pids, pid_t pid) {
	if (pids->count == pids->room) {
		size_t room = pids->room ? 2 * pids->room : 64;
		pid_t *list = realloc(pids->list, room * sizeof *list);
		if (!list)
			return -1;
		pids->list = list;
		pids->room = room;
	}
	pids->list[pids->count++] = pid;
	return 0;
}

/* Numbers with a space behind each. */
static int numbers_add(struct pids *pids, int children) {
	char text[4096];
	pid_t pid = 0;
	ssize_t size;
	while ((size = read(children, text, sizeof text)) > 0)
		for (ssize_t i = 0; i < size; i++)
			if (text[i] != ' ')
				pid = 10 * pid + (text[i] - '0');
			else if (pids_add(pids, pid) < 0)
				return -1;
			else
				pid = 0;
	return size < 0 && !gone() ? -1 : 0;
}

static int thread_children_add(struct pids *pids, int threads, const char *thread) {
	char name[64];
	snprintf(name, sizeof name, "%.20s/children", thread);
	int children = openat(threads, name, O_RDONLY | O_CLOEXEC);
	if (children < 0)
		return gone() ? 0 : -1;
	int result = numbers_add(pids, children), error = errno;
	close(children);
	errno = error;
	return result;
}

/* Each thread has children of its own. proc_tid_children(5) */
static int children_add(struct pids *pids, pid_t pid) {
	char path[64];
	struct dirent *thread;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *threads = opendir(path);
	if (!threads)
		return gone() ? 0 : -1;
	errno = 0;
	while ((thread = readdir(threads)) &&
	       (thread->d_name[0] == '.' || thread_children_add(pids, dirfd(threads), thread->d_name) == 0))
		errno = 0;
	int error = errno;
	closedir(threads);
	errno = error;
	return error && !gone() ? -1 : 0;
}

/* Init first. */
static int below(struct pids *pids, pid_t init) {
	if (pids_add(pids, init) < 0)
		return -1;
	for (size_t i = 0; i < pids->count; i++)
		if (children_add(pids, pids->list[i]) < 0)
			return -1;
	return 0;
}

/* A file of a process as text, empty when it is gone. */
static int file_read(pid_t pid, const char *name, char *text, size_t room) {
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
	text[0] = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return gone() ? 0 : -1;
	ssize_t size = read(fd, text, room - 1);
	int error = errno;
	close(fd);
	errno = error;
	text[size > 0 ? size : 0] = 0;
	return size < 0 && !gone() ? -1 : 0;
}

/* What it had from children that it waited for, in ticks: fields 16 and 17, behind a name that may hold anything. proc_pid_stat(5) */
static int waited_cpu(pid_t pid, uint64_t *sum) {
	char text[1024];
	unsigned long user = 0, system = 0;
	if (file_read(pid, "stat", text, sizeof text) < 0)
		return -1;
	const char *rest = strrchr(text, ')');
	if (rest)
		sscanf(rest + 1, " %*c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %lu %lu", &user, &system);
	*sum += (user + system) * (1000000000u / (uint64_t)sysconf(_SC_CLK_TCK));
	return 0;
}

static int pids_cpu(const struct pids *pids, uint64_t *sum) {
	for (size_t i = 0; i < pids->count; i++) {
		struct timespec used;
		if (i > 0 && clock_gettime((clockid_t)((~(unsigned)pids->list[i] << 3) | 2), &used) == 0)
			*sum += (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
		if (waited_cpu(pids->list[i], sum) < 0)
			return -1;
	}
	return 0;
}

/* Processor time of every process below init, and what each had from children that are gone. */
int tree_cpu(pid_t init, uint64_t *sum) {
	struct pids pids = {0};
	*sum = 0;
	int result = below(&pids, init) < 0 ? -1 : pids_cpu(&pids, sum), error = errno;
	free(pids.list);
	errno = error;
	return result;
}

/* Adds what the lines of these names say, in kB, as bytes. A line that is longer than the room, that of many groups, is none of them. */
static int lines_add(int file, const char *const names[LINES], uint64_t sums[LINES]) {
	char text[4096];
	size_t have = 0;
	ssize_t size;
	while ((size = read(file, text + have, sizeof text - 1 - have)) > 0) {
		have += (size_t)size;
		text[have] = 0;
		char *end = strrchr(text, '\n');
		size_t done = end ? (size_t)(end - text) : have;
		if (end)
			*end = 0;
		for (int n = 0; n < LINES; n++) {
			const char *line = names[n] ? strstr(text, names[n]) : NULL;
			if (line)
				sums[n] += strtoull(line + strlen(names[n]), NULL, 10) * 1024;
		}
		if (end)
			*end = '\n'; /* a name begins with it */
		if (done == 0 && have == sizeof text - 1)
			done = have;
		have -= done;
		memmove(text, text + done, have);
	}
	return size < 0 && !gone() ? -1 : 0;
}

static int file_add(int directory, const char *name, const char *const names[LINES], uint64_t sums[LINES]) {
	int file = openat(directory, name, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return gone() ? 0 : -1;
	int result = lines_add(file, names, sums), error = errno;
	close(file);
	errno = error;
	return result;
}

/* What a process has when its first thread has ended: that one's file tells nothing, and each of the others' tells all. */
static int threads_add(pid_t pid, const char *file, const char *const names[LINES], uint64_t sums[LINES]) {
	char path[64], name[64];
	const struct dirent *thread;
	const uint64_t before = sums[0];
	int result = 0;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *threads = opendir(path);
	if (!threads)
		return gone() ? 0 : -1;
	while (result == 0 && sums[0] == before && (thread = readdir(threads))) {
		snprintf(name, sizeof name, "%.20s/%s", thread->d_name, file);
		result = thread->d_name[0] == '.' ? 0 : file_add(dirfd(threads), name, names, sums);
	}
	int error = errno;
	closedir(threads);
	errno = error;
	return result;
}

static int pids_memory(const struct pids *pids, const char *file, const char *const names[LINES], uint64_t sums[LINES]) {
	for (size_t i = 1; i < pids->count; i++) {
		char path[64];
		uint64_t before = sums[0]; /* page tables, or what is not shared: a process that has memory has some */
		snprintf(path, sizeof path, "/proc/%d/%s", pids->list[i], file);
		if (file_add(AT_FDCWD, path, names, sums) < 0 || (sums[0] == before && threads_add(pids->list[i], file, names, sums) < 0))
			return -1;
	}
	return 0;
}

/* Private and shared memory of every process below init, and its page tables, which grow with what it only maps and reads. What several
 * have in common, a job with its template for one, is first counted for each of them, and only where that is too much by their shares:
 * that look is the dear one, and where it is refused the first stands. */
int tree_memory(pid_t init, uint64_t limit, uint64_t *sum) {
	static const char *const whole[LINES] = {"\nVmPTE:", "\nRssAnon:", "\nRssShmem:"}, *const shares[LINES] = {"\nPss_Anon:",
	                                                                                                           "\nPss_Shmem:"};
	struct pids pids = {0};
	uint64_t sums[LINES] = {0}, shared[LINES] = {0};
	int result = below(&pids, init) < 0 ? -1 : pids_memory(&pids, "status", whole, sums), error = errno;
	*sum = sums[0] + sums[1] + sums[2];
	if (result == 0 && *sum > limit && pids_memory(&pids, "smaps_rollup", shares, shared) == 0)
		*sum = sums[0] + shared[0] + shared[1];
	free(pids.list);
	errno = error;
	return result;
}
