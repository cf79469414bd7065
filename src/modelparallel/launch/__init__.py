"""Launching jobs on this machine: the estimator, the command line, the launch contract, and rehearsal on a CPU.

    from modelparallel.launch import PyTorch
    PyTorch(entry_point="train.py", instance_type="local", distribution={...}).fit({"train": "data/train"})

docs/launching.md and docs/rehearsal.md say what a script finds.
"""

from modelparallel.launch.estimator import Estimator, HuggingFace, JobHandle, PyTorch
from modelparallel.launch.failures import JobFailedError, RankFailure
from modelparallel.launch.job import run_job
from modelparallel.launch.spec import JobResult, JobSpec

__all__ = [
    "Estimator",
    "HuggingFace",
    "JobFailedError",
    "JobHandle",
    "JobResult",
    "JobSpec",
    "PyTorch",
    "RankFailure",
    "run_job",
]
