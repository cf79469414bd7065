"""The estimator: launch files written for the cloud run on this machine (smp-config sections 2, 3 and 5).

    PyTorch(entry_point="train.py", instance_type="local", distribution={...}).fit({"train": "data/train"})

The arguments of the original are accepted; those that have nothing to act on here are named once in the log.
"""

import inspect
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from modelparallel.config.reading import nearest
from modelparallel.errors import LaunchError, NotBuiltError, SMPConfigError
from modelparallel.launch.channels import input_channels, local_path
from modelparallel.launch.devices import check_devices, resolve_device
from modelparallel.launch.distribution import validate_distribution
from modelparallel.launch.environment import command_arguments
from modelparallel.launch.failures import JobFailedError
from modelparallel.launch.folder import JobFolder, checked_job_name, default_folder, new_job_name
from modelparallel.launch.job import run_job
from modelparallel.launch.process_counts import checked_range, fitting_counts
from modelparallel.launch.spec import Backend, JobResult, JobSpec, check_script
from modelparallel.launch.supervision import RankMonitor

logger = logging.getLogger("modelparallel.launch")

#: Arguments of the original that are accepted and have nothing to act on, on one machine.
ARGUMENTS_WITHOUT_EFFECT = (
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
)
FIT_ARGUMENTS_WITHOUT_EFFECT = ("logs", "experiment_config")

LOCAL_INSTANCE_TYPES = {None: "auto", "local": "auto", "local_cpu": "cpu", "local_gpu": "cuda"}
_CONTAINER_BASE = "/opt/ml"
_BACKEND_VARIABLE = "MODELPARALLEL_BACKEND"


class JobHandle:
    """A job that was started by `fit`."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.folder = spec.folder
        self._monitor = RankMonitor()
        self._result: JobResult | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self, output: TextIO | None = None) -> JobResult:
        """Run the job to its end in this thread.

        Raises:
            JobFailedError: the job was started and failed.
            LaunchError: it could not be started.
        """
        self._result = run_job(self.spec, output, self._monitor)
        return self._checked()

    def start(self, output: TextIO | None = None) -> None:
        """Run the job in a thread of its own; returns at once."""

        def work() -> None:
            try:
                self._result = run_job(self.spec, output, self._monitor)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name=f"job-{self.name}")
        self._thread.start()

    def wait(self) -> JobResult:
        """Wait for the end of a job that was started by `start`. Raises what `run` raises."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._checked()

    def stop(self) -> None:
        """Ask the job to end; `wait` then raises `JobFailedError` with exit code 143."""
        self._monitor.request_stop("stop() was called")

    @property
    def is_running(self) -> bool:
        """Whether the thread of `start` still runs the job."""
        return self._thread is not None and self._thread.is_alive()

    def _checked(self) -> JobResult:
        if self._result is None:
            raise LaunchError(f"job {self.name} has not been run: call fit()")
        result = self._result
        if result.exit_code != 0:
            raise JobFailedError(result.message, result.exit_code, result.failure, result.folder, result.attempts)
        return result


