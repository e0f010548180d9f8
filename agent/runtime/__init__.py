"""The trio shell: everything that waits, and the one place where sockets are used."""
