"""The few calls to the API server, by the official Python client (the extra `k8s`). Objects are dictionaries.

Every call has a limit of time, and its errors are `LaunchError`, with the server's own words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.k8s.keys import KubernetesSettings
from modelparallel.launch.clusters.k8s.manifests import NODE, TRAIN_JOBS, TRAINER_GROUP, TRAINER_VERSION

Object = dict[str, Any]

#: Seconds to connect, and for an answer.
_TIMES = (10, 60)
#: A log is asked for again after so many seconds without a line; a connection that is gone says nothing.
_QUIET_LOG_SECONDS = 120
_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_REMEDIES = {
    401: "your credentials are not accepted: log in to the cluster again (kubectl get pods shows the same)",
    403: "your account may not do this: docs/clusters.md has the role that it needs",
}


class LogPaused(Exception):
    """The log of a pod has said nothing for a while, or the connection is gone; it may go on."""


class ApiServer:
    """The API server of a cluster, for one namespace.

    Attributes:
        namespace: in which the job's objects are.
        context: of the kubeconfig, "" inside a cluster.
    """

    def __init__(self, settings: KubernetesSettings) -> None:
        kubernetes = _library()
        self._errors = kubernetes.client.exceptions.ApiException
        configuration = kubernetes.client.Configuration()
        self.context, namespace = _configure(kubernetes, settings, configuration)
        self.namespace = settings.namespace or namespace or "default"
        self._host = configuration.host
        self._train_jobs = (TRAINER_GROUP, TRAINER_VERSION, self.namespace, TRAIN_JOBS)
        api = kubernetes.client.ApiClient(configuration)
        self._core = kubernetes.client.CoreV1Api(api)
        self._batch = kubernetes.client.BatchV1Api(api)
        self._custom = kubernetes.client.CustomObjectsApi(api)

    def create(self, made: Mapping[str, Any], *, dry_run: bool = False) -> Object:
        """Create an object; with ``dry_run`` the server only says what it would do. A field that the server does not
        know is an error.
        """
        options: dict[str, Any] = {"field_validation": "Strict", **({"dry_run": "All"} if dry_run else {})}
        kind, body = made["kind"], dict(made)
        what = f"create {kind} {self.namespace}/{made['metadata']['name']}"
        if kind == "TrainJob":
            return self._ask(what, self._custom.create_namespaced_custom_object, *self._train_jobs, body, **options)
        call = {
            "ConfigMap": self._core.create_namespaced_config_map,
            "Service": self._core.create_namespaced_service,
            "Job": self._batch.create_namespaced_job,
        }[kind]
        return self._ask(what, call, self.namespace, body, **options)

    def own(self, kind: str, name: str, owner: Mapping[str, Any]) -> None:
        """Let an object go when its owner goes."""
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        call = {
            "ConfigMap": self._core.patch_namespaced_config_map,
            "Service": self._core.patch_namespaced_service,
        }[kind]
        body = {"metadata": {"ownerReferences": [reference]}}
        self._ask(f"change {kind} {self.namespace}/{name}", call, name, self.namespace, body)

    def read_job(self, form: str, name: str) -> Object | None:
        """The TrainJob or the Job; None if there is none."""
        what = f"read {_kind(form)} {self.namespace}/{name}"
        if form == "trainjob":
            return self._ask_or_none(what, self._custom.get_namespaced_custom_object, *self._train_jobs, name)
        return self._ask_or_none(what, self._batch.read_namespaced_job, name, self.namespace)

    def read_claim(self, name: str) -> Object | None:
        """A PersistentVolumeClaim; None if there is none."""
        what = f"read PersistentVolumeClaim {self.namespace}/{name}"
        call = self._core.read_namespaced_persistent_volume_claim
        return self._ask_or_none(what, call, name, self.namespace)

    def delete(self, kind: str, name: str) -> bool:
        """Delete an object, its pods first. False if there is none."""
        what, options = f"delete {kind} {self.namespace}/{name}", {"propagation_policy": "Foreground"}
        if kind == "TrainJob":
            call = self._custom.delete_namespaced_custom_object
            return self._ask_or_none(what, call, *self._train_jobs, name, **options) is not None
        call = {
            "ConfigMap": self._core.delete_namespaced_config_map,
            "Service": self._core.delete_namespaced_service,
            "Job": self._batch.delete_namespaced_job,
        }[kind]
        return self._ask_or_none(what, call, name, self.namespace, **options) is not None

    def pods(self, selector: str) -> list[Object]:
        """The pods with these labels."""
        call = self._core.list_namespaced_pod
        return list(self._ask(f"list the pods of {selector}", call, self.namespace, label_selector=selector)["items"])

    def read_pod(self, name: str) -> Object | None:
        """A pod; None if there is none."""
        return self._ask_or_none(
            f"read pod {self.namespace}/{name}", self._core.read_namespaced_pod, name, self.namespace
        )

    def events(self) -> list[Object]:
        """The events of the namespace; none if they may not be read."""
        try:
            return list(self._ask("list events", self._core.list_namespaced_event, self.namespace)["items"])
        except LaunchError:
            return []

    def log(self, pod: str, *, follow: bool, since: int | None) -> Iterator[bytes]:
        """What the container of a pod has printed, in pieces; each line begins with its time.

        Args:
            since: of the last so many seconds; None for all.

        Raises `LogPaused` where it may go on.
        """
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        options: dict[str, Any] = {"since_seconds": since} if since is not None else {}
        what = f"read the log of {self.namespace}/{pod}"
        try:
            response = self._raw(
                what,
                self._core.read_namespaced_pod_log,
                pod,
                self.namespace,
                container=NODE,
                follow=follow,
                timestamps=True,
                _request_timeout=(_TIMES[0], _QUIET_LOG_SECONDS),
                **options,
            )
        except LaunchError as error:
            cause = error.__cause__
            is_quiet = isinstance(getattr(cause, "reason", cause), ReadTimeoutError)
            # 400: the container is not started (again) yet; 404: the pod is gone.
            if is_quiet or getattr(cause, "status", None) in (400, 404):
                raise LogPaused(str(error)) from error
            raise
        try:
            yield from response.stream(amt=None, decode_content=False) if follow else [response.data]
        except (HTTPError, OSError) as error:
            raise LogPaused(f"{what}: {error}") from error
        finally:
            response.close()

    def _ask(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Object:
        response = self._raw(what, call, *arguments, _request_timeout=_TIMES, **options)
        try:
            answer: Object = json.loads(response.data)
        except ValueError as error:
            raise LaunchError(f"cannot {what}: {self._host} does not answer in JSON ({error})") from error
        return answer

    def _ask_or_none(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Object | None:
        try:
            return self._ask(what, call, *arguments, **options)
        except LaunchError as error:
            if getattr(error.__cause__, "status", None) == 404:
                return None
            raise

    def _raw(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        from urllib3.exceptions import HTTPError

        try:
            return call(*arguments, _preload_content=False, **options)
        except self._errors as error:
            raise LaunchError(f"cannot {what}: {_said(error)}") from error
        except (HTTPError, OSError) as error:
            raise LaunchError(f"cannot {what}: the API server {self._host} cannot be reached: {error}") from error
        except ValueError as error:  # the client checks objects, too
            raise LaunchError(f"cannot {what}: {error}") from error


def check_train_job(made: Mapping[str, Any]) -> None:
    """Compare a TrainJob with what the Trainer's own models make of it, where these are installed: they refuse wrong
    types, and drop what they do not know. Raises `LaunchError`.
    """
    try:
        from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
    except ImportError:
        return
    try:
        parsed = TrainerV1alpha1TrainJob.from_dict(dict(made))
    except ValueError as error:
        raise LaunchError(f"the TrainJob is not one of this version of the Kubeflow Trainer: {error}") from error
    lost = list(differences(made, parsed.to_dict() if parsed else {}))
    if lost:
        raise LaunchError(f"the TrainJob has fields that the Kubeflow Trainer does not know: {', '.join(lost)}")


def differences(given: Any, other: Any, where: str = "") -> Iterator[str]:
    """The places of ``given`` that the other one does not have, or has otherwise."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            if isinstance(other, Mapping) and key in other:
                yield from differences(value, other[key], f"{where}.{key}")
            elif value not in ({}, []):
                yield f"{where}.{key}"
    elif isinstance(given, list):
        for number, value in enumerate(given):
            there = other[number] if isinstance(other, list) and number < len(other) else None
            yield from differences(value, there, f"{where}[{number}]")
    elif given != other:
        yield f"{where} ({given!r}, not {other!r})"


