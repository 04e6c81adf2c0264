/* lookup ROOT: for each line that it reads, what native/beneath.c finds there: device and inode, or the errno; and the same for a directory. */
#include "kernel.h"
#include "ladder.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static void look(int root, const char *path, int flags) {
	struct stat status;
	int fd = open_beneath(root, path, flags);
	if (fd < 0)
		printf("%s ", strerror(errno));
	else if (fstat(fd, &status) == 0)
		printf("%lu:%lu ", (unsigned long)status.st_dev, (unsigned long)status.st_ino);
	if (fd >= 0)
		close(fd);
}

int main(int count, char **arguments) {
	char line[8192];
	int root = count == 2 ? open(arguments[1], O_PATH | O_DIRECTORY) : -1;
	while (root >= 0 && fgets(line, sizeof line, stdin)) {
		line[strcspn(line, "\n")] = 0;
		look(root, line, 0);
		look(root, line, O_DIRECTORY);
		puts("");
		fflush(stdout);
	}
	return root < 0;
}
