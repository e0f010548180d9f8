"""Programs and steering on this kernel, in real network namespaces (marker root)."""
