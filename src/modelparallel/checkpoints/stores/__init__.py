"""Where checkpoints lie: local folders and remote stores, and what makes a checkpoint complete."""
