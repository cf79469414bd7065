"""How distributed modules answer the calls of the modules of transformers that they replace.

The original's arguments by name, and its classes of results. What is not supported is refused by its name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from modelparallel.errors import TensorParallelError
from modelparallel.tensor_parallel.distributed_module import DistributedModule


@dataclass(frozen=True)
class Signature:
    """The arguments of a class's ``forward``: its name, and the names in order (the version decides which)."""

    class_name: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, module_class: type) -> Signature:
        """The signature of the installed version."""
        parameters = list(inspect.signature(module_class.forward).parameters.values())[1:]  # type: ignore[attr-defined]
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        return cls(module_class.__name__, names)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All given arguments by name."""
        given = dict(zip(self.names, args, strict=False))
        twice = [name for name in kwargs if name in given]
        if len(args) > len(self.names) or twice:
            raise TypeError(f"{self.class_name}: too many arguments, or given twice: {', '.join(twice)}")
        return {**given, **kwargs}

    def refuse_rest(self, given: Mapping[str, Any]) -> None:
        """Raise TensorParallelError if an argument asks for something; None, False, 0 and lists of None do not."""
        for name, value in given.items():
            is_empty = isinstance(value, list | tuple) and all(entry is None for entry in value)
            if value is None or is_empty or (isinstance(value, bool | int) and not value):
                continue
            raise TensorParallelError(
                f"{self.class_name}: the argument {name}={type(value).__name__} is not supported by the distributed "
                f"module that replaces it: leave it out" + (f" or give {name}=False" if isinstance(value, bool) else "")
            )


def _mask_of_padding(keep: torch.Tensor | None, name: str) -> torch.Tensor | None:
    """1 where masked, from the mask of transformers, which is 1 where kept: both [N, S]."""
    if keep is None:
        return None
    if keep.dim() != 2:
        raise TensorParallelError(
            f"{name} has shape {tuple(keep.shape)}: the distributed module takes masks of padding, [batch, sequence]"
        )
    return (keep == 0).to(torch.int64)


def _result_class(name: str) -> Any:
    return getattr(importlib.import_module("transformers.modeling_outputs"), name)


def _as_result(name: str, is_dict: bool, **values: Any) -> Any:
    present = {key: value for key, value in values.items() if value is not None}
    return _result_class(name)(**present) if is_dict else tuple(present.values())


def _wants_dict(given: dict[str, Any], config: Any) -> bool:
    asked = given.pop("return_dict", None)
    return bool(getattr(config, "return_dict", True) if asked is None else asked)


@dataclass(frozen=True)
class LanguageModelAnswer:
    """Answers for a causal language model, or its body, with a DistributedTransformerLMHead."""

    signature: Signature
    config: Any
    has_head: bool
    has_cross_attention: bool
    result: str

    def __call__(self, module: DistributedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``module`` with the original's arguments; the original's result.

        With labels and gradients on, the result has no logits (they are never put together) unless
        ``return_logits=True``, an argument of ours, is given.
        """
        given = self.signature.bind(args, kwargs)
        is_dict = _wants_dict(given, self.config)
        given.pop("use_cache", None)
        ids, labels = given.pop("input_ids", None), given.pop("labels", None)
        mask = _mask_of_padding(given.pop("attention_mask", None), "attention_mask")
        positions = given.pop("position_ids", None)
        return_logits = given.pop("return_logits", None)
        cross = self._cross_inputs(given)
        self.signature.refuse_rest(given)
        if ids is None:
            raise TensorParallelError(f"{self.signature.class_name}: input_ids must be given")
        if positions is not None:
            positions = positions.expand(ids.shape)
        batch = (ids, mask, None, positions, *cross)
        if not self.has_head:
            return _as_result(self.result, is_dict, last_hidden_state=module.own_forward(batch))
        output = module.own_forward((*batch, labels), return_logits=return_logits)
        if labels is None:
            return _as_result(self.result, is_dict, logits=output)
        loss, logits = output if isinstance(output, tuple) else (output, None)
        return _as_result(self.result, is_dict, loss=loss, logits=logits)

    def _cross_inputs(self, given: dict[str, Any]) -> tuple[Any, ...]:
        if not self.has_cross_attention:
            return ()
        states = given.pop("encoder_hidden_states", None)
        if states is None:
            raise TensorParallelError(
                f"{self.signature.class_name}: with add_cross_attention=True encoder_hidden_states must be given"
            )
        return states, _mask_of_padding(given.pop("encoder_attention_mask", None), "encoder_attention_mask")


@dataclass(frozen=True)
class EncoderAnswer:
    """Answers for an encoder (a stack of layers between embeddings and heads) with a DistributedTransformer."""

    signature: Signature
    config: Any
    has_cross_attention: bool
    result: str

    def __call__(self, module: DistributedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``module`` with the original's arguments; the original's result."""
        given = self.signature.bind(args, kwargs)
        is_dict = _wants_dict(given, self.config)
        for name in ("use_cache", "cache_position", "position_ids"):  # no cache; positions are in the embeddings
            given.pop(name, None)
        drop_empty_cache(given)
        hidden = given.pop("hidden_states")
        is_split = module.tp_group.size > 1
        mask = additive_mask(given.pop("attention_mask", None), hidden, hidden.shape[1], is_split)
        batch: tuple[Any, ...] = (hidden, mask)
        if self.has_cross_attention:
            states = given.pop("encoder_hidden_states", None)
            if states is None:
                raise TensorParallelError(
                    f"{self.signature.class_name}: with add_cross_attention=True encoder_hidden_states must be given"
                )
            cross_mask = additive_mask(given.pop("encoder_attention_mask", None), hidden, states.shape[1], is_split)
            batch = (hidden, states, mask, cross_mask)
        self.signature.refuse_rest(given)
        return _as_result(self.result, is_dict, last_hidden_state=module.own_forward(batch)[0])


def drop_empty_cache(given: dict[str, Any]) -> None:
    """Forget a cache of keys and values that holds nothing: the model around makes one unasked."""
    for name in ("past_key_values", "cache"):
        if getattr(given.get(name), "get_seq_length", lambda: 1)() == 0:
            del given[name]


def additive_mask(
    mask: torch.Tensor | None, hidden: torch.Tensor, num_keys: int, is_whole: bool = False
) -> torch.Tensor | None:
    """What is added to the scores, [N, 1, S or 1, keys], from any of the masks that transformers makes.

    It leaves a mask out where nothing is masked, and each rank of a tensor-parallel group decides that for its own
    batch; ``is_whole``: all come to the same shape, [N, 1, S, keys].
    """
    batch_size, num_queries = hidden.shape[:2]
    shape = (batch_size, 1, num_queries, num_keys)
    if mask is None:
        return torch.zeros(shape, dtype=hidden.dtype, device=hidden.device) if is_whole else None
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        raise TensorParallelError(
            f"the attention mask is a {type(mask).__name__}, expected a tensor with 2 or 4 dims: load the model with "
            "attn_implementation 'sdpa' or 'eager'"
        )
    if mask.dim() == 2:
        mask = (mask != 0)[:, None, None, :]
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device)
        mask = zeros.masked_fill(~mask, torch.finfo(hidden.dtype).min)
    return mask.expand(shape) if is_whole else mask
