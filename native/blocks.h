/* Reading a checked block. */
#ifndef NSJAIL_BLOCKS_H
#define NSJAIL_BLOCKS_H
#include "plan.h"

#include <fcntl.h>
#include <stddef.h>

/* Nobody can change a block any more, nor cut it short under a reader. */
#define BLOCK_SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW)

static inline const void *at(const void *block, uint32_t offset) { return (const char *)block + offset; }

/* fcntl(F_GET_SEALS) answers -1 for what cannot be sealed: as bits that would be every seal there is. */
static inline int is_sealed(long seals) { return seals >= 0 && (seals & BLOCK_SEALS) == BLOCK_SEALS; }

int plan_check(const void *block, size_t size);  /* 1 if every reference in it is good */
int order_check(const void *block, size_t size);
#endif
