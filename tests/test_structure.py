"""The shape of the source: who may import whom, how long things may be, what is public and documented."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "modelparallel"
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80

# path or path::function -> (date, reason). Keep it short; an entry is a noun that is still missing.
SIZE_EXCEPTIONS: dict[str, tuple[str, str]] = {}

# An import points only to a lower rung. Members of one rung do not import each other, except where the rung is one noun
# told in several files (marked True).
LADDER: list[tuple[bool, set[str]]] = [
    (
        True,
        {
            "config",
            "parameter_table",
            "topology",
            "errors",
            "exceptions",
            "events",
            "foreign_text",
            "private_files",
            "torch_compat",
            "trees",
            "version",
        },
    ),
    (True, {"plan"}),
    (True, {"parameters", "retired_parameters", "shards", "rendezvous", "session", "ending", "registry"}),
    (True, {"comm"}),
    (False, {"pipeline", "partitioning", "tensor_parallel", "data_parallel", "memory", "precision"}),
    (True, {"nn"}),
    (True, set()),  # the public API: every module directly in the package that is named in no other rung
    (True, {"checkpoints", "sharded_data_parallel_checkpoint"}),
    (False, {"launch", "observe"}),
]
API_RUNG = 6
# These belong below comm, but name its types: only lazily or for the type checker.
LAZY_UPWARD = {("session", "comm"), ("shards", "comm")}
# The only modules with state of the process: the session, what decorators register before it exists, and the rehearsal,
# which replaces functions of torch for the whole process.
AMBIENT = ("modelparallel/session.py", "modelparallel/registry.py", "modelparallel/launch/rehearsal/")
FORBIDDEN_NAMES = {"helpers", "common", "misc", "helper", "shared", "util"}
# The path smdistributed.modelparallel.torch.utils is named by the API, so one module of that name exists.
NAMED_BY_THE_API = {"modelparallel/utils.py", "smdistributed/modelparallel/test/torch/utils.py"}


def relative(path):
    return path.relative_to(ROOT / "src").as_posix()


def part_of(module):
    """The rung's member that a dotted module name of the package belongs to: its second component."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def rung_of(part):
    for index, (_, members) in enumerate(LADDER):
        if part in members:
            return index
    return API_RUNG


def imports_of(path):
    """(imported part of the package, line, is it only at run time inside a function or for the type checker)."""
    tree = ast.parse(path.read_text())
    package = relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".").split(".")
    lazy_lines = set()
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            lazy_lines.update(range(node.lineno, node.end_lineno + 1))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_init = path.name == "__init__.py"
                up = package[: len(package) - node.level + (1 if is_init else 0)]
                base = ".".join([*up, base] if base else up)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "modelparallel" else [base]
        for name in names:
            if name.split(".")[0] == "modelparallel" and part_of(name):
                yield part_of(name), node.lineno, node.lineno in lazy_lines


def test_imports_point_only_down():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = part_of(relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        if own in ("", "__main__"):
            continue  # the namespace itself and the command import everything
        for target, line, is_lazy in imports_of(path):
            if target == own or (is_lazy and (own, target) in LAZY_UPWARD):
                continue
            here, there = rung_of(own), rung_of(target)
            if there > here or (there == here and not LADDER[here][0]):
                wrong.append(f"{relative(path)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_arithmetic_modules_do_not_need_torch():
    for name in ("topology.py", "errors.py", "parameter_table.py", "config.py"):
        assert not re.search(r"^\s*(import|from) torch\b", (PACKAGE / name).read_text(), re.M), name


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def test_files_and_functions_stay_small():
    found = {}
    for path in SOURCES:
        length = len(path.read_text().splitlines())
        if length > MAX_FILE_LINES:
            found[relative(path)] = f"{length} lines, at most {MAX_FILE_LINES}"
        for name, line, length in functions(path):
            if length > MAX_FUNCTION_LINES:
                found[f"{relative(path)}::{name}"] = f"line {line}: {length} lines, at most {MAX_FUNCTION_LINES}"
    too_long = {key: text for key, text in found.items() if key not in SIZE_EXCEPTIONS}
    assert not too_long, "\n".join(f"{key}: {text}" for key, text in too_long.items())
    assert set(SIZE_EXCEPTIONS) <= set(found), f"no longer needed: {set(SIZE_EXCEPTIONS) - set(found)}"


def test_every_file_opens_with_a_docstring():
    missing = [relative(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not missing


def test_no_module_is_named_after_nothing():
    for path in SOURCES:
        words = set(re.split(r"[/_.]", relative(path).removesuffix(".py")))
        assert not words & FORBIDDEN_NAMES, relative(path)
        assert "utils" not in words or relative(path) in NAMED_BY_THE_API, relative(path)


def test_no_module_file_hides_a_public_function():
    import modelparallel

    modules = {path.stem for path in PACKAGE.iterdir()} - {"__init__", "__pycache__", "py"}
    callables = {name for name in modelparallel.__all__ if callable(getattr(modelparallel, name))}
    assert not modules & callables


def test_the_namespace_is_its_all():
    import modelparallel

    source = (PACKAGE / "__init__.py").read_text()
    assert len(set(modelparallel.__all__)) == len(modelparallel.__all__)
    for name in modelparallel.__all__:
        assert getattr(modelparallel, name) is not None
    tree = ast.parse(source)
    allowed = ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.Expr
    assert all(isinstance(node, allowed) for node in tree.body), "only re-exports here, no logic"
    bound = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    public = {name for name in bound if not name.startswith("_")}
    assert public <= set(modelparallel.__all__) | {"annotations"}, public - set(modelparallel.__all__)


def test_public_names_have_docstrings():
    import modelparallel

    undocumented = []
    for name in modelparallel.__all__:
        value = getattr(modelparallel, name)
        if not callable(value):
            continue
        if not (value.__doc__ or "").strip():
            undocumented.append(name)
        if isinstance(value, type) and value.__module__.startswith("modelparallel"):
            for member, function in vars(value).items():
                is_function = callable(function) or isinstance(function, property | classmethod | staticmethod)
                if not member.startswith("_") and is_function and not (getattr(value, member).__doc__ or "").strip():
                    undocumented.append(f"{name}.{member}")
    assert not undocumented


def test_only_the_session_and_the_registry_are_ambient():
    for path in PACKAGE.rglob("*.py"):
        if relative(path).startswith(AMBIENT):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Global), f"{relative(path)}:{node.lineno}"


def test_private_torch_symbols_are_imported_in_one_place():
    pattern = re.compile(
        r"^\s*(from torch[\w.]*\._\w+|import torch[\w.]*\._\w+|from torch[\w.]* import (.*, )?_\w+)", re.M
    )
    for path in PACKAGE.rglob("*.py"):
        if "torch_compat" not in path.parts:
            assert not pattern.search(path.read_text()), relative(path)


def test_version_is_one():
    import modelparallel
    from modelparallel.version import __version__

    assert modelparallel.__version__ == __version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'name = "modelparallel"' in project and 'dynamic = ["version"]' in project
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("target", ["setup", "demo", "test", "test-all", "lint", "package", "bench"])
def test_makefile_has_the_targets(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
