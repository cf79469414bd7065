"""The request of a training job, `create_training_job`: a pure function of the job, the options and the place.

It is equal, key by key, to what the cloud's SDK 2.257.7 sends for the same launch file (tests/data/sagemaker), except
that `pytorchddp` is started as `torch_distributed` is: by torchrun, which every image has.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from typing import Any

from modelparallel.job.session import DEVICE_VARIABLE
from modelparallel.launch.clusters.description import ClusterJob, DataChannel
from modelparallel.launch.clusters.sagemaker.options import DEFAULT_MAX_RUN, ServiceOptions, as_request, tag_list
from modelparallel.launch.clusters.sagemaker.place import CloudPlace, split_url
from modelparallel.launch.clusters.sagemaker.program import (
    ARCHIVE,
    CODE_CHANNEL,
    CODE_FOLDER,
    DESCRIPTION,
    script_hyperparameters,
    toolkit_hyperparameters,
)

#: Regions that have neither the debugger nor the profiler, so that the request must not name them.
_WITHOUT_DEBUGGER = (
    "us-iso-east-1", "us-isob-east-1", "ap-southeast-3", "ap-southeast-4", "eu-south-2", "me-central-1", "ap-south-2",
    "eu-central-2", "us-gov-east-1",
)  # fmt: skip


def code_url(job: ClusterJob, options: ServiceOptions, place: CloudPlace) -> str:
    """Where the code of the job is put, as the cloud's SDK chooses it."""
    if options.code_location is not None:
        base = options.code_location.rstrip("/") + "/"
    elif job.output is not None and place.is_default_bucket:
        base = f"s3://{split_url(job.output, 'output_path')[0]}/"
    else:
        base = place.url()
    return f"{base}{job.name}/source/{ARCHIVE}"


def output_url(job: ClusterJob, place: CloudPlace) -> str:
    """Below which the service puts `<name>/output/model.tar.gz`."""
    return job.output if job.output is not None else place.url()


def upload_url(job: ClusterJob, name: str, channel: DataChannel, place: CloudPlace) -> str:
    """Where a channel of this machine is put."""
    return place.url(f"{job.name}/input/{name}")


