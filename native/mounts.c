/* The file system inside: a new root of tmpfs, the plan's mounts on it in order, then the old root is gone.
 * mount_setattr(2), pivot_root(2), kernel document filesystems/mount_api
 *
 * Trees are cloned and given their flags while they are attached nowhere, so no mount is ever visible without them. A target is
 * looked up beneath the new root, whatever links a mounted tree holds, and is made before anything untrusted is mounted. */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

/* The directory that holds target, and the target's own name. */
static int parent_open(const struct cell *cell, const char *target, const char **name) {
	char parent[4096] = "/";
	const char *slash = strrchr(target, '/');
	size_t length = slash ? (size_t)(slash - target) : 0;
	if (!slash || length >= sizeof parent) {
		errno = slash ? ENAMETOOLONG : EINVAL;
		return -1;
	}
	if (length) {
		memcpy(parent, target, length);
		parent[length] = 0;
	}
	*name = slash + 1;
	return open_beneath(cell->root, parent, O_DIRECTORY);
}

static int place(const struct cell *cell, int tree, const char *target) {
	int at = open_beneath(cell->root, target, 0);
	if (at < 0)
		return -1;
	int result = sys_move_mount(tree, at, "", MOVE_MOUNT_T_EMPTY_PATH);
	keep_errno_close(at);
	return result;
}

static unsigned attributes_of(uint32_t flags) {
	return MOUNT_ATTR_NOSUID | (flags & MOUNT_DEVICES ? 0 : MOUNT_ATTR_NODEV) | (flags & MOUNT_WRITABLE ? 0 : MOUNT_ATTR_RDONLY) |
	       (flags & MOUNT_NOEXEC ? MOUNT_ATTR_NOEXEC : 0);
}

static int restrict_tree(int tree, uint32_t flags) {
	struct mount_attr attributes = {.attr_set = attributes_of(flags), .propagation = MS_PRIVATE};
	return sys_mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes);
}

static int finish(const struct cell *cell, int tree, const struct mount_step *step) {
	if (tree < 0)
		return -1;
	int result = restrict_tree(tree, step->flags);
	if (result == 0)
		result = place(cell, tree, at(cell->plan, step->target));
	keep_errno_close(tree);
	return result;
}

struct option {
	const char *key, *value;
};

static int new_file_system(const char *type, const struct option *options, unsigned attributes) {
	int fs = sys_fsopen(type), mount = -1;
	if (fs < 0)
		return -1;
	int ok = 1;
	for (; ok && options->key; options++)
		ok = sys_fsconfig(fs, FSCONFIG_SET_STRING, options->key, options->value) == 0;
	if (ok && sys_fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL) == 0)
		mount = sys_fsmount(fs, attributes);
	keep_errno_close(fs);
	return mount;
}

static int make_directory(const struct cell *cell, const struct mount_step *step) {
	const char *name;
	int parent = parent_open(cell, at(cell->plan, step->target), &name);
	if (parent < 0)
		return -1;
	int result = mkdirat(parent, name, step->mode);
	if (result == 0)
		result = fchmodat(parent, name, step->mode, 0);
	else if (errno == EEXIST)
		result = 0;
	keep_errno_close(parent);
	return result;
}

static int make_file(const struct cell *cell, const struct mount_step *step) {
	const char *name;
	int parent = parent_open(cell, at(cell->plan, step->target), &name);
	if (parent < 0)
		return -1;
	int fd = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0444);
	keep_errno_close(parent);
	if (fd < 0)
		return errno == EEXIST ? 0 : -1;
	return close(fd);
}

static int make_symlink(const struct cell *cell, const struct mount_step *step) {
	const char *name;
	int parent = parent_open(cell, at(cell->plan, step->target), &name);
	if (parent < 0)
		return -1;
	int result = symlinkat(at(cell->plan, step->source), parent, name);
	keep_errno_close(parent);
	return result;
}

