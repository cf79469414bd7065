"""What works on checkpoints without a job: listing, looking into, verifying, converting, and those of the original."""
