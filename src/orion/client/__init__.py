"""The Python SDK of Orion-Sec: `from orion.client import Orion`."""

from orion.client.sdk import ENDED, Orion

__all__ = ["ENDED", "Orion"]
