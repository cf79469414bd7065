"""docs/compatibility.md says what the code does: every row is looked up."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import modelparallel as smp
from modelparallel.config.reading import ENVIRONMENT_KEY, ENVIRONMENT_WITHOUT_EFFECT, load_config
from modelparallel.config.table import CONFIGURATION_KEYS
from modelparallel.errors import NotBuiltError, SMPConfigError
from modelparallel.launch.distribution import validate_distribution
from pool import run_ranks

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(
    r"^\| `(?P<path>[\w.]+)(\((?P<parameters>[\w, ]*)\))?` \| (?P<status>same|differs|not yet) \| (?P<note>.*)\|$"
)
# A value that asks for the feature, for parameters that are not built.


def read_rows():
    rows = []
    for line in (ROOT / "docs" / "compatibility.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        match = ROW.match(line)
        assert match, f"row that cannot be read: {line}"
        parameters = [name.strip() for name in (match["parameters"] or "").split(",") if name.strip()]
        rows.append((match["path"], parameters, match["status"], match["note"].strip()))
    return rows


ROWS = read_rows()


def says_not_built(value):
    """Whether a function does nothing but raise NotBuiltError (possibly after checks)."""
    function = inspect.unwrap(getattr(value, "__func__", value))
    if not inspect.isfunction(function):
        return False
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    return any(isinstance(node, ast.Raise) and "NotBuiltError" in ast.unparse(node) for node in definition.body)


def check(root, path, parameters, status, *, root_name):
    """None when the row is right, else what is wrong. ``root`` is the object that the path starts from."""
    where = f"{root_name}.{path}" if path else root_name
    value = root
    for part in filter(None, path.split(".")):
        try:
            value = getattr(value, part)
        except AttributeError:
            return None if status == "not yet" else f"{where} is marked {status!r}, but does not exist"
    if says_not_built(value) != (status == "not yet"):
        return f"{where} is marked {status!r}, but {'only raises' if status != 'not yet' else 'exists'}"
    if status != "not yet" and parameters:
        found = inspect.signature(value).parameters
        has_rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values())
        missing = [name for name in parameters if name not in found and not has_rest]
        if missing:
            return f"{where} has no parameter {missing}; it has {list(found)}"
    return None


def check_module(path, parameters, status):
    """A row that starts with a dotted import path: the longest importable prefix is a module, the rest attributes."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            if status == "not yet" and "not built yet" in str(error):
                return None
            return f"{name}: {error}"
        return check(module, ".".join(parts[length:]), parameters, status, root_name=name)
    return None if status == "not yet" else f"{path} cannot be imported"


def rows_of(*roots):
    return [
        (path.partition(".")[0], path.partition(".")[2], parameters, status)
        for path, parameters, status, _ in ROWS
        if path.partition(".")[0] in roots
    ]


def report(problems):
    problems = [problem for problem in problems if problem]
    assert not problems, "\n".join(problems)


def test_rows_are_unique_and_explained():
    paths = [path for path, *_ in ROWS]
    assert len(paths) == len(set(paths)) > 150
    roots = {path.partition(".")[0] for path in paths}
    objects = {"smp", "model", "optimizer", "output", "parameter", "smdistributed", "modelparallel"}
    assert roots == objects | {"config", "keyword", "environment", "mpi"}


def test_names_of_the_namespace():
    # State before init is empty; its rows are looked up with the objects, below.
    rows = [row for row in rows_of("smp") if not row[1].startswith("state.")]
    report(check(smp, path, parameters, status, root_name="smp") for _, path, parameters, status in rows)


def test_every_public_name_is_in_the_table():
    named = {path.split(".")[1] for path, *_ in ROWS if path.startswith("smp.")}
    ours = {"SMPError", "errors", "exceptions", "nn", "model", "state"}  # modules and our own exceptions
    extra = {name for name in smp.__all__ if not name.startswith("__") and not name.endswith("Error")}
    assert extra - named - ours == set(), "missing in docs/compatibility.md"


