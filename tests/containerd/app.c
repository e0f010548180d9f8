// SPDX-License-Identifier: Apache-2.0
// The one program of the test image.
//
//   pause            does nothing until it is told to stop: a sandbox's first process
//   serve PORT NAME  answers each TCP connection with "NAME CLIENT\n" and an echo
//   dial HOST PORT   calls at once, again until it is answered, and prints the answer
//
// As process 1 of a container it must ask for SIGTERM, and bury its children.
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static void stop(int number) { (void)number; _exit(0); }

static void bury(int number)
{
	(void)number;
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

static void talk(int peer, const char *name)
{
	struct sockaddr_in from;
	socklen_t size = sizeof(from);
	char text[4096];
	ssize_t got;

	if (getpeername(peer, (struct sockaddr *)&from, &size) == 0)
		dprintf(peer, "%s %s\n", name, inet_ntoa(from.sin_addr));
	while ((got = read(peer, text, sizeof(text))) > 0)
		if (write(peer, text, got) != got)
			break;
}

static int serve(int port, const char *name)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(port) };
	int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (bind(listener, (struct sockaddr *)&here, sizeof(here)) || listen(listener, 128)) {
		perror("serve");
		return 1;
	}
	for (;;) {
		int peer = accept(listener, NULL, NULL);

		if (peer < 0)
			continue;
		if (fork() == 0) {
			close(listener);
			talk(peer, name);
			_exit(0);
		}
		close(peer);
	}
}

// The first thing that the pod's first process does is to send a SYN.
static void dial(const char *host, int port)
{
	struct sockaddr_in there = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct timeval limit = { .tv_sec = 1 };
	char text[256];

	inet_pton(AF_INET, host, &there.sin_addr);
	for (int i = 0; i < 200; i++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);
		ssize_t got;

		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
		if (connect(fd, (struct sockaddr *)&there, sizeof(there)) == 0 &&
		    (got = read(fd, text, sizeof(text))) > 0) {
			if (write(1, text, got) == got)
				return;
		}
		close(fd);
		usleep(100000);
	}
}

int main(int argc, char **argv)
{
	signal(SIGTERM, stop);
	signal(SIGINT, stop);
	signal(SIGCHLD, bury);
	if (argc == 4 && strcmp(argv[1], "serve") == 0)
		return serve(atoi(argv[2]), argv[3]);
	if (argc == 4 && strcmp(argv[1], "dial") == 0)
		dial(argv[2], atoi(argv[3]));
	for (;;)
		pause();
}
