/* Reading a checked block. */
#ifndef NSJAIL_BLOCKS_H
#define NSJAIL_BLOCKS_H
#include "plan.h"

#include <stddef.h>

/* Nobody can change a block any more, nor cut it short under a reader. */
#define BLOCK_SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW)

static inline const void *at(const void *block, uint32_t offset) { return (const char *)block + offset; }

int plan_check(const void *block, size_t size);  /* 1 if every reference in it is good */
int order_check(const void *block, size_t size);
int saved_check(const void *block, size_t size); /* the plan in it, too */
#endif
