/* The Python module that a template runs on: `serve` waits for jobs, makes each one's cell, and returns in the job. Limited API.
 *
 * The clone that becomes process 1 shares our memory until it execs, and we wait for that long (as vfork does): so only one copy of the
 * interpreter is made for each job, the job's own. It continues here, at the jump, on the stack that its copy has. clone(2) */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "ladder.h"

#include <errno.h>
#include <sched.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { STACK = 131072 };

static struct cell cell;
static int reaper_fd, listener = -1, awaited, libraries[MAX_LIBRARIES], library_count;
static jmp_buf in_job;

static void jump(void) { _longjmp(in_job, 1); }

static int init_main(void *unused) {
	(void)unused;
	job_init(&cell, reaper_fd, jump);
}

static void clone_failed(int socket, int error) {
	struct cell_message message = {.kind = CELL_FAILED, .step = STEP_CLONE, .error = (uint32_t)error};
	message_send(NULL, socket, &message, sizeof message, NULL, 0);
}

/* Waits for a job and makes its init. Returns 0 in the template, and -1 when the launcher is gone; in the job it jumps. */
static int job_make(int control, const struct plan *plan, char *stack) {
	struct cell_order job;
	int sockets[2], count = 2;
	if (message_receive(NULL, control, &job, sizeof job, MSG_CMSG_CLOEXEC, sockets, &count) != sizeof job)
		return -1;
	if (job.kind == CELL_JOB && count == 2) {
		awaited = job.value != 0;
		cell = (struct cell){.plan = plan,
		                     .launcher = sockets[0],
		                     .orders = sockets[1],
		                     .rootless = 1,
		                     .scratch = -1,
		                     .app = -1,
		                     .library_count = library_count};
		memcpy(cell.libraries, libraries, sizeof libraries);
		if (clone(init_main, stack + STACK, CLONE_NEWPID | CLONE_VM | CLONE_VFORK | SIGCHLD, NULL) < 0)
			clone_failed(sockets[0], errno);
	}
	while (count-- > 0)
		close(sockets[count]);
	return 0;
}

static PyObject *texts(const struct order *order, struct span span) {
	const uint64_t *offsets = at(order, span.offset);
	PyObject *list = PyList_New(0);
	for (uint32_t i = 0; list && i < span.count; i++) {
		PyObject *text = PyBytes_FromString(at(order, (uint32_t)offsets[i]));
		if (!text || PyList_Append(list, text) < 0)
			return NULL;
		Py_DECREF(text);
	}
	return list;
}

/* take(): in a job, when it is ready. Waits for the order and puts its descriptors into their places. The limits come last, as before an
 * exec: under that of open files `ready` might be refused, since what other jobs have on its way is counted for the same user. unix(7) */
static PyObject *take(PyObject *module, PyObject *nothing) {
	struct order *order;
	int descriptors[MAX_FDS];
	(void)module;
	(void)nothing;
	step(&cell, STEP_ORDER, ready(&cell, &listener));
	step(&cell, STEP_ORDER, order_take(&cell, &order, descriptors));
	step(&cell, STEP_DESCRIPTORS, descriptors_place(&cell, order, descriptors));
	step(&cell, STEP_RESOURCE_LIMITS, limits_apply(&cell));
	close(cell.orders); /* the launcher's sign that nothing of ours runs any more */
	const struct order_file *file = at(order, order->files.offset);
	if (order->files.count != 1)
		return PyErr_Format(PyExc_ValueError, "an order for a job has one file, and not %u", order->files.count);
	return Py_BuildValue("(sy#NN)", (const char *)at(order, file->name), (const char *)at(order, file->offset),
	                     (Py_ssize_t)file->size, texts(order, order->argv), texts(order, order->environment));
}

