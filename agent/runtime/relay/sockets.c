// SPDX-License-Identifier: Apache-2.0
// A socket inside a pod's network namespace, ready to dial, in one call.
// The reference is pod_sockets.py (`_new`, `to_app`) with datapath/netns.py and sockets.py.
//
// A thread that could not come back from a pod's namespace would go on serving
// in the wrong one: like netns.py, this ends the process then.
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

// Each thread that comes here stays in one namespace of its own.
static __thread int home = -1;

static int socket_inside(int netns, int family)
{
	if (home < 0) {
		home = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
		if (home < 0)
			return -1;
	}
	if (setns(netns, CLONE_NEWNET))
		return -1;
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int error = errno;
	if (setns(home, CLONE_NEWNET)) {
		fprintf(stderr, "meshbpf: cannot leave a pod's netns: %s\n", strerror(errno));
		abort();
	}
	errno = error;
	return fd;
}

static int set(int fd, int level, int option, int value)
{
	return setsockopt(fd, level, option, &value, sizeof value);
}

// core/tuning.py
struct keepalive {
	int enabled, idle_s, interval_s, probes, user_timeout_ms;
};

static int prepare(int fd, const struct keepalive *k)
{
	if (set(fd, IPPROTO_TCP, TCP_NODELAY, 1))
		return -1;
	if (k->user_timeout_ms && set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, k->user_timeout_ms))
		return -1;
	if (!k->enabled)
		return 0;
	return set(fd, SOL_SOCKET, SO_KEEPALIVE, 1) || set(fd, IPPROTO_TCP, TCP_KEEPIDLE, k->idle_s) ||
	       set(fd, IPPROTO_TCP, TCP_KEEPINTVL, k->interval_s) ||
	       set(fd, IPPROTO_TCP, TCP_KEEPCNT, k->probes) ? -1 : 0;
}

// The kernel programs know the agent's sockets by this: before it can send a packet.
static int protect(int fd, int map)
{
	uint32_t key = fd, present = 1;
	union bpf_attr attr;
	memset(&attr, 0, sizeof attr);
	attr.map_fd = map;
	attr.key = (uintptr_t)&key;
	attr.value = (uintptr_t)&present;
	attr.flags = BPF_ANY;
	int result;
	do
		result = syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof attr);
	while (result < 0 && errno == EINTR);
	return result;
}

static int pose_as(int fd, int family, const void *client, unsigned mark)
{
	struct sockaddr_in6 six = {.sin6_family = AF_INET6};
	struct sockaddr_in four = {.sin_family = AF_INET};
	struct sockaddr *address = family == AF_INET6 ? (struct sockaddr *)&six : (struct sockaddr *)&four;
	socklen_t size = family == AF_INET6 ? sizeof six : sizeof four;
	if (family == AF_INET6)
		memcpy(&six.sin6_addr, client, 16);
	else
		memcpy(&four.sin_addr, client, 4);
	int transparent = family == AF_INET6 ? set(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
					     : set(fd, IPPROTO_IP, IP_TRANSPARENT, 1);
	return transparent || set(fd, SOL_SOCKET, SO_MARK, mark) ||
	       setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "lo", 2) ||
	       set(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1) || bind(fd, address, size) ? -1 : 0;
}

PyObject *pod_socket(PyObject *module, PyObject *arguments)
{
	int netns, family, map;
	struct keepalive k;
	unsigned mark;
	Py_buffer client;
	(void)module;
	if (!PyArg_ParseTuple(arguments, "iii(piiii)y*I", &netns, &family, &map, &k.enabled, &k.idle_s,
			      &k.interval_s, &k.probes, &k.user_timeout_ms, &client, &mark))
		return NULL;
	PyObject *result = NULL;
	if (client.len && client.len != (family == AF_INET6 ? 16 : 4)) {
		PyErr_SetString(PyExc_ValueError, "a client of another family");
		goto out;
	}
	int fd = socket_inside(netns, family);
	if (fd < 0 || prepare(fd, &k) || protect(fd, map) ||
	    (client.len && pose_as(fd, family, client.buf, mark))) {
		PyErr_SetFromErrno(PyExc_OSError);
		if (fd >= 0)
			close(fd);
		goto out;
	}
	result = PyLong_FromLong(fd);
out:
	PyBuffer_Release(&client);
	return result;
}
