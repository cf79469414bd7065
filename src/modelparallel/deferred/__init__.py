"""Late construction: models whose parameters get storage and values only where they live."""
