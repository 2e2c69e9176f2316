"""How long tests wait for events without a promised time."""

PATIENCE_S = 60
"""Seconds; long, because other tests use the machine at the same time."""
