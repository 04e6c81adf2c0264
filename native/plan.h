/* READ FIRST. The blocks of bytes that cross between Python and C, and nothing else.
 *
 * Plan     a policy compiled for this host. Written by plan.py, read here, never changed. In a sealed memfd.
 * Order    one run: program, arguments, environment, small files. Behind its request, or, when it is large, in a sealed memfd.
 * Hello    who the launcher works for and what it may use: the first message on its socket.
 * Request  start this order under that plan.
 * Report   what happened: launcher to caller, on the channel of that run.
 * Command  kill or signal: caller to launcher, on the same channel. Its end of file is the order to kill.
 * Saved    a plan in a file, with what its caller must know: for the launcher alone (alone.c). Written by saved.py.
 *
 * Inside a block a reference is an offset from its start; 0 means absent. Strings end in NUL. plan.c checks every one of them
 * before anything else looks. cffi parses this file as it stands (lines that begin with # left out), so a field that differs is
 * an error when the module is built, and not a surprise at run time. */
#ifndef NSJAIL_PLAN_H
#define NSJAIL_PLAN_H
#include <stdint.h>

enum block {
	PLAN_MAGIC = 0x4e414c50,  /* "PLAN" */
	ORDER_MAGIC = 0x4452524f, /* "ORRD" */
	REQUEST_MAGIC = 0x55514552, /* "REQU" */
	HELLO_MAGIC = 0x4c4c4548,   /* "HELL" */
	SAVED_MAGIC = 0x45564153,   /* "SAVE" */
	FORMAT_VERSION = 2,
	MAX_BLOCK = 67108864,
	MAX_INLINE = 65536,   /* an order of up to so many bytes travels with its request */
	MAX_FDS = 64,         /* descriptors that one run may be given, the three standard ones included */
	MAX_FD_NUMBER = 1000, /* a cell's own descriptors live above */
	MAX_LATE = 24,
	SAVED_SLOT = 4096,    /* bytes that a saved plan keeps free for the path of any program */
	TEMPLATE_FD = 999, /* where a template has its socket to the launcher */
	MAX_DENIED = 48,   /* distinct system calls that one report names */
};

/* Everything that can fail while a cell is made, in the order in which it happens. advice.py has a row for each. */
enum step {
	STEP_NONE,
	STEP_REQUEST,
	STEP_PLAN,
	STEP_UID_POOL,
	STEP_CGROUP,
	STEP_CLONE,
	STEP_SESSION,
	STEP_KEYRING,
	STEP_PERSONALITY,
	STEP_PRIORITY,
	STEP_USER_NAMESPACE,
	STEP_ID_MAP,
	STEP_NAMESPACES,
	STEP_SHARED_ROOT,
	STEP_MOUNT_PRIVATE,
	STEP_MOUNT_ROOT,
	STEP_MOUNT_TARGET,
	STEP_MOUNT_SOURCE,
	STEP_MOUNT_BIND,
	STEP_MOUNT_IDMAP,
	STEP_MOUNT_SCRATCH,
	STEP_MOUNT_PROC,
	STEP_MOUNT_DEVPTS,
	STEP_MOUNT_MASK,
	STEP_PIVOT_ROOT,
	STEP_HOSTNAME,
	STEP_LOOPBACK,
	STEP_NESTED_USERNS,
	STEP_TIME_NAMESPACE,
	STEP_PROGRAM_PROCESS,
	STEP_CGROUP_JOIN,
	STEP_CGROUP_NAMESPACE,
	STEP_SECUREBITS,
	STEP_GROUPS,
	STEP_IDENTITY,
	STEP_CAPABILITIES,
	STEP_NO_NEW_PRIVS,
	STEP_ORDER,
	STEP_APP_FILES,
	STEP_DESCRIPTORS,
	STEP_WORK_DIRECTORY,
	STEP_LABEL,
	STEP_RESOURCE_LIMITS,
	STEP_LANDLOCK,
	STEP_SECCOMP,
	STEP_EXEC,
	STEP_TEMPLATE,
	STEP_REAPER,
	STEP_SETUP_TIME,
	STEP_LOST,
};

struct span {
	uint32_t offset; /* of the first element */
	uint32_t count;
};

