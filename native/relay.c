/* The streams of one run, carried between the caller's and the jail's until its report is there, and the caller's signals on to the
 * program. The program never gets a descriptor of the caller's (relay.py says why). poll(2), signalfd(2) */
#include "alone.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PIECE = 4096 }; /* a pipe that poll(2) calls writable takes so much at once */

static void command(const struct relay *relay, uint32_t number, uint32_t cause) {
	struct command command = {.signal = number, .cause = cause};
	send(relay->channel, &command, sizeof command, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void pipe_close(struct relay *relay, int number) {
	if (relay->pipes[number] >= 0)
		close(relay->pipes[number]);
	relay->pipes[number] = -1;
}

/* What the caller ignores, as under nohup, he goes on ignoring. */
int signals_take(void) {
	static const int passed[] = {SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2};
	struct sigaction action;
	sigset_t taken;
	sigemptyset(&taken);
	for (size_t i = 0; i < sizeof passed / sizeof *passed; i++)
		if (sigaction(passed[i], NULL, &action) == 0 && action.sa_handler != SIG_IGN)
			sigaddset(&taken, passed[i]);
	signal(SIGPIPE, SIG_IGN); /* what cannot be written is an error, and no end */
	signal(SIGXFSZ, SIG_IGN);
	signal(SIGCHLD, SIG_DFL);
	sigprocmask(SIG_SETMASK, &taken, NULL);
	return signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
}

static int signal_pass(const struct relay *relay) {
	struct signalfd_siginfo info;
	if (read(relay->signals, &info, sizeof info) != sizeof info)
		return 0;
	command(relay, info.ssi_signo, CAUSE_NONE);
	return (int)info.ssi_signo;
}

/* 0: nobody wants more, or there is no room for it. Who cannot get rid of the output listens to signals still: then one ends it all. */
static int give(struct relay *relay, int to, const char *data, size_t size) {
	struct pollfd watched[] = {{.fd = to, .events = POLLOUT}, {.fd = relay->signals, .events = POLLIN}};
	while (size) {
		if (poll(watched, 2, -1) < 0 && errno != EINTR)
			return 0;
		int number = watched[1].revents ? signal_pass(relay) : 0;
		if (number && number != SIGUSR1 && number != SIGUSR2)
			return -number;
		if (!watched[0].revents)
			continue;
		ssize_t written = write(to, data, size < PIECE ? size : PIECE);
		if (written < 0 && errno != EAGAIN && errno != EINTR) {
			relay->refused[to] = errno == EPIPE ? 0 : errno;
			return 0;
		}
		data += written > 0 ? written : 0;
		size -= written > 0 ? (size_t)written : 0;
	}
	return 1;
}

/* Whether there may be more. Beyond the limit the run is ended, once: an order that nobody reads would take the place of the report. */
static int output(struct relay *relay, int number) {
	static char data[65536];
	ssize_t got = relay->pipes[number] < 0 ? 0 : read(relay->pipes[number], data, sizeof data);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	uint64_t size = got > 0 ? (uint64_t)got : 0, room = size;
	if (relay->limit && relay->count + size > relay->limit) {
		room = relay->count < relay->limit ? relay->limit - relay->count : 0;
		if (!relay->exceeded)
			command(relay, 0, CAUSE_OUTPUT);
		relay->exceeded = 1;
	}
	relay->count += size;
	int given = size ? give(relay, number, data, room) : 0;
	if (given < 0) {
		relay->stopped = -given;
		command(relay, 0, CAUSE_CALLER); /* before it can see that nobody reads any more */
		pipe_close(relay, 1);
		pipe_close(relay, 2);
	} else if (!given) {
		pipe_close(relay, number); /* if it goes on writing there, it gets SIGPIPE, as without a jail */
	}
	return given > 0;
}

static void input(struct relay *relay, short program, short caller) {
	if (program & POLLERR)
		return pipe_close(relay, 0);
	if (program & POLLOUT) {
		ssize_t written = write(relay->pipes[0], relay->ahead + relay->from, relay->to - relay->from);
		relay->from += written > 0 ? (size_t)written : 0;
	}
	if (!caller || relay->from < relay->to)
		return;
	ssize_t got = read(0, relay->ahead, sizeof relay->ahead);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	relay->from = 0;
	relay->to = got > 0 ? (size_t)got : 0;
	if (got <= 0)
		pipe_close(relay, 0);
}

/* 1: the report is there; what it says of a launcher that is gone is STEP_LOST. */
static int hear(struct relay *relay) {
	int none = 0;
	ssize_t size = message_receive(NULL, relay->channel, &relay->report, sizeof relay->report, 0, NULL, &none);
	if (size != sizeof relay->report)
		relay->report = (struct report){.kind = REPORT_FAILED, .step = STEP_LOST, .error = ECONNRESET};
	return relay->report.kind != REPORT_STARTED;
}

void relay_run(struct relay *relay) {
	enum { CHANNEL, SIGNALS, OUT, ERR, PROGRAM, CALLER, WATCHED };
	for (int over = 0; !over;) {
		int ahead = relay->from < relay->to;
		struct pollfd watched[WATCHED] = {
		    [CHANNEL] = {.fd = relay->channel, .events = POLLIN},
		    [SIGNALS] = {.fd = relay->signals, .events = POLLIN},
		    [OUT] = {.fd = relay->pipes[1], .events = POLLIN},
		    [ERR] = {.fd = relay->pipes[2], .events = POLLIN},
		    /* Even with nothing to write: an error means that the program does not read any more. */
		    [PROGRAM] = {.fd = relay->pipes[0], .events = ahead ? POLLOUT : 0},
		    [CALLER] = {.fd = relay->pipes[0] < 0 || ahead ? -1 : 0, .events = POLLIN},
		};
		if (poll(watched, WATCHED, -1) < 0)
			continue;
		if (watched[SIGNALS].revents)
			signal_pass(relay);
		if (watched[OUT].revents)
			output(relay, 1);
		if (watched[ERR].revents)
			output(relay, 2);
		if (watched[PROGRAM].revents || watched[CALLER].revents)
			input(relay, watched[PROGRAM].revents, watched[CALLER].revents);
		if (watched[CHANNEL].revents)
			over = hear(relay);
	}
	for (int number = 1; number <= 2; number++)
		while (output(relay, number))
			;
}
