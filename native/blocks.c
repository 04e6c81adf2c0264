/* Sealed blocks, as they arrive: whole, unchangeable, and mapped. memfd_create(2), F_GET_SEALS in fcntl(2) */
#include "ladder.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

/* The bytes of a sealed file; NULL with errno. The calls are late ones (filter.c), for the sake of the order. */
void *block_map(const struct cell *cell, int descriptor, int protection, size_t *size) {
	struct stat status;
	if (late(cell, SYS_fstat, descriptor, (long)&status, 0, 0, 0) < 0)
		return NULL;
	long seals = late(cell, SYS_fcntl, descriptor, F_GET_SEALS, 0, 0, 0);
	if (seals < 0)
		return NULL; /* what cannot be sealed answers EINVAL */
	if ((seals & BLOCK_SEALS) != BLOCK_SEALS || status.st_size <= 0 || status.st_size > MAX_BLOCK) {
		errno = EINVAL;
		return NULL;
	}
	*size = (size_t)status.st_size;
	void *block = mmap(NULL, *size, protection, MAP_PRIVATE, descriptor, 0);
	return block == MAP_FAILED ? NULL : block;
}

/* A plan that is sound; NULL with errno. */
const struct plan *plan_map(int descriptor) {
	size_t size;
	void *block = block_map(NULL, descriptor, PROT_READ, &size);
	if (!block || plan_check(block, size))
		return block;
	munmap(block, size);
	errno = EINVAL;
	return NULL;
}
