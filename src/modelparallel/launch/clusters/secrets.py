"""Secrets of a job: how they are named, found, carried to the nodes in a file of their own, and kept out of the rest.

A job names each secret by the variable that the script reads and by where the value is (`HF_TOKEN=env:HF_TOKEN`). Only
the reference is part of the job's description. Values are read when the job is submitted, go to `secrets.env`, which
its owner alone can read, and reach the processes by their environment.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from modelparallel.errors import LaunchError
from modelparallel.errors.foreign_text import parse_json
from modelparallel.job.private_files import is_own, open_private
from modelparallel.launch.clusters.description import ClusterJob

#: Beside the job's description.
FILE_NAME = "secrets.env"
#: What stands for a value wherever a job is shown.
HIDDEN = "***"
#: What has the shape of a token by its first letters.
TOKEN_SHAPE = re.compile(r"\b(?:hf_|gh[a-z]_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA|ASIA|eyJ)[\w-]{8,}")

# A word of the name or its end: HF_TOKEN, WANDB_API_KEY, APIKEY, KEY_FILE; but neither TOKENIZERS_PARALLELISM nor
# MAX_TOKENS, which hold none.
_SECRET_NAME = re.compile(r"(?i)(token|(?<!mon)key|secrets?|passwords?|passwd|credentials?)(?![a-z])")
_CREDENTIALS_IN_URL = re.compile(r"://[^\s/@:]*:[^\s/@]+@")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Variables with which a value would decide what runs, or that the launcher sets itself.
_RESERVED = re.compile(r"PATH|LD_\w+|PYTHON\w*|MODELPARALLEL_\w+|RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT")
_AWS = "aws-secretsmanager"
_EXAMPLES = {
    "env": "env:HF_TOKEN",
    "file": "file:/home/me/.hf_token",
    _AWS: "aws-secretsmanager:arn:aws:secretsmanager:us-west-2:123456789012:secret:hf-AbCdEf",
}
_MOST_BYTES = 1 << 16
_LEAST_LINE = 6


def secret_options(texts: Sequence[str]) -> dict[str, str]:
    """The references of `--secret NAME=REFERENCE`. Raises `LaunchError`."""
    references: dict[str, str] = {}
    for text in texts:
        name, separator, reference = text.partition("=")
        if not separator or not name or not reference:
            # Perhaps it is the secret itself.
            raise LaunchError(f"--secret {name}: expected NAME=REFERENCE, for example HF_TOKEN={_EXAMPLES['env']}")
        if name in references:
            raise LaunchError(f"--secret: {name!r} is given twice")
        references[name] = reference
    return references


def looks_secret(name: str, value: str) -> str:
    """Why a variable seems to hold a secret; "" if it does not."""
    if _SECRET_NAME.search(name):
        return "by its name"
    return "by its value" if has_secret_shape(value) else ""


def has_secret_shape(value: str) -> bool:
    """Whether a text has a token of a known kind in it, or a URL with a password."""
    return bool(TOKEN_SHAPE.search(value) or _CREDENTIALS_IN_URL.search(value))


def check_plain(job: ClusterJob, *, allowed: bool = False) -> None:
    """Raise `LaunchError` for what looks like a secret and would be written down in plain: in the environment,
    hyperparameters, arguments and locations. With `allowed` (--env-plain, env_plain) the user has said that it is none.
    """
    if allowed or job.env_plain:
        return
    for name, value in job.environment.items():
        if why := looks_secret(name, value):
            raise LaunchError(
                f"environment variable {name} looks like a secret ({why}), and would be readable in the job's files "
                f"and in its engine: give it as a secret (--secret {name}=env:{name}, "
                f"secrets={{{name!r}: 'env:{name}'}}), or say that it is none (--env-plain, env_plain=True)"
            )
    texts = [(f"hyperparameter {name!r}", str(value)) for name, value in job.hyperparameters.items()]
    texts += [(f"argument {number + 1} of the script", text) for number, text in enumerate(job.arguments)]
    texts += [(f"channel {name!r}", channel.location) for name, channel in job.channels.items()]
    texts += [("checkpoints", job.checkpoints or ""), ("output", job.output or "")]
    texts += [("custom_mpi_options", job.custom_mpi_options)]
    for what, text in texts:
        if has_secret_shape(text):
            raise LaunchError(
                f"{what} looks like a secret (by its value), and would be readable in the job's files and in its "
                "engine: give it as a secret (--secret NAME=env:NAME), which the script reads from its environment, "
                "or say that it is none (--env-plain, env_plain=True)"
            )


def check_secrets(job: ClusterJob, kinds: Sequence[str]) -> None:
    """Raise `LaunchError` for a name or a reference that the cluster does not take.

    Args:
        kinds: the words before the colon that it takes: "env", "file", "aws-secretsmanager".
    """
    for name, reference in job.secrets.items():
        check_secret_name(name, job)
        kind, separator, rest = str(reference).partition(":")
        if not separator or kind not in kinds or not rest:
            # What was given may be the secret.
            examples = ", ".join(_EXAMPLES.get(kind, f"{kind}:...") for kind in kinds)
            shown = f"{kind!r}" if separator and kind in _EXAMPLES else "what was given"
            raise LaunchError(f"secret {name}: {shown} is no reference of this cluster: use {examples}")
        if kind == "file" and not os.path.isabs(os.path.expanduser(rest)):
            raise LaunchError(f"secret {name}: file:{rest} is no absolute path")
        if kind == "env" and not _VARIABLE.fullmatch(rest):
            raise LaunchError(f"secret {name}: what follows env: is no name of a variable: use {_EXAMPLES['env']}")


def check_secret_name(name: str, job: ClusterJob) -> None:
    """Raise `LaunchError` for a name that no secret can have."""
    if not _VARIABLE.fullmatch(name):
        raise LaunchError(f"secret {name!r}: the name is that of a variable: letters, digits and '_', no digit first")
    if _RESERVED.fullmatch(name):
        raise LaunchError(f"secret {name}: this variable decides how processes start, and cannot be a secret")
    if name in job.environment:
        raise LaunchError(f"secret {name}: the environment of the job sets {name}, too: give it once")


def read_secret(name: str, reference: str, environ: Mapping[str, str]) -> str:
    """The value behind `env:VARIABLE` or `file:PATH`, on the submitting machine, without the last newline of a file.

    Raises `LaunchError`, which names the secret and never shows a value.
    """
    kind, _, rest = reference.partition(":")
    if kind == "env":
        value = environ.get(rest, "")
        if not value:
            raise LaunchError(
                f"secret {name}: environment variable {rest} is {'empty' if rest in environ else 'not set'}"
            )
    elif kind == "file":
        path = Path(rest).expanduser()
        try:
            with open(path, "rb") as file:
                content = file.read(_MOST_BYTES + 1)
            value = content.decode().removesuffix("\n").removesuffix("\r")
        except OSError as error:
            raise LaunchError(f"secret {name}: {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise LaunchError(f"secret {name}: {path} is no text") from None
        if not value or len(content) > _MOST_BYTES:
            raise LaunchError(f"secret {name}: {path} is {'too long' if value else 'empty'}")
    else:
        raise LaunchError(f"secret {name}: {kind}: is not read on the submitting machine")
    if "\0" in value:
        raise LaunchError(f"secret {name}: the value has a zero byte, which no variable can hold")
    return value


def secret_values(job: ClusterJob, environ: Mapping[str, str]) -> dict[str, str]:
    """The values of all secrets that are read on the submitting machine."""
    return {
        name: read_secret(name, reference, environ)
        for name, reference in job.secrets.items()
        if reference.partition(":")[0] in ("env", "file")
    }


def masked_secrets(job: ClusterJob) -> str:
    """What stands for `secrets.env` in a rendering."""
    return "".join(f"{name}={shlex.quote(HIDDEN)}\n" for name in sorted(job.secrets))


def write_secrets(path: Path, values: Mapping[str, str]) -> None:
    """Write `secrets.env`, as a shell could read it; whole, and readable for its owner alone. Raises `LaunchError`."""
    partial = path.with_name(path.name + ".partial")
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(values.items()))
    try:
        partial.unlink(missing_ok=True)
        # Never readable for others, not even while it is empty.
        with open(partial, "x", encoding="utf-8", newline="", opener=open_private) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text)
        partial.replace(path)
    except OSError as error:
        raise LaunchError(f"the secrets of the job cannot be written to {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_secrets(path: Path) -> dict[str, str]:
    """What `write_secrets` wrote. Raises `LaunchError` for a file that others could have read or written."""
    try:
        with open(path, encoding="utf-8", newline="", opener=open_private) as file:
            if not is_own(file.fileno()):
                raise LaunchError(
                    f"{path} can be read by others, or belongs to another user: it holds secrets (chmod 600 {path}; "
                    "and change them)"
                )
            words = shlex.split(file.read())
    except OSError as error:
        raise LaunchError(f"the secrets of the job cannot be read from {path}: {error.strerror}") from error
    except ValueError:
        raise LaunchError(f"{path} is damaged: submit the job again") from None
    pairs = [word.partition("=") for word in words]
    if not all(separator and _VARIABLE.fullmatch(name) for name, separator, _ in pairs):
        raise LaunchError(f"{path} is damaged: submit the job again")
    return {name: value for name, _, value in pairs}


def secrets_on_node(references: Mapping[str, str], path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The values of a job's secrets on a node: from `secrets.env`, from AWS, or as the engine has set the variable.

    Args:
        references: of the description: name -> reference.
        path: of `secrets.env`; read only if a secret is there.
        environ: of the node command; engines such as Kubernetes set the variables themselves.

    Raises `LaunchError` naming the secret that is missing.
    """
    values: dict[str, str] = {}
    carried: dict[str, str] | None = None
    for name, reference in references.items():
        kind, _, rest = reference.partition(":")
        if kind == _AWS:
            values[name] = _from_aws(name, rest)
        elif kind in ("env", "file") and (carried is not None or path.exists()):
            carried = read_secrets(path) if carried is None else carried
            if name not in carried:
                raise LaunchError(f"secret {name} is not in {path}: submit the job again")
            values[name] = carried[name]
        elif name in environ:
            values[name] = environ[name]
        else:
            raise LaunchError(f"secret {name}: neither is it in {path}, nor has the engine set the variable {name}")
    return values


