/* The order: received, checked, and its small files (a script, mostly) written beneath /app by the jail's user. Nothing untrusted
 * has run yet, and no right is left. */
#include "ladder.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* The first descriptor that comes along is the order itself; the others are the program's. */
int order_take(const struct cell *cell, struct order **order, int *descriptors) {
	struct cell_order run;
	struct stat status;
	int received[MAX_FDS + 1], count = MAX_FDS + 1;
	if (order_receive(cell->launcher, &run, received, &count) < 0)
		return -1;
	if (run.kind != CELL_RUN || count < 1 || fstat(received[0], &status) < 0 ||
	    (fcntl(received[0], F_GET_SEALS) & BLOCK_SEALS) != BLOCK_SEALS || status.st_size <= 0 || status.st_size > MAX_BLOCK) {
		errno = EINVAL;
		return -1;
	}
	*order = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, received[0], 0);
	if (*order == MAP_FAILED)
		return -1;
	if (!order_check(*order, (size_t)status.st_size) || (*order)->descriptors.count != (uint32_t)count - 1) {
		errno = EINVAL;
		return -1;
	}
	for (int i = 1; i < count; i++)
		descriptors[i - 1] = received[i];
	return 0;
}

char **order_pointers(struct order *order, struct span span) {
	uint64_t *offsets = (uint64_t *)((char *)order + span.offset);
	for (uint32_t i = 0; i < span.count; i++)
		offsets[i] += (uint64_t)(uintptr_t)order;
	return (char **)offsets;
}

static int write_all(int fd, const char *data, size_t size) {
	while (size) {
		ssize_t written = write(fd, data, size);
		if (written < 0)
			return -1;
		data += written;
		size -= (size_t)written;
	}
	return 0;
}

int app_write(const struct cell *cell, const struct order *order) {
	const struct order_file *files = at(order, order->files.offset);
	if (order->files.count && cell->app < 0) {
		errno = ENOTSUP; /* the plan made no place for them */
		return -1;
	}
	for (uint32_t i = 0; i < order->files.count; i++) {
		int fd = openat(cell->app, at(order, files[i].name), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
		if (fd < 0)
			return -1;
		if (write_all(fd, at(order, files[i].offset), files[i].size) < 0 || fchmod(fd, files[i].mode & 0777) < 0) {
			int error = errno;
			close(fd);
			errno = error;
			return -1;
		}
		close(fd);
	}
	return 0;
}
