"""amqptasks beside its peers and bare pika, in one run with equal guarantees: `python -m benchmarks.race --help`."""
