"""The `meshbpf` command: clients of the agent's control socket, and `run`, `check` and `ca`."""
