/* A session, a keyring and a personality of the cell's own: nothing of the caller's terminal, keys or debugging aids is left. setsid(2),
 * keyctl(2), personality(2) */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <linux/keyctl.h>
#include <sys/personality.h>
#include <unistd.h>

/* Refused to whoever leads one already. */
int session_new(void) { return setsid() < 0 && getsid(0) != getpid() ? -1 : 0; }

/* The caller's session keys would be possessed inside. A kernel without keyrings has nothing to leak. */
int keyring_new(void) { return syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 && errno != ENOSYS ? -1 : 0; }

/* Without flags, of which one takes the randomness out of addresses. Where it is locked (systemd's LockPersonality=), asking is refused, and
 * taking the one that it has is not. */
int personality_new(void) {
	enum { ASK = 0xffffffff };
	return personality(ASK) == PER_LINUX || personality(PER_LINUX) >= 0 ? 0 : -1;
}
