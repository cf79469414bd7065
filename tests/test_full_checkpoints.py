"""Full checkpoints: ``smp.save_checkpoint`` and ``smp.resume_from_checkpoint`` with ``partial=False``."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, GPT2Config

import modelparallel as smp
from distributed_run import shared_folder
from modelparallel.checkpoints.partial.user_content import configuration_class, named_types
from modelparallel.checkpoints.stores.completion import complete_names
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    SMPConfigError,
    SMPError,
)
from modelparallel.nn.huggingface import gpt2
from pool import run_ranks
from rank_tests import RankTests, on
from stateful_model import make_net, train_step, wrap

WAIT = {"message_timeout_seconds": 15}
SINGLE = RankTests(1, {})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, **WAIT})
TP2 = RankTests(2, {"tensor_parallel_degree": 2, **WAIT})
PP2_TP2 = RankTests(4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2, **WAIT})
SHARDED = RankTests(2, {"sharded_data_parallel_degree": 2, **WAIT})
OPTIMIZER_SHARDS = RankTests(2, {"shard_optimizer_state": True, **WAIT})
BF16 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "bf16": True, **WAIT})
FP16 = RankTests(1, {"fp16": True})
TRUSTING = RankTests(1, {"trust_pickles": True})
NAMING = RankTests(1, {"allowed_types": "test_full_checkpoints.Foreign"})
ALL = (SINGLE, PP2, TP2, PP2_TP2, SHARDED, OPTIMIZER_SHARDS, BF16, FP16)


def make_net_of_this_precision(seed: int):
    config = smp.state.cfg
    net = make_net(seed)
    return net.float() if config.bf16 or config.fp16 or config.sharded_data_parallel_degree > 1 else net


def make(seed: int, lr: float = 0.01):
    model = wrap(make_net_of_this_precision(seed))
    return model, smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=lr), static_loss_scale=8.0)


def train(model, optimizer, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        losses.append(train_step(model.train(), torch.arange(8)).reduce_mean().item())
        optimizer.step()
    return losses


def save(folder: str, tag: str = "t1", **arguments) -> None:
    smp.save_checkpoint(folder, tag=tag, partial=False, **arguments)


def resume(folder: str, tag: str | None = "t1", **arguments):
    return smp.resume_from_checkpoint(folder, tag=tag, partial=False, **arguments)


@on(*ALL)
def test_c091_full_checkpoints_are_one_file_and_restore_the_model():
    folder = shared_folder()
    model, optimizer = make(1)
    train(model, optimizer, 2)
    state = model.state_dict()
    save(f"{folder}/new", model=model, optimizer=optimizer, user_content={"step": 2, "args": argparse.Namespace(a=1)})
    assert sorted(os.listdir(f"{folder}/new")) == ["complete_t1.json", "newest", "t1", "user_content_t1"]
    assert Path(f"{folder}/new/newest").read_text() == "t1"
    torch.testing.assert_close(torch.load(f"{folder}/new/t1", weights_only=True), state, rtol=0, atol=0)
    for is_stepped in (False, True):
        other, other_optimizer = make(5)
        if is_stepped:
            train(other, other_optimizer, 1)
        assert resume(f"{folder}/new", None) == {"step": 2, "args": argparse.Namespace(a=1)}
        train_step(other, torch.arange(8))  # without an update: in a pipeline, the partition
        for name, value in other.state_dict().items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(value, state[name]), name
    save(f"{folder}/new", model=model)
    assert resume(f"{folder}/new") is None, "absent user content is tolerated"
    assert sorted(os.listdir(f"{folder}/new")) == ["complete_t1.json", "newest", "t1"]
    assert complete_names(open_store(f"{folder}/new"), is_full=True) == ["t1"]


@on(*ALL)
def test_full_optimizers_go_on_to_the_bit():
    folder = shared_folder()
    model, optimizer = make(1)
    train(model, optimizer, 2)
    save(folder, model=model, optimizer=optimizer, full_optimizer=True)
    expected = train(model, optimizer, 3), model.state_dict()
    for is_stepped in (False, True):
        other, other_optimizer = make(5, lr=0.5)
        if is_stepped:
            train(other, other_optimizer, 1)
        resume(folder)
        assert (train(other, other_optimizer, 3), other.state_dict().keys()) == (expected[0], expected[1].keys())
        torch.testing.assert_close(other.state_dict(), expected[1], rtol=0, atol=0)
    other, other_optimizer = make(5, lr=0.5)
    resume(folder, load_optimizer=False)
    assert other_optimizer.param_groups[0]["lr"] == 0.5


@on(PP2, TP2, PP2_TP2, SINGLE)
def test_plain_state_dicts_of_torch_are_loaded():
    folder = shared_folder()
    plain = make_net(7)
    if smp.rank() == 0:
        torch.save(plain.state_dict(), f"{folder}/full.pt")
        torch.save(plain.state_dict(), f"{folder}/old.pt", _use_new_zipfile_serialization=False)
        torch.save({"content": 3}, f"{folder}/user_content_full.pt")
        Path(folder, "user_content.pt").touch()
        Path(folder, "user_content_old.pt").touch()
    smp.barrier()
    for tag, content in (("full.pt", {"content": 3}), ("old.pt", None)):
        model, _ = make(1)
        assert resume(folder, tag, load_optimizer=False) == content
        torch.testing.assert_close(model.state_dict(), dict(plain.state_dict()), rtol=0, atol=0)
    renamed = {f"old.{name}": value for name, value in plain.state_dict().items()}
    if smp.rank() == 0:
        torch.save(renamed, f"{folder}/renamed.pt")
    smp.barrier()
    model, _ = make(1)
    with pytest.raises(RuntimeError, match=r"unexpected \['old\."):
        resume(folder, "renamed.pt")
    resume(folder, "renamed.pt", translate_function=lambda sd: {name[4:]: value for name, value in sd.items()})
    torch.testing.assert_close(model.state_dict(), dict(plain.state_dict()), rtol=0, atol=0)
    del renamed["old.norm.weight"]
    if smp.rank() == 0:
        torch.save({name[4:]: value for name, value in renamed.items()}, f"{folder}/short.pt")
    smp.barrier()
    with pytest.raises(RuntimeError, match=r"missing \['norm\.weight'\]"):
        resume(folder, "short.pt")
    resume(folder, "short.pt", strict=False)


@on(PP2, TP2, SINGLE)
def test_what_transformers_writes_is_loaded_where_pytorch_model_bin_is_asked_for():
    plain = make_net(7).state_dict()
    stored = {name: value for name, value in plain.items() if name != "head.weight"}  # tied: transformers drops it
    first = dict(list(stored.items())[:4])
    parts = {"a": first, "b": {name: value for name, value in stored.items() if name not in first}}
    for kind in ("model.safetensors", "safetensors index", "bin index"):
        folder = shared_folder()
        if smp.rank() == 0:
            ending = "bin" if kind == "bin index" else "safetensors"
            write = torch.save if kind == "bin index" else save_file
            if kind == "model.safetensors":
                save_file(stored, f"{folder}/model.safetensors")
            else:
                for name, part in parts.items():
                    write(part, f"{folder}/{name}.{ending}")
                weight_map = {name: f"{part}.{ending}" for part in parts for name in parts[part]}
                stem = "pytorch_model.bin" if ending == "bin" else "model.safetensors"
                Path(folder, f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
            Path(folder, "user_content.pt").touch()
        smp.barrier()
        model, _ = make(1)
        assert resume(folder, "pytorch_model.bin", load_optimizer=False) is None
        torch.testing.assert_close(model.state_dict(), dict(plain), rtol=0, atol=0)
        with pytest.raises(CheckpointNotFoundError, match="there is no full checkpoint 'other\\.bin'"):
            resume(folder, "other.bin")
        smp.barrier()
        if kind != "model.safetensors":
            if smp.rank() == 0:
                os.remove(f"{folder}/b.{ending}")
            smp.barrier()
            with pytest.raises(CheckpointCorruptError, match=r"b\.\w+' is missing"):
                resume(folder, "pytorch_model.bin")


@on(PP2, SINGLE)
def test_damage_is_found_and_every_rank_hears_of_it():
    folder = shared_folder()
    model, _ = make(1)
    save(folder, model=model, user_content=1)
    before = model.state_dict()
    if smp.rank() == 0:
        with open(f"{folder}/t1", "r+b") as file:
            file.seek(-500, os.SEEK_END)
            file.write(b"\x55" * 8)
    smp.barrier()
    with pytest.raises(CheckpointCorruptError, match="its digest is another one"):
        resume(folder)
    smp.barrier()
    if smp.rank() == 0:
        os.truncate(f"{folder}/t1", 400)
    smp.barrier()
    with pytest.raises(CheckpointCorruptError, match="has 400 bytes"):
        resume(folder)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="a tag becomes the name of a file"):
        save(folder, "../t1", model=model)
    with pytest.raises(CheckpointNotFoundError, match=r"there is no full checkpoint 't9'.*looked for t9"):
        resume(folder, "t9")


class Foreign:
    """A class that is not on the allow-list."""


@on(PP2)
def test_user_content_is_opened_by_an_allow_list():
    folder = shared_folder()
    model, _ = make(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save(folder, model=model, user_content={"foreign": Foreign()})
        train_step(model, torch.arange(8))
        smp.save_checkpoint(folder, "p", model=model, user_content=[argparse.Namespace(of=Foreign())])
    texts = [str(one.message) for one in said]
    expected = 2 if smp.rank() == 0 else 0  # which writes it
    assert len(texts) == expected and all("does not open by itself" in t for t in texts), texts
    assert all("test_full_checkpoints.Foreign. Save plain data" in text for text in texts), texts
    with pytest.raises(CheckpointError, match=r"user_content in .*names test_full_checkpoints\.Foreign") as caught:
        resume(folder)
    assert "allowed_types=" in str(caught.value) and isinstance(caught.value, SMPError)
    for arguments in ({"allowed_types": [Foreign]}, {"trust_pickles": True}):
        assert isinstance(resume(folder, **arguments)["foreign"], Foreign)
    with (
        pytest.raises(CheckpointError, match=r"user_content cannot be saved")
        if smp.rank() == 0
        else pytest.raises(CheckpointError, match="rank 0 failed: CheckpointError: user_content cannot be saved")
    ):
        save(folder, model=model, user_content=lambda: 0)
    assert isinstance(resume(folder, trust_pickles=True)["foreign"], Foreign), "the one before is untouched"
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


class OwnConfig(GPT2Config):
    """A configuration of a script."""

    model_type = "own"


@on(SINGLE, TRUSTING, NAMING)
def test_configurations_are_data_and_switches_allow_more():
    folder, config = shared_folder(), smp.state.cfg
    model, _ = make(1)
    train_step(model, torch.arange(8))
    generation = GenerationConfig(max_new_tokens=3)
    content: dict[str, Any] = {
        "config": GPT2Config(n_embd=32, dtype=torch.float16),
        "own": OwnConfig(n_layer=3),
        "how": generation,
    }
    is_open = config.trust_pickles or bool(config.allowed_types)
    if is_open:
        content["foreign"] = Foreign()
    for partial in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is saved that cannot be read
            smp.save_checkpoint(folder, "t1", partial, model=model, user_content=content)
        found = smp.resume_from_checkpoint(folder, "t1", partial)
        assert type(found["config"]) is GPT2Config and type(found["own"]) is OwnConfig
        for name in ("config", "own", "how"):
            assert found[name].to_dict() == content[name].to_dict()
        assert isinstance(found.get("foreign"), Foreign) == is_open


def test_what_is_a_configuration(tmp_path):
    gpt2, generation = "transformers.models.gpt2", "transformers.generation.configuration_utils"
    assert configuration_class(f"{gpt2}.configuration_gpt2.GPT2Config") is GPT2Config
    assert configuration_class(f"{generation}.GenerationConfig") is GenerationConfig
    assert configuration_class(f"{__name__}.OwnConfig") is OwnConfig
    assert configuration_class("transformers.models.opt.configuration_opt.OPTConfig").__name__ == "OPTConfig"
    for name in ("os.system", f"{gpt2}.configuration_gpt2.logger", f"{gpt2}.modeling_gpt2.GPT2Model", "no.such", "x",
                 f"{gpt2}.configuration_gpt2.OrderedDict", "transformers.models.gpt2.configuration_none.A",
                 f"{__name__}.Foreign", "transformers.models.auto.configuration_auto.AutoConfig"):  # fmt: skip
        assert configuration_class(name) is None, name
    with pytest.raises(SMPConfigError, match=r"allowed_types: there is no class 'a\.B' .*write module\.Class"):
        named_types("a.B")
    assert named_types(f" {__name__}.Foreign, ") == [Foreign]


@on(SINGLE, PP2)
def test_full_checkpoints_at_urls():
    if smp.size() > 1:
        return  # memory:// is of one process
    model, _ = make(1)
    save("memory://full/run", model=model, user_content=[1])
    other, _ = make(2)
    assert resume("memory://full/run", None) == [1]
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


@on(PP2)
def test_delayed_models_take_what_is_loaded_before_the_first_step():
    folder = shared_folder()
    plain = make_net(7).state_dict()
    if smp.rank() == 0:
        torch.save(plain, f"{folder}/full.pt")
    smp.barrier()
    with smp.delay_param_initialization():
        net = make_net(1)
    model = wrap(net)
    smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    resume(folder, "full.pt")
    train_step(model.eval(), torch.arange(8))
    torch.testing.assert_close(model.state_dict(), dict(plain), rtol=0, atol=0)


# Another shape (statement 93)


def save_trained(folder):
    torch.manual_seed(3)
    model, optimizer = make(1)
    train(model, optimizer, 2)
    save(folder, model=model, optimizer=optimizer, full_optimizer=True)
    return train(model, optimizer, 3), model.state_dict()


def resume_trained(folder):
    model, optimizer = make(5, lr=0.5)
    resume(folder)
    return train(model, optimizer, 3), model.state_dict()


SHAPES = {
    "1x1": (1, {"microbatches": 2}),
    "1x4": (4, {"tensor_parallel_degree": 4, "microbatches": 2}),
    "4x1": (4, {"pipeline_parallel_degree": 4, "microbatches": 2}),
    "1x1 in 2 shards of the optimizer": (2, {"shard_optimizer_state": True, "microbatches": 2}),
}


def test_c093_full_checkpoints_of_2_stages_and_2_slices_load_on_other_shapes(tmp_path):
    parameters = {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2, "ddp": True}
    expected, expected_state = run_ranks(save_trained, 4, str(tmp_path), parameters=parameters)[0]
    for num_ranks, shape in SHAPES.values():
        for losses, state in run_ranks(resume_trained, num_ranks, str(tmp_path), parameters={"ddp": True, **shape}):
            assert losses == pytest.approx(expected, rel=1e-9)
            torch.testing.assert_close(state, expected_state, rtol=1e-9, atol=1e-12)


# Models of transformers (statement 89)


def load_translated(folder):
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    from huggingface_models import gpt2_config

    def build(seed):
        torch.manual_seed(seed)
        with smp.tensor_parallelism():
            net = GPT2LMHeadModel(gpt2_config()).double()
        return smp.DistributedModel(net)

    torch.manual_seed(9)
    plain = dict(GPT2LMHeadModel(gpt2_config()).double().state_dict())
    ours = gpt2.translate_hf_state_dict_to_smdistributed_gpt2(plain)
    model = build(1)
    model.load_state_dict(plain)  # no mark: of transformers
    torch.testing.assert_close(model.state_dict(), ours, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="missing"):
        model.load_state_dict({**plain, "_smp_is_partial": False})
    build(2).load_state_dict({**ours, "_smp_is_partial": False})

    smp.save_checkpoint(folder, tag="hf", partial=False, model=model)
    smp.save_checkpoint(folder, tag="ours", partial=False, model=model, translate_if_full=False)
    saved = {tag: torch.load(f"{folder}/{tag}", weights_only=True) for tag in ("hf", "ours")}
    torch.testing.assert_close(saved["hf"], plain, rtol=0, atol=0)
    torch.testing.assert_close(saved["ours"], ours, rtol=0, atol=0)
    for tag in ("hf", "ours"):
        other = build(3)
        smp.resume_from_checkpoint(folder, tag=tag, partial=False)
        torch.testing.assert_close(other.state_dict(), ours, rtol=0, atol=0)
    return True


@pytest.mark.parametrize("degree", ["tensor_parallel_degree", "pipeline_parallel_degree"])
def test_c089_dicts_of_transformers_are_translated_and_marked_ones_are_not(tmp_path, degree):
    assert all(run_ranks(load_translated, 2, str(tmp_path), parameters={degree: 2, "ddp": True}))
