"""Communication: process groups, object messages, stage-to-stage tensors, autograd collectives."""
