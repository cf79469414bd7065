"""What cannot work, said before anything is submitted; moto, and the service itself, say it late or not at all.

The limits that decide most often stand here and are checked without boto3. The rest are read from the service's own
description, which boto3 brings along: patterns, lengths and numbers of every value of the request.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.checks import check_instance_type, check_name, check_shape
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.sagemaker.options import ServiceOptions, as_request
from modelparallel.launch.clusters.sagemaker.place import split_url
from modelparallel.launch.clusters.sagemaker.program import CODE_CHANNEL, TOOLKIT_PREFIX
from modelparallel.launch.clusters.sagemaker.request import instance_type, is_mounted, max_run
from modelparallel.launch.clusters.secrets import check_secrets

logger = logging.getLogger("modelparallel.launch")

_NAME = r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}"
_CHANNEL = re.compile(r"[A-Za-z0-9.\-_]{1,64}")
#: Of a secret: a container can ask for one by its role; nothing can be carried there in private.
_SECRETS = ("aws-secretsmanager",)
MOST_HYPERPARAMETERS = 100
LONGEST_HYPERPARAMETER = 2500
MOST_CHANNELS = 20
#: Seconds; more needs a quota that the service's support raises.
LONGEST_RUN = 28 * 24 * 60 * 60
MOST_RETRIES = 30
_MACHINE = re.compile(r"ml\.[a-z0-9-]+\.[a-z0-9]+")


def check_job(job: ClusterJob, options: ServiceOptions, *, is_own: bool) -> None:
    """Raise `LaunchError` for what the service, or the toolkit in the container, cannot do."""
    check_name(
        job.name,
        _NAME,
        "the service takes letters, digits and '-' between them, at most 63 characters: choose another name (job_name, "
        "base_job_name)",
    )
    _check_machines(job, options)
    _check_times(job, options)
    _check_network(options, is_own)
    _check_channels(job, options, is_own)
    check_secrets(job, _SECRETS)
    if job.secrets and not is_own:
        raise LaunchError(
            f'secrets {", ".join(job.secrets)}: the training toolkit has no place for them: set container = "own" '
            "(our node command fetches them), or let the script fetch them by its role"
        )


def _check_machines(job: ClusterJob, options: ServiceOptions) -> None:
    check_shape(job)
    if options.instance_groups:
        count = sum(
            int(as_request(group, "instance_groups").get("InstanceCount", 0)) for group in options.instance_groups
        )
        if count != job.num_nodes:
            raise LaunchError(f"instance_groups have {count} instances together, and the job {job.num_nodes} nodes")
        return
    kind = instance_type(job, options)
    if kind is None:
        raise LaunchError(
            'instance_type is missing: say on what the job runs, such as instance_type="ml.p4d.24xlarge", or '
            'instance_type = "..." in the cluster file'
        )
    if not _MACHINE.fullmatch(kind):
        raise LaunchError(f"instance_type {kind!r}: expected a training instance of the service: ml.<family>.<size>")
    if warning := check_instance_type(job):
        logger.warning("%s", warning)


def _check_times(job: ClusterJob, options: ServiceOptions) -> None:
    seconds = max_run(job)
    if not 1 <= seconds <= LONGEST_RUN:
        raise LaunchError(f"max_run={seconds}: expected 1 to {LONGEST_RUN} seconds (28 days)")
    if options.max_wait is not None:
        if not options.use_spot_instances:
            raise LaunchError(
                f"max_wait={options.max_wait} is how long spot instances are waited for: set use_spot_instances=True "
                "(spot = true), or leave it out"
            )
        if options.max_wait < seconds:
            raise LaunchError(
                f"max_wait={options.max_wait} is less than max_run={seconds}: it counts the waiting and the running "
                "together; raise it, or lower max_run"
            )
    if options.use_spot_instances and job.checkpoints is None:
        logger.warning(
            "spot instances without checkpoint_s3_uri: an interrupted job starts from its beginning; give a location"
        )
    if options.use_spot_instances and options.keep_alive_period_in_seconds:
        raise LaunchError("keep_alive_period_in_seconds: spot instances are not kept alive: leave one of the two out")
    if job.max_restarts > MOST_RETRIES:
        raise LaunchError(f"max_restarts={job.max_restarts}: the service retries at most {MOST_RETRIES} times")


def _check_network(options: ServiceOptions, is_own: bool) -> None:
    if bool(options.subnets) != bool(options.security_group_ids):
        missing = "security_group_ids" if options.subnets else "subnets"
        raise LaunchError(f"{missing}: subnets and security groups are given together or not at all")
    if options.training_repository_access_mode == "Vpc" and not options.subnets:
        raise LaunchError("training_repository_access_mode 'Vpc': the image is fetched through subnets: name them")
    if options.container_entry_point is not None and is_own:
        raise LaunchError('container_entry_point: container = "own" is started with our node command: leave one out')


def _check_channels(job: ClusterJob, options: ServiceOptions, is_own: bool) -> None:
    names = [*job.channels, *([options.model_channel_name] if options.model_uri else ())]
    if is_own or options.enable_network_isolation:
        names.append(CODE_CHANNEL)
    for name in names:
        if not _CHANNEL.fullmatch(name):
            raise LaunchError(f"channel {name!r}: the service takes letters, digits, '.', '-' and '_', at most 64")
        if names.count(name) > 1:
            raise LaunchError(f"channel {name!r}: the name is in use for the code or the model: choose another one")
    if len(names) > MOST_CHANNELS:
        raise LaunchError(f"{len(names)} channels ({', '.join(names)}): the service takes at most {MOST_CHANNELS}")
    for name, channel in job.channels.items():
        if name in options.inputs:
            continue
        if channel.location.startswith("s3://"):
            split_url(channel.location, f"channel {name!r}")
        elif not is_mounted(channel) and not is_own:
            raise LaunchError(
                f"channel {name!r}: {channel.location}: the service reads s3:// alone: copy it there, or set "
                'container = "own", where the node command fetches it'
            )
    for what, url in (
        ("output_path", job.output),
        ("code_location", options.code_location),
        ("checkpoint_s3_uri", job.checkpoints),
        ("model_uri", options.model_uri),
    ):
        if url is not None:
            split_url(url, what)


def check_request(request: Mapping[str, Any]) -> None:
    """The limits of the request as a whole. Raises `LaunchError`."""
    hyperparameters = request.get("HyperParameters", {})
    if len(hyperparameters) > MOST_HYPERPARAMETERS:
        own = sum(name.startswith(TOOLKIT_PREFIX) for name in hyperparameters)
        raise LaunchError(
            f"{len(hyperparameters)} hyperparameters, {own} of them the toolkit's: the service takes at most "
            f"{MOST_HYPERPARAMETERS}: put some into a file of source_dir"
        )
    for name, value in hyperparameters.items():
        if len(value) > LONGEST_HYPERPARAMETER:
            raise LaunchError(
                f"hyperparameter {name!r} has {len(value)} characters as JSON: the service takes at most "
                f"{LONGEST_HYPERPARAMETER}: put it into a file of source_dir"
                + (", which smp.init reads by its path" if name == "mp_parameters" else "")
            )
    for problem in _problems(request):
        raise LaunchError(f"create_training_job: {problem}")


def _problems(request: Mapping[str, Any]) -> Iterator[str]:
    """What the service's own description says against the request; nothing if boto3 is not installed."""
    shape = _request_shape()
    if shape is None:
        return
    from botocore.validate import ParamValidator

    report = ParamValidator().validate(request, shape)
    if report.has_errors():
        yield report.generate_report()
    else:
        yield from _violations(request, shape, "")


