"""Frozen data that the parts exchange: the partition plan and the parameter rows."""
