// SPDX-License-Identifier: Apache-2.0
// meshbpf-cni: the chained CNI plugin (CNI specification 1.1).
//
// Hands what the runtime says to the agent on this node, over a unix socket, a
// JSON object a line, and prints what the specification wants. The agent
// decides; nothing is decided here but what must be without it:
//
//   ADD     no answer, no pod: it could talk past the mesh. Namespaces that
//           the configuration excludes pass without the question, so that what
//           an agent needs to run can be started while there is none.
//   DEL, GC no answer, no matter: removal must always get on, and the agent
//           forgets pods whose network namespace is gone by itself.
//   CHECK, STATUS   no answer is an error.
//   VERSION is answered here.
//
// It runs at every start and end of a pod, and the runtime waits: so a static
// program without allocations, that starts in about a millisecond.
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "json.h"

#define DEFAULT_SOCKET "/var/lib/meshbpf/cni.sock"
#define SPEC_VERSION "1.1.0"
#define VERSIONS "[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]"
// The agent waits up to 30 s for its own start; the kubelet for two minutes.
#define ANSWER_MS 40000
#define MAX_BYTES (1 << 20)

// Error codes: below 100 they are the specification's.
enum { BAD_ENVIRONMENT = 4, BAD_CONTENT = 6, BAD_CONFIG = 7, TRY_LATER = 11, NOT_AVAILABLE = 50,
       REFUSED = 100 };

static char config_bytes[MAX_BYTES], answer_bytes[MAX_BYTES], request_bytes[2 * MAX_BYTES];
static struct span config;
static const char *command;

static struct span version(void)
{
	struct span found = json_text(json_get(config, "cniVersion"));
	static const struct span ours = { SPEC_VERSION, sizeof(SPEC_VERSION) - 1 };

	return found.at ? found : ours;
}

// `msg` and `details` are the insides of JSON strings.
static int fail(int code, struct span msg, struct span details)
{
	struct span v = version();

	printf("{\"cniVersion\":\"%.*s\",\"code\":%d,\"msg\":\"%.*s\",\"details\":\"%.*s\"}\n",
	       (int)v.size, v.at, code, (int)msg.size, msg.at, (int)details.size,
	       details.at ? details.at : "");
	return 1;
}

__attribute__((format(printf, 3, 4)))
static int fail_with(int code, const char *details, const char *format, ...)
{
	static char text[2048], quoted[4096];
	struct span msg = { quoted, 0 }, more = { details, strlen(details) };
	va_list arguments;
	const char *at;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	for (at = text; *at; at++) {
		if (*at == '"' || *at == '\\')
			quoted[msg.size++] = '\\';
		quoted[msg.size++] = (unsigned char)*at < ' ' ? ' ' : *at;
	}
	return fail(code, msg, more);
}

static const char *environment(const char *name)
{
	const char *found = getenv(name);

	return found ? found : "";
}

// The value of one key of CNI_ARGS: `IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;...`.
static struct span argument(const char *key)
{
	struct span found = { 0, 0 };
	const char *at = environment("CNI_ARGS");
	size_t size = strlen(key);

	while (*at) {
		size_t length = strcspn(at, ";");

		if (length > size && !strncmp(at, key, size) && at[size] == '=') {
			found.at = at + size + 1;
			found.size = length - size - 1;
		}
		at += length;
		at += *at == ';';
	}
	return found;
}

// --- the agent ------------------------------------------------------------

static size_t used;

static void put(const char *text, size_t size)
{
	if (used + size <= sizeof(request_bytes))
		memcpy(request_bytes + used, text, size);
	used += size; // beyond the end it is refused before it is sent
}

static void put_text(const char *text)
{
	put(text, strlen(text));
}

static void put_string(const char *key, const char *value)
{
	put_text(",\"");
	put_text(key);
	put_text("\":\"");
	for (; *value; value++) {
		char escaped[8];

		if (*value == '"' || *value == '\\') {
			put("\\", 1);
			put(value, 1);
		} else if ((unsigned char)*value < ' ') {
			snprintf(escaped, sizeof(escaped), "\\u%04x", *value);
			put_text(escaped);
		} else {
			put(value, 1);
		}
	}
	put("\"", 1);
}

// The configuration on one line: blanks between values are all that may hold a newline.
static void put_config(void)
{
	size_t i;

	put_text(",\"config\":");
	for (i = 0; i < config.size; i++)
		put(config.at[i] == '\n' || config.at[i] == '\r' ? " " : config.at + i, 1);
}

static int connect_to(struct span path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd;

	if (path.size >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(address.sun_path, path.at, path.size);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		return -1;
	return fd;
}

static long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

// One line there and one back; 0 and an errno when there is no answer.
static int ask(struct span path, struct span *answer)
{
	long until = now_ms() + ANSWER_MS;
	size_t sent = 0, got = 0;
	int fd = connect_to(path);

	if (fd < 0)
		return 0;
	while (sent < used) {
		ssize_t n = send(fd, request_bytes + sent, used - sent, MSG_NOSIGNAL);

		if (n < 0 && errno != EINTR)
			return 0;
		sent += n > 0 ? n : 0;
	}
	while (got < sizeof(answer_bytes)) {
		struct pollfd waiting = { .fd = fd, .events = POLLIN };
		long left = until - now_ms();
		ssize_t n;

		if (left <= 0 || poll(&waiting, 1, left) == 0) {
			errno = ETIMEDOUT;
			return 0;
		}
		n = read(fd, answer_bytes + got, sizeof(answer_bytes) - got);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			errno = n ? errno : ECONNRESET;
			return 0;
		}
		got += n;
		if (answer_bytes[got - 1] == '\n')
			break;
	}
	close(fd);
	answer->at = answer_bytes;
	answer->size = got;
	return 1;
}

