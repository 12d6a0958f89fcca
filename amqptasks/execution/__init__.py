"""One task: from message to outcome. No broker, no processes: what runs around a call, and what its end means."""
