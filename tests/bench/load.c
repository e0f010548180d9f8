// SPDX-License-Identifier: Apache-2.0
// The load that `make bench` puts on a path, and the server it talks to.
//
//   load server ADDR PORT LIFETIME_S
//   load stream ADDR PORT SECONDS STREAMS up|down
//   load rtt    ADDR PORT SECONDS
//   load rate   ADDR PORT SECONDS CLIENTS
//   load pace   ADDR PORT SECONDS PER_S
//
// A connection's first byte tells the server what it is for:
//   'S'  sink: answers 'k', swallows bytes until FIN, answers their count (8 bytes, big endian)
//   'D'  source: sends until the client closes
//   'E'  echo
//   'C'  one exchange: answers 'c' and closes first, so that TIME_WAIT piles up
//        on the server's side and the client never runs out of ports
// `pace` begins so many connections a second whether or not those before have
// ended, and measures each from when it was due: a stall counts for all that it
// holds up.
// Every client mode starts its clock after the first byte has come back: the
// set-up of a tunnel is measured by `rate` alone. Bytes count where they are
// received. One JSON object on stdout; exit 1 with a line on stderr otherwise.
// The server prints an event "ready" once it listens, and dies with its parent or after
// LIFETIME_S, whichever is first.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	CHUNK_BYTES = 256 * 1024,
	MESSAGE_BYTES = 64,
	WORKERS = 2,
	MAX_CLIENTS = 256,
	PACERS = 32,
	MAX_SAMPLES = 4 << 20,
	BACKLOG = 4096,
	// A read or a write that makes no progress for this long is a failure.
	STALL_S = 10,
};

static struct sockaddr_storage server_address;
static socklen_t server_address_len;
static double run_s;

static _Noreturn void die(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	fprintf(stderr, "load: ");
	vfprintf(stderr, format, arguments);
	fprintf(stderr, "\n");
	va_end(arguments);
	_exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void resolve(const char *address, const char *port)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
	struct addrinfo *found;
	int error = getaddrinfo(address, port, &hints, &found);
	if (error)
		die("%s port %s: %s", address, port, gai_strerror(error));
	memcpy(&server_address, found->ai_addr, found->ai_addrlen);
	server_address_len = found->ai_addrlen;
	freeaddrinfo(found);
}

// ---------------------------------------------------------------- server

struct connection {
	int fd;
	char kind; // 0 until the first byte came
	uint64_t received;
	size_t held, sent; // echo: bytes read and not yet written back
	unsigned char *echo;
};

static unsigned char payload[CHUNK_BYTES];
static int listener;

static void drop(struct connection *c)
{
	close(c->fd);
	free(c->echo);
	free(c);
}

// Each of these returns 0 to go on and -1 when the connection is over.
static int sink(struct connection *c, unsigned char *scratch)
{
	// A bounded number of reads, so that one stream cannot starve the others.
	for (int turn = 0; turn < 8; turn++) {
		ssize_t n = recv(c->fd, scratch, CHUNK_BYTES, 0);
		if (n < 0)
			return errno == EAGAIN ? 0 : -1;
		if (n == 0) {
			uint64_t total = htobe64(c->received);
			send(c->fd, &total, sizeof total, MSG_NOSIGNAL);
			return -1;
		}
		c->received += n;
	}
	return 0;
}

static int source(struct connection *c)
{
	for (int turn = 0; turn < 8; turn++) {
		ssize_t n = send(c->fd, payload, CHUNK_BYTES, MSG_NOSIGNAL);
		if (n < 0)
			return errno == EAGAIN ? 0 : -1;
	}
	return 0;
}

static int echo(struct connection *c, int epoll)
{
	for (;;) {
		while (c->sent < c->held) {
			ssize_t n = send(c->fd, c->echo + c->sent, c->held - c->sent, MSG_NOSIGNAL);
			if (n < 0) {
				struct epoll_event wait = {.events = EPOLLOUT, .data.ptr = c};
				if (errno != EAGAIN)
					return -1;
				return epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &wait);
			}
			c->sent += n;
		}
		c->held = c->sent = 0;
		ssize_t n = recv(c->fd, c->echo, CHUNK_BYTES, 0);
		if (n == 0)
			return -1;
		if (n < 0) {
			struct epoll_event wait = {.events = EPOLLIN, .data.ptr = c};
			if (errno != EAGAIN)
				return -1;
			return epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &wait);
		}
		c->held = n;
	}
}

