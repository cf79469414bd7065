"""Training from a cell of a notebook, and from a line of a script: `modelparallel.launch.notebook`."""

import json
import linecache
import os
import pickle
import re
import subprocess
import sys
import threading
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch import JobFailedError, JobResult, RankFailure, called_function, notebook, notebooks
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.processes import JOB_VARIABLE

pytest.importorskip("cloudpickle", reason="of the extras 'notebook' and 'test'")

IMPORTS = """
import os
import torch
from torch import nn
import modelparallel as smp
from modelparallel.launch import notebook
"""
CELLS = [
    IMPORTS,
    """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

class Report:
    def __init__(self, losses, rank):
        self.losses, self.rank = losses, rank
""",
    """
def batch():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

@smp.step
def train_step(model, x):
    loss = model(x).square().mean()
    model.backward(loss)
    return loss

def train(num_steps, rate=0.1):
    smp.init()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = smp.DistributedModel(Net())
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=rate))
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        losses.append(train_step(model, batch()).reduce_mean().item())
        optimizer.step()
    # By name, as a checkpoint or another rank would have it.
    assert [report.rank for report in smp.allgather(Report(losses, smp.rank()), smp.WORLD)] == [0, 1]
    print(f"stage {smp.pp_rank()} of {smp.pp_size()} on", torch.ones(1).cuda().sum().item())
    return Report(losses, smp.rank())
""",
    """
parameters = {"pipeline_parallel_degree": 2, "microbatches": 2}
reports = notebook(train, (3,), {"rate": 0.5}, nproc=2, parameters=parameters, all_ranks=True)
assert all(type(report) is Report for report in reports)
[(report.rank, report.losses) for report in reports]
""",
    """
def fail(message):
    if os.environ["RANK"] == "1":
        raise ValueError(message)  # the line that is shown
    smp.init({"ddp": True})

notebook(fail, ("no such data",), nproc=2, job_dir="failed")
""",
]


def run_cells(tmp_path, cells):
    """What each cell has put out: (printed text, value as text, error or None)."""
    pytest.importorskip("nbclient", reason="of the extra 'test'")
    pytest.importorskip("ipykernel", reason="of the extra 'test'")
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    script = Path(__file__).with_name("run_notebook.py")
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cells.json"), str(tmp_path / "outputs.json")],
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    shown = []
    for outputs in json.loads((tmp_path / "outputs.json").read_text()):
        printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
        value = next((o["data"]["text/plain"] for o in outputs if o["output_type"] == "execute_result"), "")
        shown.append((printed, value, next((o for o in outputs if o["output_type"] == "error"), None)))
    return shown


def plain_losses(num_steps, rate):
    torch.manual_seed(0)
    layers = (nn.Linear(6, 5, dtype=torch.float64), nn.Tanh(), nn.Linear(5, 1, dtype=torch.float64))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_notebook_trains_in_two_processes(tmp_path):
    """Functions and classes of cells, the losses of one process, output by rank, and the traceback of a failure."""
    *definitions, trained, failed = run_cells(tmp_path, CELLS)
    assert not any(error for _, _, error in definitions), definitions
    printed, value, error = trained
    assert error is None, error
    assert "[rank 0] stage 0 of 2 on 1.0" in printed and "[rank 1] stage 1 of 2 on 1.0" in printed
    (first, losses), (second, same) = eval(value)
    assert (first, second) == (0, 1) and losses == same
    assert losses == pytest.approx(plain_losses(3, 0.5), rel=1e-9)
    printed, _, error = failed
    assert error["ename"] == "JobFailedError"
    assert error["evalue"].startswith("rank 1 of 2 failed first"), error["evalue"]
    # The cell is in no file, and the line is shown all the same.
    assert re.search(r"line \d, in fail\n +raise ValueError\(message\)  # the line that is shown", error["evalue"])
    assert error["evalue"].rstrip().endswith("ValueError: no such data")
    assert "[rank 1] ValueError: no such data" in printed
    assert (tmp_path / "failed" / "logs" / "rank_1.log").read_text().endswith("ValueError: no such data\n")
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("modelparallel-call-*/rank_*"))


SCRIPT = """
import os
from modelparallel.launch import notebook

class Setting:
    def __init__(self, value):
        self.value = value

def double(setting, times=2):
    import beside
    setting.value *= times * beside.FACTOR
    print("here", os.environ["WORLD_SIZE"])
    return setting

own = Setting(3)
results = notebook(double, [own], {"times": 5}, nproc=2, all_ranks=True)
assert [type(result) is Setting and result.value for result in results] == [150, 150], results
assert own.value == 3
"""


