"""The launch files whose requests the cloud's own SDK has made (data/sagemaker/golden.json), as jobs of ours."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modelparallel.launch import HuggingFace, PyTorch
from modelparallel.launch.clusters.description import ClusterJob, DataChannel
from modelparallel.launch.clusters.sagemaker.cluster import SageMaker
from modelparallel.launch.clusters.sagemaker.options import SERVICE_ARGUMENTS
from modelparallel.launch.distribution import validate_distribution
from modelparallel.launch.environment import command_arguments

GOLDEN = json.loads((Path(__file__).parent / "data" / "sagemaker" / "golden.json").read_text())
CASES = GOLDEN["cases"]
ROLE = "arn:aws:iam::123456789012:role/service/training"
IMAGE = "123456789012.dkr.ecr.us-west-2.amazonaws.com/modelparallel:1"


def session_of(case: dict[str, Any]) -> Any:
    """What stands for the SDK's session, with its region and bucket."""
    return SimpleNamespace(
        boto_session=SimpleNamespace(region_name=case["region"]), _default_bucket_name_override=case["bucket"]
    )


def sdk_inputs(case: dict[str, Any]) -> Any:
    """`fit(inputs)`, with objects that look like the SDK's."""
    inputs = case["inputs"]
    if not isinstance(inputs, dict):
        return inputs
    configs = case["configs"]
    return {name: SimpleNamespace(config=configs[name]) if name in configs else value for name, value in inputs.items()}


def job_of(case: dict[str, Any], folder: Path, **changes: Any) -> ClusterJob:
    """The job that the launch file of a golden case describes."""
    arguments = dict(case["arguments"])
    inputs = sdk_inputs(case) or {}
    inputs = inputs if isinstance(inputs, dict) else {"training": inputs}
    objects = {name: value for name, value in inputs.items() if not isinstance(value, str)}
    distribution = arguments.get("distribution")
    hyperparameters = dict(arguments.get("hyperparameters", {}))
    parameters, processes, mpi_options = None, 1, ""
    if distribution is not None and "mpi" in distribution:
        checked = validate_distribution(distribution, arguments["instance_count"])
        parameters, processes = checked.parameters, checked.processes_per_host
        mpi_options = checked.custom_mpi_options
    elif distribution is not None:
        processes = 8
        if "smdistributed" in distribution:
            parameters = distribution["smdistributed"]["modelparallel"]["parameters"]
    if parameters is not None:
        hyperparameters["mp_parameters"] = parameters
    options = {name: value for name, value in arguments.items() if name in SERVICE_ARGUMENTS}
    fields = {
        "name": case["request"]["TrainingJobName"],
        "entry_point": "train.py",
        "source_dir": folder,
        "num_nodes": arguments["instance_count"],
        "processes_per_node": processes,
        "arguments": tuple(command_arguments(hyperparameters)),
        "hyperparameters": hyperparameters,
        "parameters": parameters,
        "channels": {
            name: DataChannel(value if isinstance(value, str) else "s3://bkt/x") for name, value in inputs.items()
        },
        "environment": arguments.get("environment", {}),
        "distribution": distribution,
        "custom_mpi_options": mpi_options,
        "instance_type": arguments["instance_type"],
        "max_seconds": arguments.get("max_run"),
        "checkpoints": arguments.get("checkpoint_s3_uri"),
        "output": arguments.get("output_path"),
        "service_options": {
            **options,
            **case["fit"],
            "sagemaker_session": session_of(case),
            **({"inputs": objects} if objects else {}),
        },
    }
    return ClusterJob(**{**fields, **changes})


def estimator_of(case: dict[str, Any], folder: Path) -> PyTorch:
    """The launch file of a golden case, as it is, with our estimator in the place of the SDK's."""
    kind = {"PyTorch": PyTorch, "HuggingFace": HuggingFace}[case["class"]]
    (folder / "train.py").touch()
    arguments = {"entry_point": "train.py", "source_dir": str(folder), **case["arguments"]}
    return kind(sagemaker_session=session_of(case), **arguments)


def request_of(job: ClusterJob, **keys: Any) -> dict[str, Any]:
    """What would be sent for a job."""
    ((name, request),) = SageMaker(**keys).render(job).requests
    assert name == "create_training_job"
    return dict(request)


def small_job(folder: Path, **changes: Any) -> ClusterJob:
    """A job of two nodes that does nothing special; SageMaker(role=..., image=..., region=...) takes it."""
    fields = {
        "name": "job-1",
        "entry_point": "train.py",
        "source_dir": folder,
        "num_nodes": 2,
        "processes_per_node": 8,
        "instance_type": "ml.p4d.24xlarge",
    }
    return ClusterJob(**{**fields, **changes})
