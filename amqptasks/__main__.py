"""``python -m amqptasks``."""

from amqptasks.cli import main

if __name__ == "__main__":
    main()
