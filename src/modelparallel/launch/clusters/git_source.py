"""Code that lies in a git repository, as `git_config={"repo": ..., "branch": ..., "commit": ...}` names it."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelparallel.config.reading import nearest
from modelparallel.errors import LaunchError, SMPConfigError

#: Keys of the original; `2FA_enabled` has nothing to act on, since a token works with and without.
KEYS = ("repo", "branch", "commit", "token", "username", "password", "2FA_enabled")
#: Seconds that git may take.
TIMEOUT = 600.0


@dataclass(frozen=True)
class ClonedSource:
    """A clone on this machine, and the commit that it stands at, in full."""

    path: Path
    commit: str


def check_git_config(git_config: Any) -> None:
    """Raise `SMPConfigError` for what cannot be a repository."""
    if not isinstance(git_config, Mapping):
        raise SMPConfigError(f'git_config: expected {{"repo": ..., "branch": ..., "commit": ...}}, got {git_config!r}')
    for key, value in git_config.items():
        if key not in KEYS:
            raise SMPConfigError(f"git_config: unknown key {key!r}: did you mean {nearest(str(key), KEYS)!r}?")
        if key != "2FA_enabled" and not (isinstance(value, str) and value and not value.startswith("-")):
            shown = "***" if key in ("token", "password") else repr(value)
            raise SMPConfigError(f"git_config[{key!r}]: expected a text that does not begin with '-', got {shown}")
    if "repo" not in git_config:
        raise SMPConfigError('git_config: "repo" is missing: the URL of the repository')
    if "password" in git_config and "username" not in git_config:
        raise SMPConfigError('git_config: "password" needs "username"')
    repo = git_config["repo"]
    if ("token" in git_config or "password" in git_config) and not repo.startswith("https://"):
        raise SMPConfigError(f"git_config: a token or password is sent to https:// alone, and repo is {repo!r}")
    if re.match(r"https?://[^/]*@", repo):
        raise SMPConfigError(
            'git_config["repo"]: credentials in a URL are seen by everybody on this machine: give "token", or '
            '"username" and "password", or use a credential helper of git'
        )


def clone(git_config: Mapping[str, Any], target: Path) -> ClonedSource:
    """Clone the repository into `target`, at the branch and commit, without its history elsewhere being touched.

    Entry point, source_dir and dependencies are then relative to the clone. Credentials reach git by its environment,
    never by a command line or the clone's configuration.

    Raises `SMPConfigError` as `check_git_config`; `LaunchError` with git's own words.
    """
    check_git_config(git_config)
    if shutil.which("git") is None:
        raise LaunchError("git_config: git is not on the PATH: install it, or give the code as source_dir")
    environ = {**os.environ, "GIT_TERMINAL_PROMPT": "0", **_credentials(git_config)}
    repo = git_config["repo"]
    command = ["clone", "--quiet", "--recurse-submodules"]
    if "branch" in git_config:
        command += ["--branch", git_config["branch"]]
    _git([*command, "--", repo, str(target)], environ, repo)
    if "commit" in git_config:
        _git(["checkout", "--quiet", "--detach", git_config["commit"]], environ, repo, target)
        _git(["submodule", "--quiet", "update", "--init", "--recursive"], environ, repo, target)
    return ClonedSource(target, _git(["rev-parse", "HEAD"], environ, repo, target).strip())


def _credentials(git_config: Mapping[str, Any]) -> dict[str, str]:
    secret = git_config.get("token") or git_config.get("password")
    if secret is None:
        return {}
    user = git_config.get("username") or "x-access-token"
    header = base64.b64encode(f"{user}:{secret}".encode()).decode()
    host = urlsplit(git_config["repo"]).netloc
    settings = {f"http.https://{host}/.extraHeader": f"Authorization: Basic {header}", "http.followRedirects": "false"}
    variables = {"GIT_CONFIG_COUNT": str(len(settings))}
    for number, (key, value) in enumerate(settings.items()):
        variables |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return variables


def _git(arguments: list[str], environ: Mapping[str, str], repo: str, folder: Path | None = None) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"git_config: git took more than {TIMEOUT:g} s with {repo}: check the network") from error
    if result.returncode != 0:
        words = result.stderr.decode(errors="replace").strip()
        raise LaunchError(f"git_config: git {arguments[0]} of {repo} failed: {words}")
    return result.stdout.decode(errors="replace")
