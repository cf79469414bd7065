"""What keeps the activations of a step within the memory of a device: groups of children that are recomputed together,
and activations that wait on the host.
"""
