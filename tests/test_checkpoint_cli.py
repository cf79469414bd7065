"""``modelparallel checkpoint inspect|verify|convert``: on checkpoints of jobs, from one process without groups."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import modelparallel as smp
from checkpoint_jobs import make_job, train
from modelparallel.checkpoints.partial.metadata_checks import coverage_problems
from modelparallel.checkpoints.tools import conversion, offline
from modelparallel.checkpoints.tools.catalogue import checkpoints_in, find
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from modelparallel.launch.command_line import app
from pool import preload, run_ranks

CLIPPING = {"sdp_gradient_clipping": 1e6, "sdp_param_persistence_threshold": 0}
SHAPES = {
    "pp2-tp2": (4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2, "ddp": True}),
    "shards-bf16": (2, {"shard_optimizer_state": True, "bf16": True, "ddp": True}),
    "fsdp-fp16": (2, {"sharded_data_parallel_degree": 2, "fp16": True, "ddp": True, **CLIPPING}),
}
CONTENT = {"epoch": 3, "history": [1.0, 2.0]}


def save_both(folder: str) -> None:
    """The same state twice: as a partial checkpoint and, gathered by the job, as a full one."""
    model, optimizer = make_job(0)
    train(model, optimizer, range(2))
    smp.save_checkpoint(f"{folder}/full", "t", partial=False, full_optimizer=True, user_content=CONTENT)
    smp.save_checkpoint(f"{folder}/partial", "t", user_content=CONTENT)


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    """The folder with a job's checkpoints: ``partial/`` and ``full/``."""
    folder = tmp_path_factory.mktemp(request.param)
    num_ranks, parameters = SHAPES[request.param]
    run_ranks(save_both, num_ranks, str(folder), parameters=parameters)
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The same of one shape."""
    folder = tmp_path_factory.mktemp("job")
    num_ranks, parameters = SHAPES["pp2-tp2"]
    run_ranks(save_both, num_ranks, str(folder), parameters=parameters)
    return folder


def command(*arguments, code=0):
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def equal(found, expected, where=""):
    """Whether two nested containers are the same, tensors to the bit; dicts in any order."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            equal(one, other, f"{where}.{number}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


def test_a_converted_checkpoint_is_the_full_one_that_the_job_has_saved(saved, tmp_path):
    """Model, optimizer with masters and loss scale, user content: to the bit."""
    assert "the optimizer's state" in command("convert", saved / "partial", tmp_path / "c", "--to", "full")
    assert sorted(os.listdir(tmp_path)) == ["c", "complete_c.json", "newest", "optimizer_c", "user_content_c"]
    for name in ("{}", "optimizer_{}", "user_content_{}"):
        found = torch.load(tmp_path / name.format("c"), weights_only=True)
        equal(found, torch.load(saved / "full" / name.format("t"), weights_only=True), name)
    assert command("verify", tmp_path, "--tag", "c").rstrip().endswith("whole")


def resume_both(converted: str, saved: str) -> tuple:
    results = []
    for path, tag in ((converted, "c"), (f"{saved}/full", "t"), (f"{saved}/partial", "t")):
        model, optimizer = make_job(1)
        content = smp.resume_from_checkpoint(path, tag, partial="partial" in path)
        results.append((content, train(model, optimizer, range(2, 4))))
    return tuple(results)


def test_a_job_of_another_shape_goes_on_with_it(job, tmp_path):
    command("convert", job / "partial", tmp_path / "c", "--to", "full")
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True}
    converted, full, partial = run_ranks(resume_both, 2, str(tmp_path), str(job), parameters=parameters)[0]
    assert converted == full
    assert converted[0] == partial[0] == CONTENT
    assert converted[1] == pytest.approx(partial[1], rel=1e-5)


def test_large_tensors_lie_on_disk_while_it_converts(job, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "SCRATCH_BYTES", 1)
    made = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, **more: made.append(name) or from_file(name, **more))
    command("convert", job / "partial", tmp_path / "c", "--to", "full")
    assert len(made) > 50 and all(os.path.dirname(name) == str(tmp_path) for name in made)
    equal(torch.load(tmp_path / "optimizer_c"), torch.load(job / "full" / "optimizer_t"))
    assert sorted(os.listdir(tmp_path)) == ["c", "complete_c.json", "newest", "optimizer_c", "user_content_c"]


