"""Tensors of a step that live on one stage, and how they travel."""
