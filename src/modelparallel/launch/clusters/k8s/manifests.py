"""The objects of a job: a ConfigMap with its description and code, then a TrainJob, or a Service and an Indexed Job.

Pure: dictionaries as the API server takes them, and their text.
"""

from __future__ import annotations

import base64
import math
import shlex
from typing import Any

import yaml

from modelparallel.errors import LaunchError
from modelparallel.job.preemption import EXIT_PREEMPTED
from modelparallel.launch.clusters.description import HOST_LOST_EXIT_CODE, ClusterJob, node_description
from modelparallel.launch.clusters.k8s.keys import (
    DESCRIPTION_FOLDER,
    OWN_FOLDER,
    SHARED_MEMORY,
    KubernetesSettings,
    is_fetched,
)
from modelparallel.launch.clusters.k8s.names import parse_secret
from modelparallel.launch.clusters.packing import ARCHIVE_NAME

#: The container and the replicated job of a TrainJob's node, by the name that the Trainer's runtimes give them.
NODE = "node"
JOB_LABEL = "modelparallel/job"
RANKS_ANNOTATION = "modelparallel/ranks"
TRAINER_GROUP, TRAINER_VERSION, TRAIN_JOBS = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
#: An object of the API server has at most 1 MiB, and etcd takes at most 1.5 MiB, in base64.
MOST_CONFIG_BYTES = 900 * 1024
_PATCH_MANAGER = "modelparallel/submit"
_RESTART_ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
#: Of pods whose node, or another one, was lost: as the launchers say it, killed, or stopped.
_LOST_EXIT_CODES = (HOST_LOST_EXIT_CODE, 137, 143)
_PEER_SECRET_FOLDER = "/etc/modelparallel-peers"


def job_objects(settings: KubernetesSettings, job: ClusterJob, archive: bytes | None) -> list[dict[str, Any]]:
    """All objects, in the order in which they are created; the last is the job itself.

    Args:
        archive: the packed code, where it goes into the ConfigMap.

    Raises `LaunchError` if it is too large for that.
    """
    objects = [_config_map(settings, job, archive)]
    if settings.form == "trainjob":
        return [*objects, _train_job(settings, job)]
    return [*objects, _service(settings, job), _indexed_job(settings, job)]


def yaml_text(objects: list[dict[str, Any]]) -> str:
    """The objects as `kubectl apply -f` reads them."""
    return "".join(f"---\n{yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=1000)}" for each in objects)


