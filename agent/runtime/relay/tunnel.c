// SPDX-License-Identifier: Apache-2.0
// One tunnel's socket: ciphertext in, frames cut, ciphertext out.
// The reference is tunnel.py (`_read`, `_process`, `_transmit`) and wire/frames.py.
#include "relay.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum {
	WANT_READ = 2,  // SSL_ERROR_WANT_READ, openssl/ssl.h
	END_STREAM = 1, // RFC 9113, section 6.1
};

int tunnel_write(struct tunnel *t, const void *from, int size)
{
	int written = t->engine->tls.write(t->ssl, from, size);
	if (written == size)
		return 0;
	return call(t->engine, t->tunnel, n_tls_failed, PyLong_FromLong(written));
}

int tunnel_encrypt_control(struct tunnel *t)
{
	if (tunnel_write(t, PyByteArray_AS_STRING(t->out), PyByteArray_GET_SIZE(t->out)))
		return -1;
	return PyByteArray_Resize(t->out, 0);
}

int tunnel_soon(struct tunnel *t)
{
	if (t->dirty)
		return 0;
	t->dirty = 1;
	return list_add(&t->engine->dirty, (PyObject *)t);
}

int tunnel_transmit(struct tunnel *t)
{
	struct engine *engine = t->engine;
	int closed = is_true(t->tunnel, n_closed);
	if (closed)
		return closed < 0 ? -1 : 0;
	if (PyByteArray_GET_SIZE(t->out) && tunnel_encrypt_control(t))
		return -1;
	for (;;) {
		int size = engine->tls.bio_read(t->from_ssl, engine->outgoing, 2 * READ_BYTES);
		if (size <= 0)
			return 0;
		ssize_t sent = 0;
		Py_ssize_t waiting = PyObject_Size(t->backlog);
		if (waiting < 0)
			return -1;
		if (!waiting) {
			sent = send(t->fd, engine->outgoing, size, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (sent < 0) {
				if (errno != EAGAIN && errno != EINTR) {
					PyObject *error = os_error(errno);
					return error ? call(engine, t->tunnel, n_broken, error) : -1;
				}
				sent = 0;
			}
		}
		if (sent < size) {
			PyObject *rest = PyBytes_FromStringAndSize((char *)engine->outgoing + sent, size - sent);
			if (!rest || call(engine, t->tunnel, n_queue, rest))
				return -1;
		}
		if (size < 2 * READ_BYTES)
			return 0;
	}
}

// Let Python cut and act on `size` bytes of plaintext.
static int act(struct tunnel *t, unsigned char *from, size_t size)
{
	PyObject *view = PyMemoryView_FromMemory((char *)from, size, PyBUF_WRITE);
	return view ? call(t->engine, t->tunnel, n_act, view) : -1;
}

struct gathered {
	struct stream *stream;
	struct iovec pieces[GATHER_LIMIT];
	int count;
	size_t size;
};

static int deliver(struct gathered *g)
{
	int result = g->count ? stream_deliver(g->stream, g->pieces, g->count, g->size) : 0;
	g->count = 0;
	g->size = 0;
	Py_CLEAR(g->stream);
	return result;
}

// The peer's last frame of a stream was read: what it holds goes to the app, then its end.
static int finish(struct tunnel *t, struct gathered *g, long long id)
{
	return deliver(g) || call(t->engine, t->tunnel, n_peer_ended, PyLong_FromLongLong(id)) ? -1 : 0;
}

// Where the splitter stands: 1 between frames, 2 inside plain DATA, 0 anywhere else.
static int position(struct tunnel *t, long long *left, long long *stream_id)
{
	PyObject *const odd[] = {n_preface, n_partial, n_skip, n_block_stream, n_first, n_padding_left,
				 n_pad_length_due};
	for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
		int is = is_true(t->splitter, odd[i]);
		if (is)
			return is < 0 ? -1 : 0;
	}
	int inside = is_true(t->splitter, n_in_data);
	if (inside <= 0)
		return inside < 0 ? -1 : 1;
	int ends = is_true(t->splitter, n_ends_stream), fresh = is_true(t->splitter, n_announced);
	if (ends || fresh)
		return ends < 0 || fresh < 0 ? -1 : 0;
	if (get_number(t->splitter, n_payload_left, left) ||
	    get_number(t->splitter, n_data_stream, stream_id))
		return -1;
	return *left > 0 ? 2 : 0;
}

static struct stream *find(struct tunnel *t, long long id)
{
	PyObject *key = PyLong_FromLongLong(id);
	if (!key)
		return NULL;
	struct stream *s = (struct stream *)PyDict_GetItemWithError(t->streams, key);
	Py_DECREF(key);
	if (!s)
		return NULL;
	int takes = stream_takes(s);
	return takes > 0 ? (struct stream *)Py_NewRef((PyObject *)s) : NULL;
}

// Account for a frame that begins; 1 when both windows have room for it.
static int admit(struct stream *s, long long size)
{
	long long own, whole;
	if (get_number(s->receive, n_available, &own) || get_number(s->tunnel->receive, n_available, &whole))
		return -1;
	if (own < size || whole < size)
		return 0;
	return set_number(s->receive, n_available, own - size) ||
	       set_number(s->tunnel->receive, n_available, whole - size) ? -1 : 1;
}

