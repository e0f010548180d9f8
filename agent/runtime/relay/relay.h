// SPDX-License-Identifier: Apache-2.0
// The relay's innermost loop in C: what is shared by its files.
//
// An accelerator, not a second implementation: it works on the very objects of
// tunnel.py, stream.py and the wire package, by their attributes, and does only
// what is usual: bytes of an open stream, whole DATA frames without padding, a
// socket that takes what it is given. For anything else it leaves all state as
// the Python code expects it and lets that act. So there is one place for every
// rule, and it is not here.
//
// Called from trio's thread with the GIL held; releases it in epoll_wait alone.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

enum {
	FRAME_HEADER_BYTES = 9,
	SMALL_FRAME_BYTES = 16384, // what every HTTP/2 peer takes; scratch.py
	RECORD_BYTES = 16384,
	CHUNK_BYTES = 16 * RECORD_BYTES - FRAME_HEADER_BYTES, // scratch.py
	READ_BYTES = 256 * 1024,                              // scratch.py
	SMALL_BYTES = 16 * 1024,                              // tunnel.py
	MAX_FRAME_BYTES = 1024 * 1024,                        // h2state.py
	GATHER_LIMIT = 64,                                    // stream.py
};

// OpenSSL's functions, from the library that pyOpenSSL itself has loaded: their
// addresses come from its binding, so nothing is linked and no version can differ.
struct tls {
	int (*read)(void *ssl, void *into, int size);
	int (*write)(void *ssl, const void *from, int size);
	int (*get_error)(const void *ssl, int result);
	int (*bio_read)(void *bio, void *into, int size);
	int (*bio_write)(void *bio, const void *from, int size);
};

struct engine;

// One tunnel. The objects are those of the Python attributes of the same names.
struct tunnel {
	PyObject_HEAD
	struct engine *engine;
	int fd;
	void *ssl, *into_ssl, *from_ssl;
	PyObject *tunnel;           // runtime.tunnel.Tunnel
	PyObject *wire, *splitter;  // wire.hbone.HboneConnection, its FrameSplitter
	PyObject *send, *receive;   // the connection's windows
	PyObject *out;              // bytearray: control frames to be sent first
	PyObject *turn, *backlog;   // who waits for the socket; what the socket did not take
	PyObject *streams;          // dict: stream id -> struct stream
	int dirty;                  // records wait in from_ssl for the end of the round
	int again;                  // there may be more to read
};

// One open stream and the app's socket.
struct stream {
	PyObject_HEAD
	struct tunnel *tunnel;
	int fd;
	uint32_t id;
	PyObject *stream;          // runtime.stream.TunnelStream
	PyObject *send, *receive;  // its windows
	PyObject *taken, *sent;    // ByteCount
	PyObject *pending;         // bytearray: what the app did not take
	int again;
};

struct list {
	PyObject **items;
	Py_ssize_t count, room;
};

struct engine {
	PyObject_HEAD
	int epoll;
	struct tls tls;
	PyObject **watched; // by descriptor; NULL where Python's callbacks do it all
	int watched_room;
	struct list dirty, again;
	int python_ran; // Python code was called: it may have something to do
	unsigned char *ciphertext, *plaintext, *outgoing, *chunk;
};

// What a function of the fast path says.
enum outcome {
	FAILED = -1, // a Python exception is set
	DONE = 0,
	NOT_OURS = 1, // nothing was touched: call the Python callback
};

extern PyTypeObject tunnel_type, stream_type, engine_type;
int names_init(void);

// attributes.c
extern PyObject *n_available, *n_uncredited, *n_batch, *n_total, *n_in_data, *n_payload_left,
	*n_padding_left, *n_pad_length_due, *n_announced, *n_ends_stream, *n_data_stream, *n_partial,
	*n_skip, *n_preface, *n_block_stream, *n_first, *n_failure, *n_local_ended, *n_remote_ended,
	*n_readable, *n_app_ended, *n_heard, *n_sock_ended, *n_ending, *n_closed, *n_max_frame_bytes, *n_act, *n_queue, *n_settle,
	*n_app_failed, *n_on_data, *n_pass_turn, *n_credit, *n_turn_due, *n_tls_failed, *n_broken, *n_peer_ended,
	*n_read_turn;
int get_number(PyObject *object, PyObject *name, long long *value);
int set_number(PyObject *object, PyObject *name, long long value);
int add_number(PyObject *object, PyObject *name, long long delta);
int is_true(PyObject *object, PyObject *name);                 // -1 on error
int set_flag(PyObject *object, PyObject *name, int value);
int call(struct engine *engine, PyObject *object, PyObject *name, PyObject *argument); // steals argument
PyObject *os_error(int number);

// tunnel.c
enum outcome tunnel_readable(struct tunnel *t);
int tunnel_transmit(struct tunnel *t);
int tunnel_encrypt_control(struct tunnel *t);
int tunnel_write(struct tunnel *t, const void *from, int size);
int tunnel_soon(struct tunnel *t);

// stream.c
enum outcome stream_readable(struct stream *s);
int stream_deliver(struct stream *s, struct iovec *pieces, int count, size_t size);
int stream_takes(struct stream *s); // 1 when the fast path may write to the app; -1 on error

// sockets.c
PyObject *pod_socket(PyObject *module, PyObject *arguments);

int list_add(struct list *list, PyObject *item);
