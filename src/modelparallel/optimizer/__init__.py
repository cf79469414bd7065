"""``smp.DistributedOptimizer``, its parts, and the optimizers of the original API."""
