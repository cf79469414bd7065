"""The kind `sagemaker`: training jobs of Amazon SageMaker."""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.checks import parse_duration
from modelparallel.launch.clusters.cluster import Cluster, JobRecord, JobStatus, Rendered, State
from modelparallel.launch.clusters.description import ClusterJob, DataChannel, node_description
from modelparallel.launch.clusters.instances import devices_of
from modelparallel.launch.clusters.interrupts import engine_asked
from modelparallel.launch.clusters.packing import Library, pack_code
from modelparallel.launch.clusters.sagemaker.checks import check_job, check_request
from modelparallel.launch.clusters.sagemaker.logs import log_lines
from modelparallel.launch.clusters.sagemaker.options import SERVICE_ARGUMENTS, ServiceOptions, service_options
from modelparallel.launch.clusters.sagemaker.place import (
    ROLE_ARN,
    CloudPlace,
    check_region,
    check_role,
    place_of,
    split_bucket,
    split_url,
)
from modelparallel.launch.clusters.sagemaker.program import ARCHIVE, DESCRIPTION
from modelparallel.launch.clusters.sagemaker.request import (
    code_url,
    is_mounted,
    output_url,
    training_request,
    upload_url,
)
from modelparallel.launch.clusters.sagemaker.service import Service, files_below, readable_size

logger = logging.getLogger("modelparallel.launch")

#: Secondary states in which the containers run the script, or are done with it.
_AT_WORK = ("Training", "Uploading", "Stopping")
_STATES: dict[str, State] = {"Completed": "succeeded", "Failed": "failed", "Stopped": "stopped"}
_ANY_ACCOUNT = "0" * 12
#: What the service knows of a container's files.
_BASE = "/opt/ml"
_CHECKPOINTS = f"{_BASE}/checkpoints"
_EXIT_CODE = re.compile(r"exit ?code:? (\d+)", re.I)
_TIMED_OUT = ("MaxRuntimeExceeded", "MaxWaitTimeExceeded")


