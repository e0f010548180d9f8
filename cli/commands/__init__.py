"""One module a command; each has `command`, and its view beside it."""
