"""How orion-rental reads an order from its request."""

from __future__ import annotations

import json
from typing import Any

from orion.rental_order import RentalOrder
from orion_worker.rental.host_certificate import read_certificate

Report = dict[str, Any]
"""The report of a command, as JSON carries it."""


def parse_request(command: str, text: str) -> RentalOrder:
    """Return the order for a command; raise ValueError, in words for a person, if the text holds none."""
    return request_from(command, json.loads(text))


def request_from(command: str, data: object) -> RentalOrder:
    """Return the order that a JSON value holds; raise ValueError if it holds none for this command."""
    order = RentalOrder.from_json(data, command)
    if order.host_certificate:
        read_certificate(order.host_certificate)
    return order
