"""Checkpoints: what is in them, how they come onto a disk whole, and how a job of another shape reads them."""
