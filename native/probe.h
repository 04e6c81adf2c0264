/* Questions to the kernel that Python cannot ask by itself. Plain declarations, read by cffi as they stand. */

/* System calls that a jail uses, each asked with arguments that it must refuse: the errno tells whether it is there. */
enum probe_call {
	PROBE_CLONE3,
	PROBE_CLOSE_RANGE,
	PROBE_PIDFD_OPEN,
	PROBE_OPEN_TREE,
	PROBE_FSOPEN,
	PROBE_MOUNT_SETATTR,
	PROBE_CALLS,
};
enum { PROBE_KILLED = 1000 }; /* in the place of an errno: a filter answered by killing who asked; it was a child of ours */
int probe_call(int call); /* its errno: ENOSYS when it is missing, EPERM when a filter or a missing right refuses it */

int probe_landlock_abi(void);    /* 0: no Landlock; negative: the errno of a filter, or PROBE_KILLED */
int probe_landlock_errata(void); /* bits of the fixes in this kernel; 0 where it does not say */
int probe_notify(void);          /* bytes of a seccomp user notification, or -errno */

/* What a system call filter can answer. */
enum probe_action {
	PROBE_KILL_PROCESS,
	PROBE_KILL_THREAD,
	PROBE_TRAP,
	PROBE_ERRNO,
	PROBE_USER_NOTIF,
	PROBE_TRACE,
	PROBE_LOG,
	PROBE_ALLOW,
	PROBE_ACTIONS,
};
int probe_actions(void); /* a bit for each that is there */

long long probe_swap(void); /* bytes that are switched on, also where /proc/meminfo is hidden; -errno where a filter refuses */

/* Both do it for real, in a child of their own that leaves nothing behind. 0, or the errno of the refusal. */
int probe_userns(int namespaces); /* a user namespace, then, with its rights, more namespaces (CLONE_NEW*) */
int probe_proc(int pids_only);    /* a fresh /proc in new user and PID namespaces; pids_only: with subset=pid */
