"""Pods made by a real containerd, attached by their names."""
