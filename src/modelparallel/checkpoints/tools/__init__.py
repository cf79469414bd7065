"""Tools that work on checkpoints without a job: listing, looking into, verifying and converting them; and checkpoints
of the original.
"""
