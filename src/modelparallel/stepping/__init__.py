"""``@smp.step``: the step function, its output, and parts that are recomputed in the backward."""
