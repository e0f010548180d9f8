"""The node agent: pure decisions, wire protocols, kernel data path, and trio around them."""
