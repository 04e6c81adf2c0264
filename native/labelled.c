/* Whether a program has the label that its plan asked for. proc_pid_attr(5) */
#include "launcher.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { TRIES = 100, PAUSE_US = 500 };

/* `NAME`, alone or followed by what AppArmor adds: what it is stacked on, and a mode for all of it. */
static int is_label(const char *text, const char *wanted) {
	const char *name = strncmp(wanted, "exec ", 5) ? wanted : wanted + 5;
	size_t length = strlen(name);
	return !strncmp(text, name, length) && (!text[length] || strchr(" \n", text[length]) || !strncmp(text + length, "//&", 3));
}

/* In any other mode (complain, unconfined, prompt, mixed) a profile, or one of a stack, lets pass what it does not allow. */
static int is_enforced(const char *text) {
	const char *mode = strrchr(text, '(');
	return !mode || !strncmp(mode, "(enforce)", 9) || !strncmp(mode, "(kill)", 6);
}

/* What is not there has ended; what cannot be looked at has no label that we know of. */
static int unless_gone(int error) { return error == 0 || error == ENOENT || error == ESRCH ? 0 : EPERM; }

/* 0, or the errno of why not. At exec the program's descriptors are closed, which is how we know of it, an instant before it has its new
 * label. One that has ended meanwhile is no matter: its exec succeeded. */
int label_missing(const struct run *run) {
	char path[64], text[4096];
	if (!run->plan->label)
		return 0;
	uint32_t pid = run_program_pid(run);
	if (!pid)
		return unless_gone(errno);
	snprintf(path, sizeof path, "/proc/%u/%s", pid, (const char *)at(run->plan, run->plan->label_shown));
	for (int i = 0; i < TRIES; i++) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
		int error = size < 0 ? errno : 0;
		if (fd >= 0)
			close(fd);
		if (size <= 0)
			return unless_gone(error);
		text[size] = 0;
		if (is_label(text, at(run->plan, run->plan->label)))
			return is_enforced(text) ? 0 : EOPNOTSUPP;
		usleep(PAUSE_US);
	}
	return EPERM;
}
