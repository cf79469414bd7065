"""Reading `custom_mpi_options` and building mpirun's command line.

The seed passes `--mca btl_vader_single_copy_mechanism none `, which is also one of mpirun's options here; Open MPI may
refuse a parameter that is given twice, so options are merged, and the user's value wins over ours.
"""

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from modelparallel.errors import SMPConfigError
from modelparallel.launch.hosts import THIS_MACHINE, Hosts

#: Options with a fixed number of values, as far as users override ours; every other option is passed on as it stands.
_MCA = ("--mca", "-mca", "--gmca", "-gmca")
_EXPORT = ("-x",)
_NCCL_DEBUG = "--NCCL_DEBUG"
_PLACEMENT = {"--map-by": "--map-by", "-map-by": "--map-by", "--bind-to": "--bind-to", "-bind-to": "--bind-to"}

DEFAULT_MCA = {"btl_vader_single_copy_mechanism": "none", "orte_abort_on_non_zero_status": "1"}
#: More processes than cores is normal for a rehearsal, and a wrong binding would number the local ranks wrongly.
DEFAULT_PLACEMENT = {"--map-by": "slot:OVERSUBSCRIBE", "--bind-to": "none"}


@dataclass(frozen=True)
class MpiOptions:
    """`exports` are variables with a value; `forwards` are names that are exported with the value they have."""

    mca: Mapping[str, str] = field(default_factory=dict)
    exports: Mapping[str, str] = field(default_factory=dict)
    forwards: tuple[str, ...] = ()
    placement: Mapping[str, str] = field(default_factory=dict)
    rest: tuple[str, ...] = ()


def parse_mpi_options(text: str) -> MpiOptions:
    """Split the text of `custom_mpi_options`. Raises `SMPConfigError` for an option whose value is missing."""
    try:
        tokens = iter(shlex.split(text))
    except ValueError as error:
        raise SMPConfigError(f"custom_mpi_options: cannot be read ({error}): {text!r}") from error
    mca: dict[str, str] = {}
    exports: dict[str, str] = {}
    forwards: list[str] = []
    placement: dict[str, str] = {}
    rest: list[str] = []

    def value_of(option: str, what: str) -> str:
        try:
            return next(tokens)
        except StopIteration:
            raise SMPConfigError(f"custom_mpi_options: {option} needs {what}: {text!r}") from None

    for token in tokens:
        if token in _MCA:
            key = value_of(token, "a key and a value")
            mca[key] = value_of(token, "a key and a value")
        elif token in _EXPORT:
            name, separator, value = value_of(token, "NAME or NAME=VALUE").partition("=")
            if separator:
                exports[name] = value
            elif name not in forwards:
                forwards.append(name)
        elif token == _NCCL_DEBUG:
            exports["NCCL_DEBUG"] = value_of(token, "a level")
        elif token.startswith(_NCCL_DEBUG + "="):
            exports["NCCL_DEBUG"] = token.partition("=")[2]
        elif token in _PLACEMENT:
            placement[_PLACEMENT[token]] = value_of(token, "a value")
        else:
            rest.append(token)
    return MpiOptions(mca, exports, tuple(forwards), placement, tuple(rest))


def mpirun_arguments(
    num_processes: int, options: MpiOptions, exported: Iterable[str], hosts: Hosts = THIS_MACHINE
) -> list[str]:
    """mpirun's arguments up to the program: our options, the user's over them, every option once."""
    arguments = ["-n", str(num_processes)]
    if hosts.sizes:
        arguments += ["--host", ",".join(f"{name}:{size}" for name, size in zip(hosts.names, hosts.sizes, strict=True))]
    if os.geteuid() == 0 and "--allow-run-as-root" not in options.rest:
        arguments.append("--allow-run-as-root")
    for option, value in {**DEFAULT_PLACEMENT, **options.placement}.items():
        arguments += [option, value]
    for key, value in {**DEFAULT_MCA, **options.mca}.items():
        arguments += ["--mca", key, value]
    for name in sorted({*exported, *options.exports, *options.forwards}):
        arguments += ["-x", name]
    return [*arguments, *options.rest]
