// SPDX-License-Identifier: Apache-2.0
// Attributes of Python objects as numbers and flags, and calls back into Python.
#include "relay.h"

#include <errno.h>
#include <string.h>

PyObject *n_available, *n_uncredited, *n_batch, *n_total, *n_in_data, *n_payload_left, *n_padding_left,
	*n_pad_length_due, *n_announced, *n_ends_stream, *n_data_stream, *n_partial, *n_skip, *n_preface,
	*n_block_stream, *n_first, *n_failure, *n_local_ended, *n_remote_ended, *n_readable, *n_app_ended, *n_heard, *n_sock_ended,
	*n_ending, *n_closed, *n_max_frame_bytes, *n_act, *n_queue, *n_settle, *n_app_failed, *n_on_data,
	*n_pass_turn, *n_credit, *n_turn_due, *n_tls_failed, *n_broken, *n_peer_ended, *n_read_turn;

static const struct {
	PyObject **where;
	const char *text;
} names[] = {
	// wire/windows.py, stream.py
	{&n_available, "available"},
	{&n_uncredited, "_uncredited"},
	{&n_batch, "_batch"},
	{&n_total, "total"},
	// wire/frames.py
	{&n_in_data, "_in_data"},
	{&n_payload_left, "_payload_left"},
	{&n_padding_left, "_padding_left"},
	{&n_pad_length_due, "_pad_length_due"},
	{&n_announced, "_announced"},
	{&n_ends_stream, "_ends_stream"},
	{&n_data_stream, "_data_stream"},
	{&n_partial, "_partial"},
	{&n_skip, "_skip"},
	{&n_preface, "_preface"},
	{&n_block_stream, "_block_stream"},
	{&n_first, "_first"},
	// stream.py
	{&n_failure, "failure"},
	{&n_local_ended, "_local_ended"},
	{&n_remote_ended, "_remote_ended"},
	{&n_readable, "_readable"},
	{&n_app_ended, "_app_ended"},
	{&n_settle, "settle"},
	{&n_app_failed, "app_failed"},
	{&n_on_data, "on_data"},
	{&n_turn_due, "_turn"},
	// tunnel.py, wire/hbone.py
	{&n_heard, "_heard"},
	{&n_sock_ended, "_sock_ended"},
	{&n_ending, "_ending"},
	{&n_closed, "closed"},
	{&n_max_frame_bytes, "max_frame_bytes"},
	{&n_act, "act"},
	{&n_queue, "_queue"},
	{&n_pass_turn, "pass_turn"},
	{&n_credit, "credit"},
	{&n_tls_failed, "tls_failed"},
	{&n_broken, "broken"},
	{&n_peer_ended, "peer_ended"},
	{&n_read_turn, "_turn_to_read"},
};

int names_init(void)
{
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		*names[i].where = PyUnicode_InternFromString(names[i].text);
		if (!*names[i].where)
			return -1;
	}
	return 0;
}

int get_number(PyObject *object, PyObject *name, long long *value)
{
	PyObject *found = PyObject_GetAttr(object, name);
	if (!found)
		return -1;
	*value = PyLong_AsLongLong(found);
	Py_DECREF(found);
	return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

int set_number(PyObject *object, PyObject *name, long long value)
{
	PyObject *number = PyLong_FromLongLong(value);
	if (!number)
		return -1;
	int result = PyObject_SetAttr(object, name, number);
	Py_DECREF(number);
	return result;
}

int add_number(PyObject *object, PyObject *name, long long delta)
{
	long long value;
	if (get_number(object, name, &value))
		return -1;
	return set_number(object, name, value + delta);
}

int is_true(PyObject *object, PyObject *name)
{
	PyObject *found = PyObject_GetAttr(object, name);
	if (!found)
		return -1;
	int result = PyObject_IsTrue(found);
	Py_DECREF(found);
	return result;
}

int set_flag(PyObject *object, PyObject *name, int value)
{
	return PyObject_SetAttr(object, name, value ? Py_True : Py_False);
}

int call(struct engine *engine, PyObject *object, PyObject *name, PyObject *argument)
{
	PyObject *arguments[2] = {object, argument};
	engine->python_ran = 1;
	PyObject *result = PyObject_VectorcallMethod(
		name, arguments, (argument ? 2 : 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
	Py_XDECREF(argument);
	Py_XDECREF(result);
	return result ? 0 : -1;
}

PyObject *os_error(int number)
{
	return PyObject_CallFunction(PyExc_OSError, "is", number, strerror(number));
}

int list_add(struct list *list, PyObject *item)
{
	if (list->count == list->room) {
		Py_ssize_t room = list->room ? 2 * list->room : 64;
		PyObject **items = PyMem_Realloc(list->items, room * sizeof *items);
		if (!items) {
			PyErr_NoMemory();
			return -1;
		}
		list->items = items;
		list->room = room;
	}
	list->items[list->count++] = Py_NewRef(item);
	return 0;
}
