// SPDX-License-Identifier: Apache-2.0
// All that runs in a pod of the VM testbed, one static binary.
//
//   pod             hold the sandbox's namespaces, as Kubernetes' pause does
//   pod serve NAME  echo on port 7001; on port 7009 tell the client, in one line
//                   of JSON, which addresses this side sees
//
// Ports and answers are those of tests/progs/server.py, so its clients serve here.
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ECHO = 7001, WHOAMI = 7009 };

static void leave(int signal)
{
	(void)signal;
	_exit(0);
}

static void text_of(const struct sockaddr_in6 *from, char *text, socklen_t size)
{
	if (IN6_IS_ADDR_V4MAPPED(&from->sin6_addr))
		inet_ntop(AF_INET, from->sin6_addr.s6_addr + 12, text, size);
	else
		inet_ntop(AF_INET6, &from->sin6_addr, text, size);
}

static void echo(int conn)
{
	static char data[64 * 1024];
	ssize_t count;

	while ((count = read(conn, data, sizeof(data))) > 0)
		for (ssize_t done = 0, more; done < count; done += more)
			if ((more = write(conn, data + done, count - done)) < 0)
				return;
}

static void whoami(int conn, const char *name)
{
	struct sockaddr_in6 peer = { 0 }, local = { 0 };
	socklen_t peer_size = sizeof(peer), local_size = sizeof(local);
	char peer_text[INET6_ADDRSTRLEN], local_text[INET6_ADDRSTRLEN];

	if (getpeername(conn, (struct sockaddr *)&peer, &peer_size) ||
	    getsockname(conn, (struct sockaddr *)&local, &local_size))
		return;
	text_of(&peer, peer_text, sizeof(peer_text));
	text_of(&local, local_text, sizeof(local_text));
	dprintf(conn, "{\"server\": \"%s\", \"peer\": \"%s\", \"local\": \"%s\"}\n", name,
		peer_text, local_text);
}

// One process a port, and one a connection.
static void serve(int port, const char *name)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int listener = socket(AF_INET6, SOCK_STREAM, 0), on = 1;

	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) ||
	    bind(listener, (struct sockaddr *)&any, sizeof(any)) || listen(listener, 1024))
		err(1, "port %d", port);
	for (;;) {
		int conn = accept(listener, NULL, NULL);

		if (conn < 0)
			continue;
		if (fork() == 0) {
			close(listener);
			if (port == ECHO)
				echo(conn);
			else
				whoami(conn, name);
			_exit(0);
		}
		close(conn);
	}
}

int main(int argc, char **argv)
{
	// PID 1 ignores what it does not handle.
	signal(SIGTERM, leave);
	signal(SIGINT, leave);
	signal(SIGCHLD, SIG_IGN);
	if (argc == 1)
		for (;;)
			pause();
	if (argc != 3 || strcmp(argv[1], "serve"))
		errx(2, "usage: pod [serve NAME]");
	if (fork() == 0)
		serve(WHOAMI, argv[2]);
	serve(ECHO, argv[2]);
}
