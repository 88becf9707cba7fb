"""Environments and the way to them: spaces, vector groups, the wire format, the link, workers and their supervisor. Knows no torch."""