def test_a_destination_is_replaced_only_on_request_and_never_half(job, tmp_path, monkeypatch):
    arguments = ("convert", job / "partial", tmp_path / "c", "--to", "full")
    command(*arguments)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert "exists" in command(*arguments, code=2) and "--overwrite" in command(*arguments, code=2)

    def fail(*_):
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("modelparallel.checkpoints.stores.completion.Draft.commit", fail)
        assert "the disk is full" in command(*arguments, "--overwrite", code=2)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    command(*arguments, "--overwrite", "--model-only")
    assert sorted(os.listdir(tmp_path)) == ["c", "complete_c.json", "newest", "user_content_c"]


def test_safetensors_hold_each_tensor_once(saved, tmp_path):
    """In several files with an index; a tied tensor under its first name. From the partial and from the full one."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    expected = torch.load(saved / "full" / "t", weights_only=True)
    for source in ("partial", "full"):
        folder = tmp_path / source
        arguments = ("convert", saved / source, folder, "--to", "safetensors", "--max-shard-size", "2KB")
        assert str(folder) in command(*arguments)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        state = {}
        for file in set(index.values()):
            state.update(load_file(folder / file))
        with safe_open(folder / file, framework="pt") as opened:
            tied = {name: to for name, to in opened.metadata().items() if name != "format"}
        assert state.keys() == index.keys() and state.keys() | tied.keys() == expected.keys()
        assert not (source == "partial" and not tied), "the model of this test has a tied tensor"
        equal({**state, **{name: state[to] for name, to in tied.items()}}, expected)
        assert command("verify", folder).rstrip().endswith("whole")
        assert "kind: exported, complete" in command("inspect", tmp_path, "--tag", source)
        assert "is there already" in command(*arguments, code=2)
        command(*arguments, "--overwrite")


def test_safetensors_of_another_dtype_come_from_the_masters(saved, tmp_path):
    from safetensors.torch import load_file

    command("convert", saved / "partial", tmp_path / "c", "--to", "safetensors", "--dtype", "float32")
    found = load_file(tmp_path / "c" / "model.safetensors")
    state = torch.load(saved / "full" / "t", weights_only=True)
    optimizer = torch.load(saved / "full" / "optimizer_t", weights_only=True)
    masters = [values["fp32_master"] for values in optimizer["state"].values() if "fp32_master" in values]
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, tensor in found.items():
        if masters:
            assert any(tensor.shape == master.shape and torch.equal(tensor, master) for master in masters), name
        else:
            assert torch.equal(tensor, state[name]), name
    assert "expected float32" in command(
        "convert", saved, tmp_path / "x", "--to", "safetensors", "--dtype", "x", code=2
    )


def save_gpt2(folder: str) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    from huggingface_models import gpt2_config

    torch.manual_seed(3)
    with smp.tensor_parallelism():
        net = GPT2LMHeadModel(gpt2_config())
    model = smp.DistributedModel(net)
    smp.DistributedOptimizer(torch.optim.Adam(model.parameters()))
    smp.save_checkpoint(f"{folder}/partial", "t")
    smp.save_checkpoint(f"{folder}/full", "hf", partial=False)
    smp.save_checkpoint(f"{folder}/full", "ours", partial=False, translate_if_full=False)


def test_replaced_models_of_transformers_come_out_under_their_names(tmp_path):
    """Distributed layers in place of GPT-2's: as the job translates them, and loaded by transformers."""
    transformers = pytest.importorskip("transformers")
    from huggingface_models import gpt2_config

    preload()  # transformers, which both ranks would import
    run_ranks(save_gpt2, 2, str(tmp_path), parameters={"tensor_parallel_degree": 2, "ddp": True})
    full = {tag: torch.load(tmp_path / "full" / tag, weights_only=True) for tag in ("hf", "ours")}
    source = tmp_path / "partial"
    assert "those of transformers (GPT2LMHeadModel)" in command("convert", source, tmp_path / "c", "--to", "full")
    equal(torch.load(tmp_path / "c"), full["hf"])
    command("convert", source, tmp_path / "d", "--to", "full", "--keep-names")
    equal(torch.load(tmp_path / "d"), full["ours"])
    gpt2_config().save_pretrained(tmp_path / "config")
    (tmp_path / "config" / "tokenizer.json").write_text("{}")
    for origin in (source, tmp_path / "full" / "hf"):
        folder = tmp_path / f"weights-{origin.name}"
        command("convert", origin, folder, "--to", "safetensors", "--config", tmp_path / "config")
        assert {"config.json", "tokenizer.json", "model.safetensors", "complete.json"} <= set(os.listdir(folder))
        net, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        equal(dict(net.state_dict()), full["hf"])
    config = tmp_path / "config" / "config.json"
    arguments = ("convert", source, tmp_path / "e", "--to", "safetensors", "--config", config)
    assert "1 tied tensors are left out: lm_head.weight" in command(*arguments)
    assert sorted(os.listdir(tmp_path / "e")) == ["complete.json", "config.json", "model.safetensors"]
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    assert "left out" not in command(*arguments, "--overwrite")
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "e").state_dict()
    assert torch.equal(found["lm_head.weight"], full["hf"]["lm_head.weight"])


