/* Plans in use, and the cells in stock for them. A plan is mapped and checked once; what its cells share of the root is mounted once;
 * and from its second request on some cells are made before they are asked for. A plan that nobody asks for keeps nothing. */
#include "launcher.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define IDLE_NS 10000000000u
#define SHORT_NS 2000000u /* a run of this length is not to share the processors with the making of a cell */

static void clear(struct shelf *shelf) {
	munmap((void *)shelf->plan, shelf->plan->size);
	if (shelf->template >= 0)
		close(shelf->template);
	shelf->plan = NULL;
}

/* A free one, or the one that was asked for least recently and has no cell. */
static struct shelf *place(struct launcher *launcher) {
	struct shelf *oldest = NULL;
	for (uint32_t i = 0; i < launcher->top_shelf; i++) {
		struct shelf *shelf = &launcher->shelves[i];
		if (!shelf->plan)
			return shelf;
		if (!shelf->cells && (!oldest || shelf->used_ns < oldest->used_ns))
			oldest = shelf;
	}
	if (launcher->top_shelf < MAX_SHELVES)
		return &launcher->shelves[launcher->top_shelf++];
	if (oldest)
		clear(oldest);
	return oldest;
}

struct shelf *shelf_find(struct launcher *launcher, const struct request *request, int plan) {
	struct shelf *shelf = NULL;
	for (uint32_t i = 0; i < launcher->top_shelf && !shelf; i++)
		if (launcher->shelves[i].plan && launcher->shelves[i].name == request->plan)
			shelf = &launcher->shelves[i];
	if (!shelf) {
		const struct plan *mapped = plan_map(plan);
		if (!mapped)
			return NULL;
		shelf = place(launcher);
		if (!shelf) {
			munmap((void *)mapped, mapped->size);
			errno = EAGAIN;
			return NULL;
		}
		*shelf = (struct shelf){.name = request->plan, .plan = mapped, .template = -1};
	}
	shelf->warm = shelf->plan->flags & PLAN_TEMPLATE ? 0 : request->template;
	shelf->requests++;
	shelf->spoiled = 0;
	shelf->used_ns = now_ns();
	/* What is mounted from the host for this run alone may be another file tomorrow: then nothing is made beforehand. */
	shelf->stock = shelf->plan->shared && shelf->requests > 1 ? request->stock : 0;
	launcher->hungry |= shelf->stock > 0;
	launcher->restock_ns = shelf->parked > 1 ? shelf->used_ns + SHORT_NS : shelf->used_ns;
	if (!launcher->expires_ns)
		launcher->expires_ns = shelf->used_ns + IDLE_NS;
	return shelf;
}

struct run *shelf_take(struct launcher *launcher, struct shelf *shelf) {
	struct run *oldest = NULL;
	for (uint32_t i = 0; i < launcher->top_run && shelf->parked; i++) {
		struct run *run = &launcher->runs[i];
		if (run->used && run->shelf == shelf && !run->ordered && !run->report.step &&
		    (!oldest || run->start_ns < oldest->start_ns))
			oldest = run;
	}
	if (oldest) {
		shelf->parked--;
		launcher->parked--;
	}
	return oldest;
}

/* The one that was taken is no good: it is counted here until its end. */
void shelf_return(struct launcher *launcher, struct shelf *shelf) {
	shelf->parked++;
	launcher->parked++;
}

static int wants(const struct launcher *launcher, const struct shelf *shelf) {
	return shelf->plan && !shelf->spoiled && shelf->parked < shelf->stock && launcher->parked < MAX_PARKED;
}

/* 0: there is a cell to make, or an end. */
int shelves_wait_ms(const struct launcher *launcher) {
	uint64_t next = launcher->hungry ? launcher->restock_ns : launcher->expires_ns;
	if (!next)
		return launcher->hungry ? 0 : -1;
	uint64_t now = now_ns();
	return now >= next ? 0 : (int)((next - now) / 1000000u + 1);
}

static void drop(struct launcher *launcher, struct shelf *shelf) {
	for (uint32_t i = 0; i < launcher->top_run && shelf->parked; i++) {
		struct run *run = &launcher->runs[i];
		if (run->used && run->shelf == shelf && !run->ordered)
			run_spoil(run, STEP_LOST, 0);
	}
	shelf->stock = 0;
	if (!shelf->cells)
		clear(shelf);
}

static void restock(struct launcher *launcher, struct shelf *shelf) {
	struct run *run = cell_slot(launcher, shelf);
	shelf->spoiled = 1; /* until it is made */
	if (!run)
		return;
	shelf->parked++;
	launcher->parked++;
	if (cell_make(launcher, run) == STEP_NONE)
		shelf->spoiled = 0;
	else
		cell_release(launcher, run);
}

static void expire(struct launcher *launcher, uint64_t now) {
	launcher->expires_ns = 0;
	for (uint32_t i = 0; i < launcher->top_shelf; i++) {
		struct shelf *shelf = &launcher->shelves[i];
		if (shelf->plan && now - shelf->used_ns >= IDLE_NS)
			drop(launcher, shelf);
		if (!shelf->plan)
			continue;
		uint64_t next = (now - shelf->used_ns < IDLE_NS ? shelf->used_ns : now) + IDLE_NS;
		if (!launcher->expires_ns || next < launcher->expires_ns)
			launcher->expires_ns = next;
	}
}

/* Nothing was to be done meanwhile: one cell more, or an end to what nobody asks for. */
void shelves_tend(struct launcher *launcher) {
	uint64_t now = now_ns();
	if (launcher->expires_ns && now >= launcher->expires_ns)
		expire(launcher, now);
	if (launcher->hungry && now < launcher->restock_ns)
		return;
	for (uint32_t i = 0; launcher->hungry && i < launcher->top_shelf; i++)
		if (wants(launcher, &launcher->shelves[i]))
			return restock(launcher, &launcher->shelves[i]);
	launcher->hungry = 0;
}
