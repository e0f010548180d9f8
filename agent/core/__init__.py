"""Pure decisions: no I/O, no trio, no sockets; time and randomness come in as arguments."""
