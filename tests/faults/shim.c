/* A launcher, and a template's extension, in which one chosen call fails. Every libc function that our own objects call and that can fail
 * goes through due() first (shim.py makes the table and the wrappers); what is to fail is said in a page that the test shares with all
 * processes. A template has it by descriptor, since it is in a jail; a job's reaper is executed in one, and has none. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LOG = 65536, PRETENDED = 0xffff };
enum fate { DONE, FAILED, FAKED };

/* As in shim.py. */
struct entry {
	uint32_t role, cell, call, pad;
	int64_t sub;
};
struct control {
	uint32_t role, cell, call, nth; /* what is to fail; nth 0: all of them */
	int64_t sub;
	uint32_t error; /* 0: nothing; PRETENDED: it is not made, and says that it was */
	uint32_t seen, hit; /* hit: where in the log, from 1 on */
	uint32_t count;
	struct entry log[LOG];
};

enum role { LAUNCHER, INIT, PROGRAM, TEMPLATE, JOB_INIT, JOB };

static struct control *control;
static uint32_t role = FIRST_ROLE, cell; /* and the how-manieth cell */

__attribute__((constructor)) static void attach(void) {
	int fd = FIRST_ROLE == TEMPLATE ? PASSED : open(CONTROL, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return;
	control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (control == MAP_FAILED)
		abort();
	close(fd);
}

static enum fate due(uint32_t call, int64_t sub) {
	if (!control)
		return DONE;
	uint32_t at = __atomic_fetch_add(&control->count, 1, __ATOMIC_SEQ_CST);
	if (at < LOG)
		control->log[at] = (struct entry){role, cell, call, 0, sub};
	if (!control->error || control->call != call || control->role != role || control->cell != cell || control->sub != sub ||
	    (__atomic_add_fetch(&control->seen, 1, __ATOMIC_SEQ_CST) != control->nth && control->nth))
		return DONE;
	control->hit = at + 1;
	if (control->error == PRETENDED)
		return FAKED;
	errno = (int)control->error;
	return FAILED;
}

/* Of which process a descriptor is, which the launcher opens a file for, as it does for figures of use: and those are looked at as often as
 * there is time for. */
__attribute__((unused)) static int asks_for_a_number(const char *path) { return !strncmp(path, "/proc/self/fdinfo/", 18); }

long faulty_syscall(long number, long a, long b, long c, long d, long e, long f) {
	enum fate fate = due(CALL_syscall, number);
	if (fate != DONE)
		return fate == FAKED ? 0 : -1;
	if (number == SYS_clone3 && role == LAUNCHER)
		cell++;
	long result = syscall(number, a, b, c, d, e, f);
	if (number == SYS_clone3 && result == 0)
		role++;
	return result;
}
