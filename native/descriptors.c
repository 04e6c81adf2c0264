/* Descriptors: how they reach a cell, where they are put, and that no other crosses. unix(7), close_range(2)
 *
 * Until exec the program shares init's table, since that is how its seccomp listener reaches init. So nothing is closed here:
 * everything else is marked close-on-exec, and our own descriptors have numbers above MAX_FD_NUMBER. */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <linux/close_range.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

int message_send(int socket, const void *message, size_t size, const int *descriptors, int count) {
	char control[CMSG_SPACE(sizeof(int) * (MAX_FDS + 2))] = {0};
	struct iovec vector = {.iov_base = (void *)message, .iov_len = size};
	struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
	if (count) {
		header.msg_control = control;
		header.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
		struct cmsghdr *first = CMSG_FIRSTHDR(&header);
		first->cmsg_level = SOL_SOCKET;
		first->cmsg_type = SCM_RIGHTS;
		first->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
		memcpy(CMSG_DATA(first), descriptors, sizeof(int) * (size_t)count);
	}
	ssize_t sent = sendmsg(socket, &header, MSG_NOSIGNAL);
	return sent == (ssize_t)size ? 0 : -1;
}

int order_receive(int socket, struct cell_order *order, int *descriptors, int *count) {
	char control[CMSG_SPACE(sizeof(int) * (MAX_FDS + 2))];
	struct iovec vector = {.iov_base = order, .iov_len = sizeof *order};
	struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	ssize_t size = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
	if (size != sizeof *order || header.msg_flags & MSG_CTRUNC) {
		errno = size < 0 ? errno : EPROTO;
		return -1;
	}
	struct cmsghdr *first = CMSG_FIRSTHDR(&header);
	int received = first ? (int)((first->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
	if (received > *count) {
		errno = EPROTO;
		return -1;
	}
	*count = received;
	if (received)
		memcpy(descriptors, CMSG_DATA(first), sizeof(int) * (size_t)received);
	return 0;
}

int descriptors_seal(void) { return (int)syscall(SYS_close_range, 3, ~0U, CLOSE_RANGE_CLOEXEC); }

/* What was received may sit on a number that another is to have: all move up first, then each to its place. */
int descriptors_place(const struct order *order, const int *descriptors) {
	const uint32_t *numbers = at(order, order->descriptors.offset);
	int moved[MAX_FDS];
	for (uint32_t i = 0; i < order->descriptors.count; i++)
		if ((moved[i] = fcntl(descriptors[i], F_DUPFD_CLOEXEC, MAX_FD_NUMBER)) < 0)
			return -1;
	if (descriptors_seal() < 0)
		return -1;
	for (uint32_t i = 0; i < order->descriptors.count; i++)
		if (dup2(moved[i], (int)numbers[i]) < 0)
			return -1;
	return 0;
}

/* Out of the way of the numbers that a program may be given. */
int descriptor_high(int descriptor) {
	int high = descriptor < 0 ? -1 : fcntl(descriptor, F_DUPFD_CLOEXEC, MAX_FD_NUMBER);
	int error = errno;
	if (descriptor >= 0)
		close(descriptor);
	errno = error;
	return high;
}

/* Closes all but these. Sorts them on the way. */
void descriptors_keep(int *kept, int count) {
	unsigned next = 0;
	for (int i = 1; i < count; i++)
		for (int j = i; j > 0 && kept[j] < kept[j - 1]; j--) {
			int swap = kept[j];
			kept[j] = kept[j - 1];
			kept[j - 1] = swap;
		}
	for (int i = 0; i < count; i++) {
		if (kept[i] < 0)
			continue;
		if ((unsigned)kept[i] > next)
			syscall(SYS_close_range, next, (unsigned)kept[i] - 1, 0);
		next = (unsigned)kept[i] + 1;
	}
	syscall(SYS_close_range, next, ~0U, 0);
}