static int begin(struct connection *c, int epoll)
{
	struct epoll_event wait = {.data.ptr = c};
	ssize_t n = recv(c->fd, &c->kind, 1, 0);
	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n <= 0)
		return -1;
	switch (c->kind) {
	case 'S':
		return send(c->fd, "k", 1, MSG_NOSIGNAL) == 1 ? 0 : -1;
	case 'D':
		wait.events = EPOLLOUT;
		return epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &wait);
	case 'E':
		c->echo = malloc(CHUNK_BYTES);
		return c->echo ? 0 : -1;
	case 'C':
		send(c->fd, "c", 1, MSG_NOSIGNAL);
		return -1;
	}
	return -1;
}

static void welcome(int epoll)
{
	int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	if (fd < 0)
		return; // the other worker was faster, or the client is gone
	int yes = 1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
	struct connection *c = calloc(1, sizeof *c);
	if (!c)
		die("out of memory");
	c->fd = fd;
	struct epoll_event wait = {.events = EPOLLIN, .data.ptr = c};
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &wait))
		drop(c);
}

static void *serve(void *unused)
{
	unsigned char *scratch = malloc(CHUNK_BYTES);
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event accepting = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.ptr = NULL};
	if (!scratch || epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &accepting))
		die("epoll: %s", strerror(errno));
	for (;;) {
		struct epoll_event events[64];
		int count = epoll_wait(epoll, events, 64, -1);
		for (int i = 0; i < count; i++) {
			struct connection *c = events[i].data.ptr;
			int over = 0;
			if (!c) {
				welcome(epoll);
				continue;
			}
			if (c->kind == 0)
				over = begin(c, epoll);
			if (!over && c->kind == 'S')
				over = sink(c, scratch);
			else if (!over && c->kind == 'D')
				over = source(c);
			else if (!over && c->kind == 'E')
				over = echo(c, epoll);
			if (over)
				drop(c);
		}
	}
	return unused;
}

static _Noreturn void run_server(unsigned lifetime_s)
{
	int yes = 1, no = 0;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(lifetime_s);
	listener = socket(server_address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (server_address.ss_family == AF_INET6)
		setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
	if (bind(listener, (struct sockaddr *)&server_address, server_address_len) || listen(listener, BACKLOG))
		die("listen: %s", strerror(errno));
	printf("{\"event\":\"ready\"}\n");
	fflush(stdout);
	for (int i = 0; i < WORKERS; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, serve, NULL))
			die("no thread");
	}
	for (;;)
		pause();
}

// --------------------------------------------------------------- clients

