"""The node agent: pure decisions, wire protocols, kernel data path, and the trio shell around them."""
