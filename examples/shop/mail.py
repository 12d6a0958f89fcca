"""Mails to customers (queue email).

A server's "not now" (SMTP 4yz) is retried with growing delays, which the message spends in the broker. Its "never"
(5yz) is not: the message goes to ``email.dlq`` at once, with the reason in its headers.
"""

from __future__ import annotations

import smtplib
from decimal import Decimal
from email.message import EmailMessage

from examples.shop import app, places

__all__ = ["MailboxUnavailable", "NoSuchMailbox", "compose", "receipt", "refusal"]


class MailboxUnavailable(Exception):
    """The server refused the recipient for now (4yz, RFC 5321, section 4.2.1)."""


class NoSuchMailbox(Exception):
    """The server refused the recipient for good (5yz)."""


def compose(order_id: int, address: str, amount: Decimal) -> EmailMessage:
    """The receipt of one order. Its Message-ID depends on the order alone: a mail that is sent twice can be told."""
    mail = EmailMessage()
    mail["From"] = "shop@shop.example"
    mail["To"] = address
    mail["Subject"] = f"Your order {order_id}"
    mail["Message-ID"] = f"<order-{order_id}@shop.example>"
    mail.set_content(f"Thank you! We have charged {amount:.2f} EUR for order {order_id}.\n")
    return mail


def refusal(error: smtplib.SMTPRecipientsRefused) -> MailboxUnavailable | NoSuchMailbox:
    """What the server's answer means for us. There is one recipient."""
    [(address, (code, text))] = error.recipients.items()
    kind = NoSuchMailbox if code >= 500 else MailboxUnavailable
    return kind(f"{address}: {code} {text.decode(errors='replace')}")


@app.task(
    name="email.receipt",
    # OSError: the server is down, or hangs up; smtplib's own errors derive from it.
    autoretry_for=(MailboxUnavailable, OSError),
    max_retries=2,
    retry_backoff=0.25,  # seconds, then twice that; a real shop would wait minutes
    retry_jitter=False,
)
def receipt(order_id: int, address: str, amount: Decimal) -> None:
    """Send the receipt of one order."""
    host, port = places.mail_server()
    # The name for the greeting is given: finding it out would be a DNS query.
    with smtplib.SMTP(host, port, local_hostname="shop.example", timeout=10) as server:
        try:
            server.send_message(compose(order_id, address, amount))
        except smtplib.SMTPRecipientsRefused as error:
            raise refusal(error) from error