static int dial(char kind)
{
	int yes = 1, fd = socket(server_address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct timeval stall = {.tv_sec = STALL_S};
	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof stall);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &stall, sizeof stall);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
	if (connect(fd, (struct sockaddr *)&server_address, server_address_len) ||
	    send(fd, &kind, 1, MSG_NOSIGNAL) != 1) {
		int error = errno;
		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static int read_all(int fd, void *into, size_t want)
{
	size_t have = 0;
	while (have < want) {
		ssize_t n = recv(fd, (char *)into + have, want - have, 0);
		if (n <= 0)
			return -1;
		have += n;
	}
	return 0;
}

struct client {
	pthread_t thread;
	int down;
	uint64_t count; // bytes or connections
	uint64_t failed;
	uint64_t began_ns, ended_ns;
};

static void *stream_down(struct client *c, int fd, unsigned char *scratch)
{
	if (read_all(fd, scratch, 1))
		die("stream: no first byte: %s", strerror(errno));
	c->began_ns = now_ns();
	uint64_t until = c->began_ns + (uint64_t)(run_s * 1e9);
	do {
		ssize_t n = recv(fd, scratch, CHUNK_BYTES, 0);
		if (n <= 0)
			die("stream down broke after %llu bytes: %s", (unsigned long long)c->count,
			    n ? strerror(errno) : "closed");
		c->count += n;
		c->ended_ns = now_ns();
	} while (c->ended_ns < until);
	return NULL;
}

static void *stream_up(struct client *c, int fd, unsigned char *scratch)
{
	uint64_t sent = 0, swallowed = 0;
	if (read_all(fd, scratch, 1))
		die("stream: no first byte: %s", strerror(errno));
	c->began_ns = now_ns();
	uint64_t until = c->began_ns + (uint64_t)(run_s * 1e9);
	while (now_ns() < until) {
		ssize_t n = send(fd, payload, CHUNK_BYTES, MSG_NOSIGNAL);
		if (n <= 0)
			die("stream up broke after %llu bytes: %s", (unsigned long long)sent, strerror(errno));
		sent += n;
	}
	shutdown(fd, SHUT_WR);
	// What is still in buffers on the way is waited for: it counts with its time.
	if (read_all(fd, &swallowed, sizeof swallowed))
		die("stream up: no count from the server: %s", strerror(errno));
	c->ended_ns = now_ns();
	c->count = be64toh(swallowed);
	if (c->count != sent)
		die("stream up: %llu bytes sent, %llu arrived", (unsigned long long)sent,
		    (unsigned long long)c->count);
	return NULL;
}

static void *stream(void *argument)
{
	struct client *c = argument;
	unsigned char *scratch = malloc(CHUNK_BYTES);
	int fd = dial(c->down ? 'D' : 'S');
	if (!scratch || fd < 0)
		die("stream: %s", strerror(errno));
	c->down ? stream_down(c, fd, scratch) : stream_up(c, fd, scratch);
	close(fd);
	free(scratch);
	return NULL;
}

static void *knock(void *argument)
{
	struct client *c = argument;
	c->began_ns = now_ns();
	uint64_t until = c->began_ns + (uint64_t)(run_s * 1e9);
	do {
		char answer[2];
		int fd = dial('C');
		// The answer and then the end: the exchange counts only when it is whole.
		if (fd >= 0 && recv(fd, answer, 1, 0) == 1 && recv(fd, answer + 1, 1, 0) == 0)
			c->count++;
		else if (++c->failed > 100)
			die("rate: 100 connections failed, the last with: %s", strerror(errno));
		if (fd >= 0)
			close(fd);
		c->ended_ns = now_ns();
	} while (c->ended_ns < until);
	return NULL;
}

static int run_clients(const char *mode, void *(*body)(void *), int count, int down)
{
	struct client clients[MAX_CLIENTS] = {0};
	uint64_t began = UINT64_MAX, ended = 0, total = 0, failed = 0;
	for (int i = 0; i < count; i++) {
		clients[i].down = down;
		if (pthread_create(&clients[i].thread, NULL, body, &clients[i]))
			die("no thread");
	}
	for (int i = 0; i < count; i++) {
		pthread_join(clients[i].thread, NULL);
		total += clients[i].count;
		failed += clients[i].failed;
		if (clients[i].began_ns < began)
			began = clients[i].began_ns;
		if (clients[i].ended_ns > ended)
			ended = clients[i].ended_ns;
	}
	double seconds = (ended - began) / 1e9;
	if (body == stream)
		printf("{\"mode\":\"%s\",\"streams\":%d,\"bytes\":%llu,\"seconds\":%.6f,\"gbit_s\":%.4f}\n", mode,
		       count, (unsigned long long)total, seconds, total * 8 / seconds / 1e9);
	else
		printf("{\"mode\":\"%s\",\"clients\":%d,\"connections\":%llu,\"failed\":%llu,"
		       "\"seconds\":%.6f,\"per_s\":%.2f}\n",
		       mode, count, (unsigned long long)total, (unsigned long long)failed, seconds,
		       total / seconds);
	return 0;
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static int run_rtt(void)
{
	uint32_t *samples = malloc(sizeof(uint32_t) * MAX_SAMPLES);
	unsigned char message[MESSAGE_BYTES] = {0};
	size_t count = 0;
	double sum = 0;
	int fd = dial('E');
	if (!samples || fd < 0)
		die("rtt: %s", strerror(errno));
	if (send(fd, message, sizeof message, MSG_NOSIGNAL) != sizeof message ||
	    read_all(fd, message, sizeof message))
		die("rtt: no first answer: %s", strerror(errno));
	uint64_t began = now_ns(), ended = began, until = began + (uint64_t)(run_s * 1e9);
	while (ended < until && count < MAX_SAMPLES) {
		uint64_t sent = ended;
		memcpy(message, &count, sizeof count);
		if (send(fd, message, sizeof message, MSG_NOSIGNAL) != sizeof message ||
		    read_all(fd, message, sizeof message) || memcmp(message, &count, sizeof count))
			die("rtt broke after %zu exchanges: %s", count, strerror(errno));
		ended = now_ns();
		samples[count++] = ended - sent > UINT32_MAX ? UINT32_MAX : ended - sent;
		sum += ended - sent;
	}
	close(fd);
	qsort(samples, count, sizeof *samples, by_value);
	printf("{\"mode\":\"rtt\",\"bytes\":%d,\"count\":%zu,\"seconds\":%.6f,\"p50_us\":%.2f,\"p99_us\":%.2f,"
	       "\"mean_us\":%.2f}\n",
	       MESSAGE_BYTES, count, (ended - began) / 1e9, samples[count / 2] / 1e3,
	       samples[count * 99 / 100] / 1e3, sum / count / 1e3);
	return 0;
}

static struct {
	uint32_t *samples;
	uint64_t began_ns, step_ns;
	int total;
	_Atomic int next, failed;
} pace;

static void *keep_pace(void *argument)
{
	(void)argument;
	for (int i; (i = pace.next++) < pace.total;) {
		uint64_t due = pace.began_ns + i * pace.step_ns;
		struct timespec when = {due / 1000000000, due % 1000000000};
		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR)
			;
		char answer[2];
		int fd = dial('C');
		if (fd < 0 || recv(fd, answer, 1, 0) != 1 || recv(fd, answer + 1, 1, 0) != 0)
			pace.failed++;
		if (fd >= 0)
			close(fd);
		uint64_t took = now_ns() - due;
		pace.samples[i] = took > UINT32_MAX ? UINT32_MAX : took;
	}
	return NULL;
}

static int run_pace(int per_s)
{
	pthread_t threads[PACERS];
	pace.total = per_s * run_s;
	pace.samples = calloc(pace.total + 1, sizeof *pace.samples);
	if (!pace.samples || !pace.total)
		die("pace: nothing to do");
	pace.step_ns = 1000000000 / per_s;
	pace.began_ns = now_ns();
	for (int i = 0; i < PACERS; i++)
		if (pthread_create(&threads[i], NULL, keep_pace, NULL))
			die("no thread");
	for (int i = 0; i < PACERS; i++)
		pthread_join(threads[i], NULL);
	qsort(pace.samples, pace.total, sizeof *pace.samples, by_value);
	printf("{\"mode\":\"pace\",\"connections\":%d,\"failed\":%d,\"p50_us\":%.2f,\"p99_us\":%.2f,"
	       "\"max_us\":%.2f}\n",
	       pace.total, pace.failed, pace.samples[pace.total / 2] / 1e3,
	       pace.samples[pace.total * 99 / 100] / 1e3, pace.samples[pace.total - 1] / 1e3);
	return 0;
}

static int bounded(const char *text, int most)
{
	int value = atoi(text);
	if (value < 1 || value > most)
		die("%s is not between 1 and %d", text, most);
	return value;
}

int main(int argc, char **argv)
{
	if (argc < 5)
		die("usage: load server|stream|rtt|rate|pace ADDR PORT SECONDS [...]");
	const char *mode = argv[1];
	resolve(argv[2], argv[3]);
	if (!strcmp(mode, "server"))
		run_server(bounded(argv[4], 7200));
	run_s = atof(argv[4]);
	if (!(run_s > 0 && run_s <= 60))
		die("%s is not a number of seconds up to 60", argv[4]);
	// Whatever hangs, the process does not outlive its time by much.
	alarm((unsigned)run_s + 2 * STALL_S);
	if (!strcmp(mode, "stream") && argc == 7)
		return run_clients(argv[6], stream, bounded(argv[5], MAX_CLIENTS), !strcmp(argv[6], "down"));
	if (!strcmp(mode, "rtt") && argc == 5)
		return run_rtt();
	if (!strcmp(mode, "rate") && argc == 6)
		return run_clients("rate", knock, bounded(argv[5], MAX_CLIENTS), 0);
	if (!strcmp(mode, "pace") && argc == 6)
		return run_pace(bounded(argv[5], 10000));
	die("unknown mode or wrong number of arguments: %s", mode);
}
