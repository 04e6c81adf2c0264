/* Where there is no clang: each file of the corpus, and changed copies of it for so many seconds. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MOST = 512, LARGEST = 1 << 20 };

int main(int argc, char **argv) {
	static uint8_t *files[MOST], copy[LARGEST];
	static size_t sizes[MOST];
	int count = 0;
	unsigned long runs = 0;
	DIR *directory = argc == 3 ? opendir(argv[1]) : NULL;
	if (!directory)
		return 2;
	for (struct dirent *entry; count < MOST && (entry = readdir(directory));) {
		char path[4096];
		snprintf(path, sizeof path, "%s/%s", argv[1], entry->d_name);
		FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "rb");
		if (!file)
			continue;
		files[count] = malloc(LARGEST);
		sizes[count] = fread(files[count], 1, LARGEST, file);
		fclose(file);
		if (sizes[count])
			LLVMFuzzerTestOneInput(files[count], sizes[count]), count++;
	}
	time_t end = time(NULL) + atoi(argv[2]);
	srandom((unsigned)time(NULL));
	while (count && time(NULL) < end) {
		int which = (int)(random() % count);
		size_t size = sizes[which];
		memcpy(copy, files[which], size);
		for (long changes = random() % 8; changes >= 0; changes--) {
			/* Mostly in the head, where the offsets and counts are. */
			size_t at = (size_t)random() % (random() % 4 && size > 240 ? 240 : size);
			static const uint8_t telling[] = {0, 1, 7, 8, 0x7f, 0x80, 0xfe, 0xff};
			copy[at] = random() % 2 ? telling[random() % 8] : (uint8_t)random();
		}
		if (random() % 8 == 0)
			size = 1 + (size_t)random() % size;
		LLVMFuzzerTestOneInput(copy, size);
		runs++;
	}
	printf("runs: %lu\n", runs);
	return 0;
}
