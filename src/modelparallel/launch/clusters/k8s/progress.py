"""How a job is, from the objects that the cluster holds of it. Pure: objects are dictionaries, as the API server sends
them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from modelparallel.launch.clusters.cluster import JobRecord, JobStatus
from modelparallel.launch.clusters.k8s.manifests import NODE, RANKS_ANNOTATION

Object = Mapping[str, Any]

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
#: What a container waits for while nothing is wrong.
_USUAL_WAITS = ("ContainerCreating", "PodInitializing")
_DEADLINE = "DeadlineExceeded"
_TIMEOUT_EXIT_CODE = 124
_MOST_EVENTS = 3


def job_status(job: Object, pods: Sequence[Object], events: Sequence[Object]) -> JobStatus:
    """How the job is.

    Args:
        job: the TrainJob or the Job.
        pods: of its nodes, those of earlier attempts too.
        events: of the job, its pods and its Kueue workload.
    """
    history = tuple(_history(job))
    conditions = _true_conditions(job)
    if "Complete" in conditions:
        return JobStatus("succeeded", exit_code=0, history=history)
    if "Failed" in conditions:
        reason, code = _failure(conditions["Failed"], pods)
        return JobStatus("failed", reason, code, history)
    if job.get("metadata", {}).get("deletionTimestamp"):
        return JobStatus("running", "it is being deleted", history=history)
    if job.get("spec", {}).get("suspend"):
        waits = _last_messages(events, ("Workload", job.get("kind", "")))
        said = conditions.get("Suspended", {}).get("message", "")
        return JobStatus("pending", "; ".join(["Suspended", *(waits or filter(None, [said]))]), history=history)
    newest = newest_pods(pods)
    num_expected = num_nodes(job)
    num_ready = sum(_runs(pod) for pod in newest)
    if num_ready >= num_expected:
        return JobStatus("running", history=history)
    reasons = [f"{num_ready} of {num_expected} nodes run"] if num_ready else []
    reasons += _waits(newest, events) or _last_messages(events, (job.get("kind", ""), "JobSet", "Job"))
    return JobStatus("pending", "; ".join(reasons) or "no pod has been made yet", history=history)


def missing_status(record: JobRecord, now: float | None = None) -> JobStatus:
    """How a job is that was submitted and is not there any more."""
    lives_on = record.settings.get("ttl_seconds")
    age = (time.time() if now is None else now) - record.submitted
    if record.submitted and (lives_on is None or age < lives_on):
        return JobStatus("stopped", f"{record.engine_id} was deleted")
    return JobStatus(
        "unknown", f"there is no {record.engine_id} any more: it was deleted, or its ttl_seconds have passed"
    )


def newest_pods(pods: Iterable[Object]) -> list[Object]:
    """The last pod of each node, by the node's number."""
    newest: dict[int, Object] = {}
    for pod in sorted(pods, key=_made_at):
        newest[node_of(pod)] = pod
    return [newest[number] for number in sorted(newest)]


def node_of(pod: Object) -> int:
    """The number of the node that a pod is."""
    metadata = pod.get("metadata", {})
    for names in ("labels", "annotations"):
        text = str((metadata.get(names) or {}).get(INDEX_LABEL, ""))
        if text.isdigit():
            return int(text)
    return 0


def num_nodes(job: Object) -> int:
    """How many nodes a job has."""
    spec = job.get("spec", {})
    return int(spec.get("completions") or (spec.get("trainer") or {}).get("numNodes") or 1)


def num_ranks(job: Object) -> int | None:
    """How many processes a job has; None for one that was not submitted by this library."""
    text = str((job.get("metadata", {}).get("annotations") or {}).get(RANKS_ANNOTATION, ""))
    return int(text) if text.isdigit() else None


def has_output(pod: Object) -> bool:
    """Whether the container of a pod has been started, so that there may be a log."""
    state = _container(pod).get("state") or {}
    return "running" in state or "terminated" in state


