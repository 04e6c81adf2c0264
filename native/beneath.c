/* A path looked up beneath a directory as if that were the root: links and ".." in it lead nowhere else. openat2(2)
 *
 * Where openat2 seems not to exist (systemd's RestrictSUIDSGID=, a container's filter), or gives up at a ".." since something was mounted
 * or renamed somewhere on the host meanwhile, each component is opened by itself. The kernel is then asked neither to follow a link nor
 * to go up: the text of a link, and "..", make another path, which is walked from the root again. So nobody who moves directories
 * meanwhile can lead us out: from a directory we only go down. */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_TURNS = 40 }; /* links and "..", as the kernel follows 40 links */

struct component {
	size_t from, to; /* in the path */
	mode_t mode;
};

static int is(const char *name, size_t size, const char *other) { return size == strlen(other) && !memcmp(name, other, size); }

/* Down to the end of the path, where the component is empty; or to a link, which is opened itself; or to where ".." stands. */
static int down(int root, char *path, struct component *component) {
	struct stat status;
	int at = openat(root, ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	*component = (struct component){.mode = S_IFDIR};
	while (at >= 0) {
		char *start = path + component->to + strspn(path + component->to, "/");
		size_t size = strcspn(start, "/");
		int up = is(start, size, ".."), stays = is(start, size, ".");
		component->from = (size_t)(start - path);
		component->to = component->from + size;
		if (size == 0)
			return at;
		char behind = start[size];
		start[size] = 0;
		int below = openat(at, up ? "." : start, O_PATH | O_NOFOLLOW | O_CLOEXEC);
		start[size] = behind;
		keep_errno_close(at);
		at = below;
		if (at < 0 || fstat(at, &status) < 0)
			break;
		component->mode = status.st_mode;
		if (up || S_ISLNK(status.st_mode))
			return at;
		if (stays) { /* or it would be what a ".." behind it takes away */
			memmove(start, start + size, strlen(start + size) + 1);
			component->to = component->from;
		}
	}
	return keep_errno_close(at);
}

/* The path with a link's text, or nothing and one directory less for "..", in the place of its component. */
static int turn(char *path, const struct component *component, int link) {
	char text[PATH_MAX], rest[PATH_MAX];
	size_t start = component->from;
	ssize_t size = 0;
	if (S_ISLNK(component->mode)) {
		size = readlinkat(link, "", text, sizeof text);
		if (size < 0)
			return -1;
		if (size > 0 && text[0] == '/')
			start = 0;
	} else {
		while (start > 0 && path[start - 1] == '/')
			start--;
		while (start > 0 && path[start - 1] != '/')
			start--;
	}
	size_t left = strlen(path + component->to) + 1;
	if (start + (size_t)size + left > PATH_MAX) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(rest, path + component->to, left);
	memcpy(path + start, text, (size_t)size);
	memcpy(path + start + size, rest, left);
	return 0;
}

static int walk(int root, const char *path, int flags) {
	char whole[PATH_MAX];
	struct component component;
	if (strlen(path) >= sizeof whole) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(whole, path, strlen(path) + 1);
	for (int turns = 0; turns <= MAX_TURNS; turns++) {
		int at = down(root, whole, &component);
		if (at < 0)
			return -1;
		if (component.from == component.to) {
			int must_be_directory = flags & O_DIRECTORY || (component.from && whole[component.from - 1] == '/');
			if (!must_be_directory || S_ISDIR(component.mode))
				return at;
			errno = ENOTDIR;
			return keep_errno_close(at);
		}
		int result = turn(whole, &component, at);
		keep_errno_close(at);
		if (result < 0)
			return -1;
	}
	errno = ELOOP;
	return -1;
}

/* flags: O_DIRECTORY, or 0. */
int open_beneath(int root, const char *path, int flags) {
	struct open_how how = {
	    .flags = (unsigned)(O_PATH | O_CLOEXEC | flags),
	    .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
	};
	int opened = sys_openat2(root, path, &how);
	return opened < 0 && (errno == ENOSYS || errno == EAGAIN) ? walk(root, path, flags) : opened;
}
