"""A job on the nodes of a Ray cluster: one launcher on each, and one first failure over all of them.

    ray job submit --working-dir . -- python ray_job.py --nodes 2 --gpus 8 -- \\
        --parameters '{"pipeline_parallel_degree": 2, "microbatches": 4, "ddp": true}' train.py --epochs 3

What follows `--` are options of `modelparallel run`, the script and its arguments. Ray reserves the devices of the
nodes and starts `modelparallel run` on each; the processes, and what they say to each other, are those of the launcher.
With RAY_DEDUP_LOGS=0 Ray shows the lines of all ranks.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(max_retries=0)
def free_address() -> tuple[str, int]:
    """Where node 0 can listen."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


@ray.remote(max_retries=0)
def run_node(number: int, nodes: int, meeting_point: str, options: list[str]) -> int:
    """The launcher of one node; its exit code. What it prints, Ray shows."""
    command = [sys.executable, "-m", "modelparallel", "run", "--nnodes", str(nodes), "--node-rank", str(number)]
    command += ["--rendezvous", meeting_point, "--job-id", ray.get_runtime_context().get_job_id(), *options]
    # Ray has set CUDA_VISIBLE_DEVICES to the devices of this bundle.
    return subprocess.run(command, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="of each node")
    parser.add_argument("--cpus", type=int, default=1, help="of each node")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds in which Ray has to find the nodes")
    parser.add_argument("options", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    options = arguments.options[1:] if arguments.options[:1] == ["--"] else arguments.options
    if "--nproc" not in options and arguments.gpus:
        options = ["--nproc", str(arguments.gpus), *options]
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), ignore_reinit_error=True)
    bundle = {"CPU": arguments.cpus} | ({"GPU": arguments.gpus} if arguments.gpus else {})
    group = placement_group([bundle] * arguments.nodes, strategy="STRICT_SPREAD")
    try:
        if not group.wait(arguments.wait):
            print(
                f"Ray has not found {arguments.nodes} nodes with {bundle} within {arguments.wait:g} s", file=sys.stderr
            )
            return 2

        def on_node(number: int) -> dict[str, object]:
            strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=number)
            return {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus, "scheduling_strategy": strategy}

        host, port = ray.get(free_address.options(**on_node(0)).remote())
        nodes = [
            run_node.options(**on_node(number)).remote(number, arguments.nodes, f"{host}:{port}", options)
            for number in range(arguments.nodes)
        ]
        # All nodes end with one exit code.
        return max(ray.get(nodes))
    finally:
        remove_placement_group(group)


if __name__ == "__main__":
    sys.exit(main())
