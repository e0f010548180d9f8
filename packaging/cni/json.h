// SPDX-License-Identifier: Apache-2.0
// Finding values in a JSON text without taking it apart: a value is a span of
// the text, and is handed on as it stands. Strings therefore stay escaped, and
// need no escaping where they are printed again.
#ifndef MESHBPF_CNI_JSON_H
#define MESHBPF_CNI_JSON_H

#include <string.h>

#define JSON_MAX_DEPTH 64

struct span {
	const char *at; // 0: not there
	size_t size;
};

static const char *json_skip(const char *at, const char *end, int depth);

static const char *json_blank(const char *at, const char *end)
{
	while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
		at++;
	return at;
}

// Past a string whose opening quote is at `at`; 0 when it does not end.
static const char *json_string(const char *at, const char *end)
{
	for (at++; at < end; at++) {
		if (*at == '\\')
			at++;
		else if (*at == '"')
			return at + 1;
	}
	return 0;
}

// Past the members of an object or the items of an array; `found` takes the
// value of `key` in an object, the last of several as JSON readers do.
static const char *json_inside(const char *at, const char *end, int depth, const char *key,
			       struct span *found)
{
	char close = *at == '{' ? '}' : ']';

	if (depth >= JSON_MAX_DEPTH)
		return 0;
	at = json_blank(at + 1, end);
	if (at < end && *at == close)
		return at + 1;
	while (at < end) {
		struct span name = { 0, 0 };
		const char *value;

		if (close == '}') {
			const char *after;

			if (*at != '"' || !(after = json_string(at, end)))
				return 0;
			name.at = at + 1;
			name.size = after - at - 2;
			at = json_blank(after, end);
			if (at >= end || *at != ':')
				return 0;
			at = json_blank(at + 1, end);
		}
		value = at;
		at = json_skip(at, end, depth + 1);
		if (!at)
			return 0;
		if (key && name.at && name.size == strlen(key) && !memcmp(name.at, key, name.size)) {
			found->at = value;
			found->size = at - value;
		}
		at = json_blank(at, end);
		if (at >= end)
			return 0;
		if (*at == close)
			return at + 1;
		if (*at != ',')
			return 0;
		at = json_blank(at + 1, end);
	}
	return 0;
}

// Past the value at `at`; 0 when there is none.
static const char *json_skip(const char *at, const char *end, int depth)
{
	const char *start = at;

	if (at >= end)
		return 0;
	if (*at == '"')
		return json_string(at, end);
	if (*at == '{' || *at == '[')
		return json_inside(at, end, depth, 0, 0);
	while (at < end && !strchr(",]} \t\r\n", *at))
		at++;
	return at == start ? 0 : at;
}

// The value of `key` in the object `text`; nothing where either is not there.
static struct span json_get(struct span text, const char *key)
{
	struct span found = { 0, 0 };
	const char *end = text.at + text.size, *at;

	if (!text.at)
		return found;
	at = json_blank(text.at, end);
	if (at >= end || *at != '{' || !json_inside(at, end, 0, key, &found))
		found.at = 0;
	return found;
}

// Whether `text` is one whole object with nothing after it.
static int json_is_object(struct span text)
{
	const char *end = text.at + text.size, *at = json_blank(text.at, end);

	if (at >= end || *at != '{' || !(at = json_inside(at, end, 0, 0, 0)))
		return 0;
	return json_blank(at, end) == end;
}

// The inside of a string value; nothing for any other value.
static struct span json_text(struct span value)
{
	struct span found = { 0, 0 };

	if (value.at && value.size >= 2 && *value.at == '"') {
		found.at = value.at + 1;
		found.size = value.size - 2;
	}
	return found;
}

static int json_equals(struct span text, const char *word)
{
	return text.at && text.size == strlen(word) && !memcmp(text.at, word, text.size);
}

// Whether `word` is one of the strings in an array.
static int json_lists(struct span array, struct span word)
{
	const char *at, *end = array.at + array.size;

	if (!array.at || *array.at != '[' || !word.at)
		return 0;
	for (at = json_blank(array.at + 1, end); at < end && *at != ']';) {
		const char *after = json_skip(at, end, 1);
		struct span item = { at, 0 };

		if (!after)
			return 0;
		item.size = after - at;
		item = json_text(item);
		if (item.at && item.size == word.size && !memcmp(item.at, word.at, word.size))
			return 1;
		at = json_blank(after, end);
		if (at < end && *at == ',')
			at = json_blank(at + 1, end);
	}
	return 0;
}

#endif
