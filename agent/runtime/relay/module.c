// SPDX-License-Identifier: Apache-2.0
// The Python types of tunnels and streams, and the module itself.
#include "relay.h"

#include <stddef.h>

#define OBJECTS(type, X) type##_OBJECTS(X)
#define tunnel_OBJECTS(X) \
	X(engine) X(tunnel) X(wire) X(splitter) X(send) X(receive) X(out) X(turn) X(backlog) X(streams)
#define stream_OBJECTS(X) X(tunnel) X(stream) X(send) X(receive) X(taken) X(sent) X(pending)

#define VISIT(field) Py_VISIT(self->field);
#define CLEAR(field) Py_CLEAR(self->field);
#define KEEP(field) Py_XINCREF(self->field);

#define COLLECTED(type)                                                                   \
	static int type##_traverse(struct type *self, visitproc visit, void *arg)         \
	{                                                                                 \
		OBJECTS(type, VISIT)                                                      \
		return 0;                                                                 \
	}                                                                                 \
	static int type##_clear(struct type *self)                                        \
	{                                                                                 \
		OBJECTS(type, CLEAR)                                                      \
		return 0;                                                                 \
	}                                                                                 \
	static void type##_dealloc(struct type *self)                                     \
	{                                                                                 \
		PyObject_GC_UnTrack(self);                                                \
		type##_clear(self);                                                       \
		Py_TYPE(self)->tp_free((PyObject *)self);                                 \
	}

COLLECTED(tunnel)
COLLECTED(stream)

// The arguments are kept once they are all right, so that a half-made handle holds nothing.
static PyObject *tunnel_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
	struct tunnel parsed = {0}, *self;
	unsigned long long ssl, into, from;
	(void)keywords;
	if (!PyArg_ParseTuple(arguments, "O!iKKKOOOOOO!O!OO!", &engine_type, &parsed.engine, &parsed.fd, &ssl, &into,
			      &from, &parsed.tunnel, &parsed.wire, &parsed.splitter, &parsed.send, &parsed.receive,
			      &PyByteArray_Type, &parsed.out, &PyDict_Type, &parsed.turn, &parsed.backlog,
			      &PyDict_Type, &parsed.streams))
		return NULL;
	self = (struct tunnel *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	parsed.ob_base = self->ob_base;
	*self = parsed;
	OBJECTS(tunnel, KEEP)
	self->ssl = (void *)(uintptr_t)ssl;
	self->into_ssl = (void *)(uintptr_t)into;
	self->from_ssl = (void *)(uintptr_t)from;
	return (PyObject *)self;
}

static PyObject *stream_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
	struct stream parsed = {0}, *self;
	(void)keywords;
	if (!PyArg_ParseTuple(arguments, "O!iIOOOOOO!", &tunnel_type, &parsed.tunnel, &parsed.fd, &parsed.id,
			      &parsed.stream, &parsed.send, &parsed.receive, &parsed.taken, &parsed.sent,
			      &PyByteArray_Type, &parsed.pending))
		return NULL;
	self = (struct stream *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	parsed.ob_base = self->ob_base;
	*self = parsed;
	OBJECTS(stream, KEEP)
	return (PyObject *)self;
}

#define HANDLE(type, name, doc)                                                           \
	PyTypeObject type##_type = {                                                      \
		PyVarObject_HEAD_INIT(NULL, 0).tp_name = "meshbpf.agent.runtime._relay." name, \
		.tp_basicsize = sizeof(struct type),                                      \
		.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,                      \
		.tp_doc = doc,                                                            \
		.tp_new = type##_new,                                                     \
		.tp_traverse = (traverseproc)type##_traverse,                             \
		.tp_clear = (inquiry)type##_clear,                                        \
		.tp_dealloc = (destructor)type##_dealloc,                                 \
	};

HANDLE(tunnel, "TunnelHandle", "What the fast path needs of one tunnel; native.py makes them.")
HANDLE(stream, "StreamHandle", "What the fast path needs of one open stream; native.py makes them.")

static PyMethodDef functions[] = {
	{"pod_socket", pod_socket, METH_VARARGS, "A socket in a pod's namespace, ready to dial; its descriptor."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_relay",
	.m_methods = functions,
	.m_doc = "The relay's innermost loop in C; see native.py.",
	.m_size = -1,
};

PyMODINIT_FUNC PyInit__relay(void)
{
	PyObject *made = PyModule_Create(&module);
	if (!made)
		return NULL;
	if (names_init() || PyModule_AddType(made, &engine_type) || PyModule_AddType(made, &tunnel_type) ||
	    PyModule_AddType(made, &stream_type)) {
		Py_DECREF(made);
		return NULL;
	}
	return made;
}
