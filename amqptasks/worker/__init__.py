"""The worker: a supervisor, and for each queue a process group of one leader and its executors."""
