"""The configuration: how it is read and checked, the configuration table, and the arithmetic of ranks."""

from modelparallel.config.reading import Config, load_config

__all__ = ["Config", "load_config"]