// Plain DATA of open streams goes to their apps; from the first other byte on, all goes to Python.
static int process(struct tunnel *t, unsigned char *data, size_t size)
{
	long long left = 0, id = 0;
	int where = position(t, &left, &id);
	if (where <= 0)
		return where < 0 ? -1 : act(t, data, size);
	struct gathered g = {0};
	size_t at = 0;
	int inside = where == 2, was_inside = inside, ends = 0, failed = 0;
	while (at < size) {
		if (!g.stream || g.stream->id != id || !inside) {
			unsigned char *head = data + at;
			if (!inside) {
				if (size - at < FRAME_HEADER_BYTES || head[3] || head[4] & ~END_STREAM)
					break;
				left = head[0] << 16 | head[1] << 8 | head[2];
				ends = head[4] & END_STREAM;
				long long next = (long long)(head[5] & 0x7f) << 24 | head[6] << 16 | head[7] << 8 | head[8];
				if (left > MAX_FRAME_BYTES)
					break;
				// A frame that ends its stream is ours when it is all here.
				if (ends ? left > (long long)(size - at) - FRAME_HEADER_BYTES : !left)
					break;
				if (next != id && (failed = deliver(&g)))
					break;
				id = next;
			}
			if (!g.stream && !(g.stream = find(t, id))) {
				failed = PyErr_Occurred() != NULL;
				break;
			}
			if (!inside) {
				int admitted = left ? admit(g.stream, left) : 1;
				if (admitted <= 0) {
					failed = admitted < 0;
					break;
				}
				at += FRAME_HEADER_BYTES;
				inside = left > 0;
				if (inside && at == size)
					break;
			}
		}
		if (!left) {
			if ((failed = finish(t, &g, id)))
				break;
			continue;
		}
		size_t step = (size_t)left < size - at ? (size_t)left : size - at;
		g.pieces[g.count++] = (struct iovec){data + at, step};
		g.size += step;
		at += step;
		left -= step;
		inside = left > 0;
		if (!inside && ends) {
			if ((failed = finish(t, &g, id)))
				break;
		} else if (g.count == GATHER_LIMIT && (failed = deliver(&g))) {
			break;
		}
	}
	if (!failed)
		failed = deliver(&g);
	Py_CLEAR(g.stream);
	if (failed)
		return -1;
	// Where we leave off is where the splitter goes on.
	if (inside) {
		if (set_number(t->splitter, n_payload_left, left) || set_number(t->splitter, n_data_stream, id))
			return -1;
		if (!was_inside && (set_flag(t->splitter, n_in_data, 1) ||
				    set_flag(t->splitter, n_ends_stream, 0) || set_number(t->splitter, n_announced, 0)))
			return -1;
	} else if (was_inside && set_flag(t->splitter, n_in_data, 0)) {
		return -1;
	}
	return at < size ? act(t, data + at, size - at) : 0;
}

enum outcome tunnel_readable(struct tunnel *t)
{
	struct engine *engine = t->engine;
	int ending = is_true(t->tunnel, n_ending);
	if (ending)
		return ending < 0 ? FAILED : NOT_OURS;
	int ended = is_true(t->tunnel, n_sock_ended); // then reads go on until the end is read
	if (ended)
		return ended < 0 ? FAILED : NOT_OURS;
	ssize_t received = recv(t->fd, engine->ciphertext, READ_BYTES, MSG_DONTWAIT);
	if (received < 0) {
		if (errno == EAGAIN)
			return DONE;
		if (errno == EINTR)
			return NOT_OURS;
		PyObject *error = os_error(errno);
		return !error || call(engine, t->tunnel, n_broken, error) ? FAILED : DONE;
	}
	if (received == 0)
		return NOT_OURS; // a second read meets the end again
	if (set_flag(t->tunnel, n_heard, 1))
		return FAILED;
	if (engine->tls.bio_write(t->into_ssl, engine->ciphertext, received) != received) {
		PyErr_NoMemory();
		return FAILED;
	}
	for (int full = 1; full;) {
		int filled = 0, result;
		while (filled < READ_BYTES) {
			result = engine->tls.read(t->ssl, engine->plaintext + filled, READ_BYTES - filled);
			if (result <= 0)
				break;
			filled += result;
		}
		full = filled == READ_BYTES;
		int fault = !full && engine->tls.get_error(t->ssl, result) != WANT_READ;
		if (filled && process(t, engine->plaintext, filled))
			return FAILED;
		if (fault)
			return call(engine, t->tunnel, n_tls_failed, PyLong_FromLong(result)) ? FAILED : DONE;
	}
	if (PyByteArray_GET_SIZE(t->out) && tunnel_soon(t))
		return FAILED;
	if (received == READ_BYTES && !t->again) {
		t->again = 1;
		if (list_add(&engine->again, (PyObject *)t))
			return FAILED;
	}
	return DONE;
}
