/* What the audit hook (audit.c) leaves for the caller. The payload can write to it, so every reader bounds what it reads (layers/audit.py). */
#ifndef NSJAIL_AUDIT_H
#define NSJAIL_AUDIT_H
#include <stdint.h>

enum audit_size { AUDIT_MAGIC = 0x54445541, /* "AUDT" */ AUDIT_ROOM = 262144, AUDIT_LONGEST = 1024 };
enum audit_kind { AUDIT_IMPORT, AUDIT_FILE, AUDIT_SOCKET, AUDIT_PROCESS, AUDIT_NATIVE, AUDIT_KINDS };

struct audit {
	uint32_t magic;
	uint32_t used; /* bytes of records */
	uint32_t cut; /* there was more */
	uint32_t reserved;
	uint64_t counts[8]; /* events of each kind */
	unsigned char records[262144];
};
#endif
