/* System calls that libc has no function for, as the kernel's documents define them. */
#ifndef NSJAIL_KERNEL_H
#define NSJAIL_KERNEL_H
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

static inline int sys_fsopen(const char *type) { return (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC); }
static inline int sys_fsconfig(int fd, unsigned command, const char *key, const char *value) {
	return (int)syscall(SYS_fsconfig, fd, command, key, value, 0);
}
static inline int sys_fsmount(int fd, unsigned attributes) { return (int)syscall(SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes); }
static inline int sys_open_tree(int at, const char *path, unsigned flags) {
	return (int)syscall(SYS_open_tree, at, path, flags | OPEN_TREE_CLOEXEC);
}
static inline int sys_move_mount(int from, int to_at, const char *to, unsigned flags) {
	return (int)syscall(SYS_move_mount, from, "", to_at, to, flags | MOVE_MOUNT_F_EMPTY_PATH);
}
static inline int sys_mount_setattr(int at, const char *path, unsigned flags, struct mount_attr *attributes) {
	return (int)syscall(SYS_mount_setattr, at, path, flags, attributes, sizeof *attributes);
}
static inline int sys_openat2(int at, const char *path, struct open_how *how) {
	return (int)syscall(SYS_openat2, at, path, how, sizeof *how);
}
static inline int sys_pidfd_open(pid_t pid) { return (int)syscall(SYS_pidfd_open, pid, 0); }
static inline int sys_pidfd_send_signal(int pidfd, int signal) {
	return (int)syscall(SYS_pidfd_send_signal, pidfd, signal, 0, 0);
}
static inline int sys_signal_default(int number) {
	const unsigned long kernel_sigaction[4] = {0}; /* SIG_DFL, no flags, and a mask of 64 bits at the end */
	return (int)syscall(SYS_rt_sigaction, number, kernel_sigaction, NULL, sizeof(uint64_t));
}
static inline pid_t sys_clone3(struct clone_args *args) { return (pid_t)syscall(SYS_clone3, args, sizeof *args); }

/* For ways out on which errno says what failed. Returns -1. */
static inline int keep_errno_close(int fd) {
	int error = errno;
	if (fd >= 0)
		close(fd);
	errno = error;
	return -1;
}
#endif
