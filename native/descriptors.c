/* Descriptors: how they reach a cell, where they are put, and that no other crosses. unix(7), close_range(2) */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define ROOM CMSG_SPACE(sizeof(int) * (MAX_FDS + 3))

int message_send(const struct cell *cell, int socket, const void *message, size_t size, const int *descriptors, int count) {
	_Alignas(struct cmsghdr) char control[ROOM];
	struct iovec vector = {.iov_base = (void *)message, .iov_len = size};
	struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
	if (count) {
		header.msg_control = control;
		header.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
		struct cmsghdr *first = header.msg_control;
		first->cmsg_level = SOL_SOCKET;
		first->cmsg_type = SCM_RIGHTS;
		first->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
		memcpy(CMSG_DATA(first), descriptors, sizeof(int) * (size_t)count);
	}
	/* Nobody of ours waits for another to read: who is stopped would stop the launcher with all its jails. */
	return late(cell, SYS_sendmsg, socket, (long)&header, MSG_NOSIGNAL | MSG_DONTWAIT, 0, 0) == (long)size ? 0 : -1;
}

/* count: how many descriptors there is room for, then how many there are. A message that is cut is an error, and so is one with more of
 * them, of which none is left. That the other side has ended without reading all of ours shows as one reset, before what it had sent. */
ssize_t message_receive(const struct cell *cell, int socket, void *message, size_t size, int flags, int *descriptors,
                        int *count) {
	_Alignas(struct cmsghdr) char control[ROOM];
	struct iovec vector = {.iov_base = message, .iov_len = size};
	struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control};
	header.msg_controllen = *count ? CMSG_SPACE(sizeof(int) * (size_t)*count) : 0;
	int room = *count;
	*count = 0;
	long received = late(cell, SYS_recvmsg, socket, (long)&header, flags, 0, 0);
	if (received < 0 && errno == ECONNRESET)
		received = late(cell, SYS_recvmsg, socket, (long)&header, flags, 0, 0);
	struct cmsghdr *first = received < 0 ? NULL : CMSG_FIRSTHDR(&header);
	int came = first && room ? (int)((first->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
	if (came > room) { /* the kernel rounds the room up */
		for (const int *extra = (const int *)CMSG_DATA(first); came-- > 0; extra++)
			late(cell, SYS_close, *extra, 0, 0, 0, 0);
		errno = EPROTO;
		return -1;
	}
	*count = came;
	if (came)
		memcpy(descriptors, CMSG_DATA(first), sizeof(int) * (size_t)came);
	if (received >= 0 && header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
		errno = header.msg_flags & MSG_CTRUNC && came < room ? EMFILE : EPROTO; /* it is our table that is full */
		return -1;
	}
	return received;
}

/* What only the launcher has the right to do. The answer's value is its errno; count: room for descriptors, and how many came. */
int launcher_ask(int socket, enum cell_message_kind what, enum cell_order_kind done, int *descriptors, int *count) {
	struct cell_message need = {.kind = what};
	struct cell_order answer;
	int room = *count;
	*count = 0;
	if (message_send(NULL, socket, &need, sizeof need, NULL, 0) < 0)
		return -1;
	*count = room;
	ssize_t size = message_receive(NULL, socket, &answer, sizeof answer, MSG_CMSG_CLOEXEC, descriptors, count);
	if (size < 0)
		return -1;
	errno = size == sizeof answer && answer.kind == done ? (int)answer.value : EPROTO;
	return errno ? -1 : 0;
}

/* They came on the lowest numbers, in order, and are to have rising ones: so from the last to the first, each can go to its place. */
int descriptors_place(const struct cell *cell, const struct order *order, const int *descriptors) {
	const uint32_t *numbers = at(order, order->descriptors.offset);
	for (uint32_t i = order->descriptors.count; i-- > 0;) {
		if (descriptors[i] != (int)i) {
			errno = EPROTO;
			return -1;
		}
		if (numbers[i] == i)
			continue;
		if (late(cell, SYS_dup3, i, numbers[i], 0, 0, 0) < 0 || late(cell, SYS_close, i, 0, 0, 0, 0) < 0)
			return -1;
	}
	return 0;
}

/* Out of the way of the numbers that a program may be given. Where that fails it stays where it is. */
int descriptor_high(int descriptor) {
	int high = fcntl(descriptor, F_DUPFD_CLOEXEC, MAX_FD_NUMBER);
	if (high >= 0)
		close(descriptor);
	return high;
}

/* Closes all but these. Sorts them on the way. */
int descriptors_keep(int *kept, int count) {
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
		if ((unsigned)kept[i] > next && syscall(SYS_close_range, next, (unsigned)kept[i] - 1, 0) < 0)
			return -1;
		next = (unsigned)kept[i] + 1;
	}
	return (int)syscall(SYS_close_range, next, ~0U, 0);
}

/* Closes all but three, and what a job's libraries hold open. */
int descriptors_keep_also(const struct cell *cell, const int three[3]) {
	int kept[3 + MAX_LIBRARIES];
	memcpy(kept, three, 3 * sizeof *kept);
	memcpy(kept + 3, cell->libraries, sizeof cell->libraries);
	return descriptors_keep(kept, 3 + cell->library_count);
}
