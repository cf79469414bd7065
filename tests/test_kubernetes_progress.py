"""How a job on Kubernetes is, from the objects that the cluster holds; and what its pods print."""

import json
import time

import pytest

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.cluster import JobRecord
from modelparallel.launch.clusters.k8s.client import LogPaused, differences
from modelparallel.launch.clusters.k8s.pod_logs import follow_logs, read_logs, shown_line
from modelparallel.launch.clusters.k8s.progress import job_status, missing_status, newest_pods

TIME = "2026-01-31T12:00:0{}Z"


def made_job(*conditions, kind="Job", **spec):
    """A job of two nodes with these conditions, each (type, reason, message)."""
    said = [
        {"type": name, "status": "True", "reason": reason, "message": message, "lastTransitionTime": TIME.format(5)}
        for name, reason, message in conditions
    ]
    own = {"completions": 2} if kind == "Job" else {"trainer": {"numNodes": 2}}
    metadata = {"name": "t", "creationTimestamp": TIME.format(0)}
    return {"kind": kind, "metadata": metadata, "spec": own | spec, "status": {"conditions": said}}


def pod(index, phase="Running", *, name=None, made=1, **state):
    """A pod; `state` is of its container: running={}, waiting={...}, terminated={...}."""
    state = state or ({"running": {}} if phase == "Running" else {})
    metadata = {
        "name": name or f"t-{index}",
        "creationTimestamp": TIME.format(made),
        "labels": {"batch.kubernetes.io/job-completion-index": str(index)},
    }
    containers = [{"name": "sidecar", "state": {"terminated": {"exitCode": 9}}}, {"name": "node", "state": state}]
    return {"metadata": metadata, "status": {"phase": phase, "containerStatuses": containers if state else []}}


def unschedulable(index, message):
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    found = pod(index, "Pending")
    found["status"]["conditions"] = [condition]
    return found


def event(kind, name, reason, message, second=1):
    about = {"kind": kind, "name": name}
    return {"involvedObject": about, "reason": reason, "message": message, "lastTimestamp": TIME.format(second)}


def ended(code, second=1, reason="Error"):
    return {"exitCode": code, "finishedAt": TIME.format(second), "reason": reason}


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_the_way_of_a_job(kind):
    job = made_job(kind=kind)
    assert job_status(job, [], ()).state == "pending"
    assert job_status(job, [], ()).reason == "no pod has been made yet"
    assert job_status(job, [pod(0)], ()).reason == "1 of 2 nodes run"
    assert job_status(job, [pod(0), pod(1)], ()).state == "running"
    assert job_status(job, [pod(0), pod(1, "Succeeded")], ()).state == "running"
    done = made_job(("Complete", "", ""), kind=kind)
    status = job_status(done, [], ())
    assert (status.state, status.exit_code, status.is_final) == ("succeeded", 0, True)
    assert [line.split(" ", 2)[2] for line in status.history] == ["created", "Complete"]


