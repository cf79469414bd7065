"""The shape of the source: who may know whom, how long things may be, what is public and documented."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from documents import script

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "modelparallel"
drawing = script("draw_architecture")
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80

# path or path::function -> (date, reason). Keep it short; an entry is a noun that is still missing.
SIZE_EXCEPTIONS: dict[str, tuple[str, str]] = {}

# The floors of the house, the lowest first. A room is a folder, without the folders in it. An import points only to a
# room of a lower floor or into the own room, whether it is for the type checker, within a function, or at the top.
LADDER: list[set[str]] = [
    {"errors"},
    {"checkpoints/stores", "config", "launch/rehearsal", "plan", "recomputation", "torch_compat"},
    {"comm", "deferred", "pipeline/schedule", "precision"},
    {"comm/collectives", "comm/stages", "job", "parameters"},
    {"data_parallel", "partitioning", "pipeline/values", "tensor_parallel"},
    {"nn", "pipeline/side_doors"},
    {"nn/huggingface", "pipeline/program"},
    {"pipeline/operations"},
    {"pipeline/recompute"},
    {"pipeline"},
    {"training"},
    {"model", "optimizer"},
    {"checkpoints/partial", "stepping"},
    {"checkpoints/huggingface"},
    {"checkpoints/whole"},
    {"checkpoints/tools"},
    {"checkpoints", "launch"},
]
# Files at the root of the package that are something of their own; both are below all rooms.
FOUNDATIONS = {"trees.py", "version.py"}
# They import everything that is public, and no room imports them.
NAMESPACES = {"__init__.py", "__main__.py", "nn/__init__.py"}
# Module paths that the original API names, and what is found there: re-exports alone.
NAMED_BY_THE_API = {
    "amp.py",
    "exceptions.py",
    "optimizers.py",
    "patches",
    "sharded_data_parallel_checkpoint.py",
    "state_mod.py",
    "utils.py",
}
# The only modules with state of the process, and why. Tables of names, specs and line numbers that were met before are
# answers that do not change; the session is what the whole library stands on.
AMBIENT = {
    "comm/event_log.py": "line numbers of code that was met before",
    "job/session.py": "the session",
    "launch/rehearsal/__init__.py": "a rehearsal replaces functions of torch for the whole process",
    "launch/rehearsal/operators.py": "the same, for operators",
    "pipeline/operations/captured_values.py": "names of code objects that were met before",
    "pipeline/values/functions.py": "traits of functions that were met before",
    "pipeline/values/stage_tensor.py": "equal specs are one object",
}
# The path smdistributed.modelparallel.torch.utils is named by the API, so modules of that name exist.
UTILS = {"modelparallel/utils.py", "smdistributed/modelparallel/test/torch/utils.py"}
FORBIDDEN_NAMES = {"helpers", "common", "misc", "helper", "shared", "util"}


def relative(path):
    return path.relative_to(ROOT / "src").as_posix()


def name_of(path):
    """The dotted name of a module of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def place_of(name):
    """The path of a module, relative to the package."""
    return FILES[name].relative_to(PACKAGE).as_posix()


def room_of(place):
    return place.rpartition("/")[0] or place


def known_to(name):
    """The modules of the package that a module imports, in whatever way, with the line."""
    for below, line in drawing.imported_at(FILES[name]):
        full = f"{PACKAGE.name}.{below}".rstrip(".")
        found = full if full in FILES else full.rpartition(".")[0]
        if found != name:
            yield found, line


def circles(graph):
    """The sets of nodes that know each other."""
    below = drawing.reached(graph)
    return {frozenset(other for other in below[node] if node in below[other]) for node in graph} - {frozenset()}


def test_every_file_has_a_room():
    rooms = set().union(*LADDER)
    assert sum(map(len, LADDER)) == len(rooms), "a room is on two floors"
    known = rooms | FOUNDATIONS | NAMED_BY_THE_API | {"__init__.py", "__main__.py"}
    there = {room_of(place_of(name)) for name in FILES}
    assert there == known, f"not in LADDER: {there - known}; no longer there: {known - there}"


