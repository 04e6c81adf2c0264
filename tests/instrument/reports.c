/* What the sanitizers say, kept in a file that every process of a launcher has had in its memory since its start: none of them has a standard
 * error, most have another root, and none may open a file. Only a job's process 1, which is executed inside, has no way to it: what is found
 * there ends the job as lost. Leaks are not looked for: that takes ptrace, which no process of ours allows. */
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SIZE = 1 << 20 };

static struct {
	uint32_t used;
	char text[SIZE - sizeof(uint32_t)];
} *page;

const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0:symbolize=0:allow_addr2line=0:detect_stack_use_after_return=1"; }
const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void) { return "print_stacktrace=1"; }

__attribute__((constructor, no_sanitize("address", "undefined"))) static void attach(void) {
	int fd = open(REPORTS, O_RDWR | O_CLOEXEC);
	void *mapped = fd < 0 ? MAP_FAILED : mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	page = mapped == MAP_FAILED ? NULL : mapped;
	if (fd >= 0)
		close(fd);
}

void __sanitizer_on_print(const char *text);
__attribute__((no_sanitize("address", "undefined"))) void __sanitizer_on_print(const char *text) {
	uint32_t length = 0;
	while (text[length])
		length++;
	if (!page)
		return;
	uint32_t at = __atomic_fetch_add(&page->used, length, __ATOMIC_RELAXED);
	for (uint32_t i = 0; i < length && at + i < sizeof page->text; i++)
		page->text[at + i] = text[i];
}
