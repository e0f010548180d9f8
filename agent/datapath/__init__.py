"""The kernel side: compile, load, attach and feed the BPF programs of `meshbpf.bpf`."""
