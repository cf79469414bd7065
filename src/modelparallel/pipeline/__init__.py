"""The pipeline engine: stage tensors, programs, glue, calls at a home, announcements, randomness and the reference
executor.
"""