def test_module_paths():
    report(
        check_module(path, parameters, status)
        for path, parameters, status, _ in ROWS
        if path.startswith(("smdistributed.", "modelparallel."))
    )


def look_up_objects(rows):
    import torch

    @smp.step
    def forward(model, x):
        return model(x)

    model = smp.DistributedModel(torch.nn.Linear(2, 2))
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    objects = {"model": model, "optimizer": optimizer, "output": forward(model, torch.zeros(2, 2)), "smp": smp}
    objects["parameter"] = next(model.parameters())
    return [check(objects[root], path, parameters, status, root_name=root) for root, path, parameters, status in rows]


def test_methods_and_attributes_of_objects():
    rows = rows_of("model", "optimizer", "output", "parameter")
    rows += [row for row in rows_of("smp") if row[1].startswith("state.")]
    sharded = [row for row in rows if row[1].startswith(("ds_", "fp32_partitioned"))]
    report(run_ranks(look_up_objects, 1, [row for row in rows if row not in sharded], parameters={})[0])
    parameters = {"sharded_data_parallel_degree": 2, "ddp": True, "sdp_param_persistence_threshold": 0}
    report(run_ranks(look_up_objects, 2, sharded, parameters=parameters)[0])


@pytest.mark.parametrize("keyword", [path for _, path, _, _ in rows_of("keyword")])
def test_keywords_of_tensor_parallelism_are_accepted(keyword):
    import torch

    with smp.tensor_parallelism(**{keyword: True}):
        module = torch.nn.Linear(2, 2)
    smp.set_tensor_parallelism(module, True, **{keyword: False})


def test_environment_variables():
    listed = {path: status for _, path, _, status in rows_of("environment")}
    assert listed.pop(ENVIRONMENT_KEY) == "same"
    assert set(listed) == set(ENVIRONMENT_WITHOUT_EFFECT) and set(listed.values()) == {"differs"}
    config = load_config({}, dict.fromkeys(listed, "1"))
    assert all(any(name in notice for notice in config.notices) for name in listed)
    assert load_config({}, {ENVIRONMENT_KEY: '{"microbatches": 3}'}).microbatches == 3


def test_keys_of_the_mpi_dictionary():
    values = {"enabled": True, "processes_per_host": 2, "custom_mpi_options": "--mca a b"}
    assert {path for _, path, _, _ in rows_of("mpi")} == set(values)
    parameters = {"enabled": True, "parameters": {"partitions": 2}}
    validate_distribution({"smdistributed": {"modelparallel": parameters}, "mpi": values}, 1)
    with pytest.raises(SMPConfigError):
        validate_distribution({"smdistributed": {"modelparallel": parameters}, "mpi": {**values, "other": 1}}, 1)


def test_every_configuration_parameter_is_in_the_table():
    listed = {path for _, path, _, _ in rows_of("config")}
    ours = {"uneven_microbatches", "seed", "timeout_seconds", "message_timeout_seconds", "push_limit_bytes"}
    ours |= {"virtual_pipeline_degree", "memory_limit", "tied_weights", "debug", "sdp_gather"}
    ours |= {"trust_pickles", "allowed_types"}
    assert listed - {"partitions"} <= set(CONFIGURATION_KEYS)
    assert set(CONFIGURATION_KEYS) - listed <= ours, "missing in docs/compatibility.md"


@pytest.mark.parametrize("key", [path for _, path, _, status in rows_of("config") if status == "not yet"])
def test_parameters_that_are_not_built_stop(key):
    with pytest.raises(NotBuiltError, match="not built yet"):
        load_config({key: True, "ddp": True}, {})


@pytest.mark.parametrize("key", [path for _, path, _, status in rows_of("config") if status != "not yet"])
def test_parameters_that_are_built_have_an_attribute(key):
    config = load_config({}, {})
    assert hasattr(config, key)
    load_config({key: getattr(config, key), "ddp": True} if key != "ddp" else {"ddp": True}, {})
