"""One file per system: its application, its client, its settings and why they are its best.

A worker imports its own file and nothing of the others, so that no system pays for another.
"""
