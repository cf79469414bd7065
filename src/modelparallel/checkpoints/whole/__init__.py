"""Checkpoints in one piece, and the files of `smp.save`."""
