/* The launcher's side: one struct run per cell, one event loop. */
#ifndef NSJAIL_LAUNCHER_H
#define NSJAIL_LAUNCHER_H
#include "ladder.h"

enum { MAX_RUNS = 1024 };

/* What an event is about: which descriptor of which run. A slot's generation tells late events of its last owner apart. */
enum event { EVENT_CONTROL, EVENT_CALLER, EVENT_CHANNEL, EVENT_CELL, EVENT_INIT, EVENT_LISTENER, EVENT_TIMER };

struct run {
	int used;
	uint32_t index, generation;
	const struct plan *plan;
	uint32_t request_flags;
	int channel;  /* to the caller */
	int cell;     /* to the cell */
	int init;     /* pidfd of the cell's process 1 */
	int listener; /* denied system calls */
	int timer;
	pid_t pid;                /* of init, on the host */
	int held[MAX_FDS + 1];    /* the order and the program's descriptors, until the cell can take them */
	int held_count;
	int groups[GROUPS];       /* the cell's own directories */
	int has_groups;
	uint64_t start_ns, exec_ns;
	uint64_t cpu_base;        /* what making the cell had used */
	uint64_t cpu_seen, cpu_seen_ns; /* for the idle clock */
	int execed, exec_passed, ended;
	struct report report;
};

struct launcher {
	int epoll, control, caller;
	struct hello hello;
	int groups[GROUPS];
	uint32_t sequence; /* names the next cell's groups */
	int undead;        /* groups that could not be removed yet */
	int cpus;
	struct run runs[MAX_RUNS];
};

/* cell.c */
void run_start(struct launcher *launcher, const struct request *request, int *descriptors, int count);
void run_kill(struct run *run, enum cause cause);
void run_heard(struct launcher *launcher, struct run *run);   /* a message from the cell */
void run_command(struct launcher *launcher, struct run *run); /* a message from the caller */
void run_finish(struct launcher *launcher, struct run *run);  /* init is dead */

/* cgroup.c */
int cgroup_make(struct launcher *launcher, struct run *run);
int cgroup_open(const struct launcher *launcher, const struct run *run, int *descriptors);
void cgroup_remove(struct launcher *launcher, struct run *run);
void cgroup_sweep(struct launcher *launcher); /* the undead, once more */
uint64_t cgroup_cpu(const struct launcher *launcher, const struct run *run);
void cgroup_report(const struct launcher *launcher, struct run *run);

/* clocks.c */
uint64_t run_cpu(const struct launcher *launcher, const struct run *run);
void clocks_start(struct launcher *launcher, struct run *run);
void clocks_check(struct launcher *launcher, struct run *run);
void clocks_final(struct run *run);

/* denials.c */
void denials_answer(struct run *run);

/* launcher.c */
int watch(struct launcher *launcher, int descriptor, enum event event, const struct run *run);
void unwatch(struct launcher *launcher, int *descriptor);
#endif
