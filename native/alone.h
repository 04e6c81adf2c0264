/* The launcher alone: the process that is the caller of one run. Its files share this and nothing of the launcher's. */
#ifndef NSJAIL_ALONE_H
#define NSJAIL_ALONE_H
#include "ladder.h"

enum { PIPES = 3 }; /* the standard streams */
enum status { STATUS_LIMIT = 124, STATUS_SETUP = 125, STATUS_CANNOT_EXECUTE = 126, STATUS_NOT_FOUND = 127 };

/* What a caller owns while its launcher runs. */
struct claim {
	const struct saved *saved;
	int lock; /* of the block of host ids */
	uint32_t uid_base;
	int groups[GROUPS]; /* in the order of the saved groups */
	char paths[GROUPS][4096];
};

/* The streams of one run: ours, and our ends of its pipes. -1: closed. */
struct relay {
	int channel, signals;
	int pipes[PIPES];
	uint64_t limit, count;
	int exceeded;
	int stopped; /* by this signal, while nobody took its output */
	int refused[PIPES]; /* the errno of why the caller's output took no more */
	size_t from, to; /* of what was read ahead for the program */
	char ahead[65536];
	struct report report;
};

/* alone.c */
void alone(int count, char **arguments); /* returns in the child only */
_Noreturn void give_up(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
void demand(int result, const char *what);

/* command.c */
struct order *order_make(struct saved *saved, char **arguments); /* for a plan of any program, the plan learns which */

/* saved.c */
struct saved *saved_open(const char *path);

/* claim.c */
void claim_make(struct claim *claim);
void claim_release(const struct claim *claim);

/* relay.c */
int signals_take(void);
void relay_run(struct relay *relay);
#endif