/* Our only child, under the name that the mounted /proc has for it. */
static pid_t child_in_proc(void) {
	char text[32] = {0};
	pid_t pid = 0;
	int fd = open("/proc/thread-self/children", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	if (read(fd, text, sizeof text - 1) > 0)
		for (const char *c = text; *c >= '0' && *c <= '9'; c++)
			pid = pid * 10 + (*c - '0');
	keep_errno_close(fd);
	if (pid == 0)
		errno = ESRCH;
	return pid ? pid : -1;
}

/* An id-mapped mount takes its map from a user namespace. A short-lived child makes one: owner on disk -> user of this cell. */
static int mapping_namespace(uint32_t uid, uint32_t gid, const struct cell *cell) {
	int ready[2], result = -1;
	char path[64], byte;
	if (pipe2(ready, O_CLOEXEC) < 0)
		return -1;
	struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
	pid_t child = sys_clone3(&args);
	if (child == 0) {
		close(ready[1]);
		_exit(read(ready[0], &byte, 1) < 0);
	}
	pid_t pid = child > 0 ? child_in_proc() : -1;
	if (pid > 0 && put_map(pid, "gid_map", gid, cell->gid) == 0 && put_map(pid, "uid_map", uid, cell->uid) == 0) {
		snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
		result = open(path, O_RDONLY | O_CLOEXEC);
	}
	keep_errno_close(ready[0]);
	keep_errno_close(ready[1]);
	int error = errno;
	if (child > 0)
		waitpid(child, NULL, 0);
	errno = error;
	return result;
}

/* Never for root's own files: a program that may write as root outside could leave a set-user-id file there. Done before the new root
 * covers the old one, since from then on the kernel takes us for chrooted and refuses user namespaces. */
static enum step maps_prepare(struct cell *cell) {
	const struct plan *plan = cell->plan;
	const struct mount_step *steps = at(plan, plan->mounts.offset);
	struct stat status;
	for (uint32_t i = 0, next = 0; i < plan->mounts.count && !cell->rootless; i++) {
		if (steps[i].kind != MOUNT_BIND || !(steps[i].flags & MOUNT_IDMAP))
			continue;
		cell->detail = i;
		if (stat(at(plan, steps[i].source), &status) < 0)
			return STEP_MOUNT_SOURCE;
		errno = status.st_uid == 0 ? EPERM : next == MAX_MAPS ? E2BIG : 0;
		if (errno ||
		    (cell->maps[next++] = mapping_namespace(status.st_uid, status.st_gid ? status.st_gid : status.st_uid, cell)) < 0)
			return STEP_MOUNT_IDMAP;
	}
	return STEP_NONE;
}

static int map_owner(struct cell *cell, int tree) {
	if (cell->rootless)
		return 0; /* the owner is the user himself or it is not ours to change */
	struct mount_attr attributes = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)cell->maps[cell->next_map++]};
	return sys_mount_setattr(tree, "", AT_EMPTY_PATH, &attributes);
}

static enum step bind(struct cell *cell, const struct mount_step *step) {
	int tree = sys_open_tree(AT_FDCWD, at(cell->plan, step->source), OPEN_TREE_CLONE | AT_RECURSIVE);
	if (tree < 0)
		return STEP_MOUNT_SOURCE;
	if (step->flags & MOUNT_IDMAP && map_owner(cell, tree) < 0) {
		keep_errno_close(tree);
		return STEP_MOUNT_IDMAP;
	}
	return finish(cell, tree, step) < 0 ? STEP_MOUNT_BIND : STEP_NONE;
}

static int scratch(struct cell *cell, const struct mount_step *step) {
	char size[32], inodes[32];
	snprintf(size, sizeof size, "%llu", (unsigned long long)step->size);
	snprintf(inodes, sizeof inodes, "%llu", (unsigned long long)step->inodes);
	struct option options[] = {{"size", size}, {"nr_inodes", inodes}, {"mode", "0755"}, {NULL, NULL}};
	cell->scratch = new_file_system("tmpfs", options, attributes_of(step->flags | MOUNT_WRITABLE));
	return cell->scratch < 0 ? -1 : place(cell, cell->scratch, at(cell->plan, step->target));
}