def test_why_a_job_waits():
    job = made_job()
    full = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    status = job_status(job, [unschedulable(0, full), unschedulable(1, full)], ())
    assert (status.state, status.reason) == ("pending", f"Unschedulable: {full} (t-0 and 1 more)")
    pulled = pod(1, "Pending", waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image"})
    reason = job_status(job, [pod(0), pulled], ()).reason
    assert reason == "1 of 2 nodes run; ImagePullBackOff: Back-off pulling image (t-1)"
    # Nothing is wrong while a container is made; but the events of its pod may say more.
    made = pod(1, "Pending", waiting={"reason": "ContainerCreating"})
    assert job_status(job, [pod(0), made], ()).reason == "1 of 2 nodes run"
    events = [
        event("Pod", "t-1", "Pulling", "Pulling image", 1),
        event("Pod", "t-1", "FailedMount", "secret hf not found", 3),
        event("Pod", "other", "Wrong", "of another pod", 4),
    ]
    assert "FailedMount: secret hf not found (t-1)" in job_status(job, [pod(0), made], events).reason
    refused = [event("Job", "t", "FailedCreate", "exceeded quota: gpu")]
    assert job_status(job, [], refused).reason == "FailedCreate: exceeded quota: gpu"


def test_why_a_queue_holds_a_job():
    job = made_job(("Suspended", "JobSuspended", "Job suspended"), suspend=True)
    assert job_status(job, [], ()).reason == "Suspended; Job suspended"
    events = [
        event("Job", "t", "CreatedWorkload", "Created Workload: team-a/job-t-1a2b3", 1),
        event("Workload", "job-t-1a2b3", "Pending", "insufficient unused quota for nvidia.com/gpu", 2),
    ]
    status = job_status(job, [], events)
    assert status.state == "pending"
    assert status.reason.startswith("Suspended; Pending: insufficient unused quota for nvidia.com/gpu")


def test_how_a_job_failed():
    job = made_job(("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"))
    status = job_status(job, [pod(0, "Failed", terminated=ended(7, 2)), pod(1, "Failed", terminated=ended(3, 1))], ())
    assert (status.state, status.exit_code) == ("failed", 3)
    assert status.reason.endswith("backoff limit; node 1 exited with 3")
    killed = pod(1, "Failed", terminated=ended(137, 1, "OOMKilled"))
    assert job_status(job, [pod(0), killed], ()).reason.endswith("node 1 exited with 137 (OOMKilled)")
    evicted = pod(0, "Failed")
    evicted["status"] |= {"reason": "Evicted", "message": "The node was low on resource: memory."}
    status = job_status(job, [evicted], ())
    assert "node 0: Evicted The node was low on resource: memory." in status.reason and status.exit_code is None
    late = made_job(("Failed", "DeadlineExceeded", "Job was active longer than specified deadline"))
    assert job_status(late, [], ()).exit_code == 124
    # What counts is how the last pod of each node ended, not one that was made again.
    first, last = (
        pod(0, "Failed", name="a", terminated=ended(9, 1)),
        pod(0, "Failed", name="b", made=2, terminated=ended(4, 3)),
    )
    assert job_status(job, [last, first], ()).exit_code == 4


def test_what_is_being_deleted():
    job = made_job()
    job["metadata"]["deletionTimestamp"] = TIME.format(3)
    assert job_status(job, [pod(0), pod(1)], ()).reason == "it is being deleted"


def test_a_job_that_is_not_there_any_more():
    def record(submitted, **settings):
        return JobRecord("t", "k8s", "kubernetes", settings, "team-a/t", "", submitted, "")

    now = 1000.0
    assert missing_status(record(900.0), now).state == "stopped"
    assert missing_status(record(900.0, ttl_seconds=3600), now).state == "stopped"
    assert missing_status(record(900.0, ttl_seconds=60), now).state == "unknown"  # it may have succeeded
    assert missing_status(record(0.0), now).state == "unknown"  # submitted elsewhere


def test_the_last_pod_of_each_node():
    pods = [
        pod(1, name="b", made=2),
        pod(0, name="a", made=1),
        pod(1, name="c", made=3),
        pod(10, name="d"),
        pod(2, name="e"),
    ]
    assert [each["metadata"]["name"] for each in newest_pods(pods)] == ["a", "c", "e", "d"]


def test_what_a_round_trip_loses():
    given = {"a": {"b": 1, "c": [1, {"d": 2}], "empty": {}}, "e": 5}
    assert list(differences(given, json.loads(json.dumps(given)))) == []
    assert list(differences(given, {"a": {"b": "1", "c": [1, {}]}})) == [".a.b (1, not '1')", ".a.c[1].d", ".e"]
    assert list(differences({"c": [1, 2]}, {"c": [1]})) == [".c[1] (2, not None)"]


def test_lines_and_ranks():
    line = "[node-b rank 5] loss 0.1"
    assert shown_line(line, 1, None) == shown_line(line, 1, 5) == line
    assert shown_line("[rank 5] loss 0.1", 1, 5) == "[rank 5] loss 0.1"
    assert shown_line(line, 1, 4) is None and shown_line("a line", 1, 5) is None
    assert shown_line("[launcher] job t", 1, None) == "[node 1] job t"
    assert shown_line("a warning of the image", 0, None) == "[node 0] a warning of the image"


class Api:
    """Answers with logs that were given as pieces; an exception among these is raised in its place."""

    def __init__(self, logs, pods):
        self.logs, self.pods = {name: list(connections) for name, connections in logs.items()}, pods
        self.asked = []

    def log(self, name, *, follow, since):
        self.asked.append((name, since))
        for piece in self.logs[name].pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def read_pod(self, name):
        return self.pods[name].pop(0) if self.pods[name] else pod(0, "Succeeded", name=name)


def stamped(second, text, fraction=""):
    return f"{TIME.format(second)[:-1]}{fraction}Z {text}\n".encode()


def test_output_as_it_is_now():
    api = Api({"a": [[stamped(1, "[rank 0] x") + b"2026-01-31T12:00:02Z [rank 1] half"]], "b": [[b""]]}, {})
    pods = [pod(0, name="a"), pod(1, name="b"), pod(2, "Pending", name="c")]
    assert list(read_logs(api, pods, None)) == ["[rank 0] x", "[rank 1] half"]
    assert [name for name, _ in api.asked] == ["a", "b"]


def test_output_that_is_followed_over_broken_connections(monkeypatch):
    """Lines that come twice are shown once, whole lines only, and a pod that is made later is read, too."""
    monkeypatch.setattr("modelparallel.launch.clusters.k8s.pod_logs._PAUSE_SECONDS", 0.0)
    first = (
        stamped(1, "[rank 0] one", ".1"),
        stamped(1, "[rank 0] two", ".15")[:30],
        stamped(1, "[rank 0] two", ".15")[30:],
    )
    again = stamped(1, "[rank 0] two", ".15"), stamped(2, "[rank 0] three")
    api = Api(
        {"a": [[*first, LogPaused("gone")], [*again], []], "b": [[stamped(1, "[rank 1] other")]]},
        {"a": [pod(0), pod(0)], "b": []},
    )
    looks = []

    def pods():
        looks.append(time.monotonic())
        return [pod(0, name="a"), pod(1, name="b")] if len(looks) > 1 else [pod(0, name="a")]

    lines = list(follow_logs(api, pods, lambda: len(looks) > 2, None, look_seconds=0.05))
    assert [line for line in lines if "rank 0" in line] == ["[rank 0] one", "[rank 0] two", "[rank 0] three"]
    assert lines.count("[rank 1] other") == 1
    assert next(since for name, since in api.asked if name == "a") is None
    assert all(since > 0 for name, since in api.asked[1:] if name == "a")


def test_a_log_that_cannot_be_read_is_an_error():
    api = Api({"a": [[LaunchError("cannot read the log: pods/log is forbidden")]]}, {})
    with pytest.raises(LaunchError, match="pods/log is forbidden"):
        list(follow_logs(api, lambda: [pod(0, name="a")], lambda: False, None, look_seconds=0.01))


def test_nothing_is_waited_for_when_the_job_is_over():
    started = time.monotonic()
    assert list(follow_logs(Api({}, {}), lambda: [], lambda: True, None, look_seconds=30.0)) == []
    assert time.monotonic() - started < 20
