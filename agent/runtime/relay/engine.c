// SPDX-License-Identifier: Apache-2.0
// The wait: epoll_wait, the fast path for what is ours, a list of the rest for Python.
// Stands where `_Inlet.poll` (reactor.py) calls select.epoll.poll.
#include "relay.h"

#include <errno.h>
#include <sys/epoll.h>
#include <time.h>

enum { MAX_EVENTS = 256, HIGHEST_FD = 1 << 24 };

static double now_s(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int fd_of(PyObject *handle)
{
	return Py_IS_TYPE(handle, &tunnel_type) ? ((struct tunnel *)handle)->fd : ((struct stream *)handle)->fd;
}

// An exception of ours is a bug: it costs one connection or tunnel, and is seen.
static int report(struct engine *engine, PyObject *handle)
{
	PyObject *kind, *error, *trace;
	PyErr_Fetch(&kind, &error, &trace);
	if (!kind || PyErr_GivenExceptionMatches(kind, PyExc_KeyboardInterrupt)) {
		PyErr_Restore(kind, error, trace);
		return -1;
	}
	PyErr_NormalizeException(&kind, &error, &trace);
	if (trace)
		PyException_SetTraceback(error, trace);
	PyObject *whose = Py_IS_TYPE(handle, &tunnel_type) ? ((struct tunnel *)handle)->tunnel
							   : ((struct stream *)handle)->stream;
	engine->python_ran = 1;
	PyObject *result = PyObject_CallMethod(whose, "native_failed", "O", error);
	Py_XDECREF(kind);
	Py_XDECREF(error);
	Py_XDECREF(trace);
	Py_XDECREF(result);
	return result ? 0 : -1;
}

static enum outcome on_event(PyObject *handle, uint32_t flags)
{
	if (flags & ~(uint32_t)(EPOLLIN | EPOLLOUT))
		return NOT_OURS; // an end, or an error
	if (Py_IS_TYPE(handle, &tunnel_type)) {
		struct tunnel *t = (struct tunnel *)handle;
		if (flags & EPOLLOUT && PyObject_Size(t->backlog))
			return NOT_OURS;
		return flags & EPOLLIN ? tunnel_readable(t) : DONE;
	}
	struct stream *s = (struct stream *)handle;
	if (flags & EPOLLOUT && PyByteArray_GET_SIZE(s->pending))
		return NOT_OURS;
	return flags & EPOLLIN ? stream_readable(s) : DONE;
}

// A second turn for those that had more than was fair.
static int on_turn(struct engine *engine, PyObject *handle)
{
	enum outcome outcome;
	PyObject *whose, *turn;
	if (Py_IS_TYPE(handle, &tunnel_type)) {
		struct tunnel *t = (struct tunnel *)handle;
		t->again = 0;
		whose = t->tunnel, turn = n_read_turn;
		outcome = t->fd < 0 ? DONE : tunnel_readable(t);
	} else {
		struct stream *s = (struct stream *)handle;
		s->again = 0;
		whose = s->stream, turn = n_turn_due;
		outcome = s->fd < 0 ? DONE : stream_readable(s);
	}
	if (outcome == NOT_OURS)
		return call(engine, whose, turn, NULL);
	return outcome == FAILED ? -1 : 0;
}

static int run_all(struct engine *engine, struct list *list, int flushing)
{
	// What comes in meanwhile has its turn in the next round.
	struct list due = *list;
	int result = 0;
	*list = (struct list){0};
	for (Py_ssize_t i = 0; i < due.count; i++) {
		PyObject *handle = due.items[i];
		int failed = 0;
		if (flushing) {
			((struct tunnel *)handle)->dirty = 0;
			failed = tunnel_transmit((struct tunnel *)handle);
		} else {
			failed = on_turn(engine, handle);
		}
		if (failed && report(engine, handle))
			result = -1;
		Py_DECREF(handle);
	}
	PyMem_Free(due.items);
	return result;
}

static int serve(struct engine *engine, struct epoll_event *events, int count, PyObject *others)
{
	for (int i = 0; i < count; i++) {
		int fd = events[i].data.fd;
		PyObject *handle = fd >= 0 && fd < engine->watched_room ? engine->watched[fd] : NULL;
		enum outcome outcome = NOT_OURS;
		if (handle) {
			Py_INCREF(handle);
			outcome = on_event(handle, events[i].events);
			int lost = outcome == FAILED && report(engine, handle);
			Py_DECREF(handle);
			if (lost)
				return -1;
		}
		if (outcome != NOT_OURS)
			continue;
		PyObject *event = Py_BuildValue("(iI)", fd, events[i].events);
		if (!event || PyList_Append(others, event)) {
			Py_XDECREF(event);
			return -1;
		}
		Py_DECREF(event);
	}
	return 0;
}

static PyObject *poll(struct engine *engine, PyObject *arguments)
{
	double timeout_s;
	int most;
	if (!PyArg_ParseTuple(arguments, "di", &timeout_s, &most))
		return NULL;
	PyObject *others = PyList_New(0);
	if (!others)
		return NULL;
	double deadline = now_s() + timeout_s;
	engine->python_ran = 0;
	for (;;) {
		struct epoll_event events[MAX_EVENTS];
		if (run_all(engine, &engine->dirty, 1))
			goto failed;
		double left = engine->again.count || engine->python_ran || timeout_s <= 0 ? 0 : deadline - now_s();
		int wait_ms = left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(left * 1e3) + 1;
		int count;
		Py_BEGIN_ALLOW_THREADS
		count = epoll_wait(engine->epoll, events, most < MAX_EVENTS ? most : MAX_EVENTS, wait_ms);
		Py_END_ALLOW_THREADS
		if (count < 0 && errno != EINTR) {
			PyErr_SetFromErrno(PyExc_OSError);
			goto failed;
		}
		if (PyErr_CheckSignals())
			goto failed;
		if (count > 0 && serve(engine, events, count, others))
			goto failed;
		if (engine->again.count && run_all(engine, &engine->again, 0))
			goto failed;
		if (PyList_GET_SIZE(others) || engine->python_ran || timeout_s <= 0 || now_s() >= deadline)
			break;
	}
	if (run_all(engine, &engine->dirty, 1))
		goto failed;
	return others;
failed:
	Py_DECREF(others);
	return NULL;
}

static PyObject *watch(struct engine *engine, PyObject *handle)
{
	if (!Py_IS_TYPE(handle, &tunnel_type) && !Py_IS_TYPE(handle, &stream_type))
		return PyErr_Format(PyExc_TypeError, "neither a tunnel nor a stream");
	int fd = fd_of(handle);
	if (fd < 0 || fd > HIGHEST_FD)
		return PyErr_Format(PyExc_ValueError, "not a descriptor: %d", fd);
	if (fd >= engine->watched_room) {
		int room = 2 * fd + 64;
		PyObject **watched = PyMem_Realloc(engine->watched, room * sizeof *watched);
		if (!watched)
			return PyErr_NoMemory();
		for (int i = engine->watched_room; i < room; i++)
			watched[i] = NULL;
		engine->watched = watched;
		engine->watched_room = room;
	}
	Py_XSETREF(engine->watched[fd], Py_NewRef(handle));
	Py_RETURN_NONE;
}

static PyObject *forget(struct engine *engine, PyObject *number)
{
	long fd = PyLong_AsLong(number);
	if (fd == -1 && PyErr_Occurred())
		return NULL;
	if (fd >= 0 && fd < engine->watched_room && engine->watched[fd]) {
		PyObject *handle = engine->watched[fd];
		// The number will be another socket's: whoever still holds the handle must not use it.
		if (Py_IS_TYPE(handle, &tunnel_type))
			((struct tunnel *)handle)->fd = -1;
		else
			((struct stream *)handle)->fd = -1;
		engine->watched[fd] = NULL;
		Py_DECREF(handle);
	}
	Py_RETURN_NONE;
}

static PyObject *flush_soon(struct engine *engine, PyObject *handle)
{
	(void)engine;
	if (!Py_IS_TYPE(handle, &tunnel_type))
		return PyErr_Format(PyExc_TypeError, "not a tunnel");
	if (tunnel_soon((struct tunnel *)handle))
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *flush(struct engine *engine, PyObject *handle)
{
	(void)engine;
	if (!Py_IS_TYPE(handle, &tunnel_type))
		return PyErr_Format(PyExc_TypeError, "not a tunnel");
	if (tunnel_transmit((struct tunnel *)handle))
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *busy(struct engine *engine, void *unused)
{
	(void)unused;
	return PyBool_FromLong(engine->again.count || engine->dirty.count);
}

static int init(struct engine *engine, PyObject *arguments, PyObject *keywords)
{
	unsigned long long read, write, get_error, bio_read, bio_write;
	(void)keywords;
	if (!PyArg_ParseTuple(arguments, "iKKKKK", &engine->epoll, &read, &write, &get_error, &bio_read, &bio_write))
		return -1;
	engine->tls.read = (void *)(uintptr_t)read;
	engine->tls.write = (void *)(uintptr_t)write;
	engine->tls.get_error = (void *)(uintptr_t)get_error;
	engine->tls.bio_read = (void *)(uintptr_t)bio_read;
	engine->tls.bio_write = (void *)(uintptr_t)bio_write;
	engine->ciphertext = PyMem_Malloc(READ_BYTES);
	engine->plaintext = PyMem_Malloc(READ_BYTES);
	engine->outgoing = PyMem_Malloc(2 * READ_BYTES);
	engine->chunk = PyMem_Malloc(CHUNK_BYTES + 17 * FRAME_HEADER_BYTES);
	if (!engine->ciphertext || !engine->plaintext || !engine->outgoing || !engine->chunk) {
		PyErr_NoMemory();
		return -1;
	}
	return 0;
}

static void dealloc(struct engine *engine)
{
	for (int i = 0; i < engine->watched_room; i++)
		Py_XDECREF(engine->watched[i]);
	struct list *const lists[] = {&engine->dirty, &engine->again};
	for (int which = 0; which < 2; which++) {
		for (Py_ssize_t i = 0; i < lists[which]->count; i++)
			Py_DECREF(lists[which]->items[i]);
		PyMem_Free(lists[which]->items);
	}
	PyMem_Free(engine->watched);
	PyMem_Free(engine->ciphertext);
	PyMem_Free(engine->plaintext);
	PyMem_Free(engine->outgoing);
	PyMem_Free(engine->chunk);
	Py_TYPE(engine)->tp_free((PyObject *)engine);
}

static PyMethodDef methods[] = {
	{"poll", (PyCFunction)poll, METH_VARARGS, "As select.epoll.poll; what is ours is acted on."},
	{"watch", (PyCFunction)watch, METH_O, "Act on the events of a handle's descriptor."},
	{"flush_soon", (PyCFunction)flush_soon, METH_O, "Send what a tunnel has to say before the next wait."},
	{"flush", (PyCFunction)flush, METH_O, "Send what a tunnel has to say now."},
	{"forget", (PyCFunction)forget, METH_O, "Leave a descriptor's events to Python from now on."},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
	{"busy", (getter)busy, NULL, "Something is to be done before the next wait.", NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject engine_type = {
	PyVarObject_HEAD_INIT(NULL, 0).tp_name = "meshbpf.agent.runtime._relay.Engine",
	.tp_basicsize = sizeof(struct engine),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_doc = "Waits on an epoll descriptor; five addresses of OpenSSL functions follow it.",
	.tp_new = PyType_GenericNew,
	.tp_init = (initproc)init,
	.tp_dealloc = (destructor)dealloc,
	.tp_methods = methods,
	.tp_getset = properties,
};
