/* The Python module that counts audit events and notes what they are about, for the result. PEP 578. Nothing is protected by it: code
 * of the payload runs in the same memory, and can write to all of it (docs/audit.md). Limited API.
 *
 * What is seen goes to a memory file that the caller reads when all is over. What is to be refused, and with which words, stands in a page
 * that is written once. The hook calls no Python code and keeps no object. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "audit.h"

#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Every CPython from 3.8 on exports it; the limited API's headers leave it out. */
extern int PySys_AddAuditHook(int (*hook)(const char *, PyObject *, void *), void *data);

enum { SEEN = 4096, PAGE = 4096, WORDS = 256 };

struct policy { /* the page that is written once */
	uint32_t refused; /* bit of each enum audit_kind */
	char words[AUDIT_KINDS][WORDS];
};

static struct audit *audit;
static const struct policy *policy;
static _Atomic uint64_t seen[SEEN]; /* hashes of what is noted already */

struct event {
	const char *name; /* one that ends in a dot is a beginning */
	enum audit_kind kind;
	int subject; /* which argument it is about */
};

static const struct event events[] = {
    {"import", AUDIT_IMPORT, 0},          {"open", AUDIT_FILE, 0},
    {"socket.connect", AUDIT_SOCKET, 1},  {"socket.bind", AUDIT_SOCKET, 1},
    {"socket.sendto", AUDIT_SOCKET, 1},   {"socket.getaddrinfo", AUDIT_SOCKET, 0},
    {"socket.__new__", AUDIT_SOCKET, -1}, {"subprocess.Popen", AUDIT_PROCESS, 0},
    {"os.system", AUDIT_PROCESS, 0},      {"os.exec", AUDIT_PROCESS, 0},
    {"os.posix_spawn", AUDIT_PROCESS, 0}, {"os.fork", AUDIT_PROCESS, -1},
    {"os.forkpty", AUDIT_PROCESS, -1},    {"pty.spawn", AUDIT_PROCESS, -1},
    {"ctypes.dlopen", AUDIT_NATIVE, 0},
};

static const struct event *event_of(const char *name) {
	for (size_t i = 0; i < sizeof events / sizeof *events; i++)
		if (events[i].name[0] == name[0] && !strcmp(events[i].name, name))
			return &events[i];
	return NULL;
}

/* The text that an argument is, or begins with; "" for what is none. Exact types only: another could bring code of its own. */
static const char *text_of(PyObject *value, Py_ssize_t *size) {
	const char *text = "";
	char *bytes;
	*size = 0;
	if (value && PyTuple_CheckExact(value) && PyTuple_Size(value) > 0)
		value = PyTuple_GetItem(value, 0);
	if (value && PyUnicode_CheckExact(value)) {
		text = PyUnicode_AsUTF8AndSize(value, size);
		if (!text)
			PyErr_Clear(); /* a lone surrogate */
	} else if (value && PyBytes_CheckExact(value)) {
		if (PyBytes_AsStringAndSize(value, &bytes, size) == 0)
			text = bytes;
	}
	return text ? text : "";
}

static int new_to_us(enum audit_kind kind, const char *name, const char *text, Py_ssize_t size) {
	uint64_t hash = 1469598103934665603u + (uint64_t)kind;
	for (; *name; name++)
		hash = (hash ^ (unsigned char)*name) * 1099511628211u;
	for (Py_ssize_t i = 0; i < size; i++)
		hash = (hash ^ (unsigned char)text[i]) * 1099511628211u;
	hash |= 1;
	for (size_t i = 0; i < 8; i++) {
		uint64_t empty = 0;
		_Atomic uint64_t *slot = &seen[(hash + i) % SEEN];
		if (atomic_compare_exchange_strong(slot, &empty, hash))
			return 1;
		if (empty == hash)
			return 0;
	}
	return 1; /* noted once more than needed */
}

