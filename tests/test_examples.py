"""The examples do what they say: the data sharding of the seed, the download, the demo's table."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pool import declare_torchvision_operators, run_ranks

pytest.importorskip("torchnet")
pytest.importorskip("torchvision")

import torchnet.dataset

import modelparallel as smp
from scripts import load_script

MNIST = Path(__file__).resolve().parent.parent / "examples" / "mnist"
SCRIPTS = ["train_tensor_parallel", "train_tensor_pipeline_parallel"]


def example(name):
    """The example ``name`` as a module."""
    declare_torchvision_operators()
    return load_script(f"examples/mnist/{name}.py")


def select_shard(script, num_samples):
    shard = example(script).shard(torch.arange(num_samples))
    assert isinstance(shard, torchnet.dataset.SplitDataset)
    return smp.dp_rank(), [int(shard[i]) for i in range(len(shard))]


def shards(script, **parameters):
    return run_ranks(select_shard, 8, script, 60000, parameters={"ddp": True, **parameters})


def test_c097_shards_of_the_data_parallel_ranks():
    results = shards("train_tensor_parallel", tensor_parallel_degree=4)
    assert [dp_rank for dp_rank, _ in results] == list(range(8))
    assert all(len(samples) == 7500 for _, samples in results)
    assert set().union(*(samples for _, samples in results)) == set(range(60000))


def test_c097_ranks_of_one_pipeline_see_the_same_shard_in_the_same_order():
    results = shards("train_tensor_pipeline_parallel", tensor_parallel_degree=2, pipeline_parallel_degree=2)
    by_rank = {}
    for dp_rank, samples in results:
        assert by_rank.setdefault(dp_rank, samples) == samples and len(samples) == 15000
    assert sorted(by_rank) == [0, 1, 2, 3]
    assert set().union(*by_rank.values()) == set(range(60000))


def test_c098_work_of_the_first_local_rank_is_done_before_the_barrier_releases(tmp_path):
    assert run_ranks(prepare_once, 4, str(tmp_path / "file"), parameters={"ddp": True}) == ["prepared"] * 4


def prepare_once(path):
    import time

    if smp.local_rank() == 0:
        time.sleep(0.3)
        Path(path).write_text("prepared")
    smp.barrier()
    return Path(path).read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_use_the_api_as_the_seed_does(script):
    source = (MNIST / f"{script}.py").read_text()
    has_pipeline = script == SCRIPTS[1]
    assert "import smdistributed.modelparallel.torch as smp" in source
    assert ("@smp.step" in source) == has_pipeline and ("drop_last=True" in source) == has_pipeline
    for line in (
        "torch.cuda.set_device(smp.local_rank())",
        'torch.device("cuda")',
        "model = smp.DistributedModel(model)",
        "optimizer = optim.Adadelta(model.parameters(), lr=args.lr)",
        "optimizer = smp.DistributedOptimizer(optimizer)",
        '"--lr", type=float, default=4.0',
        '"--batch-size", type=int, default=64',
    ):
        assert line in source, line


def read_distribution(launch_file):
    """What the launch file hands to the estimator."""
    module = example(launch_file)
    seen = {}

    class Estimator:
        def __init__(self, **kwargs):
            seen.update(kwargs)

        def fit(self, inputs):
            seen["inputs"] = inputs

    original, module.PyTorch = module.PyTorch, Estimator
    arguments, sys.argv = sys.argv, ["launch.py", "--data", "/somewhere", "--max-steps", "3"]
    try:
        module.main()
    finally:
        module.PyTorch, sys.argv = original, arguments
    return seen


@pytest.mark.parametrize(
    ("launch_file", "parameters"),
    [
        (
            "launch_tensor_parallel",
            {
                "pipeline_parallel_degree": 1,
                "placement_strategy": "cluster",
                "tensor_parallel_degree": 4,
                "ddp": True,
            },
        ),
        (
            "launch_tensor_pipeline_parallel",
            {
                "microbatches": 4,
                "pipeline_parallel_degree": 2,
                "placement_strategy": "cluster",
                "tensor_parallel_degree": 2,
                "ddp": True,
            },
        ),
    ],
)
def test_launch_files_hold_the_dictionaries_of_the_seed(launch_file, parameters):
    seen = read_distribution(launch_file)
    assert seen["distribution"] == {
        "smdistributed": {"modelparallel": {"enabled": True, "parameters": parameters}},
        "mpi": {
            "enabled": True,
            "processes_per_host": 8,
            "custom_mpi_options": "--mca btl_vader_single_copy_mechanism none ",
        },
    }
    assert seen["hyperparameters"] == {"max-steps": "3"} and seen["inputs"] == "file:///somewhere"
    assert seen["instance_type"] == "local" and (Path(seen["source_dir"]) / seen["entry_point"]).is_file()


def test_idx_files_are_those_that_torchvision_reads(tmp_path, monkeypatch):
    get_mnist = example("get_mnist")
    table = np.arange(3 * 785, dtype=np.int64).reshape(3, 785) % 251
    table[:, 0] = [5, 0, 9]
    digests = {}
    real = get_mnist.hashlib.md5

    class AnyDigest(dict):
        def __getitem__(self, name):
            return digests[name]

    monkeypatch.setattr(get_mnist, "MD5_SUMS", AnyDigest())
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        images = np.array([2051, 3, 28, 28], ">i4").tobytes() + table[:, 1:].astype(np.uint8).tobytes()
        labels = np.array([2049, 3], ">i4").tobytes() + table[:, 0].astype(np.uint8).tobytes()
        digests[f"{prefix}-images-idx3-ubyte"] = real(images).hexdigest()
        digests[f"{prefix}-labels-idx1-ubyte"] = real(labels).hexdigest()
        get_mnist.write_idx(raw, prefix, table.astype(np.uint8))
    dataset = example("train_tensor_parallel").load(str(tmp_path), is_train=True)
    assert len(dataset) == 3 and [target for _, target in dataset] == [5, 0, 9]
    assert dataset[0][0].shape == (1, 28, 28)


def test_the_demo_reads_what_the_scripts_print():
    demo = example("demo")
    job = demo.Job("launch.py", "title", "shape", {})
    for line in ("[0] step   10  loss 0.4321", "[0] test accuracy 96.4%"):
        for pattern, expected in ((demo.LOSS, "0.4321"), (demo.ACCURACY, "96.4")):
            match = pattern.search(line)
            assert match is None or match.group(1) == expected
    job.accuracy = 94.9
    assert not job.is_good
    job.accuracy = 95.0
    assert job.is_good
