/* The launcher's side: one struct run per cell, one struct shelf per plan, one event loop. */
#ifndef NSJAIL_LAUNCHER_H
#define NSJAIL_LAUNCHER_H
#include "ladder.h"

enum { MAX_RUNS = 1024, MAX_SHELVES = 2 * MAX_RUNS, MAX_PARKED = 256 };

/* What an event is about: which descriptor of which run. A slot's generation tells late events of its last owner apart. */
enum event { EVENT_CONTROL, EVENT_CALLER, EVENT_CHANNEL, EVENT_CELL, EVENT_PROGRAM, EVENT_INIT, EVENT_LISTENER, EVENT_TIMER };

/* What the kernel counts for a control group, each in a file of its own. */
enum counter {
	COUNTER_CPU,
	COUNTER_USER,
	COUNTER_SYSTEM,
	COUNTER_MEMORY,
	COUNTER_OOM,
	COUNTER_PROCESSES,
	COUNTER_FORKS, /* those that were refused */
	COUNTERS
};

/* A plan in use, and what is kept for its next run. */
struct shelf {
	uint64_t name;
	const struct plan *plan; /* NULL: the shelf is free */
	int template;            /* mount namespace with the part of the root that all its cells share; -1: not yet */
	uint32_t stock;          /* so many cells are to be parked */
	uint32_t requests;
	uint32_t cells, parked;  /* alive; and of those, without an order */
	uint32_t warm;           /* the template that forks its cells; 0: they are cloned */
	int spoiled;             /* a parked cell ended by itself: no more until the next request */
	uint64_t used_ns;        /* the last request */
};

/* A cell, and from its order on the run in it. */
struct run {
	int used, ordered, ready;
	uint32_t index, generation;
	struct shelf *shelf;
	const struct plan *plan;
	int channel;  /* to the caller */
	int cell;     /* to init */
	int program;  /* to the program, until it runs */
	int init;     /* pidfd of the cell's process 1 */
	int listener; /* denied system calls */
	int timer;
	pid_t pid;                /* of init, on the host */
	int groups[GROUPS];       /* the cell's own directories */
	int counters[COUNTERS];
	int has_groups;
	uint64_t start_ns, exec_ns, end_ns;
	uint64_t early_signals;   /* to be sent when the program runs: bit 0 for number 1 */
	uint64_t cpu_base;        /* what is not the program's of what is counted */
	uint64_t cpu_seen, cpu_seen_ns; /* for the idle clock */
	uint64_t memory_due_ns;   /* when it is to be looked at again */
	int execed, ended;
	uint32_t template;        /* its name, if this is one */
	int doomed;               /* to be killed as soon as it is born */
	struct held *held;        /* a job's order, until it can be taken */
	int stamped;              /* it came as far as exec */
	int asked;                /* the caller wants to know the program's pid */
	struct report report;
};

/* An order that waits for its cell. */
struct held {
	struct request request;
	char order[MAX_INLINE];
	int descriptors[MAX_FDS + 1], count;
};

struct launcher {
	int epoll, caller;
	int proc; /* the host's */
	struct hello hello;
	int groups[GROUPS];
	uint32_t sequence; /* names the next cell's groups */
	int undead;        /* groups that could not be removed yet */
	int sweep_ms;      /* until it is tried once more */
	int cpus;
	uint32_t parked;
	int hungry;          /* some shelf may want a cell */
	uint64_t restock_ns; /* it gets it from then on; at once where it has none */
	uint64_t expires_ns; /* when a shelf may have been idle for too long; 0: there is none */
	struct stamp *stamps; /* one per run */
	uint32_t top_run, top_shelf; /* the first that were never used */
	struct run runs[MAX_RUNS];
	struct shelf shelves[MAX_SHELVES];
};

/* shelf.c */
struct shelf *shelf_find(struct launcher *launcher, const struct request *request, int plan);
struct run *shelf_take(struct launcher *launcher, struct shelf *shelf);
void shelf_return(struct launcher *launcher, struct shelf *shelf);
int shelves_wait_ms(const struct launcher *launcher);
void shelves_tend(struct launcher *launcher);

/* cell.c */
struct run *cell_slot(struct launcher *launcher, struct shelf *shelf);
enum step cell_make(struct launcher *launcher, struct run *run);
void cell_heard(struct launcher *launcher, struct run *run);    /* a message from init */
void cell_drain(struct launcher *launcher, struct run *run);    /* what init has said so far */
void program_heard(struct launcher *launcher, struct run *run); /* a message from the program, or its exec */
void cell_finish(struct launcher *launcher, struct run *run);   /* init is dead */
int cell_is_job(const struct run *run);
void cell_left(struct launcher *launcher, struct run *run);
void cell_release(struct launcher *launcher, struct run *run);

/* run.c */
void run_refuse(int channel, enum step step, int error);
void run_start(struct launcher *launcher, const struct request *request, int *descriptors, int count);
void run_kill(struct run *run, enum cause cause);
void run_spoil(struct run *run, enum step step, int error);
void run_command(struct launcher *launcher, struct run *run); /* a message from the caller */
void run_held_send(struct launcher *launcher, struct run *run);
void run_held_drop(struct run *run);
uint32_t run_program_pid(const struct run *run);
void run_started(struct launcher *launcher, struct run *run);
void run_execed(struct launcher *launcher, struct run *run);
void run_count(struct launcher *launcher, struct run *run);
void run_answer(struct launcher *launcher, struct run *run);

/* cgroup.c */
int cgroup_make(struct launcher *launcher, struct run *run);
int cgroup_open(const struct launcher *launcher, const struct run *run, int *descriptors);
void cgroup_remove(struct launcher *launcher, struct run *run);
void cgroup_sweep(struct launcher *launcher); /* the undead, once more */
int cgroup_cpu(const struct launcher *launcher, const struct run *run, uint64_t *used);
int cgroup_only_one(const struct launcher *launcher, const struct run *run);
void cgroup_report(const struct launcher *launcher, struct run *run);

/* clocks.c */
uint64_t cpu_since(const struct run *run, uint64_t counted);
int run_cpu(const struct launcher *launcher, const struct run *run, uint64_t *used);
void clocks_job(struct launcher *launcher, struct run *run);
void clocks_start(struct launcher *launcher, struct run *run);
void clocks_check(struct launcher *launcher, struct run *run);
void clocks_final(struct run *run);

/* tree.c */
int tree_cpu(pid_t init, uint64_t *sum);
int tree_memory(pid_t init, uint64_t limit, uint64_t *sum);

/* labelled.c */
int label_missing(const struct run *run);

/* denials.c */
void denials_answer(struct launcher *launcher, struct run *run);

/* observe.c */
int observe(struct run *run);

/* launcher.c */
int watch(struct launcher *launcher, int descriptor, enum event event, const struct run *run);
void unwatch(struct launcher *launcher, int *descriptor);
#endif
