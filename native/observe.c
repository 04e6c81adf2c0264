/* A run that is observed: the filter's questions go to the caller, who answers them. seccomp_unotify(2)
 *
 * For samples that are trusted, of which a policy is to be learned: he lets nearly every call go on, so here the filter protects from
 * nothing. Hence no policy has a word for it, and a run whose caller does not take the listener does not start. */
#include "launcher.h"

#include <unistd.h>

int observe(struct run *run) {
	struct report report = {.kind = REPORT_OBSERVED, .exit_code = -1, .signal = -1};
	int sent = message_send(NULL, run->channel, &report, sizeof report, &run->listener, 1);
	close(run->listener);
	run->listener = -1;
	return sent;
}
