"""The estimator: launch files written for the cloud run on this machine, or on a cluster (smp-config sections 2, 3, 5).

    PyTorch(entry_point="train.py", instance_type="local", distribution={...}).fit({"train": "data/train"})

The arguments of the original are accepted; those that have nothing to act on where the job runs are named once in the
log.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from modelparallel.config.reading import nearest
from modelparallel.errors import LaunchError, NotBuiltError, SMPConfigError
from modelparallel.launch.channels import input_channels, local_path
from modelparallel.launch.cluster_jobs import (
    INPUTS,
    LOCAL_INSTANCE_TYPES,
    check_job,
    checkpoint_location,
    chosen_cluster,
    cluster_channels,
    devices_per_node,
    in_container,
    input_objects,
    say_what_has_no_effect,
)
from modelparallel.launch.clusters.cluster import Cluster, Rendered
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.git_source import clone
from modelparallel.launch.devices import check_devices, checked_device, resolve_device
from modelparallel.launch.distribution import is_plain, validate_distribution
from modelparallel.launch.environment import command_arguments
from modelparallel.launch.folder import JobFolder, checked_job_name, default_folder, new_job_name
from modelparallel.launch.job_handle import JobHandle
from modelparallel.launch.process_counts import checked_range, fitting_counts
from modelparallel.launch.spec import Backend, JobSpec, check_script
from modelparallel.launch.submitted import SubmittedJob, find_job, submit_job

logger = logging.getLogger("modelparallel.launch")

#: Arguments of the original that are accepted, and on which only some kinds of clusters act.
SERVICE_ARGUMENTS = (
    "role",
    "framework_version",
    "py_version",
    "pytorch_version",
    "transformers_version",
    "image_uri",
    "sagemaker_session",
    "checkpoint_s3_uri",
    "output_path",
    "code_location",
    "debugger_hook_config",
    "disable_profiler",
    "profiler_config",
    "rules",
    "metric_definitions",
    "enable_sagemaker_metrics",
    "volume_size",
    "volume_kms_key",
    "output_kms_key",
    "max_retry_attempts",
    "max_wait",
    "use_spot_instances",
    "input_mode",
    "tags",
    "subnets",
    "security_group_ids",
    "enable_network_isolation",
    "encrypt_inter_container_traffic",
    "model_uri",
    "model_channel_name",
    "git_config",
    "dependencies",
    "container_log_level",
    "keep_alive_period_in_seconds",
    "instance_groups",
    "compiler_config",
    "training_repository_access_mode",
    "training_repository_credentials_provider_arn",
    "container_entry_point",
    "container_arguments",
    "disable_output_compression",
    "enable_infra_check",
    "enable_remote_debug",
    "enable_session_tag_chaining",
    "instance_placement_config",
    "tensorboard_output_config",
    "training_plan",
)
#: Arguments of `fit` of which the same is true.
FIT_SERVICE_ARGUMENTS = ("experiment_config",)

_BACKEND_VARIABLE = "MODELPARALLEL_BACKEND"


class PyTorch:
    """A training job on this machine or on a cluster, described as for the cloud.

    Every other argument of the original is accepted: the clusters that know it act on it (docs/clusters.md), elsewhere
    it is named in the log; an unknown one is an error.

    Args:
        entry_point: the Python script, relative to `source_dir` if that is given.
        source_dir: directory of the code; it is the script's working directory. Default: the directory of the script.
        instance_type: "local" (GPUs if there are any, else a rehearsal on the CPU), "local_cpu" or "local_gpu": this
            machine. "ml.*": SageMaker. "slurm", "slurm:NAME", "kubernetes:NAME", ..., or a name in the cluster file.
        instance_count: how many machines; 1 on this machine.
        distribution: `{"smdistributed": {"modelparallel": {...}}, "mpi": {...}}`; `processes_per_host` processes are
            started on each machine. `{"torch_distributed": {"enabled": True}}`: one for each device, and the script
            says the rest. None: one process that is not model parallel.
        hyperparameters: passed to the script as `--key value`, sorted, and published as SM_HP_*.
        environment: more variables for the script.
        base_job_name: begins the job's name.
        checkpoint_local_path: where the job folder's `checkpoints` leads; a path below /opt/ml is in the job folder. On
            a cluster `checkpoint_s3_uri` comes first.
        max_run: seconds after which the job is stopped, all attempts together.
        cluster: ours, as all that follow: `Slurm(...)`, `SageMaker(...)`, `Kubernetes(...)`, or a name in the cluster
            file. ``instance_type`` then says for which machine the launch file was written: 8 devices for
            "ml.p4d.24xlarge".
        secrets: variable of the script -> where the cluster finds its value (docs/clusters.md); never the value.
        env_plain: what looks like a secret in `environment`, `hyperparameters` and locations is none.
        requirements: a file of `source_dir` with packages that are to be installed on the nodes.
        job_dir: the folder of a job on this machine; default ./modelparallel-jobs/<job name>.
        backend: "elastic" or "mpi"; default: the variable MODELPARALLEL_BACKEND, else "elastic".
        device: "auto", "cpu" or "cuda"; default: what `instance_type` says.
        pass_mp_parameters: whether the script also gets `--mp_parameters k=v,...`, as in the cloud.
        max_restarts: how often the job is started again after a failure; the script goes on from its checkpoint.
        min_processes: with how few processes it may go on, if devices are lost or a rank fails again and again; default
            `processes_per_host`. Only numbers that the degrees allow are used.

    Raises:
        SMPConfigError: an unknown or wrong argument, or a wrong `distribution`.

    Source: smp-config sections 2, 3 and 5.
    """

    def __init__(
        self,
        entry_point: str | os.PathLike[str],
        source_dir: str | os.PathLike[str] | None = None,
        role: Any = None,
        instance_type: str | None = "local",
        instance_count: int = 1,
        framework_version: str | None = None,
        py_version: str | None = None,
        sagemaker_session: Any = None,
        distribution: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        base_job_name: str | None = None,
        checkpoint_local_path: str | os.PathLike[str] | None = None,
        max_run: float | None = None,
        *,
        cluster: Cluster | str | None = None,
        secrets: Mapping[str, str] | None = None,
        env_plain: bool = False,
        requirements: str | None = None,
        job_dir: str | os.PathLike[str] | None = None,
        backend: str | None = None,
        device: str | None = None,
        pass_mp_parameters: bool = True,
        max_restarts: int = 0,
        min_processes: int | None = None,
        **others: Any,
    ) -> None:
        self.entry_point = entry_point
        self.source_dir = source_dir
        self.instance_type = instance_type
        self.instance_count = instance_count
        self.hyperparameters = dict(hyperparameters or {})
        self.environment = {str(key): str(value) for key, value in (environment or {}).items()}
        self.base_job_name = base_job_name
        self.checkpoint_local_path = checkpoint_local_path
        self.max_run = max_run
        self.job_dir = job_dir
        self.backend = _chosen_backend(backend)
        local = {"job_dir": job_dir, "backend": backend, "min_processes": min_processes}
        self._local_options = {name: value for name, value in local.items() if value is not None}
        self.device = device
        self.pass_mp_parameters = pass_mp_parameters
        self.max_restarts = _checked_count(max_restarts, "max_restarts", 0)
        self.min_processes = None if min_processes is None else _checked_count(min_processes, "min_processes", 1)
        if min_processes is not None and distribution is None:
            raise LaunchError("min_processes: without distribution the job has one process")
        self.cluster = cluster
        self.secrets = dict(secrets or {})
        self.env_plain = env_plain
        self.requirements = requirements
        self.latest_training_job: JobHandle | SubmittedJob | None = None
        _check_names(others)
        named = {
            "role": role,
            "framework_version": framework_version,
            "py_version": py_version,
            "sagemaker_session": sagemaker_session,
        }
        self.service_options = {name: value for name, value in {**named, **others}.items() if value is not None}
        if self.service_options and cluster is None and instance_type in LOCAL_INSTANCE_TYPES:
            logger.info("accepted without effect on a local job: %s", ", ".join(sorted(self.service_options)))
        # A copy: the caller's dict may serve a second estimator.
        self.distribution = dict(distribution) if distribution is not None else None
        if self.distribution is not None and not is_plain(self.distribution):
            validate_distribution(self.distribution, instance_count)

    def fit(
        self, inputs: Any = None, wait: bool = True, logs: Any = "All", job_name: str | None = None, **others: Any
    ) -> None:
        """Run the job, here or on the cluster.

        Args:
            inputs: a location (channel `training`) or a dict of channel names and locations: paths and file:///; on a
                cluster also URLs (s3://, gs://, ...).
            wait: return at the end of the job; with False at once, and `latest_training_job.wait()` waits. While a job
                on a cluster is waited for, Ctrl-C ends the waiting alone.
            logs: of a job on a cluster that is waited for: False or "None" shows changes of its state only.
            job_name: default: made from `base_job_name` and the time.

        Raises:
            LaunchError: before any process starts or anything is submitted: there is nothing to run, or no place.
            SMPConfigError: before any process starts or anything is submitted: values that do not fit.
            JobFailedError: the job fails; a LaunchError. On this machine with the traceback of the first failing
                process.

        Source: smp-config section 3.
        """
        for name in others:
            if name not in FIT_SERVICE_ARGUMENTS:
                known = ("inputs", "wait", "logs", "job_name", *FIT_SERVICE_ARGUMENTS)
                raise LaunchError(f"fit: unknown argument {name!r}: did you mean {nearest(name, known)!r}?")
        cluster = chosen_cluster(self.cluster, self.instance_type)
        if cluster is not None:
            with self._cluster_job(cluster, inputs, job_name, others) as job:
                say_what_has_no_effect(cluster, job)
                submitted = self.latest_training_job = submit_job(cluster, job)
            logger.info("submitted: job %s, %s", submitted.address, submitted.record.engine_id)
            if wait:
                submitted.wait(logs=logs not in (False, None, "None", [], ()))
            return
        handle = self.latest_training_job = JobHandle(self._job(inputs, job_name))
        if wait:
            handle.run()
        else:
            handle.start()

    def render(self, inputs: Any = None, job_name: str | None = None) -> Rendered:
        """What `fit` would submit to the cluster: files, requests, command. Nothing is sent or written.

        Raises `LaunchError` for a job on this machine; what `fit` raises before anything is submitted.
        """
        cluster = chosen_cluster(self.cluster, self.instance_type)
        if cluster is None:
            raise LaunchError("render: a job on this machine is not submitted: name a cluster, or call fit()")
        with self._cluster_job(cluster, inputs, job_name) as job:
            check_job(cluster, job)
            return cluster.render(job)

    @classmethod
    def attach(cls, job: str, sagemaker_session: Any = None, wait: bool = True, logs: Any = "All") -> PyTorch:
        """An estimator whose `latest_training_job` is a job that was submitted before, from this or another process.

        Args:
            job: `<cluster>/<name>`; the name alone where that is enough; or the engine's own address (`slurm:1234`,
                `sagemaker:NAME`, `kubernetes:namespace/name`).
            sagemaker_session: whose credentials and region are used for a job of SageMaker.
            wait: as for `fit`.
            logs: as for `fit`.

        Raises `LaunchError` if there is no such job, `JobFailedError` if it was waited for and failed.
        """
        found = find_job(job, sagemaker_session)
        estimator = cls(entry_point=found.name, cluster=found.cluster, sagemaker_session=sagemaker_session)
        estimator.latest_training_job = found
        if wait:
            found.wait(logs=logs not in (False, None, "None", [], ()))
        return estimator

    @property
    def model_data(self) -> str:
        """Where the script of the last job left its model (SM_MODEL_DIR): a directory, or a URL of a cluster's."""
        if self.latest_training_job is None:
            raise LaunchError("model_data: no job has been run: call fit()")
        if isinstance(self.latest_training_job, SubmittedJob):
            return self.latest_training_job.record.model
        return str(self.latest_training_job.folder.model)

    def _job(self, inputs: Any, job_name: str | None) -> JobSpec:
        device_asked = self._local_device()
        script, source_dir = self._code()
        channels = input_channels(inputs)
        device, available = resolve_device(device_asked)
        parameters: dict[str, Any] | None = None
        num_processes, mpi_options = 1, ""
        fewer: list[int] = []
        if self.distribution is not None and is_plain(self.distribution):
            num_processes = available or 1
        elif self.distribution is not None:
            # With min_processes the job may begin with fewer than processes_per_host.
            must_have_all = device == "cuda" and self.min_processes is None
            checked = validate_distribution(
                self.distribution, self.instance_count, devices_per_host=available if must_have_all else None
            )
            parameters = checked.parameters
            num_processes, mpi_options = checked.num_processes, checked.custom_mpi_options
            available = 0 if checked.config.shares_devices else available
            if self.min_processes is not None:
                where = f"min_processes={self.min_processes}, processes_per_host={num_processes}"
                least, most = checked_range(self.min_processes, num_processes, where)
                num_processes, *fewer = fitting_counts(checked.config, least, most, available, where)
        check_devices(num_processes, device, available)
        hyperparameters, arguments = self._published(parameters)
        name = new_job_name(self.base_job_name or script.stem) if job_name is None else checked_job_name(job_name)
        if self.job_dir is None:
            folder = default_folder(name)
        else:
            folder = JobFolder(local_path(self.job_dir, "job_dir", must_exist=False))
        return JobSpec(
            name=name,
            script=script,
            source_dir=source_dir,
            working_directory=source_dir,
            folder=folder,
            num_processes=num_processes,
            backend=self.backend,
            device=device,
            arguments=arguments,
            hyperparameters=hyperparameters,
            parameters=parameters,
            channels=channels,
            custom_mpi_options=mpi_options,
            environment=self.environment,
            instance_type=self.instance_type or "local",
            preferred_port=int((parameters or {}).get("ddp_port", 7777)),
            timeout=self.max_run,
            checkpoints=self._checkpoints(),
            max_restarts=self.max_restarts,
            fewer_processes=tuple(fewer),
        )

    def _published(self, parameters: Mapping[str, Any] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The hyperparameters that the script finds in its environment, and its command line."""
        hyperparameters = dict(self.hyperparameters)
        arguments = dict(hyperparameters)
        if parameters is not None:
            hyperparameters["mp_parameters"] = parameters
            if self.pass_mp_parameters:
                arguments["mp_parameters"] = parameters
        return hyperparameters, tuple(command_arguments(arguments))

    @contextmanager
    def _cluster_job(
        self, cluster: Cluster, inputs: Any, job_name: str | None, others: Mapping[str, Any] | None = None
    ) -> Iterator[ClusterJob]:
        """The job; its code is there for the block, since a repository is cloned for it."""
        others = {name: value for name, value in (others or {}).items() if value is not None}
        git_config = self.service_options.get("git_config")
        if git_config is None:
            yield self._described(cluster, inputs, job_name, others, None)
            return
        with tempfile.TemporaryDirectory(prefix="modelparallel-git-") as folder:
            yield self._described(cluster, inputs, job_name, others, clone(git_config, Path(folder) / "code").path)

    def _described(
        self, cluster: Cluster, inputs: Any, job_name: str | None, others: Mapping[str, Any], base: Path | None
    ) -> ClusterJob:
        script, source_dir = self._code(base)
        instance_type = None if self.instance_type in LOCAL_INSTANCE_TYPES else self.instance_type
        devices = devices_per_node(cluster, instance_type)
        parameters: dict[str, Any] | None = None
        per_node, mpi_options = 1, ""
        if self.distribution is not None and is_plain(self.distribution):
            if not devices:
                raise LaunchError(
                    f"distribution {next(iter(self.distribution))!r} starts one process per device, and nobody says "
                    f"how many {cluster.title} has: name an instance_type, or set the cluster's number of devices"
                )
            per_node = devices
        elif self.distribution is not None:
            checked = validate_distribution(self.distribution, self.instance_count, devices_per_host=devices)
            parameters, mpi_options = checked.parameters, checked.custom_mpi_options
            per_node = checked.processes_per_host
        hyperparameters, arguments = self._published(parameters)
        if isinstance(self.service_options.get("dependencies"), str | os.PathLike):
            raise LaunchError(f"dependencies: expected a list of paths, got {self.service_options['dependencies']!r}")
        options = {**self.service_options, **others, **self._local_options}
        options.pop("git_config", None)
        url, output = options.pop("checkpoint_s3_uri", None), options.pop("output_path", None)
        if self.checkpoint_local_path is not None:
            options["checkpoint_local_path"] = os.fspath(self.checkpoint_local_path)
        if INPUTS in cluster.service_arguments and (objects := input_objects(inputs)):
            options[INPUTS] = objects
        channels = cluster_channels(inputs, options.get("input_mode"), options.get(INPUTS, ()))
        return ClusterJob(
            name=cluster.new_name(self.base_job_name or script.stem) if job_name is None else job_name,
            entry_point=_entry_below(script, source_dir),
            source_dir=source_dir,
            num_nodes=self.instance_count,
            processes_per_node=per_node,
            arguments=arguments,
            hyperparameters=hyperparameters,
            parameters=parameters,
            channels=channels,
            environment=self.environment,
            secrets=self.secrets,
            env_plain=self.env_plain,
            requirements=self.requirements,
            dependencies=tuple(_below(base, path, "dependencies") for path in options.pop("dependencies", ())),
            distribution=self.distribution,
            custom_mpi_options=mpi_options,
            instance_type=instance_type,
            device=checked_device(self.device or "auto"),
            max_seconds=self.max_run,
            max_restarts=self.max_restarts,
            checkpoints=checkpoint_location(url, self.checkpoint_local_path),
            output=None if output is None else str(output),
            service_options=options,
        )

    def _local_device(self) -> str:
        if self.instance_count != 1:
            raise LaunchError(
                f"instance_count={self.instance_count}: a local job has one host: use instance_count=1 and set "
                "processes_per_host to the number of processes, or name a cluster"
            )
        return self.device or LOCAL_INSTANCE_TYPES[self.instance_type]

    def _code(self, base: Path | None = None) -> tuple[Path, Path]:
        """The script, and the directory of the code. ``base``: a clone that both are relative to."""
        if self.source_dir is None:
            script = _below(base, self.entry_point, "entry point", must_exist=False)
            check_script(script)
            return script, script.parent
        if str(self.source_dir).startswith("s3://"):
            raise NotBuiltError(f"source_dir {self.source_dir}: reading code from s3:// is not built yet: copy it here")
        source_dir = _below(base, self.source_dir, "source_dir")
        script = source_dir / self.entry_point
        check_script(script)
        return script, source_dir

    def _checkpoints(self) -> Path | None:
        if self.checkpoint_local_path is None or in_container(self.checkpoint_local_path):
            return None
        return local_path(self.checkpoint_local_path, "checkpoint_local_path", must_exist=False)


class HuggingFace(PyTorch):
    """The estimator of Hugging Face scripts: the same job as by `PyTorch`."""


class Estimator(PyTorch):
    """The generic estimator: the same job as by `PyTorch`."""


def _below(base: Path | None, path: Any, what: str, *, must_exist: bool = True) -> Path:
    """The path, of this machine or of a clone. Raises `LaunchError`, also for what leads out of the clone."""
    if base is None:
        return local_path(path, what, must_exist=must_exist)
    inside = local_path(base / os.fspath(path), what, must_exist=must_exist)
    if not inside.resolve().is_relative_to(base.resolve()):
        raise LaunchError(f"{what} {path} leads out of the repository of git_config: give a path in it")
    return inside


def _entry_below(script: Path, source_dir: Path) -> str:
    """The script, as a node finds it in the code. Raises `LaunchError` for one that would not be sent."""
    path = Path(os.path.abspath(script))
    if not path.is_relative_to(source_dir):
        raise LaunchError(f"entry point {path} is not below source_dir {source_dir}: only that directory is sent")
    return str(path.relative_to(source_dir))


def _check_names(others: Mapping[str, Any]) -> None:
    own = [name for name in inspect.signature(PyTorch.__init__).parameters if name not in ("self", "others")]
    known = (*own, *SERVICE_ARGUMENTS)
    for name in others:
        if name not in known:
            raise LaunchError(f"estimator: unknown argument {name!r}: did you mean {nearest(name, known)!r}?")


def _checked_count(value: Any, name: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise LaunchError(f"{name}: expected int >= {least}, got {value!r}")
    return value


def _chosen_backend(backend: str | None) -> Backend:
    chosen = backend or os.environ.get(_BACKEND_VARIABLE) or "elastic"
    if chosen not in ("elastic", "mpi"):
        where = "backend" if backend else _BACKEND_VARIABLE
        raise SMPConfigError(f"{where}: expected 'elastic' or 'mpi', got {chosen!r}")
    return cast(Backend, chosen)
