"""Which files of a source directory stay at home: `.gitignore`, `.modelparallelignore`, and what nobody wants."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from modelparallel.errors import LaunchError

#: Patterns as in .gitignore, beside it or above; they count before those of any .gitignore, `!name` too.
OWN_FILE = ".modelparallelignore"
GIT_FILE = ".gitignore"
#: Left out unless one of the files above says otherwise.
DEFAULTS = ("__pycache__/", "*.py[co]", ".DS_Store", ".ipynb_checkpoints/")
#: Never part of the code, whatever the files say.
NEVER = (".git", ".hg", ".svn")


@dataclass(frozen=True)
class IgnoreRule:
    """The line of a file that decides about a path."""

    file: str
    line: str
    leaves_out: bool


@dataclass(frozen=True)
class _Patterns:
    """The lines of one ignore file, which speak of paths below its directory."""

    file: str
    directory: Path
    lines: tuple[str, ...]
    spec: GitIgnoreSpec

    @staticmethod
    def of(file: str, directory: Path, text: str) -> _Patterns:
        lines = tuple(line for line in text.splitlines() if line)
        try:
            return _Patterns(file, directory, lines, GitIgnoreSpec.from_lines(lines))
        except ValueError as error:
            raise LaunchError(f"{file}: {error}: correct the pattern, or remove it") from error

    def rule_for(self, path: Path, is_folder: bool) -> IgnoreRule | None:
        name = path.relative_to(self.directory).as_posix() + ("/" if is_folder else "")
        result = self.spec.check_file(name)
        if result.include is None or result.index is None:
            return None
        return IgnoreRule(self.file, self.lines[result.index], result.include)


class IgnoreRules:
    """What the ignore files of a directory, and of the git repository around it, say of the paths below it.

    As in git, a file below speaks before one above, and the last line that fits counts; and nothing below a directory
    that is left out comes back.

    Args:
        root: an absolute path without links.
        without: a folder that is left out, too.

    Raises `LaunchError` for an ignore file that cannot be read.
    """

    def __init__(self, root: Path, without: Path | None = None) -> None:
        self._without = None if without is None else Path(os.path.realpath(without))
        repository = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), None)
        self._top = repository or root
        self._known: dict[Path, _Patterns | None] = {}
        self._exclude = None if repository is None else self._read(repository / ".git" / "info" / "exclude", repository)
        self._defaults = _Patterns.of("the defaults", self._top, "\n".join(DEFAULTS))

    def rule_for(self, path: Path, is_folder: bool) -> IgnoreRule | None:
        """The line that decides about an absolute path below the root; None if none speaks of it."""
        if path.name in NEVER or path == self._without:
            return IgnoreRule("every package", path.name, True)
        above = [folder for folder in path.parents if folder == self._top or self._top in folder.parents]
        for name in (OWN_FILE, GIT_FILE):
            for folder in above:
                patterns = self._read(folder / name, folder)
                rule = None if patterns is None else patterns.rule_for(path, is_folder)
                if rule is not None:
                    return rule
        for patterns in (self._exclude, self._defaults):
            rule = None if patterns is None else patterns.rule_for(path, is_folder)
            if rule is not None:
                return rule
        return None

    def _read(self, file: Path, directory: Path) -> _Patterns | None:
        if file not in self._known:
            try:
                # Names of files may be any bytes.
                text = os.fsdecode(file.read_bytes())
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._known[file] = None
            except OSError as error:
                raise LaunchError(f"{file} cannot be read: {error.strerror}") from error
            else:
                self._known[file] = _Patterns.of(str(file), directory, text)
        return self._known[file]
