"""The configuration table: the type, default, range and meaning of every key, and how a given value is read.

This is the table only. Where values come from, and how they fit together, is in `config/reading.py`; the reference in
docs/configuration.md is printed from here. Facts: smp-config section 1.
"""

import logging
import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from modelparallel.config.topology import Topology, all_strategies, strategy_letters
from modelparallel.errors import SMPConfigError

logger = logging.getLogger("modelparallel")

DEFAULT_PORT = 7777


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    raise ValueError("type")


def _read_int(value: Any) -> int:
    # A bool is an int to Python; `microbatches=True` is a mistake, not a 1.
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass  # not a number: refused below, with the text that every wrong type gets
    raise ValueError("type")


def _read_count(value: Any) -> int:
    """A number of elements or bytes: 500000000, 5e8 and "5e8" are one value; 0.5 is none."""
    if isinstance(value, str):
        try:
            value = float(value) if set(value) & set(".eE") else int(value)
        except ValueError:
            raise ValueError("type") from None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return _read_int(value)


def _read_float(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass  # refused below
    raise ValueError("type")


def _read_text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        path: str = os.fspath(value)
        return path
    if isinstance(value, str):
        return value
    raise ValueError("type")


def _read_strategy(value: Any) -> str:
    text = _read_text(value)
    try:
        strategy_letters(text)
    except SMPConfigError:
        raise ValueError("choice") from None
    return text


def _read_optional(reader: Any) -> Any:
    return BeforeValidator(lambda value: None if value is None else reader(value))


Flag = Annotated[bool, BeforeValidator(_read_bool)]
Whole = Annotated[int, BeforeValidator(_read_int)]
ElementCount = Annotated[int, BeforeValidator(_read_count)]
Real = Annotated[float, BeforeValidator(_read_float)]
Text = Annotated[str, BeforeValidator(_read_text)]
Strategy = Annotated[str, BeforeValidator(_read_strategy)]
OptionalWhole = Annotated[int | None, _read_optional(_read_int)]
OptionalCount = Annotated[int | None, _read_optional(_read_count)]
OptionalText = Annotated[str | None, _read_optional(_read_text)]


def _parameter(
    default: Any,
    meaning: str,
    *,
    kind: str,
    valid: str = "",
    choices: tuple[str, ...] = (),
    default_text: str = "",
    **constraints: Any,
) -> Any:
    """A row of the configuration table. `kind` and `valid` are what an error says was expected."""
    if kind == "float":
        constraints["allow_inf_nan"] = False
    extra: dict[str, Any] = {"kind": kind, "valid": valid, "choices": list(choices), "default_text": default_text}
    return Field(default=default, description=meaning, json_schema_extra=extra, **constraints)


def _flag(meaning: str, *, default: bool = False, **more: Any) -> Any:
    return _parameter(default, meaning, kind="bool", **more)


def _choice(default: str, choices: tuple[str, ...], meaning: str) -> Any:
    pattern = "^(" + "|".join(choices) + ")$"
    return _parameter(default, meaning, kind="str", choices=choices, pattern=pattern)


class Config(BaseModel):
    """The checked configuration; every parameter is an attribute that holds its default when it is not set.

    Frozen. Made by `modelparallel.config.load_config`; `sources` says for every parameter whether its value came from
    the "environment", from "init" (the dict given to `smp.init`) or is the "default". `notices` are sentences for the
    user about values that have less effect than one may expect.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, validate_default=False)

    # Shape of the job.
    pipeline_parallel_degree: Whole = _parameter(
        1, "Number of pipeline stages. `partitions` is another name for it.", kind="int", valid=">= 1", ge=1
    )
    tensor_parallel_degree: Whole = _parameter(
        1,
        "Number of processes that share one distributed layer. More than 1 needs `ddp`.",
        kind="int",
        valid=">= 1",
        ge=1,
    )
    placement_strategy: Strategy = _parameter(
        "cluster",
        "How ranks map to the axes: `cluster` is DPT, `spread` is TPD, or a permutation of D, P, T; the right-most "
        "letter varies fastest over ascending ranks.",
        kind="str",
        choices=("cluster", "spread", *all_strategies()),
    )

    # Microbatches and schedule.
    microbatches: Whole = _parameter(
        1, "Parts into which a step function splits its batch; 1 means no pipelining.", kind="int", valid=">= 1", ge=1
    )
    uneven_microbatches: Text = _choice(
        "exact",
        ("exact", "error"),
        "A batch that does not divide by `microbatches`: split it unevenly and weight by samples, or refuse it.",
    )
    active_microbatches: Whole = _parameter(
        3,
        "Most microbatches that are in flight at a time; more than `microbatches` means `microbatches`.",
        kind="int",
        valid=">= 1",
        default_text="pipeline_parallel_degree + 2",
        ge=1,
    )
    pipeline: Text = _choice(
        "interleaved",
        ("interleaved", "simple", "zero_bubble", "_only_forward"),
        "Pipeline schedule: a stage runs the backwards that are ready before further forwards, all forwards first, as "
        "the first with the gradients of the weights computed where a stage would wait (extension), or no backward at "
        "all.",
    )
    virtual_pipeline_degree: Whole = _parameter(
        1,
        "Pieces of the model that each stage holds: the automatic partition cuts the model into "
        "`pipeline_parallel_degree` times as many pieces and deals them out in turn. More bytes travel and the stages "
        "wait less. Extension.",
        kind="int",
        valid=">= 1",
        ge=1,
    )
    static_mode: Flag = _flag("Accepted, no effect.")
    fast_mode: Flag = _flag("Accepted, no effect.")
    deterministic_server: Flag = _flag("Accepted, no effect: every rank always runs in one fixed order.")

    # Partitioning.
    auto_partition: Flag = _flag("Decide the stages automatically. False needs `default_partition`.", default=True)
    default_partition: Whole = _parameter(
        0, "Stage of the modules that nothing else places.", kind="int", valid="0..pipeline_parallel_degree - 1", ge=0
    )
    memory_weight: Real = _parameter(
        0.8,
        "Balance memory (1.0) or computation (0.0) in the automatic partition.",
        kind="float",
        valid="0.0..1.0",
        default_text='0.2 with optimize="speed", else 0.8',
        ge=0.0,
        le=1.0,
    )
    optimize: Text = _choice(
        "memory", ("memory", "speed"), "Layout of tensor-parallel transformers; also picks the default `memory_weight`."
    )
    skip_tracing: Flag = _flag("Do not trace the first step; the automatic partition then uses sizes only.")
    partition_file: OptionalText = _parameter(
        None, "File that the partition plan is written to or read from.", kind="str"
    )
    load_partition: Flag = _flag("Read the plan from `partition_file` instead of computing it.")
    memory_limit: OptionalCount = _parameter(
        None,
        "What one stage may hold at most, in bytes: parameters, gradients, optimizer state and the activations of the "
        "microbatches in flight. The automatic partition keeps to it or stops. Extension.",
        kind="int",
        valid="> 0",
        gt=0,
    )
    tied_weights: Text = _choice(
        "colocate",
        ("colocate", "replicate", "auto"),
        "Modules that share a parameter: on one stage, each with a copy that is kept equal, or what is cheaper. "
        "Extension.",
    )

    # Data parallelism.
    ddp: Flag = _flag("Data parallelism. Needed when a stage or slice is held by more than one process.")
    ddp_port: Whole = _parameter(
        DEFAULT_PORT,
        "Port of the rendezvous; unset, tasks of srun take one that follows from job and step. Needs `ddp`.",
        kind="int",
        valid="0..65535",
        default_text=f"MASTER_PORT, else {DEFAULT_PORT}",
        ge=0,
        le=65535,
    )
    ddp_dist_backend: Text = _choice(
        "auto",
        ("auto", "nccl", "gloo"),
        "Backend of torch.distributed: `auto` is NCCL for CUDA tensors where there is a GPU, and gloo; `gloo` alone "
        "lets processes share a GPU. Needs `ddp`.",
    )
    prescaled_batch: Flag = _flag("The ranks of a TP group feed the same batch.")
    shard_optimizer_state: Flag = _flag("Shard the optimizer state over the holders of a parameter. Needs `ddp`.")
    sharded_data_parallel_degree: Whole = _parameter(
        1,
        "Processes over which parameters, gradients and optimizer state are sharded. More than 1 needs `ddp`.",
        kind="int",
        valid=">= 1, a divisor of the data parallel degree",
        ge=1,
    )
    sdp_reduce_bucket_size: ElementCount = _parameter(
        500_000_000, "Gradient bucket, in elements.", kind="int", valid="> 0", gt=0
    )
    sdp_param_persistence_threshold: ElementCount = _parameter(
        1_000_000, "Parameters of fewer elements stay whole.", kind="int", valid=">= 0", ge=0
    )
    sdp_max_live_parameters: ElementCount = _parameter(
        1_000_000_000, "Most elements that are gathered at a time.", kind="int", valid="> 0", gt=0
    )
    sdp_hierarchical_allgather: Flag = _flag("Gather inside a host first, then between hosts.", default=True)
    sdp_gather: Text = _choice(
        "auto",
        ("auto", "visit", "step"),
        "When sharded parameters are gathered: for each visit of their module, or once for the whole step; `auto` is "
        "`step` with a pipeline or `find_unused_parameters`, else `visit`. Extension.",
    )
    sdp_gradient_clipping: Real = _parameter(
        1.0, "L2 norm at which `optimizer.step()` clips the gradient.", kind="float", valid="> 0", gt=0.0
    )

    # Memory and precision.
    offload_activations: Flag = _flag("Keep checkpointed activations in host memory.")
    activation_loading_horizon: Whole = _parameter(
        4, "How many pipeline tasks ahead offloaded activations are fetched.", kind="int", valid=">= 1", ge=1
    )
    fp16: Flag = _flag("Train in fp16 with fp32 master weights. Excludes `bf16`.")
    fp16_params: Flag = _flag("Distributed layers create fp16 parameters. Superseded by `fp16`.")
    bf16: Flag = _flag("Train in bf16. Excludes `fp16`.")
    delayed_parameter_initialization: Flag = _flag("Default of `smp.model_creation`: create parameters when placed.")
    checkpoint_attentions: Flag = _flag("Checkpoint the attention inside the distributed layers.")
    match_weights: Flag = _flag(
        "Modules replaced through a registration take the weights of the originals.", alias="_match_weights"
    )
    fp32_grad_accumulation: Flag = _flag("Accumulate gradients in fp32.", alias="_fp32_grad_accumulation")

    # The run.
    debug: Flag = _flag(
        "Check at each call what the ranks of a TP group must give alike (a prescaled batch), which costs messages. "
        "Extension."
    )
    seed: OptionalWhole = _parameter(
        None, "Seed of the random streams.", kind="int", default_text="drawn from torch's generator at each step"
    )
    timeout_seconds: Real = _parameter(
        600.0,
        "How long a wait for another rank inside a step may last, in seconds. Where it is not given the environment "
        "variable SMP_TIMEOUT counts.",
        kind="float",
        valid="> 0",
        gt=0.0,
    )
    message_timeout_seconds: Real = _parameter(
        1800.0,
        "How long `barrier`, `recv_from` and the other calls between scripts may wait, in seconds; what the other "
        "ranks do before they arrive (a download, say) counts.",
        kind="float",
        valid="> 0",
        gt=0.0,
    )
    push_limit_bytes: Whole = _parameter(
        65536, "Outputs up to this size are sent to all stages when they are made.", kind="int", valid=">= 0", ge=0
    )

    # What is opened.
    trust_pickles: Flag = _flag(
        "`smp.resume_from_checkpoint` opens whatever objects are in a checkpoint, which can then run any code. Where "
        "it is not given the environment variable SMP_TRUST_PICKLES counts. Extension."
    )
    allowed_types: Text = _parameter(
        "",
        "Classes that objects in a checkpoint may be of, as `module.Class`, separated by commas. Where it is not given "
        "the environment variable SMP_ALLOWED_TYPES counts. Extension.",
        kind="str",
        default_text="none",
    )

    # Filled by load_config. `_given` holds the values as read, before a derived default or a limit changed them, so
    # that a second smp.init can be merged with the first.
    _given: dict[str, tuple[Any, str]] = PrivateAttr(default_factory=dict)
    _notices: tuple[str, ...] = PrivateAttr(default=())

    def model_post_init(self, context: Any, /) -> None:
        """Fill the defaults that depend on other values, and apply the limit on `active_microbatches`."""
        super().model_post_init(context)
        given = self.model_fields_set
        # The model is frozen for its users only.
        values = self.__dict__
        if "memory_weight" not in given:
            values["memory_weight"] = 0.2 if self.optimize == "speed" else 0.8
        if "active_microbatches" not in given:
            values["active_microbatches"] = self.pipeline_parallel_degree + 2
        values["active_microbatches"] = min(self.active_microbatches, self.microbatches)

    @property
    def partitions(self) -> int:
        """The older name of `pipeline_parallel_degree`."""
        return self.pipeline_parallel_degree

    @property
    def _match_weights(self) -> bool:
        return self.match_weights

    @property
    def _fp32_grad_accumulation(self) -> bool:
        return self.fp32_grad_accumulation

    @property
    def shares_devices(self) -> bool:
        """Whether several processes may use one GPU: with gloo alone, since NCCL wants a GPU for each."""
        return self.ddp_dist_backend == "gloo"

    def check_world(self, world_size: int) -> None:
        """Check the configuration against the number of processes; local. Raises `SMPConfigError`."""
        topology = Topology(
            world_size, self.pipeline_parallel_degree, self.tensor_parallel_degree, self.placement_strategy
        )
        if topology.rdp_degree > 1 and not self.ddp:
            mp_degree = topology.pp_degree * topology.tp_degree
            raise SMPConfigError(
                f"ddp: {world_size} processes hold {topology.rdp_degree} copies of the model "
                f"(pipeline_parallel_degree={topology.pp_degree}, tensor_parallel_degree={topology.tp_degree}), which "
                f"needs ddp: True: set it, or start {mp_degree} process{'es' if mp_degree > 1 else ''}"
            )
        degree, dp_degree = self.sharded_data_parallel_degree, topology.rdp_degree * topology.tp_degree
        if dp_degree % degree:
            raise SMPConfigError(
                f"sharded_data_parallel_degree: {degree} must divide the data parallel degree dp={dp_degree} "
                f"({world_size} processes / pipeline_parallel_degree {topology.pp_degree})"
            )
        if topology.rdp_degree % degree:
            raise SMPConfigError(
                f"sharded_data_parallel_degree: {degree} must divide the {topology.rdp_degree} ranks that hold the "
                f"same part of the model (data parallel degree dp={dp_degree} / tensor_parallel_degree "
                f"{topology.tp_degree}), since slices of tensor parallelism are sharded among these: use a divisor of "
                f"{topology.rdp_degree}"
            )

    @property
    def sources(self) -> dict[str, str]:
        """For every parameter, under its public key: "environment", "init" or "default"."""
        return {key: self._given[key][1] if key in self._given else "default" for key in CONFIGURATION_KEYS}

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the user; shown once, by `smp.init` on global rank 0 and by the launcher."""
        return self._notices

    @property
    def given(self) -> Mapping[str, Any]:
        """The values that were set, as they were read, under their public keys."""
        return {key: value for key, (value, _) in self._given.items()}


def public_key(field_name: str) -> str:
    """The key by which a user sets the attribute `field_name`."""
    return Config.model_fields[field_name].alias or field_name


#: Every key that a user may set, in the order of the configuration table.
CONFIGURATION_KEYS: tuple[str, ...] = tuple(public_key(name) for name in Config.model_fields)
