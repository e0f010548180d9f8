"""Small real servers and clients that run as processes inside the testbed's pods."""
