"""The job folder of several hosts: one that they share, or one on each.

Node 0 makes its folder and writes into it which job it is for (status/nodes.json, with a number that nobody else can
know). A host that reads the same number under its own name for the folder sees the same files, and takes part in it;
any other makes a folder of its own there.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from modelparallel.job.private_files import write_private
from modelparallel.launch.fetched_channels import local_channels
from modelparallel.launch.folder import JobFolder, default_folder
from modelparallel.launch.spec import JobSpec

#: A file of another host on a file server is seen after a while.
_VISIBLE_SECONDS = 5.0
_POLL_SECONDS = 0.1


def first_folder(stack: ExitStack, job: JobSpec) -> tuple[JobSpec, dict[str, Any]]:
    """Node 0: make the folder, hold it until the stack ends, and what the others are told of it."""
    folder = JobFolder(job.folder.root, 0)
    stack.enter_context(folder.held())
    folder.prepare(job.source_dir, local_channels(job), job.checkpoints)
    told = {"name": job.name, "root": str(folder.root), "token": secrets.token_hex(16)}
    # The number above goes over the network, this one does not.
    stack.callback(folder.secret_file.unlink, missing_ok=True)
    write_private(folder.secret_file, secrets.token_hex(32) + "\n")
    write_private(folder.nodes_file, json.dumps(told) + "\n")
    return replace(job, folder=folder), told


def other_folder(stack: ExitStack, job: JobSpec, node: int, told: Mapping[str, Any]) -> tuple[JobSpec, bool]:
    """The other nodes: take part in the folder of node 0, or make one; whether it is shared."""
    root = job.folder.root
    if root == default_folder(job.name).root:
        root = default_folder(told["name"]).root
    folder = JobFolder(root, node)
    job = replace(job, name=told["name"], folder=folder)
    deadline = time.monotonic() + (_VISIBLE_SECONDS if str(root) == told["root"] else 0.0)
    while not (is_shared := _has_token(folder, told["token"])) and time.monotonic() < deadline:
        with suppress(OSError):
            os.listdir(root)  # a file server is asked anew for what it did not have before
        time.sleep(_POLL_SECONDS)
    if is_shared:
        folder.prepare_shared()
    else:
        stack.enter_context(folder.held())
        folder.prepare(job.source_dir, local_channels(job), job.checkpoints)
    return job, is_shared


def _has_token(folder: JobFolder, token: str) -> bool:
    try:
        return bool(json.loads(folder.nodes_file.read_text(encoding="utf-8"))["token"] == token)
    except (OSError, ValueError, KeyError, TypeError):
        return False