def test_imports_point_only_down():
    floor = {room: number for number, rooms in enumerate(LADDER) for room in rooms}
    floor.update(dict.fromkeys(FOUNDATIONS, -1))
    wrong = []
    for name in FILES:
        place = place_of(name)
        if place in NAMESPACES or room_of(place) in NAMED_BY_THE_API:
            continue
        for other, line in known_to(name):
            here, there = room_of(place), room_of(place_of(other))
            if here == there and place_of(other) not in NAMESPACES:
                continue
            if place_of(other) in NAMESPACES or there in NAMED_BY_THE_API or floor[there] >= floor[here]:
                wrong.append(f"modelparallel/{place}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_files_know_each_other_in_a_circle():
    found = circles({name: {other for other, _ in known_to(name)} for name in FILES})
    assert not found, "\n".join(" ".join(sorted(circle)) for circle in found)


def test_module_paths_of_the_original_are_re_exports():
    for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "patches").glob("*.py")]:
        if path.name in FOUNDATIONS | {"__init__.py", "__main__.py"} and path.parent == PACKAGE:
            continue
        for node in ast.parse(path.read_text()).body:
            is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert isinstance(node, ast.ImportFrom) or is_list or is_docstring, f"{relative(path)}:{node.lineno}"


def test_arithmetic_modules_do_not_need_torch():
    for name in ("config/topology.py", "errors/__init__.py", "config/table.py", "config/reading.py"):
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
        assert "utils" not in words or relative(path) in UTILS, relative(path)


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


MUTABLE = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque", "Lock", "RLock", "local", "count",
           "WeakKeyDictionary", "WeakValueDictionary", "WeakSet"}  # fmt: skip
CHANGES = {"append", "add", "setdefault", "update", "pop", "popitem", "clear", "remove", "discard", "extend", "insert",
           "appendleft", "acquire"}  # fmt: skip


def changed_names(tree):
    """The names at the top of a module whose values code of the module changes."""
    mutable, changed = set(), set()
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        is_mutable = isinstance(node.value, ast.Dict | ast.List | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
        if isinstance(node.value, ast.Call):
            is_mutable = ast.unparse(node.value.func).rpartition(".")[2] in MUTABLE
        if is_mutable and isinstance(target, ast.Name):
            mutable.add(target.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            changed.update(node.names)
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            changed.add(ast.unparse(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            changed.add(ast.unparse(node.func.value))
    declared = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    return (changed & mutable) | declared


def test_state_of_the_process_is_where_it_is_known():
    found = {}
    for name, path in FILES.items():
        names = changed_names(ast.parse(path.read_text()))
        if names:
            found[place_of(name)] = names
    assert set(found) == set(AMBIENT), f"{found}"


def test_changed_names_are_found():
    source = "kept = {}\nlast = None\nfixed = {'a': 1}\ndef note(key):\n    global last\n    last = kept[key] = key\n"
    assert changed_names(ast.parse(source)) == {"kept", "last"}


def private_names():
    """Names of torch that begin with an underscore; those of the registries of modules are everybody's by now."""
    parameter, linear = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)
    owners = (torch, parameter, linear, nn.modules.batchnorm, nn.modules.instancenorm)
    names = {name for owner in owners for name in dir(owner) if re.match("_[a-zA-Z]", name)}
    return (names | {"_schema", "_overloadpacket"}) - {"_buffers", "_modules", "_parameters", "_apply"}


def private_uses(tree, names):
    """(line, name) of what a module reads of torch that is private; what an object has itself is its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            is_operation = owner.endswith("aten") and node.attr.startswith("_")
            if is_operation or (node.attr in names and owner not in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            hidden = [part for part in node.module.split(".") if part.startswith("_")]
            hidden += [alias.name for alias in node.names if alias.name.startswith("_")]
            yield from ((node.lineno, name) for name in hidden)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch.") and "._" in alias.name:
                    yield node.lineno, alias.name


def test_private_parts_of_torch_are_used_in_one_place():
    names, wrong = private_names(), []
    for name, path in FILES.items():
        if not place_of(name).startswith("torch_compat/"):
            uses = private_uses(ast.parse(path.read_text()), names)
            wrong += [f"{relative(path)}:{line} {used}" for line, used in uses]
    assert not wrong, "\n".join(wrong)


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