def training_request(
    job: ClusterJob,
    options: ServiceOptions,
    place: CloudPlace,
    image: str,
    *,
    is_own: bool = False,
    python: str = "python",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is sent to the service.

    Args:
        is_own: the image has no training toolkit, and is started with our node command.
        python: the interpreter of such an image.
        extra: what the request is to have besides, or instead; laid over it key by key.

    Raises `LaunchError` for values that have no place in it.
    """
    code = code_url(job, options, place)
    request: dict[str, Any] = {
        "TrainingJobName": job.name,
        "RoleArn": place.role,
        "AlgorithmSpecification": _algorithm(options, image, python if is_own else None),
        "HyperParameters": _hyperparameters(job, options, place, code, is_own),
        "InputDataConfig": _inputs(job, options, place, code, is_own),
        "OutputDataConfig": _without_none(
            S3OutputPath=output_url(job, place),
            KmsKeyId=options.output_kms_key,
            CompressionType="NONE" if options.disable_output_compression else None,
        ),
        "ResourceConfig": _resources(job, options),
        "StoppingCondition": _times(job, options),
        "Environment": {**_device(job), **job.environment},
        "Tags": tag_list(options.tags),
        "CheckpointConfig": _checkpoints(job, options),
        "RetryStrategy": _retries(job, options),
        "ExperimentConfig": options.experiment_config and dict(options.experiment_config),
        **_network(options),
        **_debugging(options, place.region, output_url(job, place)),
    }
    if options.use_spot_instances:
        request["EnableManagedSpotTraining"] = True
    if options.enable_infra_check is not None:
        request["InfraCheckConfig"] = {"EnableInfraCheck": options.enable_infra_check}
    request = {name: value for name, value in request.items() if value not in (None, {}, [])}
    return _laid_over(request, extra or {})


def _device(job: ClusterJob) -> dict[str, str]:
    return {} if job.device == "auto" else {DEVICE_VARIABLE: job.device}


def _algorithm(options: ServiceOptions, image: str, python: str | None) -> dict[str, Any]:
    entry, arguments = options.container_entry_point, options.container_arguments
    if entry is None and python is not None:
        entry = [python, "-m", "modelparallel", "node", f"{CODE_FOLDER}/{DESCRIPTION}"]
    training_image = None
    if options.training_repository_access_mode is not None:
        login = options.training_repository_credentials_provider_arn
        training_image = _without_none(
            TrainingRepositoryAccessMode=options.training_repository_access_mode,
            TrainingRepositoryAuthConfig=login and {"TrainingRepositoryCredentialsProviderArn": login},
        )
    metrics = options.enable_sagemaker_metrics
    return _without_none(
        TrainingImage=image,
        TrainingInputMode=options.input_mode,
        TrainingImageConfig=training_image,
        ContainerEntrypoint=entry and list(entry),
        ContainerArguments=arguments and list(arguments),
        MetricDefinitions=options.metric_definitions and [dict(each) for each in options.metric_definitions],
        EnableSageMakerMetricsTimeSeries=True if metrics is None else metrics,
    )


def _hyperparameters(
    job: ClusterJob, options: ServiceOptions, place: CloudPlace, code: str, is_own: bool
) -> dict[str, str]:
    if not is_own:
        return toolkit_hyperparameters(job, options, code, place.region, instance_type(job, options))
    # The node command reads job.json; these are what people look for in the service's own pages.
    values = script_hyperparameters(job) if job.hyperparameters else {}
    if job.parameters is not None:
        values["mp_parameters"] = dict(job.parameters)
    return {name: json.dumps(value) for name, value in values.items()}


def instance_type(job: ClusterJob, options: ServiceOptions) -> str | None:
    """The only type of machine; None if there are groups of several."""
    return None if options.instance_groups else job.instance_type


def _inputs(
    job: ClusterJob, options: ServiceOptions, place: CloudPlace, code: str, is_own: bool
) -> list[dict[str, Any]]:
    channels = []
    for name, channel in job.channels.items():
        if name in options.inputs:
            channels.append({**as_request(options.inputs[name], f"channel {name!r}"), "ChannelName": name})
        elif is_mounted(channel):
            url = channel.location if channel.is_url else upload_url(job, name, channel, place)
            mode = channel.input_mode if channel.input_mode != options.input_mode else None
            channels.append(_channel(name, url, input_mode=None if mode == "File" else mode))
    if options.model_uri is not None:
        name = options.model_channel_name
        channels.append(_channel(name, options.model_uri, "File", "application/x-sagemaker-model"))
    # The code has to be a file whatever the data are.
    mode = None if options.input_mode == "File" else "File"
    if is_own:
        channels.append(_channel(CODE_CHANNEL, posixpath.dirname(code) + "/", input_mode=mode))
    elif options.enable_network_isolation:
        channels.append(_channel(CODE_CHANNEL, code, input_mode=mode))
    return channels


def is_mounted(channel: DataChannel) -> bool:
    """Whether the service itself puts the data into the containers; the node command fetches other URLs there."""
    return not channel.is_url or channel.location.startswith("s3://")


def _channel(name: str, url: str, input_mode: str | None = None, content_type: str | None = None) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": url, "S3DataDistributionType": "FullyReplicated"}
    return _without_none(
        ChannelName=name, DataSource={"S3DataSource": source}, InputMode=input_mode, ContentType=content_type
    )


def _resources(job: ClusterJob, options: ServiceOptions) -> dict[str, Any]:
    groups = options.instance_groups
    return _without_none(
        InstanceType=instance_type(job, options),
        InstanceCount=None if groups else job.num_nodes,
        InstanceGroups=groups and [as_request(group, "instance_groups") for group in groups],
        VolumeSizeInGB=options.volume_size,
        VolumeKmsKeyId=options.volume_kms_key,
        KeepAlivePeriodInSeconds=options.keep_alive_period_in_seconds,
        TrainingPlanArn=options.training_plan,
        InstancePlacementConfig=options.instance_placement_config and dict(options.instance_placement_config),
    )


def max_run(job: ClusterJob) -> int:
    """Seconds after which the service stops the job."""
    return DEFAULT_MAX_RUN if job.max_seconds is None else int(job.max_seconds)


def _times(job: ClusterJob, options: ServiceOptions) -> dict[str, int]:
    times = {"MaxRuntimeInSeconds": max_run(job)}
    if options.max_wait is not None or options.use_spot_instances:
        # The service wants it for spot instances; without a word, nothing is waited for beyond the running time.
        times["MaxWaitTimeInSeconds"] = options.max_wait or max_run(job)
    return times


def _checkpoints(job: ClusterJob, options: ServiceOptions) -> dict[str, Any] | None:
    if job.checkpoints is None:
        return None
    return _without_none(S3Uri=job.checkpoints, LocalPath=options.checkpoint_local_path)


def _retries(job: ClusterJob, options: ServiceOptions) -> dict[str, int] | None:
    attempts = options.max_retry_attempts or job.max_restarts
    return {"MaximumRetryAttempts": attempts} if attempts else None


def _network(options: ServiceOptions) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if options.subnets and options.security_group_ids:
        found["VpcConfig"] = {"Subnets": list(options.subnets), "SecurityGroupIds": list(options.security_group_ids)}
    if options.enable_network_isolation:
        found["EnableNetworkIsolation"] = True
    if options.encrypt_inter_container_traffic:
        found["EnableInterContainerTrafficEncryption"] = True
    if options.enable_remote_debug is not None:
        found["RemoteDebugConfig"] = {"EnableRemoteDebug": options.enable_remote_debug}
    if options.enable_session_tag_chaining is not None:
        found["SessionChainingConfig"] = {"EnableSessionTagChaining": options.enable_session_tag_chaining}
    return found


def _debugging(options: ServiceOptions, region: str, output: str) -> dict[str, Any]:
    """The debugger's hook and the profiler, which the cloud's SDK switches on unless it is told not to."""
    found: dict[str, Any] = {}
    is_there = region not in _WITHOUT_DEBUGGER
    hook = options.debugger_hook_config
    if hook not in (None, False, True):
        found["DebugHookConfig"] = {"S3OutputPath": output, **as_request(hook, "debugger_hook_config")}
    elif hook is not False and is_there:
        found["DebugHookConfig"] = {"S3OutputPath": output, "CollectionConfigurations": []}
    rules: dict[str, list[dict[str, Any]]] = {"DebugRuleConfigurations": [], "ProfilerRuleConfigurations": []}
    for rule in options.rules or ():
        is_profiler = hasattr(rule, "to_profiler_rule_config_dict")
        rules["ProfilerRuleConfigurations" if is_profiler else "DebugRuleConfigurations"].append(
            as_request(rule, "rules")
        )
    found |= {name: listed for name, listed in rules.items() if listed}
    if options.tensorboard_output_config is not None:
        found["TensorBoardOutputConfig"] = as_request(options.tensorboard_output_config, "tensorboard_output_config")
    if options.profiler_config is not None:
        profiler = as_request(options.profiler_config, "profiler_config")
        found["ProfilerConfig"] = profiler if profiler.get("DisableProfiler") else {"S3OutputPath": output, **profiler}
    elif options.disable_profiler or not is_there:
        found["ProfilerConfig"] = {"DisableProfiler": True}
    else:
        found["ProfilerConfig"] = {"S3OutputPath": output, "DisableProfiler": False}
    return found


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _laid_over(request: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(request)
    for name, value in extra.items():
        present = result.get(name)
        both = isinstance(present, Mapping) and isinstance(value, Mapping)
        result[name] = _laid_over(present, value) if both else value  # type: ignore[arg-type]
    return result
