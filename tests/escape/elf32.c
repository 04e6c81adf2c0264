/* A program for 32 bits: all its system calls go by the other table. */
void _start(void);
void _start(void) {
	const char message[] = "WON\n";
	int result;
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(4), "b"(1), "c"(message), "d"(4) : "memory");
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(1), "b"(0) : "memory");
}
