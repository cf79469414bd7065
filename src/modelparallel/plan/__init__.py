"""Frozen data that the parts exchange: the partition plan, the parameter rows and the pipeline schedule."""