def test_remote_folders_are_read_and_written(job, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(job / "partial"), "/cli/partial", recursive=True)
    try:
        assert "complete" in command("inspect", "memory://cli/partial")
        command("verify", "memory://cli/partial/t_partial")
        command("convert", "memory://cli/partial", "memory://cli/full/c", "--to", "full")
        with memory.open("/cli/full/c") as file:
            equal(torch.load(file), torch.load(job / "full" / "t"))
        command("verify", "memory://cli/full/c")
    finally:
        memory.rm("/cli", recursive=True)


def test_inspect_says_what_is_there(saved, tmp_path):
    text = command("inspect", saved / "partial")
    assert "* t_partial" in text and "step 2" in text and "complete" in text
    assert "epoch (int), history (list)" in text
    values = json.loads(command("inspect", saved / "partial", "--json"))
    found = values["checkpoint"]
    state = torch.load(saved / "full" / "t")
    expected = {f"model.{name}": value for name, value in state.items()}
    tensors = {entry["name"]: entry for entry in found["tensors"] if entry["part"] == "model"}
    assert tensors.keys() <= expected.keys()  # a tied tensor is stored once
    assert {name: entry["shape"] for name, entry in tensors.items()} == {
        name: list(expected[name].shape) for name in tensors
    }
    num_bytes = sum(expected[name].numel() * expected[name].element_size() for name in tensors)
    assert found["totals"]["model"]["bytes"] == num_bytes
    is_half = next(iter(state.values())).dtype != torch.float32
    assert ("masters" in found["totals"]) is is_half
    assert found["num_random_states"] == found["num_processes"] == (4 if "pp2-tp2" in str(saved) else 2)
    assert found["user_content"] == {"epoch": "int", "history": "list"}
    on_disk = {path.name: path.stat().st_size for path in (saved / "partial" / "t_partial").iterdir()}
    assert found["files"] == {name: size for name, size in on_disk.items() if name != "complete.json"}


def test_inspect_lists_as_many_tensors_as_asked(job):
    short, long = command("inspect", job / "partial"), command("inspect", job / "partial", "--tensors")
    assert "more (--tensors shows all)" in short and "more (" not in long
    assert len(long.splitlines()) > len(short.splitlines()) + 30


