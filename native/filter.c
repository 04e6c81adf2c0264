/* The system call filter. With a listener: the launcher is told of each denied call. seccomp(2), seccomp_unotify(2)
 *
 * It is installed while the cell waits, since it is dear; a few calls of ours come later, and some of them are denied to the
 * program. So those (the plan's `late`), and no others, are let through when their sixth argument, which none of them has, is a
 * random number of 64 bits. This process alone knows it, and its memory ends with exec: also `exec once` rests on that. */
#include "ladder.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef __x86_64__
#define MACHINE AUDIT_ARCH_X86_64
#else
#define MACHINE AUDIT_ARCH_AARCH64
#endif

enum { TESTS = 9 };

/* These calls get this answer when their sixth argument is the key; all others, and those without it, are the filter's. */
static uint8_t head(struct sock_filter *code, const uint32_t *calls, uint8_t count, uint64_t key, uint32_t answer) {
	const unsigned sixth = offsetof(struct seccomp_data, args[5]);
	uint8_t next = 0, size = (uint8_t)(count + TESTS - 1), allowed = (uint8_t)(count + 3);
#define LOAD(offset) code[next++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset)
#define TEST(value, yes, no)                                                                                                     \
	code[next] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, (uint8_t)(yes), (uint8_t)(no)), next++
	LOAD(offsetof(struct seccomp_data, arch));
	TEST(MACHINE, 0, size - next - 1);
	LOAD(offsetof(struct seccomp_data, nr));
	for (uint8_t i = 0; i < count; i++)
		TEST(calls[i], allowed - next - 1, i + 1 < count ? 0 : size - next - 1);
	LOAD(sixth);
	TEST((uint32_t)key, 0, size - next - 1);
	LOAD(sixth + 4);
	TEST((uint32_t)(key >> 32), 0, size - next - 1);
	code[next++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, answer);
	return next;
#undef LOAD
#undef TEST
}

int filter_install(struct cell *cell, int *listener) {
	const struct plan *plan = cell->plan;
	struct sock_filter code[MAX_LATE + TESTS + plan->filter.count];
	unsigned short size = 0;
	if (!cell->stamp) /* a job: no exec would end the secret, and its last call is no secret */
		size = head(code, &(uint32_t){SYS_exit_group}, 1, LAST_CALL, SECCOMP_RET_USER_NOTIF);
	else if (plan->late.count) {
		if (getrandom(&cell->secret, sizeof cell->secret, 0) != sizeof cell->secret)
			return -1;
		size = head(code, at(plan, plan->late.offset), (uint8_t)plan->late.count, cell->secret, SECCOMP_RET_ALLOW);
	}
	memcpy(code + size, at(plan, plan->filter.offset), plan->filter.count * sizeof *code);
	struct sock_fprog program = {.len = (unsigned short)(size + plan->filter.count), .filter = code};
	*listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	return *listener < 0 ? -1 : 0;
}

/* For everyone else, who has no secret, a system call like any other. */
long late(const struct cell *cell, long call, long a, long b, long c, long d, long e) {
	return syscall(call, a, b, c, d, e, cell ? (long)cell->secret : 0L);
}
