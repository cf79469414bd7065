"""The import path of the original library gives our module objects, never a second copy."""

import importlib
import importlib.util
import subprocess
import sys

import pytest
from packaging.version import Version

import modelparallel

SAME = {
    "smdistributed.modelparallel.torch": "modelparallel",
    "smdistributed.modelparallel.torch.nn": "modelparallel.nn",
    "smdistributed.modelparallel.torch.nn.huggingface": "modelparallel.nn.huggingface",
    "smdistributed.modelparallel.torch.nn.huggingface.gpt2": "modelparallel.nn.huggingface.gpt2",
    "smdistributed.modelparallel.torch.model": "modelparallel.model",
    "smdistributed.modelparallel.torch.optimizers": "modelparallel.optimizers",
    "smdistributed.modelparallel.torch.state_mod": "modelparallel.state_mod",
    "smdistributed.modelparallel.torch.patches": "modelparallel.patches",
    "smdistributed.modelparallel.torch.patches.checkpoint": "modelparallel.patches.checkpoint",
    "smdistributed.modelparallel.torch.sharded_data_parallel_checkpoint": (
        "modelparallel.sharded_data_parallel_checkpoint"
    ),
    "smdistributed.modelparallel.torch.utils": "modelparallel.utils",
    "smdistributed.modelparallel.torch.exceptions": "modelparallel.exceptions",
    "smdistributed.modelparallel.backend.exceptions": "modelparallel.exceptions",
}


@pytest.mark.parametrize(("alias", "real"), SAME.items())
def test_alias_paths_are_the_same_module_objects(alias, real):
    module = importlib.import_module(alias)
    assert module is importlib.import_module(real)
    assert module.__name__ == real and module.__spec__.name == real
    assert sys.modules[alias] is module


def test_import_as_and_from_import_forms():
    import smdistributed.modelparallel.torch.nn as alias_nn
    from smdistributed.modelparallel.torch.nn import DistributedLinear

    import smdistributed.modelparallel.torch as smp

    assert smp is modelparallel and alias_nn is modelparallel.nn
    assert DistributedLinear is modelparallel.nn.DistributedLinear
    assert smp.model.DistributedModel is smp.DistributedModel  # type: ignore[attr-defined]


def test_an_unknown_path_is_an_ordinary_import_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        importlib.import_module("smdistributed.modelparallel.torch.no_such_part")


def test_version_is_ordered_after_what_clients_compare_with():
    from smdistributed.modelparallel import __version__

    assert Version(__version__) >= Version("1.15") > Version("1.10")
    assert Version(__version__).local == f"modelparallel.{modelparallel.__version__}"


def test_import_of_the_upper_packages_needs_no_torch():
    code = "import sys, smdistributed.modelparallel as m; assert 'torch' not in sys.modules; print(m.__version__)"
    assert importlib.util.find_spec("smdistributed") is not None
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_exception_classes_can_be_listed_where_toolkits_look():
    from smdistributed.modelparallel.backend import exceptions

    names = {name for name in dir(exceptions) if isinstance(getattr(exceptions, name), type)}
    assert {"SMPError", "SMPConfigError", "StepUsageError", "PartitionError"} <= names
    assert set(exceptions.__all__) == {  # type: ignore[attr-defined]
        name for name, value in vars(modelparallel.errors).items() if isinstance(value, type)
    }


def test_dump_and_verify_of_the_old_test_tools(tmp_path):
    import torch

    from smdistributed.modelparallel.test.torch.utils import dump_model, verify

    model = torch.nn.Linear(2, 3)
    path = str(tmp_path / "deep" / "model.pt")
    dump_model(model, path)
    verify(model, path)
    with torch.no_grad():
        model.bias.add_(1)
    with pytest.raises(ValueError, match="'bias' differs"):
        verify(model, path)
