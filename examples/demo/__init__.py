"""Drives the shop through a real broker and shows what came of it: ``python -m examples.demo``."""
