"""Which parameter is whose: the table of a model, shards of parameters, and lists of old parameters."""
