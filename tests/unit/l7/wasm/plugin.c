// SPDX-License-Identifier: Apache-2.0
// A proxy-wasm plugin without an SDK and without libc, built by clang for
// wasm32: refuses what has no token, signs what has, and counts.
typedef unsigned int u32;

#define IMPORT(name) __attribute__((import_module("env"), import_name(name)))
#define EXPORT(name) __attribute__((export_name(name)))

IMPORT("proxy_get_header_map_value")
u32 get_value(u32 map, const char *key, u32 key_size, char **value, u32 *size);
IMPORT("proxy_add_header_map_value")
u32 add_value(u32 map, const char *key, u32 key_size, const char *value, u32 size);
IMPORT("proxy_send_local_response")
u32 reply(u32 status, const char *details, u32 details_size, const char *body, u32 body_size,
          const char *headers, u32 headers_size, u32 grpc_status);
IMPORT("proxy_log") u32 log_text(u32 level, const char *text, u32 size);

enum { REQUEST = 0, RESPONSE = 2, CONTINUE = 0, PAUSE = 1, INFO = 2 };
#define TEXT(literal) literal, sizeof(literal) - 1

static char heap[65536];
static u32 used;
static u32 seen;

EXPORT("proxy_abi_version_0_2_1") void abi(void) {}

EXPORT("malloc") void *allocate(u32 size)
{
    // The host's answers live as long as one callback: start again when full.
    if (used + size > sizeof(heap))
        used = 0;
    void *found = heap + used;
    used += (size + 7) & ~7u;
    return size <= sizeof(heap) ? found : 0;
}

EXPORT("proxy_on_configure") u32 on_configure(u32 root, u32 size)
{
    log_text(INFO, TEXT("configured"));
    return 1;
}

EXPORT("proxy_on_request_headers") u32 on_request(u32 context, u32 headers, u32 end)
{
    char *value;
    u32 size;
    if (get_value(REQUEST, TEXT("x-token"), &value, &size)) {
        reply(401, TEXT("no_token"), TEXT("token, please"), 0, 0, -1);
        return PAUSE;
    }
    // Reversed, so that the bytes were really looked at.
    for (u32 at = 0; at < size / 2; at++) {
        char kept = value[at];
        value[at] = value[size - 1 - at];
        value[size - 1 - at] = kept;
    }
    add_value(REQUEST, TEXT("x-signed"), value, size);
    return CONTINUE;
}

EXPORT("proxy_on_response_headers") u32 on_response(u32 context, u32 headers, u32 end)
{
    char digit = '0' + ++seen % 10;
    add_value(RESPONSE, TEXT("x-seen"), &digit, 1);
    return CONTINUE;
}