def _represent_text(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


#: Texts of several lines as they are, and no references to what stands elsewhere.
_Dumper: Any = type("_Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
_Dumper.add_representer(str, _represent_text)


def _metadata(settings: KubernetesSettings, job: ClusterJob, **more: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "modelparallel", JOB_LABEL: job.name, **settings.labels}
    metadata: dict[str, Any] = {"name": job.name, "labels": labels | more.pop("labels", {})}
    if settings.namespace:
        metadata["namespace"] = settings.namespace
    return metadata | more


def _config_map(settings: KubernetesSettings, job: ClusterJob, archive: bytes | None) -> dict[str, Any]:
    folder, code = f"{settings.job_parent}/{job.name}", settings.code_of(job)
    description = node_description(job, folder=folder, code=code)
    made: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(settings, job),
        "data": {"job.json": description},
    }
    if archive is not None:
        size = len(archive) + len(description.encode())
        if size > MOST_CONFIG_BYTES:
            raise LaunchError(
                f"{settings.title}: the code of job {job.name} has {size / 1024:.0f} KiB packed, and a ConfigMap "
                f"takes {MOST_CONFIG_BYTES // 1024}: leave files out by .modelparallelignore, or set the key code: a "
                'path in the image or on a volume, or a URL ("s3://bucket/code") below which the code is uploaded'
            )
        made["binaryData"] = {ARCHIVE_NAME: base64.b64encode(archive).decode()}
    return made


def _job_metadata(settings: KubernetesSettings, job: ClusterJob) -> dict[str, Any]:
    """Of the object that queues look at."""
    labels = {}
    if settings.queue:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    if settings.queue_priority:
        labels["kueue.x-k8s.io/priority-class"] = settings.queue_priority
    annotations = {RANKS_ANNOTATION: str(job.num_processes), **settings.annotations}
    return _metadata(settings, job, labels=labels, annotations=annotations)


def _train_job(settings: KubernetesSettings, job: ClusterJob) -> dict[str, Any]:
    trainer: dict[str, Any] = {"numNodes": job.num_nodes, "numProcPerNode": job.processes_per_node}
    if image := settings.image_of(job):
        trainer["image"] = image
    command = _command(settings)
    trainer |= {"command": command[:1], "args": command[1:], "env": _environment(settings, job)}
    trainer["env"].append(
        {
            "name": "JOBSET_RESTART_ATTEMPT",
            "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{_RESTART_ATTEMPT}']"}},
        }
    )
    if resources := _resources(settings, job):
        trainer["resourcesPerNode"] = resources
    container: dict[str, Any] = {"name": NODE}
    if settings.security_context:
        container["securityContext"] = dict(settings.security_context)
    container["volumeMounts"] = _mounts(settings)
    pod = {"metadata": _pod_metadata(settings, job), "spec": {**_pod(settings, job), "containers": [container]}}
    patch = {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": pod}}}]}
    reference = {"apiGroup": TRAINER_GROUP, "kind": settings.runtime_kind, "name": settings.runtime}
    spec: dict[str, Any] = {"runtimeRef": reference, "suspend": bool(settings.queue)}
    if job.max_seconds is not None:
        spec["activeDeadlineSeconds"] = math.ceil(job.max_seconds)
    spec["trainer"] = trainer
    spec["runtimePatches"] = [{"manager": _PATCH_MANAGER, "trainingRuntimeSpec": {"template": {"spec": patch}}}]
    return {
        "apiVersion": f"{TRAINER_GROUP}/{TRAINER_VERSION}",
        "kind": "TrainJob",
        "metadata": _job_metadata(settings, job),
        "spec": spec,
    }


def _service(settings: KubernetesSettings, job: ClusterJob) -> dict[str, Any]:
    """Gives the pods names, also before they are ready: nodes look for node 0 as soon as they start."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(settings, job),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: job.name},
            "ports": [{"name": "rendezvous", "port": settings.port}],
        },
    }


def _indexed_job(settings: KubernetesSettings, job: ClusterJob) -> dict[str, Any]:
    environment = _environment(settings, job)
    environment += [
        {"name": "MODELPARALLEL_NNODES", "value": str(job.num_nodes)},
        {"name": "MODELPARALLEL_MASTER", "value": f"{job.name}-0.{job.name}:{settings.port}"},
    ]
    container: dict[str, Any] = {"name": NODE, "image": settings.image_of(job)}
    if settings.image_pull_policy:
        container["imagePullPolicy"] = settings.image_pull_policy
    container |= {"command": _command(settings), "env": environment}
    if resources := _resources(settings, job):
        container["resources"] = resources
    if settings.security_context:
        container["securityContext"] = dict(settings.security_context)
    container["volumeMounts"] = _mounts(settings)
    pod = {"subdomain": job.name, "restartPolicy": "Never", **_pod(settings, job), "containers": [container]}
    if settings.priority_class:
        pod["priorityClassName"] = settings.priority_class
    if settings.host_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    spec: dict[str, Any] = {
        "completions": job.num_nodes,
        "parallelism": job.num_nodes,
        "completionMode": "Indexed",
        "suspend": bool(settings.queue),
        **_restarts(job),
    }
    if job.max_seconds is not None:
        spec["activeDeadlineSeconds"] = math.ceil(job.max_seconds)
    if settings.ttl_seconds is not None:
        spec["ttlSecondsAfterFinished"] = settings.ttl_seconds
    spec["template"] = {"metadata": _pod_metadata(settings, job), "spec": pod}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _job_metadata(settings, job), "spec": spec}


def _restarts(job: ClusterJob) -> dict[str, Any]:
    """When the Job makes pods again. The launchers restart their processes themselves; what is left are lost nodes."""
    rules: list[dict[str, Any]] = [
        # The script has saved because it was asked to, and is to go on.
        {"action": "Ignore", "onExitCodes": {"containerName": NODE, "operator": "In", "values": [EXIT_PREEMPTED]}},
        # The machine was drained, or a job of a higher priority needs it.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    if job.max_restarts:
        # What a script does wrong, it would do again; the launchers have tried.
        lost = {"containerName": NODE, "operator": "NotIn", "values": list(_LOST_EXIT_CODES)}
        rules.append({"action": "FailJob", "onExitCodes": lost})
    # A lost node ends the launchers of all others.
    return {
        "backoffLimit": job.max_restarts * job.num_nodes,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
    }


def _command(settings: KubernetesSettings) -> list[str]:
    command = [settings.python, "-m", "modelparallel", "node", f"{DESCRIPTION_FOLDER}/job.json"]
    lines = list(settings.setup)
    if settings.peer_secret:
        # Mounted files are links of root's, and the secret has to be a file of the user's own.
        lines.append(
            "export MODELPARALLEL_SECRET_FILE=$(mktemp) && "
            f'cat {_PEER_SECRET_FOLDER}/secret > "$MODELPARALLEL_SECRET_FILE"'
        )
    if not lines:
        return command
    return ["/bin/sh", "-c", "\n".join(["set -e", *lines, f"exec {shlex.join(command)}"])]


def _environment(settings: KubernetesSettings, job: ClusterJob) -> list[dict[str, Any]]:
    plain = {"PYTHONUNBUFFERED": "1", **settings.env, "MODELPARALLEL_JOB_ID": job.name}
    environment: list[dict[str, Any]] = [{"name": name, "value": str(value)} for name, value in plain.items()]
    for variable, reference in {**settings.secrets, **job.secrets}.items():
        if is_fetched(reference):
            continue
        name, key = parse_secret(reference, variable)
        environment.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})
    return environment


def _resources(settings: KubernetesSettings, job: ClusterJob) -> dict[str, Any]:
    limits = dict(settings.resources)
    if settings.devices_per_node is None and (devices := settings.devices_on_each_node(job)):
        limits["nvidia.com/gpu"] = devices
    resources: dict[str, Any] = {}
    if limits:
        resources["limits"] = {name: str(number) for name, number in limits.items()}
    if settings.requests:
        resources["requests"] = {name: str(number) for name, number in settings.requests.items()}
    return resources


def _pod_metadata(settings: KubernetesSettings, job: ClusterJob) -> dict[str, Any]:
    metadata: dict[str, Any] = {"labels": {JOB_LABEL: job.name, **settings.pod_labels}}
    if settings.pod_annotations:
        metadata["annotations"] = dict(settings.pod_annotations)
    return metadata


def _pod(settings: KubernetesSettings, job: ClusterJob) -> dict[str, Any]:
    """What pods of both forms have."""
    pod: dict[str, Any] = {"terminationGracePeriodSeconds": settings.grace_seconds}
    if settings.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": settings.image_pull_secret}]
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        pod["tolerations"] = [toleration.record() for toleration in settings.tolerations]
    if settings.affinity:
        pod["affinity"] = dict(settings.affinity)
    if settings.pod_security_context:
        pod["securityContext"] = dict(settings.pod_security_context)
    pod["volumes"] = _volumes(settings, job)
    return pod


def _volumes(settings: KubernetesSettings, job: ClusterJob) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "job", "configMap": {"name": job.name}}]
    if not settings.folder:
        volumes.append({"name": "folder", "emptyDir": {}})
    if settings.mounts_shared_memory:
        size = {"sizeLimit": settings.shm} if settings.shm else {}
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", **size}})
    if settings.peer_secret:
        name, key = parse_secret(settings.peer_secret, "peer_secret")
        volumes.append({"name": "peers", "secret": {"secretName": name, "items": [{"key": key, "path": "secret"}]}})
    volumes += [{"name": f"volume-{number}", **volume.source()} for number, volume in enumerate(settings.volumes)]
    return volumes


def _mounts(settings: KubernetesSettings) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [{"name": "job", "mountPath": DESCRIPTION_FOLDER, "readOnly": True}]
    if not settings.folder:
        mounts.append({"name": "folder", "mountPath": OWN_FOLDER})
    if settings.mounts_shared_memory:
        mounts.append({"name": "shm", "mountPath": SHARED_MEMORY})
    if settings.peer_secret:
        mounts.append({"name": "peers", "mountPath": _PEER_SECRET_FOLDER, "readOnly": True})
    return mounts + [volume.mount(f"volume-{number}") for number, volume in enumerate(settings.volumes)]
