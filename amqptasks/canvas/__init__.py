"""Calls that are not sent yet, and how they are put together: chains, groups, chords."""

from amqptasks.canvas.sender import Sender
from amqptasks.canvas.types import Signature, chain, chord, chunks, from_dict, group, signature, starmap, xmap

__all__ = ["Sender", "Signature", "chain", "chord", "chunks", "from_dict", "group", "signature", "starmap", "xmap"]
