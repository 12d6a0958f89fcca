"""The scheduler: any number of beats, of which one leads. `docs/beat.md` tells how."""
