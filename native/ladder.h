/* The rungs of the ladder, one kernel facility per file. Each returns 0, or -1 with errno; none of them allocates. */
#ifndef NSJAIL_LADDER_H
#define NSJAIL_LADDER_H
#include "blocks.h"

#include <signal.h>
#include <sys/types.h>

/* The sixth argument of a job's own exit_group: the launcher is asked before the kernel takes its memory apart (denials.c). */
#define LAST_CALL 0x6c61737463616c6cUL

enum {
	MAX_MAPS = 16,     /* id-mapped mounts in one cell */
	MAX_LIBRARIES = 8  /* files that stay open in a job */
};

/* What a program's process notes before its exec, in memory that it shares with the launcher. */
struct stamp {
	uint64_t exec_ns; /* when; CLOCK_MONOTONIC */
	uint64_t cpu_ns;  /* of what is counted as the run's, so much was set-up */
};

/* What a cell knows of itself. Its processes are copies of the launcher, so this is set before the clone and passed along. */
struct cell {
	const struct plan *plan;
	int launcher;           /* init's socket to the launcher */
	int orders;             /* the program's: its order comes here, and its end of file says that the program runs */
	int template;           /* mount namespace with the shared part of the root; -1: there is none yet */
	int children;           /* init's signalfd for SIGCHLD */
	int gate[2];            /* pipe: a byte from init says that it is nobody, too */
	int groups[GROUPS];     /* v1: each group's `tasks`; v2: the group's directory; -1: none */
	uint32_t cgroup_kind;
	uint32_t uid, gid;      /* on the host */
	int rootless;
	int failures;           /* where a failed step is told: launcher in init, orders in the program */
	int root;               /* the new root */
	int scratch, app;       /* the writable tmpfs, and its part for the order's files */
	int maps[MAX_MAPS];     /* user namespaces for the id-mapped mounts, in their order */
	int next_map;
	int proc;               /* the host's /proc, until the descriptors are cleared */
	int ruleset;            /* Landlock's, ready to be applied */
	int libraries[MAX_LIBRARIES], library_count; /* of a job: what libraries of its template hold open of themselves */
	uint64_t secret;        /* what tells our own late system calls from the program's */
	struct stamp *stamp;    /* NULL in a job */
	uint64_t joined_ns;     /* what the program's process had used before its group began to count; 0: born in it, or in none */
	uint32_t flags;         /* enum report_flag */
	uint32_t detail;        /* element of the plan in hand, for the message */
};

/* What travels from a cell to the launcher. */
enum cell_message_kind {
	CELL_NEED_MAP = 1,
	CELL_SHARED,
	CELL_READY,
	CELL_FAILED,
	CELL_ENDED,
	CELL_SERVING,
	CELL_BORN,
	CELL_NEED_GROUPS
};
struct cell_message {
	uint32_t kind, flags;
	uint32_t step, error, detail;
	int32_t exit_code, signal;
	uint32_t reserved;
	uint64_t time_ns, user_ns, system_ns, peak_memory;
};

/* What travels from the launcher to a cell. */
enum cell_order_kind { CELL_MAPPED = 1, CELL_RUN, CELL_SIGNAL, CELL_JOB, CELL_GROUPS };
struct cell_order {
	uint32_t kind, value;
};

/* put.c */
int put(int directory, const char *path, const char *text);
int put_map(pid_t pid, const char *file, uint32_t from, uint32_t to);

/* session.c */
int session_new(void);
int keyring_new(void);
int keyring_none(void);
int personality_new(void);

/* priority.c */
int priority_give_up(const struct cell *cell);

/* user.c */
int user_namespace_enter(struct cell *cell);
int counts_limit(struct cell *cell);
int securebits_lock(void);
int groups_clear(const struct cell *cell);
int identity_take(const struct plan *plan);
int bounding_set_empty(void);
int capabilities_drop(void);
int no_new_privs(void);
int rights_keep(const struct plan *plan);

/* beneath.c */
int open_beneath(int root, const char *path, int flags);

/* mounts.c. These return STEP_NONE, or the step that failed, with errno. */
enum step root_build(struct cell *cell);
enum step root_furnish(struct cell *cell);
int root_pivot(const struct cell *cell);

/* shared.c */
int root_is_shared(const struct cell *cell);
int root_share(struct cell *cell);
int root_join(struct cell *cell);

/* network.c */
int loopback_up(void);

/* descriptors.c */
ssize_t message_receive(const struct cell *cell, int socket, void *message, size_t size, int flags, int *descriptors, int *count);
int message_send(const struct cell *cell, int socket, const void *message, size_t size, const int *descriptors, int count);
int launcher_ask(int socket, enum cell_message_kind what, enum cell_order_kind done, int *descriptors, int *count);
int descriptors_place(const struct cell *cell, const struct order *order, const int *descriptors);
int descriptors_keep(int *kept, int count);
int descriptors_keep_also(const struct cell *cell, const int three[3]);
int descriptor_high(int descriptor);

/* blocks.c */
void *block_map(const struct cell *cell, int descriptor, int protection, size_t *size);
const struct plan *plan_map(int descriptor);

/* order.c */
int order_take(const struct cell *cell, struct order **order, int *descriptors);
char **order_pointers(struct order *order, struct span span);
int app_write(const struct cell *cell, const struct order *order);

/* label.c */
int label_ask(const struct cell *cell);

/* limits.c */
int limits_apply(const struct cell *cell);
void limit_most(int resource);

/* landlock.c */
int landlock_prepare(struct cell *cell);
int landlock_apply(const struct cell *cell);

/* filter.c */
int filter_install(struct cell *cell, int *listener);
long late(const struct cell *cell, long call, long a, long b, long c, long d, long e);

/* snapshot.c */
int memory_snapshot(void);

/* job.c */
_Noreturn void job_init(struct cell *cell, int reaper, void (*program)(void));
void job_program(struct cell *cell, int *listener);

/* inside.c, reaper.c */
void step(const struct cell *cell, enum step step, int result);
void become_nobody(const struct cell *cell);
int init_is_ready(const struct cell *cell);
int descriptors_clear(struct cell *cell);
int ready(const struct cell *cell, int *listener);
int unshared(const struct cell *cell, uint64_t others);
_Noreturn void reaper_main(char **arguments);
_Noreturn void cell_main(struct cell *cell);
_Noreturn void program_main(struct cell *cell);
_Noreturn void reap(struct cell *cell, pid_t program);
_Noreturn void fail(const struct cell *cell, enum step step, int error);
uint64_t now_ns(void);
#endif
