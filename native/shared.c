/* The part of the root that all cells of a plan share. It is mounted by the first cell and kept by the launcher as a mount namespace;
 * every cell has a copy of it, in a namespace of its own. It is read-only, and nothing in it belongs to any cell.
 * setns(2), mount_namespaces(7)
 *
 * An ordinary user's cells do not share: the right to mount comes with a user namespace, and each cell has one of its own. */
#include "kernel.h"
#include "ladder.h"

#include <sched.h>

int root_is_shared(const struct cell *cell) { return !cell->rootless && cell->plan->shared > 0; }

/* From here on the namespace belongs to those who come later, and we go on in a copy. */
static int copy(struct cell *cell) {
	if (unshare(CLONE_NEWNS) < 0)
		return -1;
	cell->root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	return cell->root < 0 ? -1 : 0;
}

int root_share(struct cell *cell) {
	struct cell_message message = {.kind = CELL_SHARED};
	if (message_send(NULL, cell->launcher, &message, sizeof message, &cell->template, 1) < 0)
		return -1;
	close(cell->template);
	close(cell->root);
	return copy(cell);
}

int root_join(struct cell *cell) {
	cell->scratch = cell->app = -1;
	return setns(cell->template, CLONE_NEWNS) < 0 ? -1 : copy(cell);
}
