"""Kubernetes as a kind of cluster: `kind = "kubernetes"`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.cluster import JobRecord, JobStatus, Rendered
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.interrupts import engine_asked
from modelparallel.launch.clusters.k8s.client import ApiServer, check_train_job
from modelparallel.launch.clusters.k8s.keys import KubernetesSettings
from modelparallel.launch.clusters.k8s.manifests import NODE, job_objects, yaml_text
from modelparallel.launch.clusters.k8s.pod_logs import follow_logs, read_logs
from modelparallel.launch.clusters.k8s.progress import job_status, missing_status, node_of, num_nodes, num_ranks
from modelparallel.launch.clusters.log_files import check_rank
from modelparallel.launch.clusters.packing import archive_bytes

logger = logging.getLogger("modelparallel.launch")

#: Of the pods that are nodes, as the controllers set them.
_POD_LABELS = {
    "trainjob": f"jobset.sigs.k8s.io/jobset-name={{name}},jobset.sigs.k8s.io/replicatedjob-name={NODE}",
    "indexed-job": "batch.kubernetes.io/job-name={name}",
}
_MANY_WRITERS = "ReadWriteMany"
_MANY_READERS = "ReadOnlyMany"


class Kubernetes(KubernetesSettings):
    """A cluster of Kubernetes: a TrainJob of the Kubeflow Trainer, or an Indexed Job with a headless Service.

    docs/clusters.md shows all files that a job needs.

    Attributes:
        form: "trainjob" for the Kubeflow Trainer, "indexed-job" where there is none.
        namespace: default: that of the context.
        context: of the kubeconfig; default: the current one, or the pod's own service account inside a cluster.
        runtime: the training runtime of a TrainJob; of the kind `runtime_kind`.
        image: with torch, the library and what the script needs. An estimator's `image_uri` comes first.
        python: the interpreter of the image.
        setup: shell commands that each node runs first.
        code: where the code is. "": it is packed into a ConfigMap, if it is small enough. An absolute path: there, in
            the image or on a volume. A URL: it is uploaded below it, and each node fetches it.
        folder: below which the job folder is, in the containers; it is on a volume. Default: each node has its own.
        queue: of Kueue; `queue_priority` is the name of a WorkloadPriorityClass.
        volumes: further directories.
        shm: size of /dev/shm; it counts as memory of the container. Default: as much as that has (a container's own
            64 MiB are too little for NCCL and for workers of a DataLoader).
        resources: what each node gets (`limits`); `requests` where these are to be lower.
        secrets: variable -> "name/key" of a Secret.
        peer_secret: "name/key" of a Secret by which the ranks prove that they belong to the job
            (MODELPARALLEL_SECRET_FILE).
        env: variables of every node.
        image_paths: directories of the image with data that channels may name.
        grace_seconds: between SIGTERM and SIGKILL, when a pod is evicted: to save in.
        ttl_seconds: after its end the job is removed (indexed-job only).
        pod_security_context, security_context, affinity: as Kubernetes has them.
    """

    def render(self, job: ClusterJob) -> Rendered:
        return Rendered(files={f"{job.name}.yaml": yaml_text(self._objects(job))})

    def check_access(self, job: ClusterJob) -> None:
        """Let the API server try all objects, with its quotas, its admission and our rights, and keep none."""
        api = ApiServer(self)
        if api.read_job(self.form, job.name) is not None:
            raise LaunchError(f"{self.title}: there is a job {api.namespace}/{job.name} already: choose another name")
        for volume in self.volumes:
            if volume.claim is not None:
                self._check_claim(api, volume.claim, job.num_nodes, volume.read_only)
        for made in self._objects(job):
            if made["kind"] == "TrainJob":
                check_train_job(made)
            api.create(made, dry_run=True)

    def submit(self, job: ClusterJob) -> JobRecord:
        rendered = self.render(job)
        objects = self._objects(job)
        api = ApiServer(self)
        if "://" in self.code:
            _upload(archive_bytes(job), self.code_of(job))
        made: list[Mapping[str, Any]] = []
        try:
            with engine_asked():
                made += (api.create(each) for each in objects)
        except BaseException:
            for each in reversed(made):
                api.delete(each["kind"], job.name)
            raise
        for each in objects[:-1]:
            try:
                api.own(each["kind"], job.name, made[-1])
            except LaunchError as error:
                logger.warning("%s; it stays when the job is deleted", error)
        settings = self.model_dump(mode="json", exclude_defaults=True)
        return JobRecord(
            name=job.name,
            cluster=self.title,
            kind=self.kind,
            # The context of today: another one may be the current one tomorrow.
            settings={**settings, "namespace": api.namespace, "context": api.context},
            engine_id=f"{api.namespace}/{job.name}",
            folder="",
            submitted=time.time(),
            digest=rendered.digest(),
        )

    def status(self, record: JobRecord) -> JobStatus:
        return self._status(ApiServer(self._where(record)), record)

    def logs(
        self, record: JobRecord, *, rank: int | None = None, node: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        api = ApiServer(self._where(record))

        job = api.read_job(_form(record), _name(record))
        if job is None:
            raise LaunchError(f"{record.engine_id} is not there any more, and what its pods printed is gone with it")
        check_rank(rank, num_ranks(job), record.name)
        if node is not None and not 0 <= node < num_nodes(job):
            raise LaunchError(f"node {node}: job {record.name} has the nodes 0..{num_nodes(job) - 1}")

        def pods() -> list[Any]:
            return [pod for pod in self._pods(api, record) if node in (None, node_of(pod))]

        if follow:
            return follow_logs(api, pods, lambda: self._is_over(api, record), rank)
        return read_logs(api, pods(), rank)

    def stop(self, record: JobRecord) -> None:
        api = ApiServer(self._where(record))
        if not api.delete("TrainJob" if _form(record) == "trainjob" else "Job", _name(record)):
            raise LaunchError(f"{record.engine_id} is not there any more: nothing to stop")

    def adopt(self, engine_id: str) -> JobRecord:
        namespace, slash, name = engine_id.rpartition("/")
        given = self if not slash else self.model_copy(update={"namespace": namespace})
        api = ApiServer(given)
        for form in ("trainjob", "indexed-job"):
            try:
                found = api.read_job(form, name)
            except LaunchError:
                if form == "indexed-job":
                    raise
                continue  # a cluster without the Trainer, or no right to look
            if found is not None:
                settings = {"form": form, "namespace": api.namespace, "context": api.context}
                return JobRecord(name, self.title, self.kind, settings, f"{api.namespace}/{name}", "", 0.0, "")
        raise LaunchError(f"{self.kind}:{engine_id}: there is no TrainJob and no Job {api.namespace}/{name}")

    def _where(self, record: JobRecord) -> Kubernetes:
        """The cluster that the job was sent to: the current context, or the row, may have changed since."""
        return self.model_copy(update={name: record.settings.get(name, "") for name in ("namespace", "context")})

    def _objects(self, job: ClusterJob) -> list[dict[str, Any]]:
        self.check(job)
        return job_objects(self, job, None if self.code else archive_bytes(job))

    def _check_claim(self, api: ApiServer, name: str, num_nodes: int, read_only: bool) -> None:
        try:
            claim = api.read_claim(name)
        except LaunchError:
            return  # we may not look; the pods will say
        if claim is None:
            raise LaunchError(
                f"{self.title}: volumes: there is no PersistentVolumeClaim {api.namespace}/{name}: make it first, or "
                "correct the name (kubectl get pvc)"
            )
        modes = claim.get("spec", {}).get("accessModes") or []
        if num_nodes > 1 and _MANY_WRITERS not in modes and not (read_only and _MANY_READERS in modes):
            logger.warning(
                "%s: claim %s is %s: pods on %d machines cannot all mount it, and some may wait for ever: use %s",
                self.title,
                name,
                ", ".join(modes) or "of an unknown mode",
                num_nodes,
                _MANY_WRITERS,
            )

    def _status(self, api: ApiServer, record: JobRecord) -> JobStatus:
        name = _name(record)
        job = api.read_job(_form(record), name)
        if job is None:
            return missing_status(record)
        pods = self._pods(api, record)
        status = job_status(job, pods, ())
        if status.state != "pending":
            return status
        names = {name, *(pod["metadata"]["name"] for pod in pods)}
        return job_status(job, pods, [event for event in api.events() if _is_about(event, name, names)])

    def _is_over(self, api: ApiServer, record: JobRecord) -> bool:
        status = self._status(api, record)
        return status.is_final or status.state == "unknown"

    def _pods(self, api: ApiServer, record: JobRecord) -> list[dict[str, Any]]:
        labels = _POD_LABELS[_form(record)]
        return api.pods(labels.format(name=_name(record)))


def _upload(content: bytes, url: str) -> None:
    import fsspec  # which jobs without a URL do without

    try:
        with fsspec.open(url, "wb") as file:
            file.write(content)
    except Exception as error:  # each kind of store has errors of its own, and is imported when it is used
        raise LaunchError(f"the code cannot be uploaded to {url}: {type(error).__name__}: {error}") from error


def _form(record: JobRecord) -> str:
    return str(record.settings.get("form", "trainjob"))


def _name(record: JobRecord) -> str:
    return record.engine_id.rpartition("/")[2]


def _is_about(event: Mapping[str, Any], name: str, names: set[str]) -> bool:
    """Whether an event is about the job, what is made for it, or its workload in Kueue (job-NAME-1a2b3)."""
    about = event.get("involvedObject") or {}
    called = about.get("name") or ""
    if about.get("kind") == "Workload":
        return called.startswith((f"job-{name}-", f"trainjob-{name}-"))
    return called in names or called == f"{name}-node-0"
