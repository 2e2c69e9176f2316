"""Measurements of Orion-Sec, each against a baseline in the same run: `make bench`. See docs/performance.md."""
