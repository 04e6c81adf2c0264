/* A launcher in which one chosen call fails. Every libc function that the launcher's own objects call and that can fail goes through
 * due() first (shim.py makes the table and the wrappers); what is to fail is said in a page that the test shares with all processes. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LOG = 65536 };

/* As in shim.py. */
struct entry {
	uint32_t role, cell, call, pad;
	int64_t sub;
};
struct control {
	uint32_t role, cell, call, nth; /* what is to fail; nth 0: all of them */
	int64_t sub;
	uint32_t error; /* 0: nothing */
	uint32_t seen, hit; /* hit: where in the log, from 1 on */
	uint32_t count;
	struct entry log[LOG];
};

static struct control *control;
static uint32_t role, cell; /* 0: launcher, 1: init, 2: program; and the how-manieth cell */

__attribute__((constructor)) static void attach(void) {
	int fd = open(CONTROL, O_RDWR | O_CLOEXEC);
	control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (fd < 0 || control == MAP_FAILED)
		abort();
	close(fd);
}

static int due(uint32_t call, int64_t sub) {
	uint32_t at = __atomic_fetch_add(&control->count, 1, __ATOMIC_SEQ_CST);
	if (at < LOG)
		control->log[at] = (struct entry){role, cell, call, 0, sub};
	if (!control->error || control->call != call || control->role != role || control->cell != cell || control->sub != sub ||
	    (__atomic_add_fetch(&control->seen, 1, __ATOMIC_SEQ_CST) != control->nth && control->nth))
		return 0;
	control->hit = at + 1;
	errno = (int)control->error;
	return 1;
}

long faulty_syscall(long number, long a, long b, long c, long d, long e, long f) {
	if (due(CALL_syscall, number))
		return -1;
	if (number == SYS_clone3 && role == 0)
		cell++;
	long result = syscall(number, a, b, c, d, e, f);
	if (number == SYS_clone3 && result == 0)
		role++;
	return result;
}
