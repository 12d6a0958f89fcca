"""Payments (queue high_priority, priority 9).

The arguments are validated twice: in the caller, where a wrong amount raises before anything is published, and in the
worker, where a message from elsewhere with wrong arguments goes to ``high_priority.dlq`` without running.
"""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, Field

from examples.shop import app, ledger, places
from examples.shop.mail import receipt

__all__ = ["Amount", "Brand", "Card", "charge"]

Amount = Annotated[Decimal, Field(gt=0, max_digits=9, decimal_places=2)]


class Brand(StrEnum):
    """Cards that the shop takes."""

    VISA = "visa"
    MASTERCARD = "mastercard"
    UNIONPAY = "unionpay"


class Card(BaseModel):
    """What may be stored of a card."""

    brand: Brand
    last4: Annotated[str, Field(pattern=r"^\d{4}$")]


@app.task(name="payment.charge")
def charge(order_id: int, amount: Amount, card: Card, address: str) -> None:
    """Charge an order and have its receipt mailed."""
    ledger.add_charge(places.database(), order_id, amount, f"{card.brand} {card.last4}")
    # Also when the order was charged before: the first run may have died right here, with its mail unsent.
    receipt.delay(order_id, address, amount)