def has_ended(pod: Object) -> bool:
    """Whether no container of the pod will be started any more."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _runs(pod: Object) -> bool:
    """Whether the pod runs, or has done all that it had to."""
    phase = pod.get("status", {}).get("phase")
    return phase == "Succeeded" or (phase == "Running" and has_output(pod))


def _true_conditions(job: Object) -> dict[str, Object]:
    conditions = (job.get("status") or {}).get("conditions") or []
    return {condition["type"]: condition for condition in conditions if condition.get("status") == "True"}


def _failure(condition: Object, pods: Sequence[Object]) -> tuple[str, int | None]:
    """What is said of the failure, and the exit code: of the pod that ended first."""
    said = [text for text in (condition.get("reason"), condition.get("message")) if text]
    ended = sorted(
        (
            (state.get("finishedAt") or "", node_of(pod), int(state.get("exitCode", 0)), str(state.get("reason") or ""))
            for pod in newest_pods(pods)
            if (state := (_container(pod).get("state") or {}).get("terminated")) and state.get("exitCode")
        ),
    )
    for pod in pods:
        status = pod.get("status", {})
        if status.get("reason"):  # Evicted, with what ran out
            said.append(f"node {node_of(pod)}: {status['reason']} {status.get('message') or ''}".rstrip())
    code = None
    if ended:
        _, node, code, why = ended[0]
        said.append(f"node {node} exited with {code}" + (f" ({why})" if why not in ("", "Error") else ""))
    if condition.get("reason") == _DEADLINE:
        code = _TIMEOUT_EXIT_CODE
    return ": ".join(said[:2]) + "".join(f"; {text}" for text in said[2:]), code


def _waits(pods: Sequence[Object], events: Sequence[Object]) -> list[str]:
    """Why pods are not running yet, each reason once."""
    reasons: dict[str, list[str]] = {}
    for pod in pods:
        name = pod.get("metadata", {}).get("name", "")
        if reason := _wait_of(pod) or next(iter(_last_messages(events, ("Pod",), name)), ""):
            reasons.setdefault(reason, []).append(name)
    return [
        f"{reason} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for reason, names in reasons.items()
    ]


def _wait_of(pod: Object) -> str:
    status = pod.get("status", {})
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    for container in (status.get("initContainerStatuses") or []) + (status.get("containerStatuses") or []):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason", "")
        if reason and reason not in _USUAL_WAITS:
            return f"{reason}: {waiting.get('message', '')}".strip(": ")
    return ""


def _last_messages(events: Sequence[Object], kinds: Sequence[str], name: str | None = None) -> list[str]:
    """What was said last about objects of these kinds, the latest first, each reason once."""
    said: dict[str, str] = {}
    for event in sorted(events, key=_event_time, reverse=True):
        about = event.get("involvedObject") or event.get("regarding") or {}
        if about.get("kind") not in kinds or name not in (None, about.get("name")):
            continue
        reason = event.get("reason") or ""
        said.setdefault(reason, f"{reason}: {event.get('message') or event.get('note') or ''}".strip(": "))
    return list(said.values())[:_MOST_EVENTS]


def _event_time(event: Object) -> str:
    times = (event.get("lastTimestamp"), event.get("eventTime"), event.get("metadata", {}).get("creationTimestamp"))
    return next((text for text in times if text), "")


def _made_at(pod: Object) -> tuple[str, str]:
    metadata = pod.get("metadata", {})
    return metadata.get("creationTimestamp") or "", metadata.get("name", "")


def _container(pod: Object) -> Object:
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return next((status for status in statuses if status.get("name") == NODE), {})


def _history(job: Object) -> Iterable[str]:
    made = job.get("metadata", {}).get("creationTimestamp")
    entries = [(made, "created")] if made else []
    for condition in (job.get("status") or {}).get("conditions") or []:
        what = condition["type"] if condition.get("status") == "True" else f"no longer {condition['type']}"
        entries.append((condition.get("lastTransitionTime") or "", f"{what} {condition.get('reason') or ''}".rstrip()))
    return [f"{_local_time(moment)} {what}" for moment, what in sorted(entries)]


def _local_time(text: str) -> str:
    try:
        moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return text
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"
