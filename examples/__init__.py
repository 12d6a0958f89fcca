"""A small shop that runs its background work on amqptasks, and the demo that drives it."""
