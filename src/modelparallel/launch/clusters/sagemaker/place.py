"""Where in the cloud a job has its things: account, region, role, bucket."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from modelparallel.errors import LaunchError

#: As the service's own description has it.
ROLE_ARN = re.compile(r"arn:aws[a-z\-]*:iam::(\d{12}):role/?[a-zA-Z_0-9+=,.@\-_/]+")
_ROLE_NAME = re.compile(r"[a-zA-Z_0-9+=,.@\-_]{1,64}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d+")

#: Stands in a rendering for what only the account itself can say; submit asks.
UNKNOWN_ACCOUNT = "ACCOUNT"


@dataclass(frozen=True)
class CloudPlace:
    """Where the things of jobs are.

    Attributes:
        account: of twelve digits; `ACCOUNT` before the cloud was asked, if the role does not say it.
        bucket: of code, uploaded channels and outputs, unless they were given places of their own.
        prefix: begins all keys in the bucket; "" or with a slash at its end.
        is_default_bucket: nobody named a bucket, so it is that of the account, made if it does not exist.
    """

    region: str
    account: str
    role: str
    bucket: str
    prefix: str = ""
    is_default_bucket: bool = False

    @property
    def is_known(self) -> bool:
        return self.account != UNKNOWN_ACCOUNT

    def url(self, key: str = "") -> str:
        """An address below the prefix."""
        return f"s3://{self.bucket}/{self.prefix}{key}"


def split_url(url: str, what: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`. Raises `LaunchError` for anything else."""
    match = re.fullmatch(r"s3://([^/]+)(?:/(.*))?", url, re.S)
    if match is None or not _BUCKET.fullmatch(match[1]):
        raise LaunchError(f"{what}: {url!r} is no location in S3: expected s3://bucket/prefix")
    return match[1], match[2] or ""


def split_bucket(bucket: str) -> tuple[str, str]:
    """(bucket, prefix) of the cluster's key: `name`, or `s3://name/prefix`."""
    name, prefix = split_url(bucket if "://" in bucket else f"s3://{bucket}", "bucket")
    return name, prefix.strip("/") + "/" if prefix.strip("/") else ""


def place_of(role: str, region: str, bucket: str | None, account: str | None = None) -> CloudPlace:
    """The place, from what is given. Pure: a role of which only the name is known, and what depends on its account,
    stand for themselves until the account is known.

    Args:
        role: its ARN, or its name alone.
        bucket: `name` or `s3://name/prefix`; None: the account's own, by the name that the cloud's SDK gives it.
    """
    match = ROLE_ARN.fullmatch(role)
    account = account or (match[1] if match else UNKNOWN_ACCOUNT)
    arn = role if match else f"arn:{partition_of(region)}:iam::{account}:role/{role}"
    if bucket:
        name, prefix = split_bucket(bucket)
        return CloudPlace(region, account, arn, name, prefix)
    return CloudPlace(region, account, arn, f"sagemaker-{region}-{account}", is_default_bucket=True)


def partition_of(region: str) -> str:
    """The first part of names in a region: `aws`, or that of a group of regions apart."""
    if region.startswith("cn-"):
        return "aws-cn"
    return "aws-us-gov" if region.startswith("us-gov-") else "aws"


def check_role(role: str | None, instance_type: str | None = None) -> str:
    """The role. Raises `LaunchError` if there is none, or it is none."""
    if not role:
        what = f"instance_type {instance_type!r}: " if instance_type else ""
        raise LaunchError(
            f"{what}role is missing: the service runs the job as a role of yours; give "
            'role="arn:aws:iam::<account>:role/..." to the estimator, or role = "..." in the cluster file (to run on '
            'this machine: instance_type="local")'
        )
    if not isinstance(role, str) or not (ROLE_ARN.fullmatch(role) or _ROLE_NAME.fullmatch(role)):
        raise LaunchError(f"role {role!r}: expected arn:aws:iam::<12 digits>:role/<name>, or the name of a role")
    return role


def check_region(region: str | None, environ: Mapping[str, str] | None = None) -> str:
    """The region that is given, else that of the environment. Raises `LaunchError`."""
    environ = os.environ if environ is None else environ
    region = region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if not region:
        raise LaunchError(
            'region is missing: give region = "us-west-2" in the cluster file, or set AWS_REGION, or write it into '
            "~/.aws/config (aws configure)"
        )
    if not _REGION.fullmatch(region):
        raise LaunchError(f"region {region!r}: expected a name like us-west-2")
    return region
