"""Message classes that `make protos` writes from `agent/wire/protos`; do not edit."""
