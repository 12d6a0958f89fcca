"""Subscribers of the event bus: logs and Sentry. The core knows none of them."""
