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

/* The caller's session keys would be possessed inside. A kernel without keyrings has nothing to leak. A user may have 200 keys, and all jobs
 * of a template are one user, as are all runs of an ordinary user's: where he has no more, the one that we have will do if it is of no use
 * to anybody. */
int keyring_new(void) {
	if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) >= 0 || errno == ENOSYS)
		return 0;
	int error = errno;
	if (error == EDQUOT && syscall(SYS_keyctl, KEYCTL_DESCRIBE, KEY_SPEC_SESSION_KEYRING, NULL, 0) < 0 && errno == EKEYREVOKED)
		return 0;
	errno = error;
	return -1;
}

/* One that nobody can find anything in, or put anything into. */
int keyring_none(void) {
	if (keyring_new() < 0)
		return -1;
	long revoked = syscall(SYS_keyctl, KEYCTL_REVOKE, KEY_SPEC_SESSION_KEYRING);
	return revoked < 0 && errno != ENOSYS && errno != EKEYREVOKED ? -1 : 0;
}

/* Without flags, of which one takes the randomness out of addresses. Where it is locked (systemd's LockPersonality=), asking is refused, and
 * taking the one that it has is not. */
int personality_new(void) {
	enum { ASK = 0xffffffff };
	return personality(ASK) == PER_LINUX || personality(PER_LINUX) >= 0 ? 0 : -1;
}
