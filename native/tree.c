/* What the processes of a cell use together, where no control group knows: each of them is looked at. proc(5)
 *
 * They come and go meanwhile, so it is an estimate; what a process is said to have used is never more than it has. */
#include "launcher.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct pids {
	pid_t *list;
	size_t count, room;
};

static void pids_add(struct pids *pids, pid_t pid) {
	if (pids->count == pids->room) {
		size_t room = pids->room ? 2 * pids->room : 64;
		pid_t *list = realloc(pids->list, room * sizeof *list);
		if (!list)
			return;
		pids->list = list;
		pids->room = room;
	}
	pids->list[pids->count++] = pid;
}

/* Each thread has children of its own. proc_tid_children(5) */
static void children_add(struct pids *pids, pid_t pid) {
	char path[64];
	struct dirent *thread;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *threads = opendir(path);
	while (threads && (thread = readdir(threads))) {
		char name[64];
		snprintf(name, sizeof name, "%.20s/children", thread->d_name);
		int fd = openat(dirfd(threads), name, O_RDONLY | O_CLOEXEC);
		FILE *file = fd < 0 ? NULL : fdopen(fd, "r");
		for (int child; file && fscanf(file, "%d", &child) == 1;)
			pids_add(pids, child);
		if (file)
			fclose(file);
		else if (fd >= 0)
			close(fd);
	}
	if (threads)
		closedir(threads);
}

/* Init first. */
static struct pids below(pid_t init) {
	struct pids pids = {0};
	pids_add(&pids, init);
	for (size_t i = 0; i < pids.count; i++)
		children_add(&pids, pids.list[i]);
	return pids;
}

/* What it had from children that it waited for, in ticks: fields 16 and 17, behind a name that may hold anything. proc_pid_stat(5) */
static uint64_t waited_cpu(pid_t pid) {
	char path[64], text[1024];
	unsigned long user = 0, system = 0;
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[length > 0 ? length : 0] = 0;
	const char *rest = strrchr(text, ')');
	if (rest)
		sscanf(rest + 1, " %*c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %lu %lu", &user, &system);
	return (user + system) * (1000000000u / (uint64_t)sysconf(_SC_CLK_TCK));
}

/* Processor time of every process below init, and what each had from children that are gone. */
uint64_t tree_cpu(pid_t init) {
	struct pids pids = below(init);
	uint64_t sum = waited_cpu(init);
	for (size_t i = 1; i < pids.count; i++) {
		struct timespec used;
		if (clock_gettime((clockid_t)((~(unsigned)pids.list[i] << 3) | 2), &used) == 0)
			sum += (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
		sum += waited_cpu(pids.list[i]);
	}
	free(pids.list);
	return sum;
}

/* Bytes that stand in the lines of these two names, as kB. */
static uint64_t lines_sum(pid_t pid, const char *file, const char *one, const char *two) {
	char path[64], line[256];
	unsigned long long value;
	uint64_t sum = 0;
	snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
	FILE *lines = fopen(path, "re");
	while (lines && fgets(line, sizeof line, lines))
		if ((strncmp(line, one, strlen(one)) == 0 || strncmp(line, two, strlen(two)) == 0) &&
		    sscanf(strchr(line, ':') + 1, "%llu", &value) == 1)
			sum += value * 1024;
	if (lines)
		fclose(lines);
	return sum;
}

static uint64_t pids_memory(const struct pids *pids, const char *file, const char *one, const char *two) {
	uint64_t sum = 0;
	for (size_t i = 1; i < pids->count; i++)
		sum += lines_sum(pids->list[i], file, one, two);
	return sum;
}

/* Private and shared memory of every process below init. What several have in common, a job with its template for one, is first counted for
 * each of them, and only where that is too much by their shares: that look is the dear one. */
uint64_t tree_memory(pid_t init, uint64_t limit) {
	struct pids pids = below(init);
	uint64_t sum = pids_memory(&pids, "status", "RssAnon:", "RssShmem:");
	if (sum > limit)
		sum = pids_memory(&pids, "smaps_rollup", "Pss_Anon:", "Pss_Shmem:");
	free(pids.list);
	return sum;
}
