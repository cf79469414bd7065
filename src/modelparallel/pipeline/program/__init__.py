"""One microbatch's program on every stage: what it records, its first run, its turns, and its split backward."""
