/* The order: received, checked, and its small files (a script, mostly) written beneath /app by the jail's user. Nothing untrusted
 * has run yet, and no right is left. All calls are late ones (filter.c). */
#include "ladder.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The order lies behind its message, or, when it is large, in the last descriptor that comes along; the others are the program's. */
int order_take(const struct cell *cell, struct order **order, int *descriptors) {
	static struct {
		struct cell_order head;
		_Alignas(8) char order[MAX_INLINE];
	} message;
	int received[MAX_FDS + 1], count = MAX_FDS + 1;
	ssize_t length = message_receive(cell, cell->orders, &message, sizeof message, 0, received, &count);
	size_t size = message.head.value;
	if (length < 0)
		return -1;
	if ((size_t)length != sizeof message.head + size || message.head.kind != CELL_RUN || count < 1) {
		errno = EPROTO;
		return -1;
	}
	*order = (struct order *)message.order;
	if (size == 0) {
		int block = received[--count];
		if (!(*order = block_map(cell, block, PROT_READ | PROT_WRITE, &size)))
			return -1;
		late(cell, SYS_close, block, 0, 0, 0, 0);
	}
	if (!order_check(*order, size) || (*order)->descriptors.count != (uint32_t)count) {
		errno = EINVAL;
		return -1;
	}
	memcpy(descriptors, received, sizeof *received * (size_t)count);
	return 0;
}

char **order_pointers(struct order *order, struct span span) {
	uint64_t *offsets = (uint64_t *)((char *)order + span.offset);
	for (uint32_t i = 0; i < span.count; i++)
		offsets[i] += (uint64_t)(uintptr_t)order;
	return (char **)offsets;
}

static int write_all(const struct cell *cell, int fd, const char *data, size_t size) {
	while (size) {
		long written = late(cell, SYS_write, fd, (long)data, (long)size, 0, 0);
		if (written < 0)
			return -1;
		data += written;
		size -= (size_t)written;
	}
	return 0;
}

static int file_write(const struct cell *cell, const struct order *order, const struct order_file *file) {
	long name = (long)at(order, file->name);
	int fd = (int)late(cell, SYS_openat, cell->app, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600, 0);
	if (fd < 0)
		return -1;
	int result = write_all(cell, fd, at(order, file->offset), file->size);
	if (result == 0)
		result = (int)late(cell, SYS_fchmod, fd, file->mode & 0777, 0, 0, 0);
	int error = errno;
	late(cell, SYS_close, fd, 0, 0, 0, 0);
	errno = error;
	return result;
}

int app_write(const struct cell *cell, const struct order *order) {
	const struct order_file *files = at(order, order->files.offset);
	if (order->files.count && cell->app < 0) {
		errno = ENOTSUP; /* the plan made no place for them */
		return -1;
	}
	for (uint32_t i = 0; i < order->files.count; i++)
		if (file_write(cell, order, &files[i]) < 0)
			return -1;
	return 0;
}
