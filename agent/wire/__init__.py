"""Sans-io protocols: bytes and events in, bytes and events out."""