def _from_aws(name: str, text: str) -> str:
    """The value of a secret of AWS: of all of it, or after `#` of one key of a JSON object."""
    try:
        import boto3
    except ImportError as error:
        raise LaunchError(f"secret {name}: {_AWS} needs boto3: pip install 'modelparallel[sagemaker]'") from error
    arn, _, key = text.partition("#")
    fields = arn.split(":")
    region = fields[3] if arn.startswith("arn:") and len(fields) > 3 else None
    try:
        client = boto3.client("secretsmanager", region_name=region)
        value = client.get_secret_value(SecretId=arn).get("SecretString")
    except Exception as error:  # botocore makes its errors at run time
        raise LaunchError(f"secret {name}: {arn} cannot be fetched: {type(error).__name__}: {error}") from error
    if key and value is not None:
        try:
            value = parse_json(value)[key]
        except (ValueError, TypeError, KeyError):
            raise LaunchError(f"secret {name}: {arn} is no JSON object with the key {key!r}") from None
    if not isinstance(value, str) or not value or "\0" in value:
        raise LaunchError(f"secret {name}: {arn} holds no text")
    return value


def without_values(values: Mapping[str, str]) -> Callable[[str], str]:
    """A function that puts `***` in the place of every value in a text, and of each of its lines, since texts are cut:
    for messages of others, which may quote them.
    """
    lines = [line for value in values.values() for line in value.splitlines() if len(line) >= _LEAST_LINE]
    found = sorted(filter(None, (*values.values(), *lines)), key=len, reverse=True)

    def hide(text: str) -> str:
        for value in found:
            text = text.replace(value, HIDDEN)
        return text

    return hide