/* A record: kind, two bytes of size, text. Processes that share the file get each their own place. */
static void note(const struct event *event, const char *text, Py_ssize_t size) {
	int named = event->kind == AUDIT_SOCKET || event->kind == AUDIT_PROCESS;
	size_t name = named ? strlen(event->name) + 1 : 0;
	if (size > AUDIT_LONGEST - 64)
		size = AUDIT_LONGEST - 64;
	size_t whole = name + (size_t)size;
	if (!new_to_us(event->kind, named ? event->name : "", text, size))
		return;
	if (audit->used > AUDIT_ROOM || whole + 3 > AUDIT_ROOM - audit->used) {
		audit->cut = 1;
		return;
	}
	uint32_t at = __atomic_fetch_add(&audit->used, (uint32_t)whole + 3, __ATOMIC_RELAXED);
	if (at > AUDIT_ROOM || whole + 3 > AUDIT_ROOM - at) {
		audit->cut = 1;
		return;
	}
	unsigned char *record = audit->records + at;
	record[1] = (unsigned char)whole;
	record[2] = (unsigned char)(whole >> 8);
	if (named) {
		memcpy(record + 3, event->name, name - 1);
		record[3 + name - 1] = ' ';
	}
	memcpy(record + 3 + name, text, (size_t)size);
	__atomic_store_n(record, (unsigned char)(event->kind + 1), __ATOMIC_RELEASE);
}

static int hook(const char *name, PyObject *arguments, void *data) {
	const struct event *event = event_of(name);
	Py_ssize_t size = 0;
	(void)data;
	if (!event)
		return 0;
	__atomic_fetch_add(&audit->counts[event->kind], 1, __ATOMIC_RELAXED);
	PyObject *subject = event->subject >= 0 && arguments && PyTuple_Check(arguments) && PyTuple_Size(arguments) > event->subject
	                        ? PyTuple_GetItem(arguments, event->subject)
	                        : NULL;
	const char *text = text_of(subject, &size);
	if (size || event->kind == AUDIT_PROCESS || event->kind == AUDIT_SOCKET)
		note(event, text, size);
	if (policy->refused & (1u << event->kind)) {
		PyErr_Format(PyExc_PermissionError, "%s: %s", name, policy->words[event->kind]);
		return -1;
	}
	return 0;
}

/* install(descriptor, refused): of the memory file; a dictionary of kinds and the words of their refusal. */
static PyObject *install(PyObject *module, PyObject *arguments) {
	int descriptor;
	PyObject *refused, *key, *value;
	Py_ssize_t position = 0;
	(void)module;
	if (!PyArg_ParseTuple(arguments, "iO", &descriptor, &refused))
		return NULL;
	if (policy)
		return PyErr_Format(PyExc_RuntimeError, "the hook is there already");
	struct policy *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *shared = mmap(NULL, sizeof *audit, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
	if (page == MAP_FAILED || shared == MAP_FAILED)
		return PyErr_SetFromErrno(PyExc_OSError);
	_Static_assert(sizeof *page <= PAGE, "the policy is one page");
	while (PyDict_Next(refused, &position, &key, &value)) {
		Py_ssize_t size;
		long kind = PyLong_AsLong(key);
		const char *words = PyUnicode_AsUTF8AndSize(value, &size);
		if (kind < 0 || kind >= AUDIT_KINDS || !words || size >= WORDS)
			return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no such kind, or too many words");
		page->refused |= 1u << kind;
		memcpy(page->words[kind], words, (size_t)size);
	}
	if (mprotect(page, PAGE, PROT_READ) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	audit = shared;
	policy = page;
	audit->magic = AUDIT_MAGIC;
	if (PySys_AddAuditHook(hook, NULL) < 0)
		return NULL;
	return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"install", install, METH_VARARGS, "Adds the hook; it stays until the process ends."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_audit", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__audit(void);
PyMODINIT_FUNC PyInit__audit(void) { return PyModule_Create(&definition); }