static int refused(struct span answer)
{
	struct span error = json_get(answer, "error");
	struct span code = json_text(json_get(error, "code")), what = json_text(json_get(error, "what"));
	int number = REFUSED;

	if (!what.at)
		return fail_with(REFUSED, "compare the versions of both", "meshbpf: the agent's answer is none");
	if (json_equals(code, "starting") || json_equals(code, "stopping") || json_equals(code, "busy"))
		number = TRY_LATER;
	if (!strcmp(command, "STATUS"))
		number = NOT_AVAILABLE;
	return fail(number, what, json_text(json_get(error, "hint")));
}

static int unanswered(struct span path, int why)
{
	struct span ns = argument("K8S_POD_NAMESPACE"), name = argument("K8S_POD_NAME");
	const char *hint = "see that the agent runs (systemctl status meshbpf, or its DaemonSet's pod on "
			   "this node); `meshbpf cni uninstall` lets pods start without it";

	if (!strcmp(command, "DEL") || !strcmp(command, "GC"))
		return 0;
	if (!strcmp(command, "ADD") && name.at)
		return fail_with(TRY_LATER, hint,
				 "meshbpf: no agent answers at %.*s (%s): pod %.*s/%.*s is not started, "
				 "since it could talk past the mesh",
				 (int)path.size, path.at, strerror(why), (int)ns.size, ns.at,
				 (int)name.size, name.at);
	return fail_with(!strcmp(command, "STATUS") ? NOT_AVAILABLE : TRY_LATER, hint,
			 "meshbpf: no agent answers at %.*s (%s)", (int)path.size, path.at, strerror(why));
}

// --- the plugin -----------------------------------------------------------

// A chained plugin's result is what came before it, or an empty one.
static int print_result(void)
{
	struct span before = json_get(config, "prevResult"), v = version();

	if (before.at)
		printf("%.*s\n", (int)before.size, before.at);
	else
		printf("{\"cniVersion\":\"%.*s\"}\n", (int)v.size, v.at);
	return 0;
}

static int read_config(void)
{
	size_t size = 0;
	ssize_t n;

	while ((n = read(0, config_bytes + size, sizeof(config_bytes) - size)) != 0) {
		if (n < 0 && errno != EINTR)
			return 0;
		size += n > 0 ? n : 0;
		if (size == sizeof(config_bytes))
			return 0;
	}
	config.at = config_bytes;
	config.size = size;
	return json_is_object(config);
}

int main(void)
{
	static const char *commands[] = { "ADD", "DEL", "CHECK", "STATUS", "GC" };
	struct span path, answer;
	size_t i;

	command = environment("CNI_COMMAND");
	if (!strcmp(command, "VERSION")) {
		printf("{\"cniVersion\":\"" SPEC_VERSION "\",\"supportedVersions\":" VERSIONS "}\n");
		return 0;
	}
	for (i = 0; i < sizeof(commands) / sizeof(*commands); i++)
		if (!strcmp(command, commands[i]))
			break;
	if (i == sizeof(commands) / sizeof(*commands))
		return fail_with(BAD_ENVIRONMENT, "a container runtime runs this program",
				 "meshbpf-cni: CNI_COMMAND is '%.100s'", command);
	if (!read_config()) {
		config.at = 0;
		return fail_with(BAD_CONTENT, "", "meshbpf-cni: the configuration on stdin is no JSON object");
	}
	path = json_text(json_get(config, "socket"));
	if (!path.at)
		path = (struct span){ DEFAULT_SOCKET, sizeof(DEFAULT_SOCKET) - 1 };
	if (*path.at != '/')
		return fail_with(BAD_CONFIG, "", "meshbpf-cni: \"socket\" is not an absolute path");
	if (i < 3 && (!argument("K8S_POD_NAME").at || // not a pod of Kubernetes
		      json_lists(json_get(config, "excludeNamespaces"), argument("K8S_POD_NAMESPACE"))))
		return strcmp(command, "ADD") ? 0 : print_result();
	put_text("{\"verb\":\"cni\",\"args\":{\"version\":1");
	put_string("command", command);
	put_string("container", environment("CNI_CONTAINERID"));
	put_string("netns", environment("CNI_NETNS"));
	put_string("interface", environment("CNI_IFNAME"));
	put_string("arguments", environment("CNI_ARGS"));
	put_config();
	put_text("}}\n");
	if (used > sizeof(request_bytes))
		return fail_with(BAD_CONTENT, "", "meshbpf-cni: the configuration is too large");
	if (!ask(path, &answer))
		return unanswered(path, errno);
	if (!json_equals(json_get(answer, "ok"), "true"))
		return refused(answer);
	return strcmp(command, "ADD") ? 0 : print_result();
}
