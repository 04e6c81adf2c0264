/* The module of the templates with counters: a template may have no descriptor open, and theirs is not needed once they are mapped. */
#include <sys/stat.h>
#include <unistd.h>

enum { FIRST = 6, LAST = 64 }; /* behind those that a template is given */

void *PyInit_counted(void);
void *PyInit__template(void);
void *PyInit__template(void) {
	struct stat status;
	for (int fd = FIRST; fd < LAST; fd++)
		if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode))
			close(fd);
	return PyInit_counted();
}
