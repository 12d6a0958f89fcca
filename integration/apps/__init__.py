"""Apps that the integration tests' workers run."""