def test_inspect_of_other_kinds(job, tmp_path):
    from safetensors.torch import save_file

    weights = {"a.weight": torch.zeros(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    torch.save({"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1}]}, tmp_path / "other.pt")
    shutil.copytree(job / "partial" / "t_partial", tmp_path / "broken_partial")
    (tmp_path / "broken_partial" / "model_0_0.pt").write_bytes(b"")
    (tmp_path / ".new_partial.draft-0011").mkdir()
    (tmp_path / "old_partial").mkdir()
    torch.save({"a": torch.zeros(2)}, tmp_path / "old_partial" / "model_0_0.pt")
    torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}}, tmp_path / "old_partial" / "optimizer_0_0.pt")
    values = json.loads(command("inspect", tmp_path, "--json"))
    kinds = {entry["name"]: (entry["kind"], entry["is_complete"]) for entry in values["checkpoints"]}
    assert kinds == {
        "model.safetensors": ("huggingface", None),
        "other.pt": ("torch", None),
        "broken_partial": ("partial", False),
        "old_partial": ("original", None),
    }
    assert values["unfinished"] == [".new_partial.draft-0011"]
    assert {entry["name"]: entry["shape"] for entry in values["checkpoint"]["tensors"]} == {
        "a.weight": [3, 2],
        "b": [4],
    }
    assert {entry["name"]: entry["dtype"] for entry in values["checkpoint"]["tensors"]}["b"] == "bfloat16"
    found = json.loads(command("inspect", tmp_path / "other.pt", "--json"))["checkpoint"]
    assert [entry["name"] for entry in found["tensors"]] == ["state.0.step"] and found["objects"] == ["groups.0.lr"]
    assert "NOT COMPLETE: 'model_0_0.pt' has 0 bytes" in command("inspect", tmp_path, "--tag", "broken")
    old = json.loads(command("inspect", tmp_path, "--tag", "old", "--json"))["checkpoint"]
    assert [entry["name"] for entry in old["tensors"]] == ["model_0_0.pt: a", "optimizer_0_0.pt: state.0.exp_avg"]
    assert old["num_processes"] == 1 and old["totals"]["optimizer"]["bytes"] == 8
    assert "no completion record" in command("verify", tmp_path, "--tag", "old")
    assert "is of kind 'original'" in command(
        "convert", tmp_path / "old_partial", tmp_path / "x", "--to", "full", code=2
    )
    full = json.loads(command("inspect", job / "full", "--json"))["checkpoint"]
    assert full["kind"] == "full" and full["totals"]["optimizer"]["tensors"] > 10


class Factored(torch.optim.Optimizer):
    """One number for each row is its state; of a slice it is another than the slice of the whole parameter's."""

    is_elementwise = True  # so that it takes slices

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                rows = self.state[parameter]["rows"] = parameter.grad.norm(dim=-1)
                parameter.sub_(parameter.grad / (1 + rows.sum()), alpha=self.defaults["lr"])


def save_two_models(folder: str) -> None:
    first, first_optimizer = make_job(0)
    train(first, first_optimizer, range(1))
    second, _ = make_job(1)
    factored = smp.DistributedOptimizer(Factored(second.parameters()))
    train(second, factored, range(1))
    smp.save_checkpoint(f"{folder}/partial", "t", model=[first, second], optimizer=[first_optimizer, factored])
    for number, model in enumerate((first, second)):
        smp.save_checkpoint(f"{folder}/full", f"{number}", partial=False, model=model)


def test_one_of_several_models_and_state_that_cannot_be_joined(tmp_path):
    run_ranks(save_two_models, 2, str(tmp_path), parameters={"tensor_parallel_degree": 2, "ddp": True})
    arguments = ("convert", tmp_path / "partial", tmp_path / "c", "--to", "full")
    assert "holds 2 models: say which" in command(*arguments, code=2)
    assert "holds the models 0, 1" in command(*arguments, "--model-index", "2", code=2)
    for index, more in enumerate(([], ["--overwrite", "--model-only"])):
        command(*arguments, "--model-index", index, *more)
        equal(torch.load(tmp_path / "c"), torch.load(tmp_path / "full" / str(index)))
    text = command(*arguments, "--model-index", 1, "--overwrite", code=2)
    assert "was computed from a part of the parameter (tp_" in text and "--model-only" in text


def test_links_of_a_cache_of_transformers_are_followed(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.zeros(3)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    for path in (tmp_path / "snapshot", tmp_path / "snapshot" / "model.safetensors"):
        assert "a  [3] float32" in command("inspect", path)
        assert "no problem found" in command("verify", path)
    command("convert", tmp_path / "snapshot", tmp_path / "c", "--to", "safetensors")
    assert "a  [3] float32" in command("inspect", tmp_path / "c")


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_nothing_is_unpickled_that_is_not_allowed(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, tmp_path / "x.pt")
    assert "not allowed" in command("inspect", tmp_path / "x.pt", code=2)
    shutil.copytree(job / "partial", tmp_path / "copy")
    folder = tmp_path / "copy" / "t_partial"
    torch.save({"epoch": Harmful()}, folder / "user_content.pt")
    text = command("inspect", tmp_path / "copy")
    assert "user content: not opened" in text and "not allowed" in text
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful()))
    text = command("inspect", tmp_path / "copy", code=2)
    assert "* t_partial  partial" in text and "not among what may be in it" in text
    assert "'.metadata'" in command("verify", tmp_path / "copy", code=1)
    (folder / "complete.json").unlink()
    assert "not among what may be in it" in command("verify", tmp_path / "copy", code=1)
    assert not (tmp_path / "ran").exists()


def spoilt(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(data[:-1])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "cut off", "changed"])
def test_verify_names_every_file_that_is_not_what_was_written(job, tmp_path, how):
    for source, names in (("partial", os.listdir(job / "partial" / "t_partial")), ("full", ["t", "optimizer_t"])):
        for name in names:
            copy = tmp_path / f"{source}-{name}"
            shutil.copytree(job / source, copy)
            spoilt(copy / ("t_partial" if source == "partial" else "") / name, how)
            text = command("verify", copy, "--tag", "t", code=1)
            assert name in text, (name, how)
            assert "convert" not in text
            shutil.rmtree(copy)
    assert command("verify", job / "partial").rstrip().endswith("whole")


