"""Calls that are not sent yet, and how they are put together: chains, groups, chords."""

from amqptasks.canvas.types import Sender, Signature, chain, chord, chunks, from_dict, group, signature, starmap, xmap

__all__ = ["Sender", "Signature", "chain", "chord", "chunks", "from_dict", "group", "signature", "starmap", "xmap"]