class PyTorch:
    """A training job on this machine, described as for the cloud.

    Every other argument of the original is accepted and named in the log; an unknown one is an error.

    Args:
        entry_point: the Python script, relative to `source_dir` if that is given.
        source_dir: directory of the code; it is the script's working directory. Default: the directory of the script.
        instance_type: "local" (GPUs if there are any, else a rehearsal on the CPU), "local_cpu" or "local_gpu". Any
            other type stops in `fit` before a process starts.
        instance_count: 1.
        distribution: `{"smdistributed": {"modelparallel": {...}}, "mpi": {...}}`; `processes_per_host` processes are
            started. None: one process that is not model parallel.
        hyperparameters: passed to the script as `--key value`, sorted, and published as SM_HP_*.
        environment: more variables for the script.
        base_job_name: begins the job's name.
        checkpoint_local_path: where the job folder's `checkpoints` leads; a path below /opt/ml is in the job folder.
        max_run: seconds after which the job is stopped, all attempts together.
        job_dir: ours, as all that follow: the job folder; default ./modelparallel-jobs/<job name>.
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
        self.device = device
        self.pass_mp_parameters = pass_mp_parameters
        self.max_restarts = _checked_count(max_restarts, "max_restarts", 0)
        self.min_processes = None if min_processes is None else _checked_count(min_processes, "min_processes", 1)
        if min_processes is not None and distribution is None:
            raise LaunchError("min_processes: without distribution the job has one process")
        self.latest_training_job: JobHandle | None = None
        _check_names(others)
        named = {
            "role": role,
            "framework_version": framework_version,
            "py_version": py_version,
            "sagemaker_session": sagemaker_session,
        }
        given = [name for name, value in {**named, **others}.items() if value is not None]
        if given:
            logger.info("accepted without effect on a local job: %s", ", ".join(sorted(given)))
        # A copy: the caller's dict may serve a second estimator.
        self.distribution = dict(distribution) if distribution is not None else None
        if self.distribution is not None:
            validate_distribution(self.distribution, instance_count)

    def fit(
        self, inputs: Any = None, wait: bool = True, logs: Any = None, job_name: str | None = None, **others: Any
    ) -> None:
        """Run the job.

        Args:
            inputs: a path or file:/// location (channel `training`) or a dict of channel names and locations.
            wait: return at the end of the job; with False at once, and `latest_training_job.wait()` waits.
            job_name: default: made from `base_job_name` and the time.

        Raises:
            LaunchError: before any process starts: there is nothing to run, or no place to run it.
            SMPConfigError: before any process starts: values that do not fit.
            JobFailedError: the job fails; a LaunchError, with the traceback of the first failing process.

        Source: smp-config section 3.
        """
        for name in others:
            if name not in FIT_ARGUMENTS_WITHOUT_EFFECT:
                known = ("inputs", "wait", "job_name", *FIT_ARGUMENTS_WITHOUT_EFFECT)
                raise LaunchError(f"fit: unknown argument {name!r}: did you mean {nearest(name, known)!r}?")
        handle = JobHandle(self._job(inputs, job_name))
        self.latest_training_job = handle
        if wait:
            handle.run()
        else:
            handle.start()

    @property
    def model_data(self) -> str:
        """The directory in which the script of the last job left its model (SM_MODEL_DIR)."""
        if self.latest_training_job is None:
            raise LaunchError("model_data: no job has been run: call fit()")
        return str(self.latest_training_job.folder.model)

    def _job(self, inputs: Any, job_name: str | None) -> JobSpec:
        device_asked = self._local_device()
        script, source_dir = self._code()
        channels = input_channels(inputs)
        device, available = resolve_device(device_asked)
        parameters: dict[str, Any] | None = None
        num_processes, mpi_options = 1, ""
        fewer: list[int] = []
        if self.distribution is not None:
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
        hyperparameters = dict(self.hyperparameters)
        arguments = dict(hyperparameters)
        if parameters is not None:
            hyperparameters["mp_parameters"] = parameters
            if self.pass_mp_parameters:
                arguments["mp_parameters"] = parameters
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
            arguments=tuple(command_arguments(arguments)),
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

    def _local_device(self) -> str:
        if self.instance_type not in LOCAL_INSTANCE_TYPES:
            raise LaunchError(
                f"instance_type {self.instance_type!r}: only jobs on this machine are supported: use "
                'instance_type="local" (or "local_cpu", "local_gpu")'
            )
        if self.instance_count != 1:
            raise LaunchError(
                f"instance_count={self.instance_count}: a local job has one host: use instance_count=1 and set "
                "processes_per_host to the number of processes"
            )
        return self.device or LOCAL_INSTANCE_TYPES[self.instance_type]

    def _code(self) -> tuple[Path, Path]:
        if self.source_dir is None:
            script = local_path(self.entry_point, "entry point", must_exist=False)
            check_script(script)
            return script, script.parent
        if str(self.source_dir).startswith("s3://"):
            raise NotBuiltError(f"source_dir {self.source_dir}: reading code from s3:// is not built yet: copy it here")
        source_dir = local_path(self.source_dir, "source_dir")
        script = source_dir / self.entry_point
        check_script(script)
        return script, source_dir

    def _checkpoints(self) -> Path | None:
        if self.checkpoint_local_path is None:
            return None
        text = os.fspath(self.checkpoint_local_path)
        if text == _CONTAINER_BASE or text.startswith(_CONTAINER_BASE + "/"):
            return None
        return local_path(text, "checkpoint_local_path", must_exist=False)


class HuggingFace(PyTorch):
    """The estimator of Hugging Face scripts: the same job as by `PyTorch`."""


class Estimator(PyTorch):
    """The generic estimator: the same job as by `PyTorch`."""


def _check_names(others: Mapping[str, Any]) -> None:
    own = [name for name in inspect.signature(PyTorch.__init__).parameters if name not in ("self", "others")]
    known = (*own, *ARGUMENTS_WITHOUT_EFFECT)
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