@cache
def _request_shape() -> Any:
    """The service's description of the request; None if boto3 is not installed."""
    try:
        from botocore.loaders import Loader
        from botocore.model import ServiceModel
    except ImportError:
        return None
    model = ServiceModel(Loader().load_service_model("sagemaker", "service-2"))
    return model.operation_model("CreateTrainingJob").input_shape


def _violations(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Patterns, enumerations and greatest lengths, which botocore knows and does not check."""
    limits = shape.metadata
    if shape.type_name == "structure":
        for name, part in value.items():
            yield from _violations(part, shape.members[name], f"{where}.{name}".lstrip("."))
        return
    if shape.type_name == "string":
        pattern, names = limits.get("pattern"), limits.get("enum")
        if pattern and not _matches(pattern, value):
            yield f"{where}: {value!r} is not of the form {pattern}"
        if names and value not in names and not where.endswith("InstanceType"):  # new types come faster than boto3
            yield f"{where}: {value!r} is none of {', '.join(names)}"
    size = value if shape.type_name in ("integer", "long") else len(value) if hasattr(value, "__len__") else None
    most = limits.get("max")
    if most is not None and size is not None and size > most:
        yield f"{where}: {size} is more than {most}" + ("" if size is value else f" ({shape.type_name})")
    if shape.type_name == "list" and isinstance(value, Sequence):
        for number, part in enumerate(value):
            yield from _violations(part, shape.member, f"{where}[{number}]")
    if shape.type_name == "map":
        for name, part in value.items():
            yield from _violations(name, shape.key, f"{where}: the name")
            yield from _violations(part, shape.value, f"{where}[{name!r}]")


def _matches(pattern: str, value: str) -> bool:
    try:
        return re.fullmatch(pattern, value, re.S) is not None
    except re.error:  # it is written for Java, which knows more
        return True
