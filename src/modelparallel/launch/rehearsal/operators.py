"""Declaring the operators that torchvision's CUDA wheel cannot bring to a CPU torch.

The wheel that the package index has is linked against CUDA. With a CPU torch its C++ library does not load, and then
`import torchvision` fails, because Python code in it registers shape functions for operators that do not exist. With
the two schemas declared everything of torchvision that is written in Python works (datasets, transforms, models); the
C++ operators themselves (nms, roi_align, ...) stay unavailable.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

#: The declaration lives as long as this object does.
_library: torch.library.Library | None = None


def declare_torchvision_operators() -> bool:
    """Declare torchvision's operators if it is installed and cannot declare them itself. Call it before torchvision, or
    transformers, is imported; calling it again does nothing.

    Returns whether the declaration is in place. Local.
    """
    global _library
    if _library is not None:
        return True
    if torch.version.cuda is not None or torch.version.hip is not None or _has_operator():
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _extension_loads(Path(spec.origin).parent):
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        _library.define(name + _SCHEMA)
    return True


def _has_operator() -> bool:
    return hasattr(torch.ops.torchvision, _OPERATORS[0])


def _extension_loads(package: Path) -> bool:
    """Whether torchvision's C++ library fits this torch; if so it has then registered the operators itself."""
    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return _has_operator()
    return False
