"""The options that all modules of the transformer family share, beyond their documented arguments."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from modelparallel.errors import TensorParallelError
from modelparallel.nn.family import FamilyModule
from modelparallel.tensor_parallel.placements import slice_length

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


@dataclass(frozen=True)
class TransformerOptions:
    """Keyword arguments of every class of the family (smp-api section 18, and what model families need).

    Attributes:
        attention_in_fp32: compute scores, softmax and the product with the values in fp32.
        query_key_layer_scaling: accepted; the original scales scores down and up again, which is no difference here,
            where the softmax is never computed from scores in half precision.
        fused_softmax, fused_bias_gelu, fused_dropout, flash_attention: accepted. Attention always runs on torch's
            ``scaled_dot_product_attention``, which picks the fused kernel.
        fp32_residual_addition: add residuals in fp32.
        use_alibi, alibi_bias_max: bias scores by the distance to the last key (Press et al. 2021, arXiv:2108.12409;
            smp-api section 9), in place of position embeddings.
        zero_init: accepted; parameters are created by slices in any case.
        distribute_embedding: split the word embedding (and the head) over the vocabulary; False: whole on each rank.
        deterministic_dropout: draw attention dropout masks for all heads and cut out one's own, so that results do not
            depend on the tensor parallel degree; slow, and without flash kernels.
        scale_attention_scores: divide scores by the square root of the head size.
        scale_attn_by_layer_idx: divide scores by ``layer_idx + 1``, too.
        layer_idx: the number of the layer.
        rotary_dim: rotate this many features of each query and key by its position (Su et al. 2021, arXiv:2104.09864);
            None: none.
        rotary_interleaved: features 2i and 2i+1 are rotated together; False: features i and i + rotary_dim/2.
        rotary_base: of the frequencies.
        parallel_attn_output: attention and output layer read the same normalised input:
            ``x + attention(LN x) + output(LN x)``.
        single_pre_layernorm: with ``parallel_attn_output``; False: each of the two has a LayerNorm of its own.
        window_size: a query sees this many last keys only, its own included; a stack also takes one per layer.
        qkv_by_head: the map to queries, keys and values gives those of one head after another; False: all queries, all
            keys, all values.
        qkv_bias, attention_dense_bias: whether these maps have a bias.
        input_layernorm, output_layernorm: whether a stack normalises what it gets and what it gives; None: if
            ``pre_layernorm`` and ``post_layernorm``.
    """

    attention_in_fp32: bool = False
    query_key_layer_scaling: bool = False
    fused_softmax: bool = True
    fused_bias_gelu: bool = False
    fused_dropout: bool = False
    flash_attention: bool = True
    fp32_residual_addition: bool = False
    use_alibi: bool = False
    alibi_bias_max: int = 8
    zero_init: bool = False
    distribute_embedding: bool = True
    deterministic_dropout: bool = False
    scale_attention_scores: bool = True
    scale_attn_by_layer_idx: bool = False
    layer_idx: int | None = None
    rotary_dim: int | None = None
    rotary_interleaved: bool = True
    rotary_base: float = 10000.0
    parallel_attn_output: bool = False
    single_pre_layernorm: bool = True
    window_size: int | Sequence[int | None] | None = None
    qkv_by_head: bool = False
    qkv_bias: bool = True
    attention_dense_bias: bool = True
    input_layernorm: bool | None = None
    output_layernorm: bool | None = None

    @staticmethod
    def of(who: str, given: dict[str, Any]) -> TransformerOptions:
        """The options of ``given``; raises TensorParallelError for a name that does not exist."""
        known = {field.name for field in dataclasses.fields(TransformerOptions)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise TensorParallelError(
                f"{who}: unknown argument {', '.join(unknown)}; besides the documented ones there are "
                f"{', '.join(sorted(known))}"
            )
        return TransformerOptions(**given)

    def for_layer(self, index: int) -> dict[str, Any]:
        """As keyword arguments of layer ``index`` of a stack."""
        own = self.as_arguments()
        own["layer_idx"] = index
        if isinstance(self.window_size, Sequence):
            own["window_size"] = self.window_size[index]
        return own

    def as_arguments(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class OptionsModule(FamilyModule):
    """A module of the family with the options that all share."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = TransformerOptions.of(type(self).__name__, options)


def takes_options(cls: ModuleClass) -> ModuleClass:
    """Class decorator: show the options in the signature, where the constructor takes them as ``**options``."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    documented = [one for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(TransformerOptions)
        if all(field.name != one.name for one in documented)
    ]
    cls.__signature__ = inspect.Signature(documented + options)  # type: ignore[attr-defined]
    return cls


def _gelu_of_tanh(input: torch.Tensor) -> torch.Tensor:
    return F.gelu(input, approximate="tanh")


def activation_function(who: str, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function called ``name``: "gelu" and "relu" (smp-api section 9), and some that model families use."""
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu": F.gelu,
        "relu": F.relu,
        "gelu_new": _gelu_of_tanh,
        "gelu_pytorch_tanh": _gelu_of_tanh,
        "silu": F.silu,
    }
    if name not in known:
        raise TensorParallelError(f"{who}: activation={name!r} is not one of {', '.join(sorted(known))}")
    return known[name]


def check_sizes(who: str, tp_size: int, **sizes: int) -> None:
    """Raise NotSplittableError unless each size is divisible by the tensor parallel degree."""
    for name, size in sizes.items():
        if size < 1:
            raise TensorParallelError(f"{who}: {name}={size} must be at least 1")
        slice_length(size, tp_size, f"{name} of a {who}")


def check_layernorms(who: str, pre_layernorm: bool, post_layernorm: bool) -> None:
    """``pre_layernorm or post_layernorm`` must hold (smp-api section 9)."""
    if not (pre_layernorm or post_layernorm):
        raise TensorParallelError(
            f"{who}: pre_layernorm and post_layernorm are both False, so that nothing would be normalised: set one"
        )
