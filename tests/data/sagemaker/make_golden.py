"""What the cloud's own SDK sends for a launch file: writes golden.json, the requests that ours must be equal to.

    python -m venv /tmp/sdk && /tmp/sdk/bin/pip install sagemaker==2.257.7 'moto[s3,sagemaker]'
    /tmp/sdk/bin/python tests/data/sagemaker/make_golden.py

Nothing leaves the machine: moto stands for the service. Each case is an estimator as users write it; the request is
recorded where the SDK hands it to boto3.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-west-2")

import boto3
import sagemaker
from moto import mock_aws
from sagemaker.huggingface import HuggingFace
from sagemaker.inputs import FileSystemInput, TrainingInput
from sagemaker.pytorch import PyTorch

HERE = Path(__file__).resolve().parent
ROLE = "arn:aws:iam::123456789012:role/service/training"
IMAGE = "123456789012.dkr.ecr.us-west-2.amazonaws.com/modelparallel:1"
MPI = {
    "enabled": True,
    "processes_per_host": 8,
    "custom_mpi_options": "--mca btl_vader_single_copy_mechanism none ",
}


def model_parallel(**parameters):
    return {"smdistributed": {"modelparallel": {"enabled": True, "parameters": parameters}}, "mpi": MPI}


# The estimators of the seed's two launch files, examples/mnist/launch_*.py.
TENSOR = model_parallel(pipeline_parallel_degree=1, placement_strategy="cluster", tensor_parallel_degree=4, ddp=True)
TENSOR_PIPELINE = model_parallel(
    microbatches=4, pipeline_parallel_degree=2, placement_strategy="cluster", tensor_parallel_degree=2, ddp=True
)
SEED = {
    "role": ROLE,
    "image_uri": IMAGE,
    "instance_type": "ml.p3.16xlarge",
    "framework_version": "1.8.1",
    "py_version": "py36",
    "instance_count": 1,
    "base_job_name": "SMD-MP-demo",
}
EVERYTHING = {
    **SEED,
    "instance_count": 2,
    "instance_type": "ml.p4d.24xlarge",
    "distribution": TENSOR_PIPELINE,
    "hyperparameters": {"epochs": 3, "lr": 1e-3, "name": "a b", "flag": True, "nothing": None, "sizes": [1, 2]},
    "environment": {"NCCL_DEBUG": "WARN"},
    "max_run": 3600,
    "max_wait": 7200,
    "use_spot_instances": True,
    "checkpoint_s3_uri": "s3://bkt/checkpoints/one",
    "checkpoint_local_path": "/opt/ml/checkpoints",
    "output_path": "s3://bkt/outputs",
    "code_location": "s3://bkt/code",
    "output_kms_key": "arn:aws:kms:us-west-2:123456789012:key/out",
    "volume_size": 200,
    "volume_kms_key": "arn:aws:kms:us-west-2:123456789012:key/volume",
    "subnets": ["subnet-0123456789abcdef0"],
    "security_group_ids": ["sg-0123456789abcdef0"],
    "tags": [{"Key": "team", "Value": "x"}],
    "metric_definitions": [{"Name": "loss", "Regex": "loss ([0-9.]+)"}],
    "enable_sagemaker_metrics": True,
    "encrypt_inter_container_traffic": True,
    "max_retry_attempts": 2,
    "input_mode": "FastFile",
    "debugger_hook_config": False,
    "disable_profiler": True,
    "container_log_level": 10,
    "training_repository_access_mode": "Vpc",
    "training_repository_credentials_provider_arn": "arn:aws:lambda:us-west-2:123456789012:function:login",
    "enable_remote_debug": True,
    "enable_infra_check": True,
    "enable_session_tag_chaining": True,
    "disable_output_compression": True,
    "model_uri": "s3://bkt/model",
    "model_channel_name": "start",
}
# name -> (class, arguments, inputs, arguments of fit)
CASES = {
    "tensor": ("PyTorch", {**SEED, "distribution": TENSOR}, "s3://bkt/mnist", {}),
    "tensor_pipeline": ("PyTorch", {**SEED, "distribution": TENSOR_PIPELINE}, "s3://bkt/mnist", {}),
    "two_hosts": (
        "PyTorch",
        {**SEED, "instance_count": 2, "distribution": TENSOR_PIPELINE, "hyperparameters": {"max-steps": "20"}},
        {"train": "s3://bkt/train", "test": "s3://bkt/test/"},
        {},
    ),
    "everything": (
        "PyTorch",
        EVERYTHING,
        {
            "train": {
                "TrainingInput": {
                    "s3_data": "s3://bkt/train",
                    "distribution": "ShardedByS3Key",
                    "input_mode": "File",
                    "content_type": "text/csv",
                }
            },
            "lists": {"TrainingInput": {"s3_data": "s3://bkt/list.manifest", "s3_data_type": "ManifestFile"}},
            "disk": {
                "FileSystemInput": {
                    "file_system_id": "fs-0123456789abcdef0",
                    "file_system_type": "FSxLustre",
                    "directory_path": "/fsx/data",
                }
            },
        },
        {"experiment_config": {"ExperimentName": "e", "TrialName": "t"}},
    ),
    "isolated": (
        "PyTorch",
        {**SEED, "distribution": TENSOR, "enable_network_isolation": True},
        {"train": "s3://bkt/train"},
        {},
    ),
    "warm_pool": ("PyTorch", {**SEED, "keep_alive_period_in_seconds": 600, "distribution": TENSOR}, None, {}),
    "one_process": ("PyTorch", {**SEED, "instance_type": "ml.m5.xlarge"}, None, {}),
    "torch_distributed": (
        "PyTorch",
        {**SEED, "instance_count": 2, "distribution": {"torch_distributed": {"enabled": True}}},
        "s3://bkt/mnist",
        {},
    ),
    "pytorchddp": ("PyTorch", {**SEED, "distribution": {"pytorchddp": {"enabled": True}}}, "s3://bkt/mnist", {}),
    "both": (
        "PyTorch",
        {
            **SEED,
            "distribution": {
                "torch_distributed": {"enabled": True},
                "smdistributed": TENSOR["smdistributed"],
            },
        },
        "s3://bkt/mnist",
        {},
    ),
    "huggingface": (
        "HuggingFace",
        {
            **{key: value for key, value in SEED.items() if key != "framework_version"},
            "transformers_version": "4.28",
            "pytorch_version": "2.0",
            "py_version": "py310",
            "distribution": TENSOR_PIPELINE,
        },
        "s3://bkt/mnist",
        {},
    ),
    "no_debugger_region": (
        "PyTorch",
        {**SEED, "distribution": TENSOR, "image_uri": IMAGE.replace("us-west-2", "eu-south-2")},
        "s3://bkt/mnist",
        {},
    ),
}


def made(value):
    """The SDK's object for an input that is not a location."""
    if isinstance(value, dict) and "TrainingInput" in value:
        return TrainingInput(**value["TrainingInput"])
    if isinstance(value, dict) and "FileSystemInput" in value:
        return FileSystemInput(**value["FileSystemInput"])
    if isinstance(value, dict):
        return {name: made(location) for name, location in value.items()}
    return value


