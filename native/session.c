/* A session, signals and keyring of the cell's own: nothing of the caller's terminal, handlers or keys is left.
 * signal(7), setsid(2), keyctl(2) */
#include "kernel.h"
#include "ladder.h"

#include <errno.h>
#include <linux/keyctl.h>

int signals_reset(void) {
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL); /* fails for SIGKILL, SIGSTOP and libc's own: they have no handler to lose */
	sigset_t none;
	sigemptyset(&none);
	return sigprocmask(SIG_SETMASK, &none, NULL);
}

int session_new(void) { return setsid() < 0 && errno != EPERM ? -1 : 0; /* EPERM: we lead one already */ }

/* The caller's session keys would be possessed inside. A kernel without keyrings has nothing to leak. */
int keyring_new(void) { return syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 && errno != ENOSYS ? -1 : 0; }
