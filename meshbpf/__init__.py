"""meshbpf: an Istio ambient data plane with eBPF steering and an HBONE proxy.

The packages `agent`, `cli` and `bpf` are links to the folders beside this
one; always import them through here (`meshbpf.agent`), never from the
checkout's root.
"""

__version__ = "0.1.0"
