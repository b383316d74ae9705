"""Rewards that a small network reads from frames; see `model` and `tasks`."""
