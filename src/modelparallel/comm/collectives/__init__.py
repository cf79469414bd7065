"""Collectives on tensors: started and waited for later, of split layers with autograd, of equal values."""
