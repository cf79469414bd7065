"""Configuration: where parameter values come from, and the rules that they keep together.

Values come from the environment variable SM_HP_MP_PARAMETERS, then from the dict given to `smp.init`, then from the
defaults; the first that has a key wins (smp-config sections 1, 2 and 5.7). All checks of them are here and run
before any process is started (launcher) or any group is made (`smp.init`). The configuration
table is `config/table.py`.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelparallel.config.table import CONFIGURATION_KEYS, Config, public_key
from modelparallel.errors import NotBuiltError, SMPConfigError

__all__ = [
    "Config",
    "load_config",
    "merge_second_init",
    "parse_parameters",
    "validate_parameters",
]

ENVIRONMENT_KEY = "SM_HP_MP_PARAMETERS"
#: Seconds: what `timeout_seconds` is where it is not given.
TIMEOUT_VARIABLE = "SMP_TIMEOUT"
TRUST_VARIABLE = "SMP_TRUST_PICKLES"
TYPES_VARIABLE = "SMP_ALLOWED_TYPES"
_WHERE = {"environment": ENVIRONMENT_KEY, "init": "smp.init"}

#: Features that do not exist yet: a parameter, or one value of it ("key=value"), and what is missing. A parameter that
#: is listed here may only have its default value. Whoever builds the feature deletes its line.
NOT_BUILT: dict[str, str] = {
    "checkpoint_attentions": "checkpointing inside the distributed attention",
}

#: Keys of other frameworks, or of other calls, that jobs carry along.
FOREIGN_KEYS: dict[str, str] = {
    "contiguous": "a TensorFlow option",
    "horovod": "Horovod is not used; set ddp: True for data parallelism",
    "overlapping_allreduce": "pass it to smp.DistributedModel instead",
}

#: Variables of the original library that are accepted and have nothing to act on here (smp-config section 4).
ENVIRONMENT_WITHOUT_EFFECT: dict[str, str] = {
    "SMP_NCCL_THROTTLE_LIMIT": "most NCCL operations in flight",
    "SMDDP_AG_SCRATCH_BUFFER_SIZE_BYTES": "allgather scratch buffer of SMDDP",
    "SMDDP_AG_SORT_BUFFER_SIZE_BYTES": "gather buffer of SMDDP",
    "SMP_DISABLE_D2D": "device-to-device link of the original pipeline",
    "SMP_D2D_GPU_BUFFER_SIZE_BYTES": "device-to-device link of the original pipeline",
    "SMP_ENABLE_CROSS_NODE_D2D": "device-to-device link of the original pipeline",
}

# What counts with stages only, and what the automatic partition alone reads.
_PIPELINE_KEYS = ("pipeline", "active_microbatches", "virtual_pipeline_degree", "memory_limit", "tied_weights")
_AUTOMATIC_KEYS = ("memory_weight", "virtual_pipeline_degree", "memory_limit")
_SDP_IDLE_KEYS = ("sdp_reduce_bucket_size", "sdp_hierarchical_allgather")
_SDP_KEYS = tuple(key for key in CONFIGURATION_KEYS if key.startswith("sdp_"))

# Read from the environment where they are not given.
_DERIVED_KEYS = ("ddp_port", "timeout_seconds", "trust_pickles", "allowed_types")


def load_config(
    init_parameters: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Read, check and combine the values of the environment, of `smp.init` and the defaults.

    Args:
        init_parameters: the dict given to `smp.init`, or the path of a JSON file with the same keys.
        environ: the environment; `os.environ` if None.

    Raises `SMPConfigError` for an unknown key (names the nearest), a wrong type or value, or values that do not fit
    together; `NotBuiltError` for a feature that does not exist yet. The number of processes is checked by
    `Config.check_world`. Source: smp-config section 1.
    """
    environ = os.environ if environ is None else environ
    from_environment = parse_parameters(environ.get(ENVIRONMENT_KEY) or {}, ENVIRONMENT_KEY)
    from_init = parse_parameters(init_parameters or {}, "smp.init")
    given: dict[str, tuple[Any, str]] = {}
    notices: list[str] = []
    for parameters, source in ((from_init, "init"), (from_environment, "environment")):
        for key, value in _read_keys(parameters, source, notices).items():
            if key in given and not _same(key, given[key][0], value):
                notices.append(
                    f"{key}: {given[key][0]!r} given to smp.init, {value!r} in {ENVIRONMENT_KEY}; the latter wins"
                )
            given[key] = (value, source)
    derived: dict[str, Any] = {}
    if given.get("ddp_port") is None and environ.get("MASTER_PORT", "").isdigit():
        derived["ddp_port"] = int(environ["MASTER_PORT"])
    if TIMEOUT_VARIABLE in environ:
        derived["timeout_seconds"] = _timeout(environ[TIMEOUT_VARIABLE])
    if environ.get(TRUST_VARIABLE):
        derived["trust_pickles"] = _trust(environ[TRUST_VARIABLE])
    if environ.get(TYPES_VARIABLE):
        derived["allowed_types"] = environ[TYPES_VARIABLE]
    return _build(given, notices, environ, derived=derived)