class SageMaker(Cluster):
    """Training jobs of Amazon SageMaker. What the estimator is given comes before these keys.

    Attributes:
        role: the role that jobs run as: its ARN, or its name.
        region: default: the session's, AWS_REGION, or that of ~/.aws/config.
        profile: of ~/.aws, for credentials.
        image: of the containers; there is no default, since none has the library in it.
        images: framework_version -> image, for launch files that say nothing else.
        container: "toolkit": the image has the training toolkit (sagemaker-training); "own": it has not, and is
            started with our node command.
        python: the interpreter of an image of one's own.
        library: how this library gets into the job: it is in the image; "wheel" sends it along; "index" installs it.
        instance_type: for jobs that do not name one.
        bucket: `name` or `s3://name/prefix`, for code, uploads and outputs; default: the account's own.
        spot: use spot instances.
        max_wait: how long spot instances are waited for, the running included: "48h".
        extra: what the request is to have besides, by the service's own names.
    """

    kind: ClassVar[str] = "sagemaker"
    max_name_length: ClassVar[int] = 63
    service_arguments: ClassVar[tuple[str, ...]] = SERVICE_ARGUMENTS

    role: str = ""
    region: str = ""
    profile: str = ""
    image: str = ""
    images: Mapping[str, str] = Field(default_factory=dict)
    container: Literal["toolkit", "own"] = "toolkit"
    python: str = "python"
    library: Library = "image"
    instance_type: str = ""
    bucket: str = ""
    output: str = ""
    spot: bool = False
    max_wait: str | int | None = None
    retries: int | None = Field(default=None, ge=1, le=30)
    keep_alive: str | int | None = None
    volume_size: int | None = Field(default=None, ge=1)
    volume_kms_key: str | None = None
    output_kms_key: str | None = None
    subnets: Sequence[str] = ()
    security_groups: Sequence[str] = ()
    network_isolation: bool = False
    encrypt_traffic: bool = False
    tags: Mapping[str, str] = Field(default_factory=dict)
    metrics: Mapping[str, str] = Field(default_factory=dict)
    debugger: bool | None = None
    profiler: bool = True
    env: Mapping[str, str] = Field(default_factory=dict)
    extra: Mapping[str, Any] = Field(default_factory=dict)
    boto_session: Any = Field(default=None, exclude=True, repr=False)
    #: The one that a job was submitted by: with the estimator's session.
    _submitted_by: Service | None = PrivateAttr(default=None)

    @field_validator("max_wait", "keep_alive")
    @classmethod
    def _seconds(cls, value: str | int | None, info: ValidationInfo) -> int | None:
        return (
            value
            if value is None or isinstance(value, int)
            else int(parse_duration(value, info.field_name or cls.kind))
        )

    def with_session(self, session: Any) -> Cluster:
        boto_session = getattr(session, "boto_session", None) or session
        return self if boto_session is None else self.model_copy(update={"boto_session": boto_session})

    @property
    def devices_per_node(self) -> int | None:
        return devices_of(self.instance_type) if self.instance_type else None

    # What is decided without the cloud.

    def check(self, job: ClusterJob) -> None:
        self._request(job)

    def render(self, job: ClusterJob) -> Rendered:
        job, options, place, request = self._request(job)
        files = {}
        if self.container == "own":
            files[f"{_folder_of(code_url(job, options, place))}{DESCRIPTION}"] = _description(job)
        return Rendered(files=files, requests=(("create_training_job", request),))

    def _request(
        self, job: ClusterJob, place: CloudPlace | None = None
    ) -> tuple[ClusterJob, ServiceOptions, CloudPlace, dict[str, Any]]:
        """The job with the cluster's keys in it, its options, its place, and what is sent. Raises `LaunchError`."""
        job = self._completed(job)
        options = self._options(job)
        is_own = self.container == "own"
        check_job(job, options, is_own=is_own)
        check_role(options.role, job.instance_type)
        if is_own and self.library != "image":
            raise LaunchError(
                f'library = {self.library!r}: container = "own" starts our node command, so that the library with the '
                "node command is in the image already: leave it out"
            )
        for name, channel in self._uploads(job, options).items():
            if not Path(channel.location).exists():
                raise LaunchError(f"channel {name!r}: {channel.location} does not exist: it would be uploaded")
        place = place or self._place(options)
        image = self._image(options)

        def request_at(place: CloudPlace) -> dict[str, Any]:
            extra = dict(self.extra)
            return training_request(job, options, place, image, is_own=is_own, python=self.python, extra=extra)

        # What stands for an account is none that the checks would take.
        check_request(request_at(place if place.is_known else self._place(options, _ANY_ACCOUNT)))
        return job, options, place, request_at(place)

    def _completed(self, job: ClusterJob) -> ClusterJob:
        """The job, with the cluster's keys where it says nothing."""
        # A launch file may name a cluster in the place of a machine.
        asked = None if job.instance_type in (self.name, self.kind, f"{self.kind}:{self.name}") else job.instance_type
        return dataclasses.replace(
            job,
            instance_type=asked or self.instance_type or None,
            environment={**self.env, **job.environment},
            output=job.output or self.output or None,
        )

    def _options(self, job: ClusterJob) -> ServiceOptions:
        return service_options(
            job.service_options,
            {
                "role": self.role or None,
                "boto_session": self.boto_session,
                "use_spot_instances": self.spot or None,
                "max_wait": self.max_wait,
                "max_retry_attempts": self.retries,
                "keep_alive_period_in_seconds": self.keep_alive,
                "volume_size": self.volume_size,
                "volume_kms_key": self.volume_kms_key,
                "output_kms_key": self.output_kms_key,
                "subnets": list(self.subnets) or None,
                "security_group_ids": list(self.security_groups) or None,
                "enable_network_isolation": self.network_isolation or None,
                "encrypt_inter_container_traffic": self.encrypt_traffic or None,
                "tags": dict(self.tags) or None,
                "metric_definitions": [{"Name": name, "Regex": regex} for name, regex in self.metrics.items()] or None,
                "debugger_hook_config": self.debugger,
                "disable_profiler": None if self.profiler else True,
            },
        )

    def _image(self, options: ServiceOptions) -> str:
        version = options.framework_version
        image = options.image_uri or self.image or (self.images.get(version, "") if version else "")
        if image:
            return image
        known = ", ".join(self.images) or "none"
        asked_for = f" of framework_version {version!r} (the table images has {known})" if version else ""
        raise LaunchError(
            f"there is no image{asked_for}: give image_uri to the estimator, or image (or a table images by "
            "framework_version) in the cluster file; docs/clusters.md shows how one is built"
        )

    def _place(self, options: ServiceOptions, account: str | None = None) -> CloudPlace:
        role = check_role(options.role)
        bucket = self.bucket or _bucket_of(options.sagemaker_session)
        return place_of(role, self._region(options), bucket, account)

    def _region(self, options: ServiceOptions | None = None) -> str:
        region = self.region
        session = self.boto_session
        if options is not None:
            session = getattr(options.sagemaker_session, "boto_session", None) or options.boto_session or session
        if not region and session is not None:
            region = session.region_name or ""
        if not region:
            try:
                return check_region(None)
            except LaunchError:
                region = _configured_region(self.profile)
        return check_region(region)

    def _uploads(self, job: ClusterJob, options: ServiceOptions) -> dict[str, DataChannel]:
        """The channels that lie on this machine."""
        return {
            name: channel for name, channel in job.channels.items() if not channel.is_url and name not in options.inputs
        }

    # What is asked of the cloud.

    def check_access(self, job: ClusterJob) -> None:
        job = self._completed(job)
        options = self._options(job)
        service = self._service(options)
        place = self._real_place(options, service)
        for bucket_place in self._bucket_places(job, options, place):
            why = service.bucket_state(bucket_place)
            if why and not (why == "missing" and bucket_place.is_default_bucket):
                raise LaunchError(f"bucket {bucket_place.bucket}: {why}: name one that exists and that you may use")
        if service.describe(job.name) is not None:
            raise LaunchError(f"training job {job.name!r} exists in {service.region}: choose another name")

    def submit(self, job: ClusterJob) -> JobRecord:
        service = self._service(self._options(self._completed(job)))
        place = self._real_place(self._options(job), service)
        job, options, place, request = self._request(job, place)
        if place.is_default_bucket and service.bucket_state(place) == "missing":
            service.make_bucket(place)
        self._upload_code(job, options, place, service)
        for name, channel in self._uploads(job, options).items():
            _upload_channel(service, name, Path(channel.location), upload_url(job, name, channel, place))
        with engine_asked():
            service.create(request)
        self._submitted_by = service
        rendered = Rendered(requests=(("create_training_job", request),))
        return self._record(service, job.name, request, time.time(), rendered.digest())

    def status(self, record: JobRecord) -> JobStatus:
        found = self._service().describe(record.engine_id)
        if found is None:
            return JobStatus("unknown", f"the service knows no training job {record.engine_id}")
        return status_of(found)

    def logs(
        self, record: JobRecord, *, rank: int | None = None, node: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        service = self._service()
        return log_lines(
            service.client("logs"),
            record.engine_id,
            lambda: self.status(record).is_final,
            rank=rank,
            node=node,
            follow=follow,
        )

    def stop(self, record: JobRecord) -> None:
        self._service().stop(record.engine_id)

    def adopt(self, engine_id: str) -> JobRecord:
        service = self._service()
        found = service.describe(engine_id)
        if found is None:
            raise LaunchError(f"sagemaker:{engine_id}: the service knows no such training job in {service.region}")
        return self._record(service, engine_id, found, found["CreationTime"].timestamp(), "")

    def _record(
        self, service: Service, name: str, request: Mapping[str, Any], submitted: float, digest: str
    ) -> JobRecord:
        output = request["OutputDataConfig"]
        folder = f"{output['S3OutputPath'].rstrip('/')}/{name}/output"
        is_packed = output.get("CompressionType") != "NONE"
        here = self.model_copy(update={"region": service.region})
        return JobRecord(
            name=name,
            cluster=self.title,
            kind=self.kind,
            settings=here.model_dump(mode="json", exclude_defaults=True),
            engine_id=name,
            folder=folder,
            submitted=submitted,
            digest=digest,
            model=f"{folder}/model.tar.gz" if is_packed else f"{folder}/model",
        )

    def _service(self, options: ServiceOptions | None = None) -> Service:
        if options is None and self._submitted_by is not None:
            return self._submitted_by
        return Service(
            self._region(options),
            self.profile or None,
            (options and options.boto_session) or self.boto_session,
            options and options.sagemaker_session,
        )

    def _real_place(self, options: ServiceOptions, service: Service) -> CloudPlace:
        """The place, with what only the account knows."""
        guessed = self._place(options)
        account = service.account()
        if guessed.is_known and guessed.account != account and guessed.is_default_bucket:
            raise LaunchError(
                f"role {options.role} is of account {guessed.account}, and the credentials are of {account}: use a "
                "role of that account, or name a bucket that both may use"
            )
        role = check_role(options.role)
        if not ROLE_ARN.fullmatch(role):
            role = service.role_arn(role)
        return place_of(role, service.region, self.bucket or _bucket_of(options.sagemaker_session), account)

    def _bucket_places(self, job: ClusterJob, options: ServiceOptions, place: CloudPlace) -> list[CloudPlace]:
        """Every bucket that is written to, once; the first is the place's own."""
        found = {place.bucket: place}
        urls = (job.output, options.code_location, job.checkpoints)
        for url in urls:
            if url is not None:
                bucket, _ = split_url(url, "bucket")
                found.setdefault(bucket, dataclasses.replace(place, bucket=bucket, is_default_bucket=False))
        return list(found.values())

    def _upload_code(self, job: ClusterJob, options: ServiceOptions, place: CloudPlace, service: Service) -> None:
        bucket, key = split_url(code_url(job, options, place), "code_location")
        encryption = {"ServerSideEncryption": "aws:kms"}
        if options.output_kms_key and bucket == split_url(output_url(job, place), "output_path")[0]:
            encryption["SSEKMSKeyId"] = options.output_kms_key
        with tempfile.TemporaryDirectory(prefix="modelparallel-code-") as folder:
            code = pack_code(job, Path(folder, ARCHIVE), library=self.library)
            logger.info("uploading the code of %s: %s", job.name, readable_size(code.size))
            service.upload(code.path, bucket, key, encryption)
            if self.container == "own":
                description = Path(folder, DESCRIPTION)
                description.write_text(_description(job), encoding="utf-8")
                service.upload(description, bucket, f"{_folder_of(key)}{DESCRIPTION}", encryption)


def status_of(found: Mapping[str, Any]) -> JobStatus:
    """What `describe_training_job` says, in our words and the service's own."""
    state, detail = found["TrainingJobStatus"], found.get("SecondaryStatus", "")
    transitions = found.get("SecondaryStatusTransitions", ())
    message = str(transitions[-1].get("StatusMessage", "")) if transitions else ""
    history = tuple(
        " ".join(filter(None, (f"{each['StartTime']:%Y-%m-%d %H:%M:%S}", each["Status"], each.get("StatusMessage"))))
        for each in transitions
    )
    failure = found.get("FailureReason", "")
    if state in _STATES:
        code = _EXIT_CODE.search(failure)
        exit_code = 0 if state == "Completed" else int(code[1]) if code else 124 if detail in _TIMED_OUT else None
        reason = failure or ("" if state == "Completed" else ": ".join(filter(None, (detail, message))))
        return JobStatus(_STATES[state], reason, exit_code, history)
    current: State = "running" if detail in _AT_WORK or state == "Stopping" else "pending"
    return JobStatus(current, ": ".join(filter(None, (detail or state, message))), None, history)


def _upload_channel(service: Service, name: str, path: Path, url: str) -> None:
    bucket, prefix = split_url(url, f"channel {name!r}")
    files = files_below(path)
    size = readable_size(sum(count for _, _, count in files))
    logger.info("uploading channel %s: %s in %d files, from %s to %s", name, size, len(files), path, url)
    for key, file, _ in files:
        service.upload(file, bucket, f"{prefix}/{key}")


def _description(job: ClusterJob) -> str:
    """job.json for a container: what the service mounts has a path there."""
    channels = {
        name: DataChannel(f"{_BASE}/input/data/{name}") if is_mounted(channel) else channel
        for name, channel in job.channels.items()
    }
    # The service mounts what checkpoint_s3_uri names.
    checkpoints = None if job.checkpoints is None else _CHECKPOINTS
    # Sent there at the end, the names of a job folder are those that the service uploads: model, output/data.
    inside = dataclasses.replace(job, channels=channels, checkpoints=checkpoints, output=_BASE, service_options={})
    return node_description(inside, folder=f"{_BASE}/job")


def _folder_of(url: str) -> str:
    return url.rpartition("/")[0] + "/"


def _bucket_of(sagemaker_session: Any) -> str | None:
    """The bucket that a session of the cloud's SDK was made with. (Its `default_bucket()` would ask the cloud.)"""
    if sagemaker_session is None:
        return None
    for name in ("_default_bucket_name_override", "_default_bucket"):
        bucket = getattr(sagemaker_session, name, None)
        if isinstance(bucket, str) and bucket:
            prefix = getattr(sagemaker_session, "default_bucket_prefix", None)
            split_bucket(bucket)
            return f"s3://{bucket}/{prefix}" if isinstance(prefix, str) and prefix else bucket
    return None


def _configured_region(profile: str) -> str:
    """The region of ~/.aws/config, if boto3 is there to read it."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return ""
    try:
        return boto3.Session(profile_name=profile or None).region_name or ""
    except BotoCoreError as error:
        raise LaunchError(f"profile {profile!r}: {error}") from error