static int libraries_take(PyObject *numbers) {
	Py_ssize_t count = PyTuple_Size(numbers);
	if (count > MAX_LIBRARIES)
		PyErr_Format(PyExc_ValueError, "%zd descriptors are left open; at most %d can be", count, MAX_LIBRARIES);
	for (; library_count < count && !PyErr_Occurred(); library_count++)
		libraries[library_count] = (int)PyLong_AsLong(PyTuple_GetItem(numbers, library_count));
	return PyErr_Occurred() ? -1 : 0;
}

/* serve(control, reaper, plan, libraries): descriptors of the launcher's socket, of the reaper's executable, of the jobs' plan, and those
 * that jobs keep, all of them above the numbers that a program may be given. Returns in a job, which is then in its jail and has given
 * everything up, whether somebody waits for it already; and None in the template when the launcher is gone. */
static PyObject *serve(PyObject *module, PyObject *arguments) {
	struct cell_message serving = {.kind = CELL_SERVING};
	static _Alignas(16) char stack[STACK];
	int control, plan_fd;
	PyObject *kept;
	(void)module;
	if (!PyArg_ParseTuple(arguments, "iiiO!", &control, &reaper_fd, &plan_fd, &PyTuple_Type, &kept) || libraries_take(kept) < 0)
		return NULL;
	const struct plan *plan = plan_map(plan_fd);
	/* Nobody waits for the jobs' inits here: the launcher sees their ends. */
	if (!plan || signal(SIGCHLD, SIG_IGN) == SIG_ERR || prctl(PR_SET_DUMPABLE, 0) < 0 ||
	    message_send(NULL, control, &serving, sizeof serving, NULL, 0) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	PyOS_BeforeFork();
	if (_setjmp(in_job)) {
		PyOS_AfterFork_Child();
		job_program(&cell, &listener);
		return PyBool_FromLong(awaited);
	}
	while (job_make(control, plan, stack) == 0)
		;
	PyOS_AfterFork_Parent();
	return Py_NewRef(Py_None);
}

/* snapshot(): what this process has written until now is mapped from a file, as far as that can be done and is worth it. */
static PyObject *snapshot(PyObject *module, PyObject *nothing) {
	(void)module;
	(void)nothing;
	if (memory_snapshot() < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	return Py_NewRef(Py_None);
}

/* seed(number): where the C library's generators begin, which is the same place in every process that does not say otherwise. rand(3) */
static PyObject *seed(PyObject *module, PyObject *number) {
	unsigned long value = PyLong_AsUnsignedLong(number);
	(void)module;
	if (PyErr_Occurred())
		return NULL;
	srand((unsigned)value);
	srandom((unsigned)value);
	srand48((long)value);
	return Py_NewRef(Py_None);
}

/* flush(): what C's own streams have in their buffers, as exit would. */
static PyObject *flush(PyObject *module, PyObject *nothing) {
	(void)module;
	(void)nothing;
	fflush(NULL);
	return Py_NewRef(Py_None);
}

/* leave(): the end of a job that is well and has nothing more to say, or returns when it cannot be had so. A signal would end the wait for
 * the launcher's answer, and handlers have nobody to tell any more. */
static PyObject *leave(PyObject *module, PyObject *nothing) {
	sigset_t all;
	(void)module;
	(void)nothing;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	syscall(SYS_exit_group, 0L, 0L, 0L, 0L, 0L, LAST_CALL);
	return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"snapshot", snapshot, METH_NOARGS, "Map what was written from a file, so that forks need not copy its page tables."},
    {"seed", seed, METH_O, "Begin the C library's random numbers elsewhere."},
    {"flush", flush, METH_NOARGS, "Write what C's own streams have in their buffers."},
    {"serve", serve, METH_VARARGS, "Make jobs; return in each."},
    {"take", take, METH_NOARGS, "Wait for the order: file name, source, arguments, environment."},
    {"leave", leave, METH_NOARGS, "End with status 0, told before the memory is given back."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_template", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__template(void);
PyMODINIT_FUNC PyInit__template(void) { return PyModule_Create(&definition); }