def _kind(form: str) -> str:
    return "TrainJob" if form == "trainjob" else "Job"


def _library() -> Any:
    try:
        import kubernetes
    except ImportError as error:
        raise LaunchError(
            "jobs are sent to Kubernetes by its Python client, which is not installed: pip install 'modelparallel[k8s]'"
        ) from error
    return kubernetes


def _configure(kubernetes: Any, settings: KubernetesSettings, configuration: Any) -> tuple[str, str]:
    """Fill the configuration; returns context and namespace."""
    config = kubernetes.config
    # The library looks at the variable only once, when it is imported.
    file = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    is_inside = "KUBERNETES_SERVICE_HOST" in os.environ and not settings.context and "KUBECONFIG" not in os.environ
    try:
        if is_inside and not Path(file).exists():
            config.load_incluster_config(client_configuration=configuration)
            return "", _ACCOUNT_NAMESPACE.read_text().strip() if _ACCOUNT_NAMESPACE.exists() else ""
        contexts, active = config.list_kube_config_contexts(file)
        name = settings.context or active["name"]
        known = {context["name"]: context for context in contexts}
        if name not in known:
            raise LaunchError(f"context {name!r}: the kubeconfig has {', '.join(sorted(known)) or 'none'}")
        config.load_kube_config(file, context=name, client_configuration=configuration)
    except (config.ConfigException, OSError, TypeError, ValueError) as error:
        raise LaunchError(
            f"there is no usable kubeconfig ({error}): set KUBECONFIG, or log in to the cluster first, so that "
            "`kubectl get pods` works"
        ) from error
    return name, str((known[name].get("context") or {}).get("namespace") or "")


def _said(error: Any) -> str:
    """What the server has said, whole, and what helps."""
    try:
        text = json.loads(error.body)["message"]
    except (ValueError, KeyError, TypeError):
        text = str(error.body or error.reason or error)
    remedy = _REMEDIES.get(error.status)
    return f"{text} (HTTP {error.status})" + (f": {remedy}" if remedy else "")
