"""What a training job is to be like: the arguments of the estimator over the cluster's keys, as one checked record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelparallel.errors import LaunchError

InputMode = Literal["File", "FastFile"]
RepositoryAccess = Literal["Platform", "Vpc"]

#: Seconds that a job may run if nobody says: as in the cloud's SDK.
DEFAULT_MAX_RUN = 24 * 60 * 60


class ServiceOptions(BaseModel):
    """Arguments of the estimator that a training job of the service has, by the names of the cloud's SDK.

    Objects of that SDK (`TrainingInput`, `DebuggerHookConfig`, `InstanceGroup`, ...) are taken as they are, and so are
    dicts of the request's own form.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    role: str | None = None
    image_uri: str | None = None
    framework_version: str | None = None
    sagemaker_session: Any = None
    boto_session: Any = None
    # Where things are kept.
    output_kms_key: str | None = None
    disable_output_compression: bool = False
    code_location: str | None = None
    checkpoint_local_path: str | None = None
    model_uri: str | None = None
    model_channel_name: str = "model"
    # The machines.
    volume_size: int = Field(default=30, ge=1)
    volume_kms_key: str | None = None
    keep_alive_period_in_seconds: int | None = Field(default=None, ge=0, le=21600)
    instance_groups: Sequence[Any] | None = None
    training_plan: str | None = None
    instance_placement_config: Mapping[str, Any] | None = None
    use_spot_instances: bool = False
    max_wait: int | None = Field(default=None, ge=1)
    max_retry_attempts: int | None = Field(default=None, ge=1, le=30)
    enable_infra_check: bool | None = None
    # The network.
    subnets: Sequence[str] | None = None
    security_group_ids: Sequence[str] | None = None
    enable_network_isolation: bool = False
    encrypt_inter_container_traffic: bool = False
    training_repository_access_mode: RepositoryAccess | None = None
    training_repository_credentials_provider_arn: str | None = None
    enable_remote_debug: bool | None = None
    enable_session_tag_chaining: bool | None = None
    # What is recorded of it.
    tags: Sequence[Mapping[str, str]] | Mapping[str, str] | None = None
    metric_definitions: Sequence[Mapping[str, str]] | None = None
    enable_sagemaker_metrics: bool | None = None
    debugger_hook_config: Any = None
    rules: Sequence[Any] | None = None
    tensorboard_output_config: Any = None
    profiler_config: Any = None
    disable_profiler: bool = False
    experiment_config: Mapping[str, str] | None = None
    container_log_level: int = 20
    # The program.
    input_mode: InputMode = "File"
    container_entry_point: Sequence[str] | None = None
    container_arguments: Sequence[str] | None = None
    #: channel -> what the cloud's SDK makes of it, for one that is more than a location.
    inputs: Mapping[str, Any] = Field(default_factory=dict)


#: The arguments of the estimator that a training job has a place for; checkpoints, the environment and the times have
#: fields of their own in `ClusterJob`.
SERVICE_ARGUMENTS = tuple(ServiceOptions.model_fields)


def service_options(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> ServiceOptions:
    """The options of a job: what the estimator was given, else what the cluster's keys say.

    Args:
        arguments: of the estimator; those that are None, and those of other names, do not count.
        defaults: by the same names, from the cluster's keys.

    Raises `LaunchError` naming the argument.
    """
    given = {name: value for name, value in arguments.items() if name in SERVICE_ARGUMENTS and value is not None}
    values = {**{name: value for name, value in defaults.items() if value is not None}, **given}
    try:
        return ServiceOptions(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise LaunchError(f"{name}: {first['msg']}, got {values.get(name)!r}") from error


def as_request(value: Any, what: str) -> dict[str, Any]:
    """A part of the request: a dict of its form, or an object of the cloud's SDK that stands for one."""
    if isinstance(value, Mapping):
        return dict(value)
    for method in ("_to_request_dict", "to_debugger_rule_config_dict", "to_profiler_rule_config_dict"):
        if hasattr(value, method):
            made = getattr(value, method)()
            if isinstance(made, Mapping):
                return dict(made)
    config = getattr(value, "config", None)
    if isinstance(config, Mapping):
        return dict(config)
    raise LaunchError(f"{what}: expected a dict of the service's form or an object of the cloud's SDK, got {value!r}")


def tag_list(tags: Sequence[Mapping[str, str]] | Mapping[str, str] | None) -> list[dict[str, str]] | None:
    """Tags in the form of the request; they are written as a dict, or as the request has them."""
    if tags is None:
        return None
    if isinstance(tags, Mapping):
        return [{"Key": str(key), "Value": str(value)} for key, value in tags.items()]
    return [dict(tag) for tag in tags]