@pytest.mark.parametrize("how", ["missing", "cut off", "changed"])
def test_verify_looks_as_far_as_it_can_without_a_record(tmp_path, how):
    from safetensors.torch import save_file

    torch.save({"w": torch.arange(1000.0)}, tmp_path / "plain.pt")
    save_file({"a": torch.zeros(1000)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert "no completion record" in command("verify", tmp_path / "plain.pt")
    assert "no problem found" in command("verify", tmp_path)
    spoilt(tmp_path / "plain.pt", how)
    spoilt(tmp_path / "one.safetensors", how)
    command("verify", tmp_path / "plain.pt", code=2 if how == "missing" else 1)
    if how != "changed":  # safetensors have no checksums
        assert "one.safetensors" in command("verify", tmp_path, code=1)


@pytest.mark.parametrize(
    ("chunks", "problem"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], None),
        ([((0, 0), (4, 1)), ((0, 1), (2, 2)), ((2, 1), (2, 2))], None),
        ([((0, 0), (2, 3))], "12 elements, and its pieces hold 6"),
        ([((0, 0), (3, 3)), ((2, 0), (2, 3))], "overlap"),
        ([((0, 0), (4, 2)), ((0, 1), (4, 2))], "overlap"),
        ([((0, 0), (4, 3)), ((4, 0), (1, 3))], "outside of its shape"),
        ([((0, 0), (2, 3)), ((0, 0), (2, 3))], "overlap"),
        ([], "12 elements, and its pieces hold 0"),
    ],
)
def test_pieces_cover_a_tensor(chunks, problem):
    found = list(coverage_problems((4, 3), chunks))
    assert (problem is None and not found) or (len(found) == 1 and problem in found[0])


def test_verify_finds_a_tensor_that_lacks_a_piece(job, tmp_path):
    """An index that does not fit the files, though every file is what was written."""
    shutil.copytree(job / "partial" / "t_partial", tmp_path / "x_partial")
    place = tmp_path / "x_partial" / ".metadata"
    metadata = pickle.loads(place.read_bytes())
    key = next(key for key, value in metadata.state_dict_metadata.items() if len(getattr(value, "chunks", ())) > 1)
    metadata.state_dict_metadata[key].chunks.pop()
    place.write_bytes(pickle.dumps(metadata))
    (tmp_path / "x_partial" / "complete.json").unlink()
    text = command("verify", tmp_path / "x_partial", code=1)
    assert f"the tensor '{key}'" in text and "its pieces hold" in text


def test_a_damaged_checkpoint_is_not_converted(job, tmp_path):
    shutil.copytree(job / "partial", tmp_path / "copy")
    spoilt(tmp_path / "copy" / "t_partial" / "model_1_1.pt", "changed")
    assert "'model_1_1.pt'" in command("convert", tmp_path / "copy", tmp_path / "new" / "c", "--to", "full", code=2)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointCorruptError, match="model_1_1"):
        conversion.convert_to_full(tmp_path / "copy", tmp_path / "new" / "c")


def test_what_is_meant_by_a_path(job, tmp_path):
    shutil.copytree(job / "partial", tmp_path / "two")
    shutil.copytree(job / "partial" / "t_partial", tmp_path / "two" / "s_partial")
    place = os.path.relpath(tmp_path / "two" / "s_partial") + "/"
    assert find(place).name == "s_partial"
    assert find(tmp_path / "two").name == find(tmp_path / "two", "t").name == "t_partial"
    assert find(tmp_path / "two", "s").name == find(tmp_path / "two", "s_partial").name == "s_partial"
    (tmp_path / "two" / "newest").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"by its tag: .*s_partial"):
        find(tmp_path / "two")
    with pytest.raises(CheckpointNotFoundError, match=r"'u'.*s_partial"):
        find(tmp_path / "two", "u")
    os.rename(tmp_path / "two" / "s_partial", tmp_path / "two" / ".s_partial.old")  # a job died at this moment
    assert [(one.name, one.is_complete) for one in checkpoints_in(str(tmp_path / "two"))[0]] == [
        ("s_partial", True),
        ("t_partial", True),
    ]
    assert find(tmp_path / "two", "s").folder.path_of().endswith(".s_partial.old")
    for path in (tmp_path / "nothing", tmp_path):
        assert "checkpoint" in command("inspect", path, code=2)
