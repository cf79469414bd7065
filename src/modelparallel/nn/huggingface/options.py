"""What configurations of transformers mean for ``smp.nn``, and which of their options it does not have.

An option that cannot be honoured stops the wrapping, by its name: a model that was asked to be split and silently is
not would cost more than the error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from modelparallel.errors import TensorParallelError
from modelparallel.job.registry import ConstructorArguments
from modelparallel.nn.huggingface.translation import Place, unknown_names

#: From a configuration, arguments of what replaces the model.
InitHook = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def refuse(config: Any, option: str, why: str = "") -> NoReturn:
    """Raise TensorParallelError for an option of a configuration."""
    raise TensorParallelError(
        f"{type(config).__name__}.{option}={getattr(config, option)!r} is not supported by tensor parallelism"
        f"{': ' + why if why else ''}. Change it, or leave this module as it is with "
        "smp.set_tensor_parallelism(module, False)"
    )


def activation(config: Any, option: str) -> str:
    """The name in ``smp.nn`` of the activation function that ``option`` names."""
    value = getattr(config, option)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        refuse(config, option, f"the activation functions are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def check_outputs(config: Any) -> None:
    """No inner results are collected."""
    for option in ("output_attentions", "output_hidden_states"):
        if getattr(config, option, False):
            refuse(config, option, "the layers keep no inner results")


def head_size(config: Any, num_heads: int) -> int:
    """The width of a head."""
    if config.hidden_size % num_heads:
        refuse(config, "hidden_size", f"it is not divisible by the number of heads, {num_heads}")
    return int(config.hidden_size // num_heads)


def decoder_arguments(config: Any) -> dict[str, Any]:
    """What the configurations of all decoders say alike, as arguments of DistributedTransformerLMHead."""
    return {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_size": head_size(config, config.num_attention_heads),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_positions": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "use_normal_initialization": True,
        "causal_mask_size": config.max_position_embeddings,
        "pre_layernorm": True,
        "post_layernorm": False,
        "output_layernorm": True,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }


def body_arguments(init_hook: InitHook, config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for the body of a language model, from the init hook of the model."""
    positional, keyword = init_hook(config)
    return positional, {**keyword, "add_lm_head": False, "lm_head_bias": False}


def arguments_of(module: nn.Module, place: Place) -> ConstructorArguments:
    """The configuration of ``module``, after a look at whether the module is what that builds.

    Raises TensorParallelError if its parameters have other names or sizes: adapters, pruned heads, embeddings that were
    resized behind the configuration's back, weights that are tied against it. A head that is not tied against it is
    taken for one of a script that skips transformers' initialisation, which also ties: the configuration counts.
    """
    config: Any = module.config
    state = module.state_dict(keep_vars=True)
    unknown = unknown_names(state, place)
    if unknown:
        raise TensorParallelError(
            f"this {type(module).__name__} has parameters that are not those of its class: {', '.join(unknown[:4])}"
            f"{', ...' if len(unknown) > 4 else ''}; remove what was added to it (adapters, for example)"
        )
    if getattr(config, "pruned_heads", None):
        refuse(config, "pruned_heads")
    if place.has_head and not config.tie_word_embeddings and is_head_tied(module, place):
        refuse(config, "tie_word_embeddings", "the head's weight is tied")
    is_left_untied = place.has_head and config.tie_word_embeddings and not is_head_tied(module, place)
    if is_left_untied and not skips_initialization(module):
        warnings.warn(
            f"{type(config).__name__}.tie_word_embeddings=True, and the head of this {type(module).__name__} is not "
            "tied: what replaces it has a tied head, unless it keeps these weights (_match_weights). To train a head "
            "of its own, set tie_word_embeddings=False in the configuration",
            stacklevel=6,  # where smp.DistributedModel is called
        )
    embedding = f"{place.layout.before[0].hf[0]}.weight" if place.layout.before else None
    words = next((value for name, value in state.items() if embedding and name.endswith(embedding)), None)
    if words is not None and words.shape[0] != config.vocab_size:
        refuse(config, "vocab_size", f"the embedding has {words.shape[0]} rows")
    return ConstructorArguments((config,), {})


def is_head_tied(module: nn.Module, place: Place) -> bool:
    """Whether the weight of the head is that of the embedding."""
    head, embedding = (module.get_parameter(name) for name in place.tied)
    return head is embedding


def skips_initialization(module: nn.Module) -> bool:
    """Whether the script has put a function of its own in the place of transformers' ``init_weights``, which also ties
    weights: scripts of the original do, to start faster.
    """
    method: Any = getattr(type(module), "init_weights", None)
    return method is not None and str(getattr(method, "__module__", "")).split(".")[0] != "transformers"


def origin_of(module: nn.Module) -> str:
    """What ``from_pretrained`` was given; "" for a model that was built from a configuration."""
    # The configuration may come from a file by itself; from_pretrained leaves models in evaluation mode.
    return "" if module.training else str(getattr(module.config, "_name_or_path", "") or "")
