"""All that is asked of the cloud, by boto3. Every error of it becomes a `LaunchError` with the cloud's own words."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.sagemaker.place import CloudPlace

logger = logging.getLogger("modelparallel.launch")

#: Seconds to reach the cloud, and to wait for an answer of it.
_CONNECT_SECONDS = 15
_READ_SECONDS = 60
_ATTEMPTS = 8


class Service:
    """The cloud, through the session of a user.

    Args:
        region: None: the session's own.
        profile: of ~/.aws, for a session that is made here.
        session: a boto3 session; None makes one.
        sagemaker_session: of the cloud's SDK; its boto3 session and clients are used.
    """

    def __init__(
        self, region: str | None, profile: str | None = None, session: Any = None, sagemaker_session: Any = None
    ) -> None:
        boto3 = import_boto3()
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        self._clients: dict[str, Any] = {}
        if sagemaker_session is not None:
            session = getattr(sagemaker_session, "boto_session", None) or session
            client = getattr(sagemaker_session, "sagemaker_client", None)
            if client is not None:
                self._clients["sagemaker"] = client
        try:
            self._session = session or boto3.Session(profile_name=profile or None, region_name=region)
        except BotoCoreError as error:
            raise LaunchError(f"profile {profile!r}: {error}") from error
        self.region = region or self._session.region_name
        self._config = Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"max_attempts": _ATTEMPTS, "mode": "standard"},
        )

    def client(self, name: str) -> Any:
        """The client of one of the cloud's services."""
        if name not in self._clients:
            with asked(f"{name} in {self.region}"):
                self._clients[name] = self._session.client(name, region_name=self.region, config=self._config)
        return self._clients[name]

    def account(self) -> str:
        """The account that the credentials are of."""
        with asked("the account of the credentials (sts get-caller-identity)"):
            return str(self.client("sts").get_caller_identity()["Account"])

    def role_arn(self, name: str) -> str:
        """The full name of a role of the account."""
        with asked(f"role {name!r} (iam get-role)"):
            return str(self.client("iam").get_role(RoleName=name)["Role"]["Arn"])

    def bucket_state(self, place: CloudPlace) -> str:
        """`""` if the bucket is there and ours to use, else why not; "missing" if there is none."""
        from botocore.exceptions import ClientError

        # Nobody else may have taken the name that the account's own bucket would have.
        owner = {"ExpectedBucketOwner": place.account} if place.is_default_bucket else {}
        with asked(f"bucket {place.bucket}"):
            try:
                self.client("s3").head_bucket(Bucket=place.bucket, **owner)
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status == 404:
                    return "missing"
                if status == 403:
                    whose = " (it may be another account's)" if place.is_default_bucket else ""
                    return f"access is refused{whose}"
                raise
        return ""

    def make_bucket(self, place: CloudPlace) -> None:
        """Make the account's own bucket, as the cloud's SDK does."""
        configuration = {}
        if self.region != "us-east-1":
            configuration = {"CreateBucketConfiguration": {"LocationConstraint": self.region}}
        with asked(f"bucket {place.bucket}"):
            self.client("s3").create_bucket(Bucket=place.bucket, **configuration)
        logger.info("made bucket %s", place.bucket)

    def upload(self, path: Path, bucket: str, key: str, encryption: Mapping[str, str] | None = None) -> None:
        """Put a file into a bucket."""
        from boto3.exceptions import S3UploadFailedError

        with asked(f"upload of {path} to s3://{bucket}/{key}"):
            try:
                self.client("s3").upload_file(str(path), bucket, key, ExtraArgs=dict(encryption or {}))
            except S3UploadFailedError as error:
                raise LaunchError(f"upload of {path} failed: {error}") from error

    def create(self, request: Mapping[str, Any]) -> None:
        """Submit a training job."""
        with asked(f"training job {request['TrainingJobName']} was not accepted"):
            self.client("sagemaker").create_training_job(**request)

    def describe(self, name: str) -> dict[str, Any] | None:
        """All that the service knows of a training job; None if it does not know the job."""
        from botocore.exceptions import ClientError

        with asked(f"training job {name}"):
            try:
                return dict(self.client("sagemaker").describe_training_job(TrainingJobName=name))
            except ClientError as error:
                details = error.response.get("Error", {})
                if details.get("Code") in ("ValidationException", "ResourceNotFound", "ResourceNotFoundException"):
                    logger.debug("%s", error)
                    return None
                raise

    def stop(self, name: str) -> None:
        """Ask the service to end a training job."""
        with asked(f"training job {name} cannot be stopped"):
            self.client("sagemaker").stop_training_job(TrainingJobName=name)


def import_boto3() -> Any:
    """boto3, which only these jobs need. Raises `LaunchError` naming what to install."""
    try:
        import boto3
    except ImportError as error:
        raise LaunchError(
            "jobs of SageMaker are sent by boto3, which is not installed: pip install 'modelparallel[sagemaker]'"
        ) from error
    return boto3


@contextmanager
def asked(what: str) -> Iterator[None]:
    """Whatever boto3 raises is a `LaunchError` that names what was asked, and quotes the cloud."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise LaunchError(
            f"{what}: {error}: run `aws configure`, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile"
        ) from error
    except (ClientError, BotoCoreError) as error:
        raise LaunchError(f"{what}: {error}") from error


def files_below(path: Path) -> list[tuple[str, Path, int]]:
    """(key, path, bytes) of a file, or of all files of a directory, sorted; links are followed to files.

    Raises `LaunchError` if there is nothing.
    """
    if path.is_file():
        return [(path.name, path, path.stat().st_size)]
    found = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            try:
                found.append((file.relative_to(path).as_posix(), file, file.stat().st_size))
            except OSError as error:
                raise LaunchError(f"{file} cannot be read: {error.strerror}") from error
    if not found:
        raise LaunchError(f"{path} has no files" if path.is_dir() else f"{path} does not exist")
    return found


def readable_size(count: float) -> str:
    """`512 B`, `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
