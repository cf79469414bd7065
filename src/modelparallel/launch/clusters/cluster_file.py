"""The cluster file `modelparallel.toml`: the clusters that a user can submit to, by name.

[clusters.gpu]
kind = "slurm"
partition = "gpu"
gpus_per_node = 8
folder = "/shared/jobs"
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelparallel.config.reading import nearest
from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch.clusters.cluster import Cluster

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: The path of a cluster file; `--clusters` comes first.
FILE_VARIABLE = "MODELPARALLEL_CLUSTERS"
FILE_NAME = "modelparallel.toml"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def kinds() -> dict[str, type[Cluster]]:
    """Every kind of cluster, by its word."""
    from modelparallel.launch.clusters.k8s.cluster import Kubernetes
    from modelparallel.launch.clusters.sagemaker.cluster import SageMaker
    from modelparallel.launch.clusters.slurm import Slurm

    found: tuple[type[Cluster], ...] = (Slurm, SageMaker, Kubernetes)
    return {cluster.kind: cluster for cluster in found}


def places(environ: Mapping[str, str]) -> list[Path]:
    """Where a cluster file is looked for, in order, if it was not named."""
    base = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path.cwd() / FILE_NAME, base / "modelparallel" / FILE_NAME]


def find_file(given: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Path | None:
    """The cluster file: what was given, the variable's, else the first that exists; None if there is none.

    Raises `LaunchError` for a file that was named and does not exist.
    """
    named = given or environ.get(FILE_VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            source = "--clusters" if given else f"environment variable {FILE_VARIABLE}"
            raise LaunchError(f"{source}: {path} is no file: give the path of a {FILE_NAME}")
        return path
    return next((path for path in places(environ) if path.is_file()), None)


def read_clusters(path: Path) -> dict[str, Cluster]:
    """All clusters of a file. Raises `SMPConfigError` naming file, cluster and key."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SMPConfigError(f"{path}: cannot be read: {error}") from error
    for key in content:
        if key != "clusters":
            raise SMPConfigError(f"{path}: unknown section {key!r}: clusters stand in [clusters.NAME]")
    rows = content.get("clusters", {})
    if not isinstance(rows, dict):
        raise SMPConfigError(f"{path}: clusters: expected sections [clusters.NAME], got {rows!r}")
    for name in rows:
        if not _NAME.fullmatch(name):
            raise SMPConfigError(
                f"{path}: [clusters.{name!r}]: a cluster's name has letters, digits, '.', '_' and '-', a letter or "
                "digit first: it stands before the '/' in the names of jobs"
            )
    return {name: make_cluster(name, row, f"{path}: [clusters.{name}]") for name, row in rows.items()}


def make_cluster(name: str, row: Any, where: str) -> Cluster:
    """The cluster of a row. Raises `SMPConfigError` for an unknown kind or key, or a wrong value."""
    known = kinds()
    if not isinstance(row, Mapping):
        raise SMPConfigError(f"{where}: expected a section with keys, got {row!r}")
    kind = row.get("kind")
    if kind not in known:
        hint = f": did you mean {nearest(kind, tuple(known))!r}?" if isinstance(kind, str) else ""
        raise SMPConfigError(f"{where}: kind must be one of {', '.join(known)}, got {kind!r}{hint}")
    fields = [field for field in known[kind].model_fields if field != "name"]
    values = {key: value for key, value in row.items() if key != "kind"}
    for key in values:
        if key not in fields:
            raise SMPConfigError(f"{where}: unknown key {key!r}: did you mean {nearest(key, fields)!r}?")
    try:
        return known[kind](name=name, **values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or kind
        raise SMPConfigError(f"{where}: {key}: {first['msg']}, got {first.get('input')!r}") from error


def cluster_named(name: str, given: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Cluster:
    """The cluster of that name: of the file; or a kind alone (`slurm`), with what that kind's defaults are.

    Raises `LaunchError` for an unknown name, with the nearest and the list.
    """
    path = find_file(given, environ)
    clusters = {} if path is None else read_clusters(path)
    kind, _, rest = name.partition(":")
    if kind in kinds() and rest:
        name = rest  # "slurm:gpu"
    if name in clusters:
        cluster = clusters[name]
        if rest and cluster.kind != kind:
            raise LaunchError(f"cluster {kind}:{rest}: {rest!r} is of kind {cluster.kind!r} in {path}")
        return cluster
    if name in kinds():
        return make_cluster(name, {"kind": name}, f"cluster {name!r}")
    where = f"{path} has {', '.join(clusters) or 'none'}" if path else f"there is no {FILE_NAME} here"
    choices = (*clusters, *kinds())
    hint = f"did you mean {nearest(name, choices)!r}? " if choices else ""
    raise LaunchError(f"cluster {name!r}: {hint}{where}; kinds that need no file: {', '.join(kinds())}")
