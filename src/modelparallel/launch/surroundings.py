"""`modelparallel env`: what a report of a fault needs to say about the machine, without secrets.

Of the environment only the variables below are looked at, and what looks like a secret in one of them is left out.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modelparallel.config.reading import ENVIRONMENT_KEY, ENVIRONMENT_WITHOUT_EFFECT, Config, load_config
from modelparallel.errors import LaunchError, SMPError
from modelparallel.errors.foreign_text import one_line
from modelparallel.job.discovery import LAUNCHER_VARIABLES, discover_process, lonely_hint
from modelparallel.launch.clusters.secrets import TOKEN_SHAPE
from modelparallel.launch.devices import VISIBLE_VARIABLE, num_gpus, resolve_device
from modelparallel.launch.environment import OUTER_RANK_VARIABLES
from modelparallel.launch.mpi_backend import find_mpirun
from modelparallel.plan.partition import readable_bytes
from modelparallel.version import __version__

#: Packages that have a say in how a job runs.
_PACKAGES = ("numpy", "pydantic", "safetensors", "fsspec", "transformers", "accelerate", "torchvision", "mpi4py")
_ALSO_SET_BY_LAUNCHERS = (
    "MASTER_PORT", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE",
    VISIBLE_VARIABLE,
)  # fmt: skip
_NAMES = {*LAUNCHER_VARIABLES, *OUTER_RANK_VARIABLES, *_ALSO_SET_BY_LAUNCHERS, *ENVIRONMENT_WITHOUT_EFFECT}
_OWN = ("MODELPARALLEL_", "SMP_")

_HIDDEN = "(not shown)"
_SECRET_NAME = r"(?i:token|secret|passw|credential|auth|cookie|apikey|(?<![a-z])key(?![a-z]))"
_VALUE = r"""(?!\(not shown\))(?:"[^"]*"|'[^']*'|[^\s,;&]+)"""
# Each looks at a text once, however long its words are.
_SECRETS = (
    # https://user:password@host
    (re.compile(r"(?<=://)[^\s/@]+(?=@)"), _HIDDEN),
    # token=abc, "api_key": "abc"
    (re.compile(rf"""(?<!\w)(?=\w*{_SECRET_NAME})(\w+["']?\s*[=:]\s*){_VALUE}"""), rf"\1{_HIDDEN}"),
    # What has the shape of a token: a known beginning, or long and of letters and digits.
    (TOKEN_SHAPE, _HIDDEN),
    (re.compile(r"(?<![\w+=-])(?=[\w+=-]*\d)(?=[\w+=-]*[A-Za-z])[\w+=-]{32,}"), _HIDDEN),
)


def surroundings(parameters: str | None, environ: Mapping[str, str]) -> str:
    """Versions, devices, what launchers have set, and the configuration that `smp.init(parameters)` would use. Local.

    Args:
        parameters: as `modelparallel run --parameters`: JSON, or the path of a file with JSON; None for none.
        environ: the environment to look at.

    What cannot be found out is said in its place; nothing is raised.
    """
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "launcher": _launcher(environ),
        "configuration": _configuration(parameters, environ),
    }
    lines = []
    for title, entries in sections.items():
        lines += [title, *(f"  {one_line(without_secrets(entry))}" for entry in entries), ""]
    return "\n".join(lines[:-1])


def without_secrets(text: str) -> str:
    """The text without what looks like a token, a key, a password or the credentials in a URL."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _versions() -> Iterator[str]:
    import torch

    yield f"modelparallel {__version__}"
    yield f"python {platform.python_version()} ({platform.python_implementation()})"
    yield f"platform {platform.platform()}"
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    yield f"torch {torch.__version__}, built for {built_for}"
    for package in _PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package}: not installed"
    try:
        yield f"mpirun of Open MPI: {find_mpirun()}"
    except (LaunchError, OSError, subprocess.SubprocessError):
        yield "mpirun of Open MPI: not found"


def _devices() -> Iterator[str]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {readable_bytes(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))}"
    yield f"cpu: {platform.machine()}, {usable} of {os.cpu_count()} cores usable{memory}"
    try:
        for index in range(num_gpus()):
            properties = torch.cuda.get_device_properties(index)
            memory, version = readable_bytes(properties.total_memory), f"sm_{properties.major}{properties.minor}"
            yield f"cuda:{index}: {properties.name}, {memory}, {version}"
        yield f"device of a job: {resolve_device('auto')[0]}"
    except (SMPError, RuntimeError, AssertionError) as error:
        yield f"device of a job: {error}"


def _launcher(environ: Mapping[str, str]) -> Iterator[str]:
    try:
        identity = discover_process(environ)
        if identity.world_size == 1:
            yield "this process is alone"
        else:
            local = (
                f"local rank {identity.local_rank} of {identity.local_world_size}"
                if identity.is_host_known
                else "which processes share its host is found out by smp.init"
            )
            rank = f"rank {identity.global_rank} of {identity.world_size}"
            yield f"this process is {rank}, {local} (from {identity.source})"
        if hint := lonely_hint(identity, environ):
            yield hint
    except SMPError as error:
        yield str(error)
    for name in sorted(environ):
        if name in _NAMES or name.startswith(_OWN):
            is_secret = re.search(_SECRET_NAME, name)
            yield f"{name}={_HIDDEN if is_secret else environ[name]}"
    if ENVIRONMENT_KEY in environ:
        yield f"{ENVIRONMENT_KEY} is set: see the configuration"


def _configuration(parameters: str | None, environ: Mapping[str, str]) -> Iterator[str]:
    try:
        config = load_config(parameters, environ)
        identity = discover_process(environ)
        if identity.world_size > 1:
            config.check_world(identity.world_size)
    except SMPError as error:
        yield from f"{type(error).__name__}: {error}".splitlines()
        return
    origins = {"environment": f"from {ENVIRONMENT_KEY}", "init": "from --parameters"}
    for field, info in Config.model_fields.items():
        key, value = info.alias or field, getattr(config, field)
        source: Any = origins.get(config.sources[key])
        if source is None and value != info.default:
            source = "follows from others or from the environment"
        if source is not None:
            yield f"{key} = {value!r} ({source})"
    yield from config.notices
    yield f"everything else: the defaults of modelparallel {__version__}"
