"""Partial checkpoints: each rank writes its part, and a job of another shape reads what it needs."""
