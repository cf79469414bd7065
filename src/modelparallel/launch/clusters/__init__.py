"""Jobs for machines elsewhere: how one is described, and what each kind of cluster makes of the description.

A job is described once (`ClusterJob`); every cluster starts the same command on each of its nodes, `modelparallel node
job.json`, by the means that its users know: sbatch, a training job of SageMaker, a TrainJob of Kubernetes. Nothing here
starts a process of its own on another machine, and nothing here trains.
"""
