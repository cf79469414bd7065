"""The shape of the source: who may know whom, how long things may be, what is public and documented."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "modelparallel"
drawing = load_script("docs/draw_architecture.py")
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80

# path or path::function -> (date, reason). Keep it short; an entry is a noun that is still missing.
SIZE_EXCEPTIONS: dict[str, tuple[str, str]] = {}

# The floors of the house, the lowest first: (name, why it stands there, rooms). A room is a folder or a file directly
# in the package. An import points to a room of a lower floor or into the own room, whether it is for the type checker,
# within a function, or at the top. docs/draw_architecture.py draws these floors.
LADDER = (
    ("words", "all rooms use them, and they use none", ("errors", "trees", "version")),
    ("givens", "what torch offers, and what the user has set", ("config", "torch_compat")),
    ("decisions", "frozen data that rooms hand to each other", ("plan",)),
    ("messages", "all that goes from process to process, and every wait for it", ("comm",)),
    ("holdings", "who this process is, and which parameter is whose", ("job", "parameters")),
    (
        "means",
        "each is one way to use more devices or less memory, and knows of no other way",
        ("data_parallel", "deferred", "partitioning", "pipeline", "precision", "recomputation", "tensor_parallel"),
    ),
    ("layers", "modules made for tensor parallelism", ("nn",)),
    ("training", "what models, optimizers and steps share, so that they need not know each other", ("training",)),
    ("wrappers", "a model and an optimizer with all means in them; neither knows the other", ("model", "optimizer")),
    ("steps", "they run wrapped models", ("stepping",)),
    ("checkpoints", "they read and write what models and optimizers hold", ("checkpoints",)),
    ("jobs", "they start processes that do all this, and read what these leave behind", ("launch",)),
    (
        "paths",
        "module paths that the original has: re-exports alone",
        ("amp", "exceptions", "optimizers", "patches", "sharded_data_parallel_checkpoint", "state_mod", "utils"),
    ),
    ("package", "what scripts import, and the command", ("__init__", "__main__")),
)
# The folders of a room in their order, the lowest first; "files" are those of the room itself. Its __init__ is above
# them all.
INSIDE = {
    "checkpoints": ("stores", "partial", "huggingface", "whole", "tools", "files"),
    "comm": ("files", "collectives stages"),
    "launch": ("rehearsal clusters", "files"),
    "nn": ("files", "huggingface"),
    "pipeline": ("schedule", "values", "side_doors", "program", "operations", "recompute", "files"),
}
# The only modules with state of the process, and why. Tables of names, specs and line numbers that were met before are
# answers that do not change; the session is what the whole library stands on.
AMBIENT = {
    "comm/event_log.py": "line numbers of code that was met before",
    "job/session.py": "the session",
    "launch/clusters/interrupts.py": "the submission that a signal, which is the process's, would interrupt",
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


def address_of(place):
    """(room, floor, part of the room, floor inside the room) of a file."""
    room, *rest = Path(place).with_suffix("").parts
    floor = next(number for number, (_, _, rooms) in enumerate(LADDER) if room in rooms)
    inside = INSIDE.get(room, ("files",))
    if rest in ([], ["__init__"]):
        return room, floor, "top", len(inside)
    part = rest[0] if len(rest) > 1 else "files"
    return room, floor, part, next(number for number, parts in enumerate(inside) if part in parts.split())


def is_below(other, place):
    """Whether a file may import the other one."""
    (room, floor, part, inside), (other_room, other_floor, other_part, other_inside) = map(address_of, (place, other))
    if other_room != room:
        return other_floor < floor
    return other_part == part or other_inside < inside


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
    rooms = [room for _, _, rooms in LADDER for room in rooms]
    assert len(rooms) == len(set(rooms)), "a room is on two floors"
    there = {Path(place_of(name)).with_suffix("").parts[0] for name in FILES}
    assert there == set(rooms), f"not in LADDER: {there - set(rooms)}; no longer there: {set(rooms) - there}"
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/*/*.py")}
    known = {f"{room}/{part}" for room, parts in INSIDE.items() for part in " ".join(parts).split() if part != "files"}
    assert folders == known, f"not in INSIDE: {folders - known}; no longer there: {known - folders}"


def test_imports_point_only_down():
    wrong = [
        f"modelparallel/{place_of(name)}:{line} imports {other}"
        for name in FILES
        for other, line in known_to(name)
        if not is_below(place_of(other), place_of(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_below_what():
    """Down, but neither up nor sideways, between rooms and inside one; what a room is known by is above its parts."""
    assert is_below("errors/raised.py", "comm/waits.py") and not is_below("comm/waits.py", "errors/raised.py")
    assert not is_below("job/session.py", "parameters/table.py") and not is_below("nn/linear.py", "job/session.py")
    assert is_below("comm/waits.py", "comm/lookout.py") and is_below("comm/waits.py", "comm/stages/gloo.py")
    assert not is_below("comm/stages/gloo.py", "comm/waits.py")
    assert not is_below("comm/stages/gloo.py", "comm/collectives/split.py")
    assert is_below("nn/huggingface/gpt2.py", "nn/__init__.py") and not is_below("nn/__init__.py", "nn/linear.py")
    assert is_below("launch/job.py", "__main__.py") and not is_below("__init__.py", "launch/job.py")


def test_no_files_know_each_other_in_a_circle():
    found = circles({name: {other for other, _ in known_to(name)} for name in FILES})
    assert not found, "\n".join(" ".join(sorted(circle)) for circle in found)


def test_module_paths_of_the_original_are_re_exports():
    for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "patches").glob("*.py")]:
        if path.parent == PACKAGE and path.stem in ("__init__", "__main__", *LADDER[0][2]):
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


def test_no_two_classes_have_one_name():
    places = {}
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{place_of(name)}:{node.lineno}")
    assert not {name: where for name, where in places.items() if len(where) > 1}


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


def modules_named(tree):
    """(line, name) of each module that a file imports, or names in a text: an argument, or a script that it writes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"(?:import|from) (\w+)", node.value)
            yield from ((node.lineno, name) for name in {*names, node.value})


def test_what_tests_share_is_in_no_test_file():
    files = sorted((ROOT / "tests").glob("*.py"))
    test_files, wrong = {path.stem for path in files if path.stem.startswith("test_")}, []
    for path in files:
        for line, name in modules_named(ast.parse(path.read_text())):
            if name in test_files - {path.stem}:
                wrong.append(f"tests/{path.name}:{line} uses {name}.py: move what both need into a file of its own")
    assert not wrong, "\n".join(wrong)


def test_the_use_of_another_test_file_is_found():
    source = (
        "from test_a import b\ndef late():\n    import test_c\nrun('test_d', 1)\ncode = f'x = {1}\\nimport test_e\\n'\n"
    )
    names = {name for _, name in modules_named(ast.parse(source))}
    assert {"test_a", "test_c", "test_d", "test_e"} <= names


def is_annotated(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a for a in named if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return not missing and function.returns is not None


def test_what_tests_share_is_annotated():
    """mypy checks the body of every function, but not the calls of one without annotations."""
    wrong = []
    for path in (ROOT / "tests").glob("*.py"):
        if not path.stem.startswith("test_"):
            functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
            wrong += [f"tests/{path.name}:{node.lineno} {node.name}" for node in functions if not is_annotated(node)]
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
