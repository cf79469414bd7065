"""Kubernetes: a TrainJob of the Kubeflow Trainer, or an Indexed Job with a headless Service.

names       what a name, a label, a quantity may be; pure
volumes     the parts of a row of the cluster file that are more than one value; pure
keys        the keys of such a row, and what can be wrong in them and in a job for it; pure
manifests   the objects of a job; pure
progress    how a job is, from the objects that the cluster holds; pure
client      the few calls to the API server, by the official client
pod_logs    what the pods print, line by line
cluster     `Kubernetes`, the kind
"""