static int part(struct cell *cell, const struct mount_step *step) {
	const char *name = at(cell->plan, step->source);
	if (mkdirat(cell->scratch, name, 0700) < 0 || fchmodat(cell->scratch, name, step->mode, 0) < 0)
		return -1;
	if (step->flags & MOUNT_OWNED && !cell->rootless &&
	    fchownat(cell->scratch, name, cell->uid, cell->gid, AT_SYMLINK_NOFOLLOW) < 0)
		return -1;
	if (step->flags & MOUNT_APP) {
		cell->app = openat(cell->scratch, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (cell->app < 0)
			return -1;
	}
	return finish(cell, sys_open_tree(cell->scratch, name, OPEN_TREE_CLONE), step);
}

static int proc(const struct cell *cell, const struct mount_step *step) {
	struct option options[] = {{"hidepid", "invisible"}, {"subset", "pid"}, {NULL, NULL}};
	if (!(step->flags & MOUNT_PIDS_ONLY))
		options[1].key = NULL;
	/* With its flags from the start: in a user namespace the kernel compares them with those of the /proc that is there already. */
	return finish(cell, new_file_system("proc", options, attributes_of(step->flags)), step);
}

static int devpts(const struct cell *cell, const struct mount_step *step) {
	struct option options[] = {
	    {"ptmxmode", "0666"}, {"mode", "0600"}, {"max", "64"}, {NULL, NULL}}; /* the host's are one stock */
	return finish(cell, new_file_system("devpts", options, 0), step);
}

static int mask(const struct cell *cell, const struct mount_step *step) {
	struct stat status;
	struct option empty[] = {{"size", "4096"}, {"nr_inodes", "2"}, {"mode", "0555"}, {NULL, NULL}};
	int target = open_beneath(cell->root, at(cell->plan, step->target), 0);
	if (target < 0)
		return errno == ENOENT ? 0 : -1;
	int tree = -1;
	if (fstat(target, &status) == 0)
		tree =
		    S_ISDIR(status.st_mode) ? new_file_system("tmpfs", empty, 0) : sys_open_tree(AT_FDCWD, "/dev/null", OPEN_TREE_CLONE);
	keep_errno_close(target);
	return finish(cell, tree, step);
}

static int read_only(const struct cell *cell, const struct mount_step *step) {
	int target = open_beneath(cell->root, at(cell->plan, step->target), 0);
	if (target < 0)
		return errno == ENOENT ? 0 : -1;
	int tree = sys_open_tree(target, "", OPEN_TREE_CLONE | AT_EMPTY_PATH | AT_RECURSIVE);
	keep_errno_close(target);
	return finish(cell, tree, step);
}

static enum step perform(struct cell *cell, const struct mount_step *step) {
#define OR(step, result) ((result) < 0 ? (step) : STEP_NONE)
	switch ((enum mount_kind)step->kind) {
	case MOUNT_DIRECTORY: return OR(STEP_MOUNT_TARGET, make_directory(cell, step));
	case MOUNT_FILE: return OR(STEP_MOUNT_TARGET, make_file(cell, step));
	case MOUNT_SYMLINK: return OR(STEP_MOUNT_TARGET, make_symlink(cell, step));
	case MOUNT_BIND: return bind(cell, step);
	case MOUNT_SCRATCH: return OR(STEP_MOUNT_SCRATCH, scratch(cell, step));
	case MOUNT_PART: return OR(STEP_MOUNT_SCRATCH, part(cell, step));
	case MOUNT_PROC: return OR(STEP_MOUNT_PROC, proc(cell, step));
	case MOUNT_DEVPTS: return OR(STEP_MOUNT_DEVPTS, devpts(cell, step));
	case MOUNT_MASK: return OR(STEP_MOUNT_MASK, mask(cell, step));
	case MOUNT_READONLY: return OR(STEP_MOUNT_MASK, read_only(cell, step));
	}
	errno = EINVAL;
	return STEP_PLAN;
#undef OR
}

static enum step perform_all(struct cell *cell, uint32_t from, uint32_t to) {
	const struct mount_step *steps = at(cell->plan, cell->plan->mounts.offset);
	for (cell->detail = from; cell->detail < to; cell->detail++) {
		enum step failed = perform(cell, &steps[cell->detail]);
		if (failed)
			return failed;
	}
	return STEP_NONE;
}

enum step root_build(struct cell *cell) {
	const struct plan *plan = cell->plan;
	struct option options[] = {{"size", "4m"}, {"nr_inodes", "65536"}, {"mode", "0755"}, {NULL, NULL}};
	struct mount_attr private = {.propagation = MS_PRIVATE}, locked = {.attr_set = MOUNT_ATTR_RDONLY};
	cell->scratch = cell->app = -1;
	if (sys_mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, &private) < 0)
		return STEP_MOUNT_PRIVATE;
	enum step failed = maps_prepare(cell);
	if (failed)
		return failed;
	if (root_is_shared(cell) && (cell->template = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC)) < 0)
		return STEP_SHARED_ROOT;
	cell->root = new_file_system("tmpfs", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	if (cell->root < 0 || sys_move_mount(cell->root, AT_FDCWD, "/", 0) < 0)
		return STEP_MOUNT_ROOT;
	failed = perform_all(cell, 0, root_is_shared(cell) ? plan->shared : plan->mounts.count);
	if (failed)
		return failed;
	return sys_mount_setattr(cell->root, "", AT_EMPTY_PATH, &locked) < 0 ? STEP_MOUNT_ROOT : STEP_NONE;
}

/* What is each cell's own, on the targets that the shared root has for it. */
enum step root_furnish(struct cell *cell) { return perform_all(cell, cell->plan->shared, cell->plan->mounts.count); }

/* The new root is stacked on the old; the old is then taken off from beneath, with everything on it. */
int root_pivot(const struct cell *cell) {
	if (fchdir(cell->root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0)
		return -1;
	return chdir("/");
}
