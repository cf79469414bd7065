"""What the engine must know of a torch function: found out once for each, since every operation of a step asks."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

# Answered from the wrapper tensor and the spec, on every stage alike; everything else is an operation.
_METADATA = frozenset(
    "shape device dtype ndim layout is_cuda is_cpu is_xpu is_mps is_meta is_sparse is_sparse_csr is_quantized "
    "is_nested is_mkldnn itemsize nbytes "
    "is_leaf names size dim stride numel nelement ndimension element_size is_contiguous is_floating_point is_complex "
    "storage_offset get_device is_signed __len__ __hash__ is_same_size is_inference is_conj is_neg has_names "
    "_is_view output_nr name is_shared is_pinned".split()
)
_RANDOM = frozenset(
    "rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ multinomial normal normal_ "
    "uniform_ random_ "
    "exponential_ cauchy_ geometric_ log_normal_ poisson binomial dropout dropout_ dropout1d dropout2d dropout3d "
    "alpha_dropout alpha_dropout_ "
    "feature_dropout feature_dropout_ feature_alpha_dropout feature_alpha_dropout_ native_dropout rrelu rrelu_ "
    "gumbel_softmax "
    "scaled_dot_product_attention multi_head_attention_forward fractional_max_pool2d fractional_max_pool3d "
    "fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices _sample_dirichlet _standard_gamma rnn_tanh "
    "rnn_relu lstm gru "
    "trunc_normal_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_ orthogonal_ sparse_ "
    "kaiming_uniform kaiming_normal".split()
)
_IN_PLACE_DUNDERS = frozenset(
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__ "
    "__ilshift__ __irshift__".split()
)
_READS = frozenset("item tolist __bool__ __int__ __float__ __index__ __complex__ numpy __array__ is_nonzero".split())
# Functions whose floats do not decide the structure of the output, so that a new value needs no new announcement. (Not
# so dropout: with p=0 it gives back its input.)
_ARITHMETIC = frozenset(
    "add sub mul div true_divide divide multiply subtract rsub pow add_ sub_ mul_ div_ pow_ __add__ __radd__ __iadd__ "
    "__sub__ __rsub__ "
    "__isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __pow__ __rpow__ addcmul addcdiv lerp "
    "clamp clamp_min clamp_max "
    "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ masked_fill masked_fill_ fill_ where "
    "layer_norm softmax log_softmax "
    "gelu leaky_relu leaky_relu_ elu hardtanh normalize cross_entropy smooth_l1_loss huber_loss".split()
)
_SHAPE_DEPENDS_ON_VALUES = frozenset(
    "nonzero argwhere masked_select unique unique_consecutive unique_dim bincount repeat_interleave one_hot "
    "tensor_split nonzero_static combinations cartesian_prod pack_padded_sequence _pack_padded_sequence "
    "pad_packed_sequence _pad_packed_sequence".split()
)
_SHAPE_MAY_DEPEND_ON_VALUES = frozenset(("where", "__getitem__", "index"))
#: Functions that are no operations on a value of the step, and why (None: answered by the engine itself).
NO_OPERATIONS: dict[str, str | None] = {
    "backward": "use model.backward(loss) inside smp.step: with pipelining the backward of all stages is run by the "
    "library",
    "grad": "gradients inside a step are not known before the step returns (the backward runs at its end): read "
    "parameter.grad after it",
    "data_ptr": "a value that is spread over the stages has no address",
    "untyped_storage": "a value that is spread over the stages has no storage here",
    "storage": "a value that is spread over the stages has no storage here",
    "__dlpack__": "a value that is spread over the stages cannot be exported",
    "resize_": "use an operation that returns a new tensor",
    "resize_as_": "use an operation that returns a new tensor",
    "set_": "use an operation that returns a new tensor",
    "t_": "use x.t()",
    "transpose_": "use x.transpose()",
    "squeeze_": "use x.squeeze()",
    "unsqueeze_": "use x.unsqueeze()",
    "swapaxes_": "use x.swapaxes()",
    "requires_grad_": None,
    "retain_grad": None,
    "register_hook": None,
}
_PROPERTIES = frozenset("requires_grad grad_fn grad _version".split())


@dataclass(frozen=True, eq=False, slots=True)
class FunctionTraits:
    """See the field comments; of a property, the name is the property's."""

    name: str
    description: str  # these two for messages
    input_description: str
    identity: tuple[str, str | None]  # its part of an operation's signature
    is_metadata: bool  # only asks for what every stage knows of a tensor
    is_special: bool  # may be no operation: see glue.run
    is_random: bool  # may draw from the default generators
    is_read: bool  # gives Python a value
    is_in_place: bool  # by its name: writes to its first argument
    stays_with_base: bool  # its result is a view of the first of several tensors
    is_value_shaped: bool | None  # the output's shape depends on values (None: depending on the arguments)
    are_floats_plain: bool  # the values of floats among the arguments do not decide the output's structure


_known: dict[Any, FunctionTraits] = {}


def traits_of(func: Any) -> FunctionTraits:
    """What there is to know of a torch function as ``__torch_function__`` gets it."""
    traits = _known.get(func)
    if traits is None:
        traits = _find_out(func)
        # Not what is made anew for each call, or belongs to an object of the user's.
        if getattr(func, "__closure__", None) is None and not isinstance(func, MethodType):
            _known[func] = traits
    return traits


def _find_out(func: Any) -> FunctionTraits:
    accessor = getattr(func, "__name__", "")
    name = accessor
    if accessor in ("__get__", "__set__", "__delete__"):
        name = getattr(getattr(func, "__self__", None), "__name__", accessor)
    is_setter = accessor == "__set__"
    module_name = getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", None)
    is_by_name = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return FunctionTraits(
        name=name,
        description=f"operation {name}",
        input_description=f"input of {name}",
        identity=(name, module_name),
        is_metadata=name in _METADATA and not is_setter,
        is_special=is_setter or name in NO_OPERATIONS or (accessor == "__get__" and name in _PROPERTIES),
        is_random=name in _RANDOM,
        is_read=name in _READS,
        is_in_place=name in _IN_PLACE_DUNDERS or is_by_name,
        stays_with_base=name.endswith("_as"),
        is_value_shaped=None if name in _SHAPE_MAY_DEPEND_ON_VALUES else name in _SHAPE_DEPENDS_ON_VALUES,
        are_floats_plain=name in _ARITHMETIC,
    )
