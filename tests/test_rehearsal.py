"""Rehearsal: a script for CUDA runs on a CPU, libraries see no CUDA, and the documentation lists every mapped name."""

import importlib
import io
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from modelparallel.launch import JobSpec, run_job
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.rehearsal import declare_torchvision_operators
from modelparallel.launch.rehearsal.callers import ScriptCode

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is rehearsed")

LIBRARY = """
    import torch
    from torch import nn

    def sees_cuda():
        return torch.cuda.is_available() or torch.cuda.device_count() > 0

    def originals():
        return torch.device, torch.zeros, torch.Tensor.to

    def asks_for_cuda():
        torch.zeros(1).cuda()

    def makes_on_cuda():
        return torch.zeros(1, device="cuda")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def to(self, *args, **kwargs):
            return super().to(*args, **kwargs)

        def cuda(self, device=None):
            return super().cuda(device)
"""

SCRIPT = """
    import copy, importlib.util, io, os, pickle, sys, warnings
    filters = warnings.filters[:]
    warnings.simplefilter("error")
    import torch
    from torch import nn
    from torch import device as device_type
    from torch.cuda.amp import GradScaler, autocast
    import a_library
    import neighbour

    local_rank = int(os.environ["LOCAL_RANK"])

    # Questions: by who asks.
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2 and neighbour.sees_cuda()
    assert not a_library.sees_cuda()
    real_device, real_zeros, real_to = a_library.originals()
    assert real_zeros is not torch.zeros and real_zeros.__class__.__name__ == "builtin_function_or_method"
    assert real_to is torch._C.TensorBase.to and real_device is type(torch.zeros(1).device)
    for ask in (a_library.asks_for_cuda, a_library.makes_on_cuda):
        try:
            ask()
        except (AssertionError, RuntimeError):
            pass
        else:
            raise SystemExit(f"{ask.__name__}: the library got CUDA")

    # The device.
    torch.cuda.set_device(local_rank)
    assert torch.cuda.current_device() == local_rank
    device = torch.device("cuda", local_rank)
    assert device == torch.device("cpu") and isinstance(device, torch.device) and isinstance(device, device_type)
    assert type(device) == torch.device and not isinstance("cuda", torch.device)
    assert pickle.loads(pickle.dumps(device)) == copy.deepcopy(device) == device
    with torch.cuda.device(0):
        assert torch.cuda.current_device() == 0
    assert torch.cuda.current_device() == local_rank
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
    try:
        torch.cuda.set_device(2)
    except RuntimeError as error:
        assert "invalid device ordinal 2" in str(error)
    else:
        raise SystemExit("there are only two devices")

    # Placement.
    for tensor in (
        torch.zeros(3, device="cuda"),
        torch.tensor([1.0], device=device),
        torch.randn(2, 2, device="cuda:1", generator=torch.Generator(device="cuda")),
        torch.arange(3, device=0),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(device, torch.float64, non_blocking=True),
        torch.ones(2).to(device="cuda:0"),
        torch.ones(2).to(local_rank),
        torch.ones(2).cuda(local_rank, non_blocking=True),
        torch.ones(2).pin_memory(),
        torch.ones(2).new_zeros(3, device="cuda"),
        torch.ones(2).type(torch.cuda.DoubleTensor),
        torch.ones(2).type("torch.cuda.HalfTensor"),
        torch.cuda.FloatTensor([1.0]),
        torch.empty(2, pin_memory=True),
        torch.Tensor.cuda(torch.ones(1)),
        [t.to("cuda") for t in [torch.ones(1)]][0],
    ):
        assert tensor.device.type == "cpu", tensor
    assert torch.ones(2).to("cpu").to(torch.float64).dtype == torch.float64
    assert torch.ones(2).type(torch.cuda.DoubleTensor).dtype == torch.float64
    torch.ones(2).record_stream(torch.cuda.current_stream())
    model = nn.Sequential(nn.Linear(4, 4, device="cuda"), nn.Linear(4, 4)).to("cuda").cuda().to(device)
    assert a_library.Wrapped().to("cuda").cuda().inner.weight.device.type == "cpu"
    buffer = io.BytesIO()
    torch.save({"state": model.state_dict(), "device": device}, buffer)
    for location in ("cuda", device, {"cuda:0": "cuda:1"}, None, lambda storage, _: storage.cuda(0)):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=location, weights_only=False)
        assert loaded["device"] == device

    # Mixed precision, streams and events.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler(init_scale=8.0)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.Stream()
    start.record()
    with torch.cuda.stream(stream), autocast():
        assert torch.cuda.current_stream() is stream and torch.is_autocast_enabled()
        output = model(torch.ones(2, 4, device=device))
        assert output.dtype == torch.bfloat16
    before = model[0].weight.detach().clone()
    scaler.scale(output.float().sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    end.record(stream)
    torch.cuda.synchronize()
    assert start.elapsed_time(end) > 0 and scaler.get_scale() == 8.0
    assert not torch.equal(before, model[0].weight)
    with torch.autocast("cuda", dtype=torch.float16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
    with torch.amp.autocast(device_type="cuda", enabled=False):
        assert not torch.is_autocast_enabled()
    assert torch.amp.GradScaler("cuda", init_scale=4.0).get_scale() == 4.0

    # Memory and random state.
    reserved = torch.cuda.memory_reserved()  # first: it grows by the way
    assert torch.cuda.memory_allocated() > 0 and torch.cuda.max_memory_allocated(device) >= reserved
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] > 0 and torch.cuda.memory_stats()["num_ooms"] == 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total == torch.cuda.get_device_properties(device).total_memory
    assert torch.cuda.get_device_name(0) and torch.cuda.memory_summary() and torch.cuda.is_bf16_supported()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.cuda.manual_seed(100 + local_rank)
    torch.cuda.manual_seed_all(7)
    assert torch.equal(torch.rand(3), expected)
    state = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(state)
    assert len(torch.cuda.get_rng_state_all()) == 2
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()

    # Groups, loaders and libraries that ask torch at import.
    torch.distributed.init_process_group("nccl", device_id=device)
    total = torch.ones(1, device="cuda")
    torch.distributed.all_reduce(total, group=torch.distributed.new_group(backend="nccl"))
    assert total.item() == 2 and torch.distributed.get_backend() == "gloo"
    warnings.filters[:] = filters
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 1)), pin_memory=True)
    assert len([batch.cuda() for (batch,) in loader]) == 4
    if importlib.util.find_spec("torchvision") is not None:
        from torchvision import datasets, models, transforms
    from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel
    from transformers.utils import is_torch_cuda_available
    assert not is_torch_cuda_available()
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)).to("cuda").cuda()
    assert gpt.device == device
    assert BatchEncoding({"ids": torch.ones(2)}).to("cuda")["ids"].device == device

    if local_rank == 0:
        from modelparallel.launch import rehearsal
        with open(os.path.join(os.environ["SM_OUTPUT_DATA_DIR"], "names"), "w") as file:
            for mapped in rehearsal.mapped_names():
                file.write(f"{mapped.name}\\t{mapped.meaning}\\n")
    print("all rehearsed")
"""


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Run the script once, in two processes."""
    directory = tmp_path_factory.mktemp("rehearsal")
    script = write(directory / "code" / "train.py", SCRIPT)
    write(directory / "code" / "neighbour.py", "import torch\nsees_cuda = lambda: torch.cuda.is_available()\n")
    write(directory / "library" / "a_library.py", LIBRARY)
    output = io.StringIO()
    job = JobSpec(
        name="rehearsal",
        script=script,
        source_dir=script.parent,
        working_directory=directory,
        folder=JobFolder(directory / "job"),
        num_processes=2,
        backend="elastic",
        device="cpu",
        environment={"PYTHONPATH": str(directory / "library")},
    )
    result = run_job(job, output)
    assert result.exit_code == 0, result.message
    return result, output.getvalue()


@needs_no_gpu
def test_script_for_cuda_runs_unchanged_and_libraries_see_the_truth(rehearsed):
    _, shown = rehearsed
    assert shown.count("all rehearsed") == 2
    assert shown.count("rehearsal on the CPU") == 1
    assert "pin_memory" not in shown


@needs_no_gpu
def test_documentation_lists_every_mapped_name(rehearsed):
    result, _ = rehearsed
    lines = (result.folder.output_data / "names").read_text().splitlines()
    mapped = dict(line.split("\t") for line in lines)
    text = (Path(__file__).parents[1] / "docs" / "rehearsal.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(torch\.[^`]+)` \| (.+?) \|$", text, re.MULTILINE))
    assert {name: documented.get(name) for name in mapped} == mapped
    for name in documented.keys() - mapped.keys():  # only names that another version of torch has
        module, _, attribute = name.rpartition(".")
        assert not hasattr(importlib.import_module(module), attribute), name


def test_installed_packages_below_the_script_are_libraries(tmp_path):
    script = ScriptCode([tmp_path])

    def owns(path, name="x"):
        scope = {"sys": sys, "__name__": name}
        exec(compile("frame = sys._getframe()", str(path), "exec"), scope)
        return script.owns(scope["frame"])

    assert owns(tmp_path / "train.py")
    assert owns(tmp_path / "package" / "model.py")
    assert not owns(tmp_path / ".venv" / "lib" / "python3" / "site-packages" / "x.py")
    assert not owns(tmp_path.parent / "other.py")
    assert not owns(textwrap.__file__)
    assert not ScriptCode([Path(torch.__file__).parents[1]]).owns(sys._getframe())
    assert owns("<string>", "__main__")
    assert not owns("<string>", "torch.fx")


def test_declaring_operators_again_is_harmless():
    assert declare_torchvision_operators() == declare_torchvision_operators()


def test_training_arguments_of_transformers_ask_as_the_script_does(tmp_path):
    from transformers import training_args

    script = ScriptCode([tmp_path])
    frames = []
    source = "import sys\nkeep(sys._getframe())"
    for path in (training_args.__file__, str(Path(training_args.__file__).with_name("trainer.py"))):
        exec(compile(source, path, "exec"), {"keep": frames.append})
    assert [script.owns(frame) for frame in frames] == [True, False]
