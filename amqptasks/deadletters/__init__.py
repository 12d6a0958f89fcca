"""Dead letters: look at them, replay them, change them, keep them elsewhere, or let them go."""

from amqptasks.deadletters.box import DeadLetters
from amqptasks.deadletters.groups import Filter, Group
from amqptasks.deadletters.letter import Letter
from amqptasks.deadletters.moving import Moved, Stopped

__all__ = ["DeadLetters", "Filter", "Group", "Letter", "Moved", "Stopped"]
