"""The public namespace of modelparallel, usually imported as ``smp``."""

from modelparallel.version import __version__ as __version__
