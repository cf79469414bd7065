"""Slurm: a job is one readable sbatch file in a folder that all nodes see, submitted by the cluster's own commands."""

from modelparallel.launch.clusters.slurm.cluster import Slurm as Slurm
