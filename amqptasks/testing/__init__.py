"""A bench for tests and demos: private brokers, a proxy that breaks, workers as processes."""
