/* A template's memory as a file: what it has written goes into a sealed memfd and is mapped from there, privately, at the same place.
 *
 * fork(2) copies the page tables of anonymous memory, page by page, and the end of the process takes them apart again, whether it touched
 * them or not; of a file's it copies none, and a page is found when somebody first looks at it. So a job costs what it touches, and not
 * what its template holds. Nobody can write to the file, and what a job writes to is its own copy, as before. It is quicker and nothing
 * else, so what cannot be mapped like this just stays as it is. mmap(2), memfd_create(2), proc_pid_pagemap(5), proc_pid_smaps(5) */
#include "kernel.h"
#include "ladder.h"

#include <linux/memfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum {
	MAX_REGIONS = 4096,
	PIECE = 256, /* pages that are there twice for a moment */
	SMALL_GAP = 16, /* pages that nobody has written to, which cost less than two mappings more */
	WORTH_IT = 8 << 10 /* KiB: a bare interpreter's 4,000 are copied sooner than they are found one by one */
};
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif

/* fork(2) treats these in a way of their own, the kernel grows them, or a page more would be paid for: in smaps(5)'s letters. */
static const char *const kept[] = {" gd", " lo", " io", " pf", " dc", " wf", " dp", " nr", " ht", " ss"};

struct region {
	uintptr_t start, end;
	int protection;
};

static struct region regions[MAX_REGIONS];

/* One line more of a region's description; true with the last one of a region that the process has written to. */
static int described(const char *line, struct region *region, unsigned long *written) {
	unsigned long start, end;
	char rights[5];
	if (sscanf(line, "%lx-%lx %4s", &start, &end, rights) == 3) {
		*written = 0;
		*region = (struct region){start, end, PROT_READ | (rights[1] == 'w' ? PROT_WRITE : 0)};
		if (rights[0] != 'r' || rights[2] == 'x' || rights[3] != 'p')
			region->start = end;
		return 0;
	}
	if (sscanf(line, "Anonymous: %lu", written) == 1 || strncmp(line, "VmFlags:", 8) != 0)
		return 0;
	for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
		if (strstr(line, kept[i]))
			return 0;
	return region->start < region->end && *written > 0;
}

/* How many there are; none if it is too little to be worth it. */
static int regions_read(void) {
	static char lines[1 << 16];
	size_t have = 0;
	unsigned long written = 0, all = 0;
	struct region region = {0};
	int count = 0, smaps = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);
	ssize_t got;
	while (count < MAX_REGIONS && (got = read(smaps, lines + have, sizeof lines - have)) > 0) {
		char *line = lines, *end;
		for (have += (size_t)got; count < MAX_REGIONS && (end = memchr(line, '\n', have));
		     have -= (size_t)(end + 1 - line), line = end + 1) {
			*end = 0;
			if (described(line, &region, &written)) {
				regions[count++] = region;
				all += written;
			}
		}
		memmove(lines, line, have);
	}
	close(smaps);
	return all < WORTH_IT ? 0 : count;
}

static int piece_move(int file, off_t *size, uintptr_t start, size_t length, int protection) {
	if (pwrite(file, (const void *)start, length, *size) != (ssize_t)length)
		return -1;
	if (mmap((void *)start, length, protection, MAP_PRIVATE | MAP_FIXED, file, *size) == MAP_FAILED)
		return -1;
	*size += (off_t)length;
	return 0;
}

static int is_written(uint64_t page) {
	const uint64_t present = 1ULL << 63, swapped = 1ULL << 62, of_a_file = 1ULL << 61;
	return (page & (present | swapped)) && !(page & of_a_file);
}

/* What was written to in a region, piece by piece. */
static int region_move(int file, off_t *size, int pagemap, const struct region *region) {
	const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	for (uintptr_t at = region->start; at < region->end;) {
		uint64_t pages[PIECE];
		size_t count = (region->end - at) / page, first = 0;
		count = count < PIECE ? count : PIECE;
		if (pread(pagemap, pages, count * sizeof *pages, (off_t)(at / page * sizeof *pages)) != (ssize_t)(count * sizeof *pages))
			return -1;
		while (first < count && !is_written(pages[first]))
			first++;
		size_t next = first, last = first; /* last: behind the last one that was written to */
		while (next < count && next - last <= SMALL_GAP)
			if (is_written(pages[next++]))
				last = next;
		if (last > first && piece_move(file, size, at + first * page, (last - first) * page, region->protection) < 0)
			return -1;
		at += next * page;
	}
	return 0;
}

int memory_snapshot(void) {
	off_t size = 0;
	int count = regions_read();
	if (count == 0)
		return 0;
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int file = (int)syscall(SYS_memfd_create, "template", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
	if (file < 0 && errno == EINVAL) /* Linux before 6.3 */
		file = (int)syscall(SYS_memfd_create, "template", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	for (int i = 0; i < count && region_move(file, &size, pagemap, &regions[i]) == 0; i++)
		;
	int result = size == 0 ? 0 : fcntl(file, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
	keep_errno_close(pagemap);
	keep_errno_close(file);
	return result;
}
