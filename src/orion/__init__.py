"""Orion-Sec, which rents environments and keeps them alive when a worker dies."""

__version__ = "0.1.0"