enum mount_kind {
	MOUNT_DIRECTORY, /* make target with mode */
	MOUNT_FILE,      /* make target, empty: something will be mounted on it */
	MOUNT_SYMLINK,   /* make target pointing to source */
	MOUNT_BIND,      /* host's source, with all below it, on target */
	MOUNT_SCRATCH,   /* the writable tmpfs, of size bytes and inodes files, parked on target until its parts are placed */
	MOUNT_PART,      /* directory source of the scratch on target */
	MOUNT_PROC,
	MOUNT_DEVPTS,
	MOUNT_MASK,     /* hide target, file or directory, if there is one */
	MOUNT_READONLY, /* what is at target already, again, read-only */
};

enum mount_flag {
	MOUNT_WRITABLE = 1,
	MOUNT_NOEXEC = 2,
	MOUNT_DEVICES = 4,     /* leave device nodes usable: our own /dev only */
	MOUNT_OWNED = 8,       /* belongs to the jail's user */
	MOUNT_IDMAP = 16,      /* the source's owner appears as the jail's user */
	MOUNT_PIDS_ONLY = 32,  /* proc without anything but processes */
	MOUNT_APP = 64,        /* part into which the order's files are written */
};

struct mount_step {
	uint32_t kind;
	uint32_t flags;
	uint32_t source; /* string */
	uint32_t target; /* string */
	uint32_t mode;
	uint32_t reserved;
	uint64_t size;
	uint64_t inodes;
};

struct path_rule { /* Landlock: what is allowed beneath path */
	uint64_t access;
	uint32_t path;
	uint32_t optional; /* may be absent inside */
};

struct resource_limit {
	uint64_t value; /* soft and hard */
	uint32_t resource;
	uint32_t reserved;
};

struct cgroup_write {
	uint32_t group; /* enum control_group */
	uint32_t file;  /* string */
	uint32_t value; /* string */
	uint32_t reserved;
};

enum plan_flag {
	PLAN_LOOPBACK = 1,
	PLAN_KILL_DENIED = 2,     /* the first denied system call ends the run */
	PLAN_LANDLOCK = 4,
	PLAN_FILTER = 8,
	PLAN_NESTED = 16,          /* user namespaces may be made inside */
	PLAN_NESTED_OPTIONAL = 32, /* they may not, but go on where the kernel will not have it so */
	PLAN_CGROUP = 64,
	PLAN_TEMPLATE = 128, /* keeps its rights in its own user namespace, and makes jobs (job.c) */
	PLAN_OBSERVED = 256, /* the caller answers for the filter (observe.c): no policy can ask for it, only observe.py does */
};

struct plan {
	uint32_t magic, version, size, flags;
	uint64_t namespaces; /* CLONE_NEW*; user, mount and pid always among them */
	uint64_t wall_ns, cpu_ns, idle_ns; /* 0: no limit */
	uint64_t memory;                   /* bytes, watched where no control group holds them; 0: no limit */
	uint64_t max_denied;               /* so many denied system calls end the run */
	uint32_t uid, gid;                 /* inside */
	uint32_t unknown_from;             /* system calls from this number on are new to us: ENOSYS, and not EPERM */
	uint32_t shared;                   /* so many of the mounts, from the first on, are the same in every cell, now and later */
	uint32_t hostname, directory;      /* strings */
	uint32_t label, label_file, label_shown, reserved; /* strings: label.c; label 0: none is asked for */
	uint64_t landlock_fs, landlock_net, landlock_scope;
	struct span mounts;  /* struct mount_step */
	struct span paths;   /* struct path_rule */
	struct span limits;  /* struct resource_limit */
	struct span cgroup;  /* struct cgroup_write */
	struct span filter;  /* struct sock_filter: 8 bytes each */
	struct span late;    /* uint32_t: system calls that the filter denies, and the cell still makes between filter and exec */
};

struct order_file {
	uint32_t name; /* string: one component, beneath /app */
	uint32_t mode;
	uint32_t offset, size;
};

struct order {
	uint32_t magic, version, size, flags;
	uint32_t program;       /* string: path inside */
	uint32_t reserved;
	struct span argv;        /* uint64_t: strings, and a 0 behind the last: the cell turns them into pointers in place */
	struct span environment; /* the same, NAME=value */
	struct span files;       /* struct order_file */
	struct span descriptors; /* uint32_t: the number inside of each descriptor sent along */
};

enum control_group { GROUP_MEMORY, GROUP_PIDS, GROUP_CPU, GROUP_QUOTA, GROUP_CPUSET, GROUP_UNIFIED, GROUPS };
enum cgroup_kind { CGROUP_NONE, CGROUP_V1, CGROUP_V2 };

