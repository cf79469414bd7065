"""What every test needs before it is imported."""

import pool  # sets the environment of all ranks and declares torchvision's operators; transformers breaks without

__all__ = ["pool"]
