"""The `distribution` argument of the estimator, checked before any process is started (smp-config sections 1 and 2)."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelparallel.config.reading import Config, nearest, parse_parameters, short, validate_parameters
from modelparallel.errors import SMPConfigError

#: Distributions that only say that there is a process per device.
PLAIN_DISTRIBUTIONS = ("torch_distributed", "pytorchddp")


@dataclass(frozen=True)
class ValidatedDistribution:
    """A checked `distribution` dict.

    `parameters` is what the launcher publishes in SM_HP_MP_PARAMETERS: the values as checked, with both names of the
    pipeline degree. `custom_mpi_options` is the user's text as it was given.
    """

    config: Config
    processes_per_host: int
    num_processes: int
    custom_mpi_options: str
    parameters: dict[str, Any]


def validate_distribution(
    distribution: Mapping[str, Any], instance_count: int = 1, *, devices_per_host: int | None = None
) -> ValidatedDistribution:
    """Check the estimator's `distribution` dict before any process is started.

    Args:
        distribution: `{"smdistributed": {"modelparallel": {...}}, "mpi": {...}}`.
        instance_count: number of hosts, >= 1.
        devices_per_host: accelerators of a host, if the job is to use them; more processes than that are refused,
            except with `ddp_dist_backend` "gloo", which lets them share.

    Raises `SMPConfigError`. Local. Source: smp-config sections 1 and 2.
    """
    _need(instance_count, int, "instance_count")
    if instance_count < 1:
        raise SMPConfigError(f"instance_count: expected int >= 1, got {instance_count}")
    top = _section(distribution, "distribution", required=("smdistributed", "mpi"))
    libraries = _need(top["smdistributed"], Mapping, "distribution['smdistributed']")
    if "modelparallel" in libraries and "dataparallel" in libraries:
        raise SMPConfigError(
            "distribution['smdistributed']: modelparallel and dataparallel cannot be used together: remove "
            "dataparallel; ddp: True in the parameters gives data parallelism"
        )
    _section(libraries, "distribution['smdistributed']", required=("modelparallel",))
    where = "distribution['smdistributed']['modelparallel']"
    section = _section(libraries["modelparallel"], where, required=("enabled", "parameters"))
    if _need(section["enabled"], bool, f"{where}['enabled']") is not True:
        raise SMPConfigError(f"{where}: enabled must be True, got {section['enabled']!r}")

    where = "distribution['mpi']"
    mpi = _section(top["mpi"], where, required=("enabled", "processes_per_host"), optional=("custom_mpi_options",))
    if _need(mpi["enabled"], bool, f"{where}['enabled']") is not True:
        raise SMPConfigError(f"{where}: modelparallel requires mpi enabled: set enabled to True")
    per_host = _need(mpi["processes_per_host"], int, f"{where}['processes_per_host']")
    if per_host < 1:
        raise SMPConfigError(f"{where}['processes_per_host']: expected int >= 1, got {per_host}")
    options = mpi.get("custom_mpi_options") or ""
    _need(options, str, f"{where}['custom_mpi_options']")
    try:
        shlex.split(options)
    except ValueError as error:
        raise SMPConfigError(f"{where}['custom_mpi_options']: cannot be read ({error}): {options!r}") from error

    num_processes = instance_count * per_host
    parameters = parse_parameters(section["parameters"], "parameters")
    config = validate_parameters(parameters, num_processes=num_processes)
    if devices_per_host is not None and per_host > devices_per_host and not config.shares_devices:
        raise SMPConfigError(
            f"{where}['processes_per_host']: {per_host} processes on {devices_per_host} devices: at most one process "
            "per device, unless they share them (parameters ddp: True and ddp_dist_backend: 'gloo')"
        )
    # Keys that the configuration table does not have (foreign ones, unknown ones with "_") go to the job as they are.
    published = {**parameters, **config.given}
    published["partitions"] = published["pipeline_parallel_degree"] = config.pipeline_parallel_degree
    return ValidatedDistribution(config, per_host, num_processes, options, published)


def is_plain(distribution: Mapping[str, Any]) -> bool:
    """Whether processes are to be started, one per device, and the rest is the script's: `{"torch_distributed":
    {"enabled": True}}`, or `pytorchddp` in its place.

    Raises `SMPConfigError` for one of these that is wrong. Local.
    """
    name = next((name for name in PLAIN_DISTRIBUTIONS if name in distribution), None)
    if name is None:
        return False
    section = _section(distribution, "distribution", required=(name,))[name]
    optional = ("custom_mpi_options", "processes_per_host") if name == "pytorchddp" else ()
    where = f"distribution[{name!r}]"
    enabled = _section(section, where, required=("enabled",), optional=optional)["enabled"]
    if _need(enabled, bool, f"{where}['enabled']") is not True:
        raise SMPConfigError(f"{where}: enabled must be True, got {enabled!r}: leave distribution out for one process")
    return True


def _need(value: Any, kind: type, where: str) -> Any:
    """The value, if it has the type; a bool is not an int. 0 and 1 serve as bool."""
    if kind is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = "dict" if kind is Mapping else kind.__name__
        raise SMPConfigError(f"{where}: expected {name}, got {type(value).__name__} {short(value)}")
    return value


def _section(value: Any, where: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """A dict that has all required keys and no unknown ones."""
    section: Mapping[str, Any] = _need(value, Mapping, where)
    known = (*required, *optional)
    for key in section:
        if key not in known:
            raise SMPConfigError(f"{where}: unknown key {key!r}: did you mean {nearest(str(key), known)!r}?")
    for key in required:
        if key not in section:
            raise SMPConfigError(f"{where}: {key!r} is missing: required keys are {', '.join(map(repr, required))}")
    return section