def _timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise SMPConfigError(
            f"environment variable {TIMEOUT_VARIABLE}: expected a number of seconds > 0, got {text!r}: set it to how "
            "long a wait for another rank inside a step may last, or unset it"
        )
    return seconds


def _trust(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true"):
        raise SMPConfigError(
            f"environment variable {TRUST_VARIABLE}: expected 1 or 0, got {text!r}: 1 opens whatever objects are in a "
            "checkpoint, which can then run any code"
        )
    return text.lower() in ("1", "true")


def validate_parameters(
    parameters: Mapping[str, Any] | str | os.PathLike[str] | None, *, num_processes: int | None
) -> Config:
    """Check the `parameters` of a job before it starts; the environment of the caller does not count. Local.

    Args:
        parameters: as for `load_config`.
        num_processes: the size of the job, None if not known yet.

    Raises:
        SMPConfigError: a wrong parameter, or one that does not fit the number of processes.
    """
    config = load_config(parameters, {})
    if num_processes is not None:
        config.check_world(num_processes)
    return config


def merge_second_init(config: Config, parameters: Mapping[str, Any] | str | None) -> tuple[Config, list[str]]:
    """Combine a running configuration with the dict of a later `smp.init`: new keys are added, old values stay.

    Returns the merged configuration and one warning per key whose value differs from the one in force.
    """
    notices: list[str] = []
    warnings: list[str] = []
    given = dict(config._given)
    for key, value in _read_keys(parse_parameters(parameters or {}, "smp.init"), "init", notices).items():
        if key not in given:
            given[key] = (value, "init")
        elif not _same(key, given[key][0], value):
            held, source = given[key]
            warnings.append(
                f"smp.init was called before: {key} stays {held!r} (from {_WHERE[source]}), {value!r} is ignored: "
                "give all parameters to the first smp.init"
            )
    # What the environment gave stays.
    derived = {key: getattr(config, key) for key in _DERIVED_KEYS if key not in given}
    return _build(given, notices, {}, derived=derived), warnings


def parse_parameters(source: Mapping[str, Any] | str | os.PathLike[str], where: str) -> dict[str, Any]:
    """The parameters as a dict, from a dict, JSON text, `key=value,key=value` text, or the path of a JSON file."""
    if isinstance(source, Mapping):
        parameters: Any = dict(source)
    elif isinstance(source, str | os.PathLike):
        text = os.fspath(source).strip()
        if not text.startswith("{"):
            path = Path(text)
            if "=" in text and not path.exists():
                return _parse_assignments(text, where)
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise SMPConfigError(
                    f"{where}: cannot read the parameters from {str(path)!r} ({error.strerror or error}): expected a "
                    "dict, JSON text, or the path of a JSON file"
                ) from error
        try:
            parameters = json.loads(text)
        except json.JSONDecodeError as error:
            raise SMPConfigError(f"{where}: the parameters are not valid JSON ({error}): got {short(text)}") from error
    else:
        parameters = source
    if not isinstance(parameters, dict):
        raise SMPConfigError(
            f"{where}: expected a dict of parameters (or the path of a JSON file with one), got "
            f"{type(parameters).__name__} {short(parameters)}"
        )
    for key in parameters:
        if not isinstance(key, str):
            raise SMPConfigError(f"{where}: a parameter's key must be a str, got {type(key).__name__} {key!r}")
    return parameters


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The candidate that is spelled most like `word`."""
    candidates = list(candidates)
    return difflib.get_close_matches(word.lower(), candidates, n=1, cutoff=0.0)[0]


# --------------------------------------------------------------------------------------------------------------------
# Reading one source


def _parse_assignments(text: str, where: str) -> dict[str, Any]:
    """`ddp=True,microbatches=4`, the form of a hyperparameter on a command line; all values are strings."""
    parameters = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, sign, value = part.partition("=")
        if not sign:
            raise SMPConfigError(f"{where}: expected key=value, got {part!r} in {short(text)}")
        parameters[key.strip()] = value.strip()
    return parameters


def _read_keys(parameters: Mapping[str, Any], source: str, notices: list[str]) -> dict[str, Any]:
    """Canonical keys with values as given: aliases resolved, foreign keys noted, unknown ones refused."""
    where = _WHERE[source]
    given: dict[str, Any] = {}
    for key, value in parameters.items():
        if key in CONFIGURATION_KEYS or key == "partitions":
            given[key] = value
        elif key in FOREIGN_KEYS:
            notices.append(f"{key}={value!r} (from {where}) has no effect: {FOREIGN_KEYS[key]}")
        elif key.startswith("_"):
            notices.append(f"{key}={value!r} (from {where}) is not known and has no effect")
        else:
            raise SMPConfigError(
                f"{key}: unknown parameter (from {where}): did you mean "
                f"{nearest(key, [*CONFIGURATION_KEYS, 'partitions'])!r}? docs/configuration.md lists all"
            )
    if "partitions" in given:
        alias = given.pop("partitions")
        degree = given.setdefault("pipeline_parallel_degree", alias)
        if not _same("pipeline_parallel_degree", degree, alias):
            raise SMPConfigError(
                f"pipeline_parallel_degree: {degree!r} and partitions: {alias!r} (from {where}) are two names of one "
                "parameter and must be equal: give one of them"
            )
    if _is_on(parameters.get("horovod")) and _is_on(parameters.get("ddp")):
        raise SMPConfigError(f"horovod: cannot be used together with ddp (from {where}): remove horovod")
    return given


def _is_on(value: Any) -> bool:
    """Whether a flag as given, not yet checked, means True."""
    return value not in (None, False, 0) and str(value).strip().lower() not in ("false", "0", "")


def _same(key: str, first: Any, second: Any) -> bool:
    """Whether two values, as given, mean the same ("4" and 4 do)."""
    if type(first) is type(second) and first == second:
        return True
    readings = []
    for value in (first, second):
        try:
            readings.append(getattr(Config(**{key: value}), _field_name(key)))
        except ValidationError:
            # A wrong value: it is reported with its key by whoever builds the configuration with it.
            readings.append(value)
    return bool(readings[0] == readings[1])


def _field_name(key: str) -> str:
    return key.lstrip("_")


# --------------------------------------------------------------------------------------------------------------------
# Checks


def _build(
    given: Mapping[str, tuple[Any, str]],
    notices: Iterable[str],
    environ: Mapping[str, str],
    derived: Mapping[str, Any] | None = None,
) -> Config:
    """Check types, ranges and rules, and make the configuration."""
    try:
        config = Config(**{**(derived or {}), **{key: value for key, (value, _) in given.items()}})
    except ValidationError as error:
        raise SMPConfigError("\n".join(_explain(detail, given) for detail in error.errors())) from error
    # As read: "4" has become 4, but no limit was applied yet.
    checked = {key: (_as_read(config, key, value), source) for key, (value, source) in given.items()}
    config._given = checked
    _check_rules(config)
    _check_built(config)
    config._notices = tuple(dict.fromkeys((*notices, *_notices(config, environ))))
    return config


def _as_read(config: Config, key: str, value: Any) -> Any:
    return int(value) if key == "active_microbatches" else getattr(config, _field_name(key))


def _explain(detail: Any, given: Mapping[str, tuple[Any, str]]) -> str:
    """One sentence for one finding of pydantic: key, what was expected, what was given, and where it came from."""
    location = str(detail["loc"][0])
    key = location if location in given else public_key(location)
    value, source = given[key]
    return f"{key}: {_expected(key)}, got {_described(value, key)} (from {_WHERE[source]})"


def _expected(key: str) -> str:
    extra: Any = Config.model_fields[_field_name(key)].json_schema_extra
    if extra["choices"]:
        listed = ", ".join(repr(choice) for choice in extra["choices"])
        if key == "placement_strategy":
            return f"not a permutation of D,P,T: must be one of {listed}"
        return f"must be one of {listed}"
    return f"expected {extra['kind']} {extra['valid']}".rstrip()


def _described(value: Any, key: str) -> str:
    """The value, with its type where the type is what is wrong."""
    extra: Any = Config.model_fields[_field_name(key)].json_schema_extra
    kind = type(value).__name__
    return repr(value) if kind == extra["kind"] else f"{kind} {short(value)}"


def short(value: Any) -> str:
    """The value as an error shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_rules(config: Config) -> None:
    """The rules between parameters that do not need the number of processes."""

    def fail(text: str) -> None:
        raise SMPConfigError(text)

    given, pp_degree = config.given, config.pipeline_parallel_degree
    if config.fp16 and config.bf16:
        fail("fp16, bf16: fp16 and bf16 are exclusive: remove one of them")
    if config.tensor_parallel_degree > 1 and not config.ddp:
        fail(
            f"tensor_parallel_degree: {config.tensor_parallel_degree} requires ddp: True "
            "(tensor_parallel_degree>1 requires ddp: True): the ranks of a tensor-parallel group feed different data"
        )
    if not config.auto_partition and "default_partition" not in given:
        fail(f"auto_partition: False needs default_partition: set it to a stage, 0..{pp_degree - 1}")
    if config.default_partition >= pp_degree:
        fail(
            f"default_partition: default_partition={config.default_partition} is outside 0..{pp_degree - 1} "
            f"(pipeline_parallel_degree={pp_degree})"
        )
    if config.load_partition and config.partition_file is None:
        fail("load_partition: True needs partition_file: name the file that holds the plan")
    for key in ("ddp_port", "ddp_dist_backend"):
        if key in given and "ddp" not in given:
            fail(f"{key}: {given[key]!r} needs ddp: set ddp too, or remove {key}")
    if config.shard_optimizer_state and not config.ddp:
        fail("shard_optimizer_state: True requires ddp: True")
    if config.sharded_data_parallel_degree > 1:
        if not config.ddp:
            fail(f"sharded_data_parallel_degree: {config.sharded_data_parallel_degree} requires ddp: True")
        if config.shard_optimizer_state:
            fail(
                f"shard_optimizer_state, sharded_data_parallel_degree: {config.sharded_data_parallel_degree} shards "
                "the optimizer state already, with the parameters: remove shard_optimizer_state"
            )


def _check_built(config: Config) -> None:
    """Stop at a feature that does not exist yet."""
    for entry, feature in NOT_BUILT.items():
        key, sign, refused = entry.partition("=")
        field = Config.model_fields[_field_name(key)]
        value = getattr(config, _field_name(key))
        if (sign and value == refused) or (not sign and value != field.default):
            raise NotBuiltError(
                f"{key}: {value!r} asks for {feature}, which is not built yet: use {field.default!r} or remove "
                "the parameter"
            )


def _notices(config: Config, environ: Mapping[str, str]) -> Iterable[str]:
    """What the user should know about values that have less effect than one may expect."""
    given = config.given
    for key in ("static_mode", "fast_mode", "deterministic_server"):
        if getattr(config, key):
            yield f"{key}=True has no effect: every rank runs the same program in one fixed order"
    idle = [key for key in _PIPELINE_KEYS if key in given]
    if idle and config.pipeline_parallel_degree == 1:
        yield f"{', '.join(idle)}: no effect with pipeline_parallel_degree=1"
    idle = [key for key in _SDP_KEYS if key in given and config.sharded_data_parallel_degree == 1]
    if idle:
        yield f"{', '.join(idle)}: no effect with sharded_data_parallel_degree=1"
    idle = [key for key in _SDP_IDLE_KEYS if key in given and config.sharded_data_parallel_degree > 1]
    if idle:
        yield f"{', '.join(idle)}: no effect: the parameters of a module are gathered and reduced together"
    if "activation_loading_horizon" in given and not config.offload_activations:
        yield "activation_loading_horizon: no effect without offload_activations"
    if config.offload_activations:
        yield (
            "offload_activations: moves the inputs of modules with activation checkpointing; no effect without "
            "smp.set_activation_checkpointing or smp.checkpoint"
        )
    if config.prescaled_batch and config.tensor_parallel_degree == 1:
        yield "prescaled_batch: no effect with tensor_parallel_degree=1"
    idle = [key for key in _AUTOMATIC_KEYS if key in given]
    if idle and not config.auto_partition:
        yield f"{', '.join(idle)}: no effect with auto_partition=False"
    for name, meaning in ENVIRONMENT_WITHOUT_EFFECT.items():
        if name in environ:
            yield f"environment variable {name} ({meaning}) has no effect"
