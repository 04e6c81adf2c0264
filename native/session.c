/* A session and a keyring of the cell's own: nothing of the caller's terminal or keys is left. setsid(2), keyctl(2) */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <linux/keyctl.h>
#include <unistd.h>

/* Refused to whoever leads one already. */
int session_new(void) { return setsid() < 0 && getsid(0) != getpid() ? -1 : 0; }

/* The caller's session keys would be possessed inside. A kernel without keyrings has nothing to leak. */
int keyring_new(void) { return syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 && errno != ENOSYS ? -1 : 0; }
