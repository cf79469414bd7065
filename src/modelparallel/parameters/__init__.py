"""Which parameter is whose: the parameter table of a model, shards of parameters, and lists of old parameters."""
