"""Start train_tensor_parallel.py on 8 processes: tensor parallelism alone.

    python launch_tensor_parallel.py [--data FOLDER] [hyperparameters of the script, such as --max-steps 20]

The ``distribution`` dictionaries are those of a cluster job on a host of 8 GPUs; only instance_type differs.
"""

import argparse
from pathlib import Path

from modelparallel.launch import PyTorch

mpi_options = {
    "enabled": True,
    "processes_per_host": 8,  # 8 processes
    "custom_mpi_options": "--mca btl_vader_single_copy_mechanism none ",
}

smp_options = {
    "enabled": True,
    "parameters": {
        "pipeline_parallel_degree": 1,  # alias for "partitions"
        "placement_strategy": "cluster",
        "tensor_parallel_degree": 4,  # tp over 4 devices
        "ddp": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with MNIST/raw; see get_mnist.py")
    args, rest = parser.parse_known_args()
    hyperparameters = {name.removeprefix("--"): value for name, value in zip(rest[::2], rest[1::2], strict=True)}

    smd_mp_estimator = PyTorch(
        entry_point="train_tensor_parallel.py",
        source_dir=str(Path(__file__).resolve().parent),
        role="any",
        instance_type="local",
        sagemaker_session=None,
        framework_version="1.8.1",
        py_version="py36",
        instance_count=1,
        distribution={"smdistributed": {"modelparallel": smp_options}, "mpi": mpi_options},
        base_job_name="SMD-MP-demo",
        hyperparameters=hyperparameters,
    )
    smd_mp_estimator.fit(args.data.resolve().as_uri())


if __name__ == "__main__":
    main()
