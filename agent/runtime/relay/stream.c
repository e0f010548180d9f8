// SPDX-License-Identifier: Apache-2.0
// One stream's bytes: from the app's socket into DATA frames, and from DATA to the app.
// The reference is stream.py: `_pump` and `on_data`.
#include "relay.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

static void put_header(unsigned char *at, uint32_t size, uint32_t stream_id)
{
	at[0] = size >> 16;
	at[1] = size >> 8;
	at[2] = size;
	at[3] = 0; // DATA
	at[4] = 0;
	at[5] = stream_id >> 24;
	at[6] = stream_id >> 16;
	at[7] = stream_id >> 8;
	at[8] = stream_id;
}

// Neither direction's end, nor a failure, by `name` and `failure`.
static int open_still(struct stream *s, PyObject *ended)
{
	int failed = is_true(s->stream, n_failure);
	if (failed)
		return failed < 0 ? -1 : 0;
	int over = is_true(s->stream, ended);
	return over < 0 ? -1 : !over;
}

int stream_takes(struct stream *s)
{
	if (s->fd < 0 || PyByteArray_GET_SIZE(s->pending))
		return 0;
	return open_still(s, n_remote_ended);
}

enum outcome stream_readable(struct stream *s)
{
	struct tunnel *t = s->tunnel;
	struct engine *engine = t->engine;
	long long own, whole, max_frame;
	int ok = open_still(s, n_local_ended);
	if (ok <= 0)
		return ok < 0 ? FAILED : NOT_OURS;
	// Once its end is known a short read is not the last, so it must go on until the end is read.
	ok = is_true(s->stream, n_app_ended);
	if (ok)
		return ok < 0 ? FAILED : NOT_OURS;
	ok = is_true(t->tunnel, n_ending);
	if (ok)
		return ok < 0 ? FAILED : NOT_OURS;
	Py_ssize_t waiting = PyObject_Size(t->backlog);
	if (waiting)
		return waiting < 0 ? FAILED : NOT_OURS;
	if (get_number(s->send, n_available, &own) || get_number(t->send, n_available, &whole) ||
	    get_number(t->wire, n_max_frame_bytes, &max_frame))
		return FAILED;
	long long limit = own < whole ? own : whole;
	if (limit <= 0)
		return NOT_OURS;
	if (limit > CHUNK_BYTES)
		limit = CHUNK_BYTES;

	// One read, scattered so that each frame's header fits in front of its payload.
	long long frame = max_frame >= CHUNK_BYTES ? CHUNK_BYTES : SMALL_FRAME_BYTES;
	struct iovec slots[CHUNK_BYTES / SMALL_FRAME_BYTES + 2];
	int count = 0;
	long long placed = 0;
	for (unsigned char *at = engine->chunk; placed < limit; count++) {
		long long size = limit - placed < frame ? limit - placed : frame;
		slots[count].iov_base = at + FRAME_HEADER_BYTES;
		slots[count].iov_len = size;
		at += FRAME_HEADER_BYTES + size;
		placed += size;
	}
	ssize_t size;
	if (count == 1) {
		size = recv(s->fd, slots[0].iov_base, slots[0].iov_len, MSG_DONTWAIT);
	} else {
		struct msghdr message = {.msg_iov = slots, .msg_iovlen = count};
		size = recvmsg(s->fd, &message, MSG_DONTWAIT);
	}
	if (size < 0) {
		if (errno == EAGAIN || errno == EINTR)
			return set_flag(s->stream, n_readable, errno == EINTR) ? FAILED : DONE;
		// The error is ours alone to know: a second read would not meet it.
		PyObject *error = os_error(errno);
		return !error || call(engine, s->stream, n_app_failed, error) ? FAILED : DONE;
	}
	if (size == 0)
		return NOT_OURS; // a second read meets the end again

	int framed = 0;
	for (ssize_t left = size; left > 0; framed++) {
		ssize_t step = left < frame ? left : frame;
		put_header((unsigned char *)slots[framed].iov_base - FRAME_HEADER_BYTES, step, s->id);
		left -= step;
	}
	if (add_number(s->taken, n_total, size) || set_number(s->send, n_available, own - size) ||
	    set_number(t->send, n_available, whole - size))
		return FAILED;
	if (PyByteArray_GET_SIZE(t->out) && tunnel_encrypt_control(t))
		return FAILED;
	if (tunnel_write(t, engine->chunk, size + framed * FRAME_HEADER_BYTES))
		return FAILED;
	if (size > SMALL_BYTES ? tunnel_transmit(t) : tunnel_soon(t))
		return FAILED;
	if (PyDict_GET_SIZE(t->turn) && call(engine, t->tunnel, n_pass_turn, NULL))
		return FAILED;
	// A short read was the last: the end of the stream is an event of its own.
	int more = size == limit;
	if (set_flag(s->stream, n_readable, more))
		return FAILED;
	if (more && !s->again) {
		s->again = 1;
		if (list_add(&engine->again, (PyObject *)s))
			return FAILED;
	}
	return DONE;
}

static PyObject *views_of(struct iovec *pieces, int count)
{
	PyObject *views = PyList_New(count);
	for (int i = 0; views && i < count; i++) {
		PyObject *view = PyMemoryView_FromMemory(pieces[i].iov_base, pieces[i].iov_len, PyBUF_READ);
		if (!view)
			Py_CLEAR(views);
		else
			PyList_SET_ITEM(views, i, view);
	}
	return views;
}

// The bytes may go when they have left for good; in bulk, as ReceiveWindow does it.
static int credit(struct stream *s, size_t size)
{
	long long own, own_batch, whole, whole_batch;
	if (get_number(s->receive, n_uncredited, &own) || get_number(s->receive, n_batch, &own_batch) ||
	    get_number(s->tunnel->receive, n_uncredited, &whole) ||
	    get_number(s->tunnel->receive, n_batch, &whole_batch))
		return -1;
	own += size;
	whole += size;
	if (own >= own_batch || whole >= whole_batch) {
		PyObject *result = PyObject_CallMethod(s->tunnel->wire, "credit", "In", s->id, (Py_ssize_t)size);
		Py_XDECREF(result);
		return result ? 0 : -1;
	}
	return set_number(s->receive, n_uncredited, own) ||
	       set_number(s->tunnel->receive, n_uncredited, whole) ? -1 : 0;
}

int stream_deliver(struct stream *s, struct iovec *pieces, int count, size_t size)
{
	struct engine *engine = s->tunnel->engine;
	struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
	ssize_t sent = sendmsg(s->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent == (ssize_t)size)
		return add_number(s->sent, n_total, size) || credit(s, size) ? -1 : 0;
	int error = errno;
	PyObject *views = views_of(pieces, count);
	if (!views)
		return -1;
	PyObject *fault = Py_NewRef(Py_None);
	if (sent < 0 && error != EAGAIN && error != EINTR)
		Py_SETREF(fault, os_error(error));
	engine->python_ran = 1;
	PyObject *result = fault ? PyObject_CallMethod(s->stream, "settle", "OnnO", views, (Py_ssize_t)size,
						       sent < 0 ? (Py_ssize_t)0 : sent, fault)
				 : NULL;
	Py_XDECREF(fault);
	Py_DECREF(views);
	Py_XDECREF(result);
	return result ? 0 : -1;
}
