"""Import path of the original library; importing this level does not import torch."""

# The level of the original API that is offered, which client code compares with "1.10" and "1.15",
# and behind it our own version.
__version__ = "1.15.0+modelparallel.0.1.0"
