/* The order's small files (a script, mostly), written beneath /app by the jail's user, before anything untrusted runs. */
#include "ladder.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

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
