"""Launching jobs, here and on clusters: the estimator, the command line, the launch contract, and rehearsal on a CPU.

    from modelparallel.launch import PyTorch
    PyTorch(entry_point="train.py", instance_type="local", distribution={...}).fit({"train": "data/train"})

docs/launching.md and docs/rehearsal.md say what a script finds.
"""

from modelparallel.launch.clusters.cluster import Cluster, JobStatus, Rendered
from modelparallel.launch.clusters.k8s.cluster import Kubernetes
from modelparallel.launch.clusters.sagemaker.cluster import SageMaker
from modelparallel.launch.clusters.slurm import Slurm
from modelparallel.launch.estimator import Estimator, HuggingFace, PyTorch
from modelparallel.launch.failures import JobFailedError, RankFailure
from modelparallel.launch.job import run_job
from modelparallel.launch.job_handle import JobHandle
from modelparallel.launch.notebooks import notebook
from modelparallel.launch.spec import JobResult, JobSpec
from modelparallel.launch.submitted import SubmittedJob

__all__ = [
    "Cluster",
    "Estimator",
    "HuggingFace",
    "JobFailedError",
    "JobHandle",
    "JobResult",
    "JobSpec",
    "JobStatus",
    "Kubernetes",
    "PyTorch",
    "RankFailure",
    "Rendered",
    "SageMaker",
    "Slurm",
    "SubmittedJob",
    "notebook",
    "run_job",
]
