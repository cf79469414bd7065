"""Switching tensor parallelism on, and replacing marked modules by distributed ones."""