def recorded(case, code):
    """The request that the SDK sends for a case."""
    kind, arguments, inputs, others = CASES[case]
    region = "eu-south-2" if case == "no_debugger_region" else "us-west-2"
    with mock_aws():
        boto_session = boto3.Session(region_name=region)
        boto_session.client("s3").create_bucket(Bucket="bkt", CreateBucketConfiguration={"LocationConstraint": region})
        session = sagemaker.Session(boto_session, default_bucket="bkt")
        sent = []
        session.sagemaker_client.meta.events.register(
            "provide-client-params.sagemaker.CreateTrainingJob", lambda params, **_: sent.append(dict(params))
        )
        estimator = {"PyTorch": PyTorch, "HuggingFace": HuggingFace}[kind](
            entry_point="train.py", source_dir=str(code), sagemaker_session=session, **arguments
        )
        estimator.fit(made(inputs), wait=False, job_name=f"golden-{case.replace('_', '-')}", **others)
    (request,) = sent
    return {
        "class": kind,
        "arguments": arguments,
        "inputs": inputs,
        "configs": {
            name: made(value).config
            for name, value in (inputs.items() if isinstance(inputs, dict) else ())
            if isinstance(value, dict)
        },
        "fit": others,
        "region": region,
        "bucket": "bkt",
        "request": request,
    }


def main():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text("print('train')\n")
        golden = {case: recorded(case, Path(folder)) for case in CASES}
    text = json.dumps({"sdk": sagemaker.__version__, "cases": golden}, indent=1, sort_keys=False)
    (HERE / "golden.json").write_text(text + "\n")
    print(f"{len(golden)} requests of SDK {sagemaker.__version__}")


if __name__ == "__main__":
    main()
