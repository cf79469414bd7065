"""The docstrings of what scripts call: one form for arguments, errors, sources, and for who has to call."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import modelparallel as smp
from modelparallel import errors, launch
from modelparallel.checkpoints.whole.objects import FileNameError
from modelparallel.errors import SMPConfigError
from modelparallel.model.arguments import check_arguments
from modelparallel.model.states import StateDictError
from modelparallel.training.gradient_norm import NonFiniteGradientError

SOURCES = sorted((Path(__file__).resolve().parent.parent / "src").rglob("*.py"))
SECTIONS = {"Args", "Attributes", "Raises", "Returns"}
# Who has to call it, said in one of these ways.
WHO_CALLS = re.compile(
    r"\b[Ll]ocal\b|\b[Cc]ollective (?:over|with|as)\b|[Cc]alled by the library|as collective|is local|over which group"
)
ENTRY = re.compile(r"^    (?! )(\*{0,2}[\w, *]+): \S")


def docstrings(path):
    """(qualified name, line, docstring) of everything in a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", path.stem), getattr(node, "lineno", 1), text


def members(title, value):
    """(title, docstring, is it a property) of the public methods and properties that the library itself has defined."""
    for owner in value.__mro__:
        if not owner.__module__.startswith("modelparallel"):
            continue
        for name, function in vars(owner).items():
            is_function = inspect.isroutine(function) or isinstance(function, property | classmethod | staticmethod)
            if not name.startswith("_") and is_function:
                yield f"{title}.{name}", inspect.getdoc(getattr(value, name)) or "", isinstance(function, property)


def namespaces():
    """The public names, by the modules that they are in."""
    return {
        "smp": {name: getattr(smp, name) for name in smp.__all__},
        "smp.nn": {name: getattr(smp.nn, name) for name in dir(smp.nn) if not name.startswith("_")},
        "smp.optimizers": {name: getattr(smp.optimizers, name) for name in ("FusedAdam", "FusedLAMB", "FusedNovoGrad")},
        "smp.amp": {"GradScaler": smp.amp.GradScaler},
        "launch": {name: getattr(launch, name) for name in launch.__all__},
    }


def public_functions():
    """(title, docstring) of the functions, classes and methods that scripts call on the ranks of a job."""
    for space, names in namespaces().items():
        for name, value in names.items():
            if not callable(value) or not getattr(value, "__module__", "").startswith("modelparallel"):
                continue
            yield space, f"{space}.{name}", inspect.getdoc(value) or ""
            if isinstance(value, type) and name in ("DistributedModel", "DistributedOptimizer", "GlobalBatchSampler"):
                for title, text, is_property in members(f"{space}.{name}", value):
                    if not is_property:
                        yield space, title, text


def sections(text):
    """The sections of a docstring: (title, their lines)."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        title = re.match(r"([A-Z][a-z]+):$", line)
        if title and index + 1 < len(lines) and lines[index + 1].startswith("    "):
            inside = []
            for following in lines[index + 1 :]:
                if following and not following.startswith("    "):
                    break
                inside.append(following)
            yield title[1], inside


def test_sections_have_one_name_each():
    found, wrong = 0, []
    for path in SOURCES:
        for name, line, text in docstrings(path):
            titles = [title for title, _ in sections(text)]
            found += len(titles)
            if set(titles) - SECTIONS:
                wrong.append(f"{path.name}:{line} {name}: {titles}")
            if re.search(r"\bSpec: |^Arguments:", text, re.M):
                wrong.append(f"{path.name}:{line} {name}: say Source:, Args:")
    assert not wrong, "\n".join(wrong)
    assert found > 100


def test_public_functions_say_who_has_to_call_them():
    silent = []
    for space, title, text in public_functions():
        is_configuration = space == "launch" or title in ("smp.CommGroup", "smp.RankType")
        if not is_configuration and not WHO_CALLS.search(" ".join(text.split())):
            silent.append(title)
    assert not silent


def test_errors_of_public_functions_are_in_a_section_of_their_own():
    """In it each line names an error that there is; nothing is 'raised' elsewhere."""
    others = (FileNameError, NonFiniteGradientError, StateDictError, launch.JobFailedError, RuntimeError)
    known = {*vars(errors), *(error.__name__ for error in others)}
    found, wrong = 0, []
    for _, title, text in public_functions():
        if re.search(r"\bRaises (?!:)`*[A-Z]\w+", " ".join(text.split())):
            wrong.append(f"{title}: 'Raises X' in a sentence")
        for section, lines in sections(text):
            names = [line.split(":")[0].strip() for line in lines if re.match(r"    \S", line)]
            if section == "Raises":
                found += len(names)
                wrong.extend(f"{title}: {name}" for name in names if name not in known)
    assert not wrong, "\n".join(wrong)
    assert found > 60


def test_arguments_in_docstrings_are_arguments():
    found, wrong = 0, []
    for space, names in namespaces().items():
        for name, value in names.items():
            if not callable(value) or not getattr(value, "__module__", "").startswith("modelparallel"):
                continue
            functions = [(f"{space}.{name}", value)]
            if isinstance(value, type):
                functions += [(title, getattr(value, title.rpartition(".")[2])) for title, *_ in members(name, value)]
            for title, function in functions:
                for section, lines in sections(inspect.getdoc(function) or ""):
                    if section != "Args":
                        continue
                    named = {
                        one.strip(" *") for line in lines if (entry := ENTRY.match(line)) for one in entry[1].split(",")
                    }
                    assert named, title
                    found += len(named)
                    wrong += [f"{title}: {one}" for one in named - set(inspect.signature(function).parameters)]
    assert not wrong, "\n".join(wrong)
    assert found > 100


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("local_state_dict", r"Local; .*collective over the ranks that share the parameters out"),
        ("state_dict", r"Collective over the caller's MP_GROUP.* then all ranks of the world call it"),
        ("load_state_dict", r"Local for a whole one.*collective over MP_GROUP for a partial one"),
        ("join", r"SMPConfigError.*StepUsageError.*DivergenceError.*RuntimeError"),
    ],
)
def test_what_is_easily_called_wrongly_is_said(name, words):
    text = " ".join((inspect.getdoc(getattr(smp.DistributedModel, name)) or "").replace("*", "").split())
    assert re.search(words, text), text


def test_units_are_said():
    assert "in MiB (1024 * 1024 bytes)" in inspect.getdoc(smp.DistributedModel)
    with pytest.raises(SMPConfigError, match="bucket_cap_mb: expected a size > 0 in MiB"):
        check_arguments(torch.nn.Linear(1, 1), "gpu", False, 1, bucket_cap_mb=0)