def test_a_script_calls_a_function_of_its_own(tmp_path):
    """Without a guard against being run again, with a module beside it, from another directory."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.py").write_text(SCRIPT)
    (tmp_path / "code" / "beside.py").write_text("FACTOR = 10\n")
    process = subprocess.run(
        [sys.executable, "code/main.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "[rank 1] here 2" in process.stdout
    (folder,) = (tmp_path / "modelparallel-jobs").glob("double-*")
    assert (folder / "logs" / "rank_0.log").read_text() == "here 2\n"


def leave():
    sys.exit(0)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call a function as a process of a job does, rank 0 or another."""

    def run(function, *args, global_rank=0, all_ranks=False, sources=None):
        monkeypatch.setenv(notebooks.CALL_VARIABLE, str(tmp_path))
        for name, value in (("RANK", global_rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "path", ["/code/of/the/package", *sys.path])
        monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        content = notebooks.dumped((function, args, {}))
        description = {"sys_path": ["/code/of/the/script"], "sources": sources or {}, "all_ranks": all_ranks}
        (tmp_path / "call.pickle").write_bytes(pickle.dumps({**description, "content": content}))
        called_function.main()
        return tmp_path

    return run


def test_only_what_is_asked_for_is_copied_back(call):
    folder = call(max, 3, 4, global_rank=1)
    assert not notebooks.result_file(folder, 1).exists()
    with pytest.raises(LaunchError, match=r"rank 1 ended well but without returning from max, as after sys.exit\(\)"):
        notebooks._returned(folder, 1, "max")
    assert notebooks._returned(call(max, 3, 4, global_rank=1, all_ranks=True), 1, "max") == 4
    assert notebooks._returned(call(max, 3, 4), 0, "max") == 4


def test_a_value_that_cannot_be_copied_back(call):
    with pytest.raises(LaunchError, match="what the function returned on rank 0, a generator, cannot be copied back"):
        call(lambda: (number for number in range(3)))


def test_what_a_process_finds(call):
    """The places of the caller's modules first, its names in `__main__`, and the text of its cells."""
    names = {"__name__": "__main__", "leave": leave}
    exec("def function():\n    return leave", names)
    call(names["function"], sources={"/tmp/ipykernel_1/2.py": "a = 1\nb = 2\n"})
    assert sys.path[:2] == ["/code/of/the/script", "/code/of/the/package"]
    assert sys.modules["__main__"].leave is not None and sys.modules["__main__"].__name__ == "__main__"
    assert linecache.getline("/tmp/ipykernel_1/2.py", 2) == "b = 2\n"
    linecache.checkcache()
    assert notebooks._sources_of_cells()["/tmp/ipykernel_1/2.py"] == "a = 1\nb = 2\n"
    del linecache.cache["/tmp/ipykernel_1/2.py"]


class TestBeforeAnythingStarts:
    """Each is said before a process starts."""

    @pytest.fixture(autouse=True)
    def _nothing_starts(self, monkeypatch):
        def start(job):
            pytest.fail(f"{job.name} was started")

        monkeypatch.setattr(notebooks, "run_job", start)

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"nproc": 0}, "nproc=0: expected a whole number, 1 or more"),
            ({"nproc": "2:4"}, "nproc='2:4': expected a whole number"),
            ({"max_restarts": -1}, "max_restarts=-1"),
            ({"timeout": 0}, "timeout=0: expected a number of seconds above 0"),
            ({"backend": "ray"}, "backend='ray': expected 'elastic' or 'mpi'"),
            ({"device": "tpu"}, "device 'tpu': expected auto, cpu or cuda"),
        ],
    )
    def test_wrong_settings(self, settings, text):
        with pytest.raises(LaunchError, match=re.escape(text)):
            notebook(leave, **settings)

    def test_degrees_that_do_not_fit(self):
        with pytest.raises(SMPConfigError, match="world size 3 is not divisible"):
            notebook(leave, nproc=3, device="cpu", parameters={"pipeline_parallel_degree": 2})

    def test_no_function(self):
        with pytest.raises(
            LaunchError, match=r"expected a function, got 3: notebook\(train, nproc=2\), without calling"
        ):
            notebook(3)

    def test_in_a_process_of_a_job(self, monkeypatch):
        monkeypatch.setenv(JOB_VARIABLE, "/somewhere/job.json")
        with pytest.raises(LaunchError, match="was called in a process of a job: call it in the notebook"):
            notebook(leave)

    def test_what_cannot_be_copied_is_named(self):
        lock = threading.Lock()
        with pytest.raises(LaunchError, match=r"leave cannot be copied .* because of argument 1, a lock \(TypeError"):
            notebook(leave, (3, lock))
        with pytest.raises(LaunchError, match="because of argument 'of', a lock"):
            notebook(leave, kwargs={"of": lock})

    def test_an_interrupt_is_python_s_own(self, monkeypatch, tmp_path):
        """That of Ctrl-C; a function that raises KeyboardInterrupt itself has failed."""
        result = JobResult(130, 1.0, JobFolder(tmp_path), message="job train was stopped by SIGINT")
        monkeypatch.setattr(notebooks, "run_job", lambda job: result)
        with pytest.raises(KeyboardInterrupt, match="job train was stopped by SIGINT"):
            notebook(leave)
        failure = RankFailure(1, 130, "KeyboardInterrupt", "", tmp_path / "rank_1.log")
        monkeypatch.setattr(notebooks, "run_job", lambda job: replace(result, failure=failure))
        with pytest.raises(JobFailedError, match="was stopped"):
            notebook(leave)

    def test_without_cloudpickle(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
        with pytest.raises(LaunchError, match=r"pip install 'modelparallel\[notebook\]'"):
            notebook(leave)


class Callable:
    def __call__(self):
        return 1

    def method(self):
        return 2


def test_the_names_that_a_function_knows():
    own = globals()
    for function in (leave, partial(partial(leave), 1), Callable().method, Callable()):
        assert notebooks.globals_of(function) is own
    assert notebooks.globals_of(print) == {}


def test_processes_rehearse_the_code_of_cells(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELPARALLEL_REHEARSAL_PATHS", "/before")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    variables = notebooks._variables(tmp_path, {"KEY": 3}, {"/tmp/ipykernel_1"})
    assert variables["MODELPARALLEL_REHEARSAL_PATHS"] == "/before:/tmp/ipykernel_1"
    assert variables["KEY"] == "3" and variables["MPLBACKEND"] == "Agg"
    assert variables[notebooks.CALL_VARIABLE] == str(tmp_path)