struct hello { /* with one directory descriptor for each bit of groups, in order of enum control_group */
	uint32_t magic, version;
	uint32_t cgroup_kind;
	uint32_t groups;
	uint32_t uid_base, uid_count; /* host ids for cells; 0: the launcher's own */
	uint32_t caller;              /* its pid; the launcher ends with it */
	uint32_t reserved;
};

struct saved_file { /* what a plan was made from, as it was; both -1: it was not there */
	int64_t size, mtime_ns;
	uint32_t path; /* string */
	uint32_t reserved;
};

struct saved_group {
	uint32_t group;           /* enum control_group */
	uint32_t controller;      /* string: version 1, where our own group is looked for; 0: version 2 */
	uint32_t mount, root;     /* strings: where the hierarchy is mounted, and from which of its directories on */
};

struct saved {
	uint32_t magic, version, size;
	uint32_t uid;              /* who may use it */
	uint64_t checksum;         /* of all that stands behind it */
	uint64_t output;           /* bytes that both outputs may have together; 0: no limit */
	uint32_t release;          /* string: the kernel's */
	uint32_t tree;             /* string: the cached root; 0: there is none */
	uint32_t program, inside;  /* strings: the program on the host (0: any) and in the jail */
	uint32_t slot;             /* offset within the plan of 4096 bytes for the path of any program */
	uint32_t search;           /* string: where programs are looked for, as in PATH */
	uint32_t cgroup_kind;
	uint32_t controllers;      /* string: version 2, what the groups hand on; 0: none */
	uint32_t locks;            /* string: the directory of the blocks' locks; 0: no ids but our own */
	uint32_t uid_base, uid_block, uid_blocks;
	struct span plan;          /* bytes */
	struct span sources;       /* struct saved_file */
	struct span groups;        /* struct saved_group */
	struct span visible;       /* uint64_t: directories whose programs have the same path inside */
	struct span environment;   /* the same, NAME=value */
	struct span passed;        /* the same, names of the caller's own variables */
	struct span steps;         /* the same, names of enum step */
};

struct request { /* with channel, plan, the program's descriptors, and the order if it is large */
	uint32_t magic;
	uint32_t inlined; /* bytes of the order behind this; 0: it has a descriptor */
	uint64_t plan;    /* the caller's name for the plan: one plan, one name */
	uint32_t stock;   /* so many cells are to wait for further orders under this plan */
	uint32_t template; /* the name of the template that is started, or that is to fork the job; 0: none */
};

enum cause { /* why the launcher ended a run */
             CAUSE_NONE,
             CAUSE_WALL,
             CAUSE_CPU,
             CAUSE_IDLE,
             CAUSE_SYSCALL,
             CAUSE_CALLER,
             CAUSE_OUTPUT,
             CAUSE_MEMORY,
};

struct command {
	uint32_t signal; /* 0: kill everything, for cause; or, without one, tell when the program runs: its process, and all counts */
	uint32_t cause;
};

enum report_kind { REPORT_STARTED = 1, REPORT_ENDED, REPORT_FAILED, REPORT_OBSERVED };
enum source { SOURCE_NONE, SOURCE_RUSAGE, SOURCE_CGROUP1, SOURCE_CGROUP2 };
enum report_flag { REPORT_DISK_FULL = 1, REPORT_NO_NESTED = 2, REPORT_BEGAN = 4 /* the program may have run */ };

struct denied {
	uint32_t nr;
	uint32_t arch;
	uint64_t count;
	uint64_t args[6]; /* of the first one */
};

struct report {
	uint32_t kind;
	uint32_t flags;
	uint32_t step, error; /* REPORT_FAILED */
	uint32_t detail; /* which element of the plan the step was at */
	uint32_t pid; /* of the program, as the host sees it */
	int32_t exit_code, signal; /* of the program; -1: not so */
	uint32_t cause; /* enum cause */
	uint32_t cpu_source, memory_source;
	uint32_t denied_count;
	uint64_t observed; /* what the clock of cause showed: nanoseconds, or bytes */
	uint64_t wall_ns, cpu_ns, user_ns, system_ns;
	uint64_t peak_memory, peak_processes, oom_kills, process_denials;
	uint64_t outer_oom_kills, outer_process_denials; /* not for the policy's limit: for one around the jail, or the host's own */
	uint64_t setup_ns; /* from request to exec */
	uint64_t request_ns, end_ns, answer_ns; /* when: it came, the program ended, this was sent. CLOCK_MONOTONIC */
	uint64_t denied_more; /* calls that had no place in the table */
	struct denied denied[48];
};
#endif
