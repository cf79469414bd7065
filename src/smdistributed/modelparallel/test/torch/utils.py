"""Two functions that old BERT scripts import for a self-check: write a model's tensors, compare them later."""

from pathlib import Path
from typing import Any

import torch


def dump_model(model: torch.nn.Module, path: str, *_: Any, **__: Any) -> None:
    """Write the tensors that this rank holds, by name, to the file ``path``. Local call."""
    state = {name: value.detach().cpu().clone() for name, value in _tensors(model).items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def verify(model: torch.nn.Module, path: str, *_: Any, rtol: float = 1e-5, atol: float = 1e-7, **__: Any) -> None:
    """Compare the tensors that this rank holds with those in the file ``path``. Local call.

    Raises ValueError that names the first tensor that is missing or differs.
    """
    state = torch.load(path, weights_only=True)
    for name, value in _tensors(model).items():
        if name not in state:
            raise ValueError(f"tensor {name!r} is not in {path}, which holds {len(state)} tensors")
        if not torch.allclose(value.detach().cpu(), state[name], rtol=rtol, atol=atol):
            raise ValueError(f"tensor {name!r} differs from the one in {path} by more than rtol={rtol}, atol={atol}")


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    local = getattr(model, "local_state_dict", None)
    state = model.state_dict() if local is None else local()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
