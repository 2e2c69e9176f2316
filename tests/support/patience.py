"""How long tests wait for what nobody promised a time."""

PATIENCE_S = 60
"""Seconds: other tests, attacks among them, have the machine besides."""
