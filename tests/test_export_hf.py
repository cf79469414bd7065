"""``smp.export_hf`` and ``smp.import_hf``: folders of safetensors that plain transformers writes and loads."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file

import modelparallel as smp
from distributed_run import shared_folder
from huggingface_models import KINDS, gpt2_config, masked_ids
from modelparallel.checkpoints.huggingface.names import _place_of
from modelparallel.checkpoints.huggingface.safetensors_files import (
    SafetensorsWriter,
    TensorToWrite,
    parse_size,
    split_into_files,
    write_folder,
)
from modelparallel.checkpoints.huggingface.safetensors_reading import RectangleReader, stored_tensors
from modelparallel.checkpoints.partial.whole_tensors import WholeTensors
from modelparallel.checkpoints.stores.completion import Draft
from modelparallel.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    DivergenceError,
    SMPConfigError,
    StepUsageError,
)
from plan_families import make_family
from rank_tests import RankTests, on
from stateful_model import make_net, wrap
from stateful_model import train_step as train_net
from training import step_of

WAIT = {"message_timeout_seconds": 20}
SINGLE = RankTests(1, WAIT)
_PP2_TP2 = {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2, "_match_weights": True}
PP2_TP2 = RankTests(4, {**_PP2_TP2, **WAIT})
PP2_TP2_MORE = RankTests(4, {**_PP2_TP2, **WAIT})
SHARDED = RankTests(2, {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 20, **WAIT})
BF16 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "bf16": True, **WAIT})
BF16_SHARDED = RankTests(
    2, {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 20, "bf16": True, **WAIT}
)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}


def new_path() -> str:
    """A path that all ranks have, where nothing is yet."""
    return shared_folder() + "/model"


@smp.step
def train_step(model, ids):
    loss = model(input_ids=ids, labels=ids)["loss"]
    model.backward(loss)
    return loss


@smp.step
def logits_step(model, ids):
    return model(input_ids=ids)["logits"]


def some_ids() -> torch.Tensor:
    return masked_ids(4, torch.Generator().manual_seed(3))[0]


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    """The same on all ranks: of the last stage."""
    with torch.no_grad():
        output = logits_step(model.eval(), ids).concat()
    return smp.allgather(output, smp.WORLD)[-1] if smp.pp_size() > 1 else output


def plain_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids)["logits"]


def make_gpt2(seed: int, **more):
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(gpt2_config(**more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def wrap_gpt2(seed: int, is_swapped: bool, **more):
    plain = make_gpt2(seed, **more)
    if is_swapped:
        smp.set_tensor_parallelism(plain)
    model = smp.DistributedModel(plain)
    return model, smp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(model, optimizer, step=train_step, data=None, num_steps: int = 2) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        step(model.train(), some_ids() if data is None else data)
        optimizer.step()


def tensors_in(folder: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors"):
            found.update(load_file(f"{folder}/{file}"))
    return found


# Models of transformers


@on(PP2_TP2)
def test_a_trained_gpt2_is_loaded_by_plain_transformers_with_the_same_logits():
    for is_swapped in (True, False):
        model, optimizer = wrap_gpt2(1, is_swapped)
        assert ("Distributed" in type(model.module).__name__) == is_swapped
        train(model, optimizer)
        folder = new_path()
        smp.export_hf(folder, model, max_shard_size=3000)
        logits = logits_of(model, some_ids())
        if smp.rank() == 0:
            auto: Any = transformers.AutoModelForCausalLM
            loaded, report = auto.from_pretrained(folder, output_loading_info=True)
            assert type(loaded) is transformers.GPT2LMHeadModel
            assert not any(report.values()), report
            torch.testing.assert_close(plain_logits(loaded, some_ids()), logits, **TOLERANCE)
            plain = make_gpt2(1)  # transformers 5 saves what it has loaded in another order
            plain.load_state_dict(loaded.state_dict())
            plain.save_pretrained(f"{folder}-plain", max_shard_size=3000)
            ours, theirs = (json.loads(Path(f"{folder}{end}/config.json").read_text()) for end in ("", "-plain"))
            assert ours == theirs
            ours, theirs = (
                json.loads(Path(f"{folder}{end}/model.safetensors.index.json").read_text()) for end in ("", "-plain")
            )
            assert ours == theirs, "the same tensors in the same files, tied weights once"
            assert len(set(ours["weight_map"].values())) == 8
            names = {*os.listdir(f"{folder}-plain"), "complete.json"}
            assert set(os.listdir(folder)) == names
            torch.testing.assert_close(tensors_in(folder), tensors_in(f"{folder}-plain"), **EXACT)
        smp.barrier()


@on(PP2_TP2)
def test_what_plain_transformers_saves_is_imported_before_and_after_the_partition():
    folder = new_path()
    plain = make_gpt2(7)
    if smp.rank() == 0:
        plain.save_pretrained(folder, max_shard_size="4KB")
    smp.barrier()
    expected = plain_logits(plain, some_ids())
    for is_swapped in (True, False):
        for is_early, is_delayed in ((True, False), (True, True), (False, False)):
            with smp.delay_param_initialization(is_delayed):
                model, optimizer = wrap_gpt2(2, is_swapped)
            if not is_early:
                train(model, optimizer, num_steps=1)
            assert smp.import_hf(folder, model) == ([], [])
            if is_early:
                with pytest.raises(StepUsageError, match="when it is partitioned"):
                    smp.export_hf(f"{folder}-early", model)
            torch.testing.assert_close(logits_of(model, some_ids()), expected, **TOLERANCE)
            again = new_path()
            smp.export_hf(again, model)
            torch.testing.assert_close(tensors_in(again), tensors_in(folder), **EXACT)


# Queries, keys and values apart; the head untied and the names transposed; a part of the model.
@on(PP2_TP2)
def test_families_that_are_replaced_come_back_to_the_bit():
    replaced_families_come_back("gpt2-options", "bert")


@pytest.mark.slow
@on(PP2_TP2_MORE)
def test_more_families_that_are_replaced_come_back_to_the_bit():
    replaced_families_come_back("gpt2-crossed", "gpt2-classes", "gptj", "gptneo", "roberta")


def replaced_families_come_back(*names: str) -> None:
    for name in names:
        kind = KINDS[name]
        plain = kind.make()
        folder = new_path()
        smp.set_tensor_parallelism(plain)
        model = smp.DistributedModel(plain)
        smp.export_hf(folder, model, max_shard_size=5000)
        if smp.rank() == 0:
            loaded, report = kind.model_class.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
            assert not any(report.values()), (name, report)
            torch.testing.assert_close(loaded.state_dict(), dict(kind.make().state_dict()), **EXACT)
        other = kind.make()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        smp.set_tensor_parallelism(other)
        other = smp.DistributedModel(other)
        smp.import_hf(folder, other)
        _partition(other, kind)
        torch.testing.assert_close(other.state_dict(), model.state_dict(), **EXACT)


def _partition(model, kind) -> None:
    step = step_of(kind.loss)
    step(model, *kind.batches(4)[0])


@on(PP2_TP2)
def test_families_that_are_split_by_their_plan_come_back():
    planned_families_come_back("llama-tied")


@pytest.mark.slow
@on(PP2_TP2_MORE)
def test_more_families_that_are_split_by_their_plan_come_back():
    planned_families_come_back("llama", "phi3", "mixtral")


def planned_families_come_back(*families: str) -> None:
    for name in families:
        plain = make_family(name).float()
        folder = new_path()
        expected = {key: value.clone() for key, value in plain.state_dict().items()}
        # The names in memory: by default transformers 5 takes stacked experts apart in files.
        plain.save_pretrained(f"{folder}-plain-{smp.rank()}", save_original_format=False)
        smp.set_tensor_parallelism(plain)
        model = smp.DistributedModel(plain)
        train(model, smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01)))
        assert any(row.split is not None for row in model.table.rows())
        smp.export_hf(folder, model)
        logits = logits_of(model, some_ids())
        if smp.rank() == 0:
            auto: Any = transformers.AutoModelForCausalLM
            loaded, report = auto.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values()), (name, report)
            torch.testing.assert_close(plain_logits(loaded, some_ids()), logits, **TOLERANCE)
            assert all(not torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
            names = set(tensors_in(f"{folder}-plain-0"))
            assert set(tensors_in(folder)) == names
            assert ("lm_head.weight" in names) == (name in ("llama", "phi3", "mixtral"))


@on(SHARDED, BF16, BF16_SHARDED)
def test_sharded_and_half_models_come_back():
    model, optimizer = wrap_gpt2(1, False)
    train(model, optimizer)
    is_half = smp.state.cfg.bf16
    folder = new_path()
    smp.export_hf(folder, model, max_shard_size=3000)
    smp.export_hf(f"{folder}-full", model, dtype=torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == (torch.bfloat16 if is_half else torch.float32)
    state = model.state_dict()
    expected = {name: state[name].to(loaded.dtype) for name in loaded.state_dict()}
    torch.testing.assert_close(loaded.state_dict(), expected, **EXACT)
    masters = tensors_in(f"{folder}-full")
    rounded = {name: value.bfloat16() for name, value in masters.items()} if is_half else masters
    torch.testing.assert_close(rounded, tensors_in(folder), **EXACT)
    assert all(bool((value != value.bfloat16().float()).any()) for value in masters.values()), "not rounded"

    for is_early in (True, False):
        other, other_optimizer = wrap_gpt2(3, False)
        if not is_early:
            train(other, other_optimizer, num_steps=1)
        smp.import_hf(f"{folder}-full", other)
        train_step(other, some_ids())
        smp.export_hf(f"{folder}-{is_early}", other, dtype=torch.float32)
        torch.testing.assert_close(tensors_in(f"{folder}-{is_early}"), masters, **EXACT)
        torch.testing.assert_close(other.state_dict(), state, **EXACT)


@on(SINGLE)
def test_files_of_the_body_and_of_older_models_are_read():
    folder = new_path()
    plain = KINDS["gpt2"].make()
    state = plain.state_dict()
    old = {name.removeprefix("transformer."): value for name, value in state.items() if "lm_head" not in name}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(old, f"{folder}.safetensors")
    model = smp.DistributedModel(make_gpt2(3).double())
    assert smp.import_hf(f"{folder}.safetensors", model) == ([], [])
    torch.testing.assert_close(model.state_dict(), dict(plain.state_dict()), **EXACT)
    plain = KINDS["bert"].make()
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in plain.state_dict().items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): value.clone() for name, value in old.items()}
    os.makedirs(folder)
    save_file(old, f"{folder}/model.safetensors")
    model = smp.DistributedModel(KINDS["bert"].model_class(KINDS["bert"].config()).double())
    smp.import_hf(folder, model)
    torch.testing.assert_close(model.state_dict(), dict(plain.state_dict()), **EXACT)


# Other modules


@on(PP2_TP2, SHARDED)
def test_any_module_is_exported_under_its_own_names():
    def make(seed):
        net = make_net(seed)
        return wrap(net.float() if smp.state.cfg.sharded_data_parallel_degree > 1 else net)

    model = make(1)
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01))
    train(model, optimizer, train_net, torch.arange(8))
    folder = new_path()
    smp.export_hf(folder, model)
    state = model.state_dict()
    assert sorted(os.listdir(folder)) == ["complete.json", "model.safetensors"]
    assert set(tensors_in(folder)) == set(state) - {"head.weight"}
    net = make_net(2).to(state["scale"].dtype)
    load_model(net, f"{folder}/model.safetensors")  # of safetensors, which also knows which names are tied
    running = ("running", "num_batches")  # of each copy
    expected = {name: value for name, value in state.items() if not any(word in name for word in running)}
    torch.testing.assert_close({name: net.state_dict()[name] for name in expected}, expected, **EXACT)
    for is_early in (True, False):
        other = make(4)
        if not is_early:
            train_net(other.train(), torch.arange(8))
        smp.import_hf(folder, other)
        train_net(other.eval(), torch.arange(8))
        torch.testing.assert_close({name: other.state_dict()[name] for name in expected}, expected, **EXACT)


class Stateful(torch.nn.Linear):
    def get_extra_state(self):
        return {"count": 1}

    def set_extra_state(self, state):
        pass


@on(SINGLE)
def test_what_no_file_of_safetensors_can_hold_is_refused():
    model = smp.DistributedModel(Stateful(2, 2))
    with pytest.raises(CheckpointError, match=r"'_extra_state' .* is no parameter or buffer but a dict"):
        smp.export_hf(new_path(), model)
    adapted = make_gpt2(1)
    adapted._hf_peft_config_loaded = True
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel has adapters"):
        smp.export_hf(new_path(), smp.DistributedModel(adapted))


@on(SINGLE)
def test_a_checkpoint_for_resuming_is_not_overwritten():
    folder = new_path()
    model = wrap(make_net(1))
    smp.save_checkpoint(folder, "t1", model=model)
    with pytest.raises(CheckpointError, match="and no weights"):
        smp.export_hf(f"{folder}/t1_partial", model, overwrite=True)


@on(SINGLE)
def test_weights_that_are_tied_against_the_configuration_are_written_under_each_name():
    plain = make_gpt2(1, tie_word_embeddings=False)
    plain.lm_head.weight = plain.transformer.wte.weight
    folder = new_path()
    smp.export_hf(folder, smp.DistributedModel(plain))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(plain_logits(loaded, some_ids()), plain_logits(plain, some_ids()), **EXACT)


@on(SINGLE)
def test_urls_and_a_process_without_transformers(hidden=("transformers", "huggingface_hub")):
    taken = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in hidden}
    blocked = dict.fromkeys(hidden)
    sys.modules.update(blocked)
    try:
        model = wrap(make_net(1))
        smp.export_hf("memory://exports/a", model, max_shard_size=400)
        names = [Path(name).name for name in fsspec_names("memory://exports")]
        assert "model.safetensors.index.json" in names and "complete.json" in names and "draft.json" not in names
        other = wrap(make_net(2))
        smp.import_hf("memory://exports/a", other)
        torch.testing.assert_close(other.state_dict(), model.state_dict(), **EXACT)
        with pytest.raises(CheckpointError, match="overwrite=True"):
            smp.export_hf("memory://exports/a", model)
        smp.export_hf("memory://exports/a", model, overwrite=True)
        assert len(fsspec_names("memory://exports")) == 2
        with fsspec.open("memory://exports/a/draft.json", "wb") as file:
            file.write(b"{}")
        fsspec.filesystem("memory").rm("/exports/a/complete.json")
        with pytest.raises(CheckpointCorruptError, match="broken off"):
            smp.import_hf("memory://exports/a", other)
        smp.export_hf("memory://exports/a", model)  # what was broken off is no export
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(taken)


# Failures


@on(PP2_TP2)
def test_what_does_not_fit_is_an_error_on_all_ranks():
    folder = new_path()
    plain = make_gpt2(7)
    if smp.rank() == 0:
        plain.save_pretrained(folder)
        wider = make_gpt2(7, n_embd=32)
        wider.save_pretrained(f"{folder}-wide")
        state = load_file(f"{folder}/model.safetensors")
        state["transformer.h.9.ln_1.weight"] = state.pop("transformer.h.1.ln_1.weight")
        os.makedirs(f"{folder}-renamed")
        save_file(state, f"{folder}-renamed/model.safetensors")
        os.makedirs(f"{folder}-torn")
        data = Path(f"{folder}/model.safetensors").read_bytes()
        Path(f"{folder}-torn/model.safetensors").write_bytes(data[:-10])
        os.makedirs(f"{folder}-torch")
        torch.save({}, f"{folder}-torch/pytorch_model.bin")
    smp.barrier()
    model, _ = wrap_gpt2(1, True)
    before = model.state_dict()
    message = r"missing transformer\.h\.1\.ln_1\.weight; unexpected transformer\.h\.9\.ln_1\.weight"
    with pytest.raises(CheckpointError, match=message):
        smp.import_hf(f"{folder}-renamed", model)
    shape = r"'transformer\.wte\.weight' has shape \(13, 32\) in the files and \(13, 16\) in the model"
    with pytest.raises(CheckpointError, match=shape):
        smp.import_hf(f"{folder}-wide", model, strict=False)
    with pytest.raises(CheckpointCorruptError, match="not a whole file of safetensors"):
        smp.import_hf(f"{folder}-torn", model)
    with pytest.raises(CheckpointNotFoundError, match=r"tag='pytorch_model\.bin'"):
        smp.import_hf(f"{folder}-torch", model)
    with pytest.raises(CheckpointNotFoundError, match="there is nothing"):
        smp.import_hf(f"{folder}-nowhere", model)
    with pytest.raises(SMPConfigError if smp.rank() == 2 else CheckpointError, match=r"expected a smp\.Distributed"):
        smp.import_hf(folder, plain if smp.rank() == 2 else model)
    torch.testing.assert_close(model.state_dict(), before, **EXACT)
    found = smp.import_hf(f"{folder}-renamed", model, strict=False)
    assert found.missing_keys == ["transformer.h.1.ln_1.weight"]
    assert found.unexpected_keys == ["transformer.h.9.ln_1.weight"]


@on(PP2_TP2)
def test_an_export_that_fails_leaves_nothing_and_touches_nothing():
    folder = new_path()
    model, _ = wrap_gpt2(1, False)
    arguments = {"max_shard_size": 3000}
    with pytest.raises(DivergenceError, match="with equal arguments"):
        smp.export_hf(folder, model, max_shard_size=3000 + smp.rank())
    for wrong in ({"dtype": torch.int32}, {"max_shard_size": "many"}, {"max_shard_size": 0}):
        with pytest.raises((SMPConfigError, CheckpointError), match=next(iter(wrong))):
            smp.export_hf(folder, model, **wrong)
    assert not os.path.exists(folder)
    write = SafetensorsWriter.write

    def failing(writer, name, tensor):
        if smp.rank() == 1 and "h.1" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, name, tensor)

    def try_to_export(**more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SafetensorsWriter, "write", failing)
            with pytest.raises((CheckpointError, OSError), match="No space left"):
                smp.export_hf(folder, model, **arguments, **more)
        smp.barrier()

    try_to_export()
    assert os.listdir(os.path.dirname(folder)) == []
    smp.export_hf(folder, model, **arguments)
    expected = tensors_in(folder)
    with pytest.raises(CheckpointError, match=r"is there already.*overwrite=True"):
        smp.export_hf(folder, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    try_to_export(overwrite=True)
    assert os.listdir(os.path.dirname(folder)) == ["model"]
    torch.testing.assert_close(tensors_in(folder), expected, **EXACT)
    smp.export_hf(folder, model, overwrite=True)
    assert sorted(os.listdir(folder)) == ["complete.json", "config.json", "generation_config.json", "model.safetensors"]
    assert not torch.equal(tensors_in(folder)["transformer.wte.weight"], expected["transformer.wte.weight"])
    with pytest.raises(CheckpointError, match=r"holds model and no weights"):
        smp.export_hf(os.path.dirname(folder), model, overwrite=True)


@on(PP2_TP2)
def test_a_rank_holds_one_whole_tensor_at_a_time():
    model, _ = wrap_gpt2(1, True)
    logits_of(model, some_ids())
    sizes: list[int] = []
    alive: list[weakref.ref] = []
    put_together = WholeTensors.put_together

    def watched(self, wanted):
        assert all(reference() is None for reference in alive)
        tensor = put_together(self, wanted)
        if tensor is not None:
            alive.append(weakref.ref(tensor))
            sizes.append(tensor.numel())
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeTensors, "put_together", watched)
        smp.export_hf(new_path(), model, max_shard_size=3000)
    assert sizes
    everything = [count for counts in smp.allgather(sizes, smp.WORLD) for count in counts]
    whole = sum(parameter.numel() for parameter in make_gpt2(1).parameters())
    assert sum(everything) == whole, "each tensor was sent to one rank, once"
    assert max(sum(counts) for counts in smp.allgather(sizes, smp.WORLD)) < 0.6 * whole


# Files alone


def test_tensors_are_divided_as_huggingface_hub_does_it():
    draw = random.Random(1)
    for _ in range(50):
        tensors = {f"t{i}": torch.empty(draw.randrange(0, 30), device="meta") for i in range(draw.randrange(1, 12))}
        limit = draw.randrange(1, 200)
        expected = split_torch_state_dict_into_shards(tensors, max_shard_size=limit).filename_to_tensors
        specs = {name: TensorToWrite.of(tensor) for name, tensor in tensors.items()}
        assert split_into_files(specs, limit) == {file: list(names) for file, names in expected.items()}
    assert [parse_size(text) for text in ("5GB", "1.5 kb", "2GiB", "7", 7)] == [5 * 10**9, 1500, 2 << 30, 7, 7]
    for wrong in ("", "GB", "-1", "5 bytes", 0, True, None):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            parse_size(wrong)


def test_files_are_those_of_safetensors_and_are_read_by_rectangles():
    torch.manual_seed(1)
    tensors = {
        "a": torch.randn(5, 7),
        "b": torch.arange(6).view(2, 3),
        "c": torch.tensor(2.5, dtype=torch.bfloat16),
        "d": torch.randn(4, 6, dtype=torch.float64).t(),
        "e": torch.zeros(0, 3),
        "f": torch.rand(3, 4, 5) > 0.5,
        "g": torch.randn(8).to(torch.float8_e4m3fn),
    }
    specs = {name: TensorToWrite.of(tensor) for name, tensor in tensors.items()}
    for folder in (tempfile.mkdtemp(), "memory://files/x"):
        calls: list[str] = []
        files = write_folder(
            folder,
            specs,
            lambda name, calls=calls: calls.append(name) or tensors[name],
            other_files={"config.json": b"{}"},
            max_shard_size=200,
            metadata={"made": "here"},
        )
        assert sorted(calls) == sorted(tensors) and len(files) > 1
        if "://" not in folder:
            found = tensors_in(folder)
            assert all(found[name].equal(value) and found[name].dtype == value.dtype for name, value in tensors.items())
            with safe_open(f"{folder}/{next(iter(files))}", framework="pt") as file:
                assert file.metadata() == {"format": "pt", "made": "here"}
        stored = stored_tensors(folder)
        assert {name: (each.dtype, each.shape) for name, each in stored.items()} == {
            name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()
        }
        with RectangleReader() as reader:
            for name, starts, lengths in (
                ("a", (1, 2), (3, 4)), ("b", (0, 1), (2, 1)), ("c", (), ()), ("d", (2, 0), (4, 3)),
                ("f", (1, 0, 2), (2, 3, 3)), ("g", (3,), (5,)),
            ):  # fmt: skip
                expected = tensors[name]
                for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                    expected = expected.narrow(dim, start, length)
                assert reader.read(stored[name], starts, lengths).equal(expected), name
        with pytest.raises(CheckpointError, match="overwrite=True"):
            write_folder(folder, specs, tensors.__getitem__)
        with pytest.raises(CheckpointError, match="which safetensors do not have"):
            write_folder(f"{folder}y", {"x": TensorToWrite(torch.complex128, (1,))}, lambda name: torch.zeros(1))
    shutil.rmtree(f"{folder}y", ignore_errors=True)


def test_what_a_killed_process_leaves_is_no_export():
    parent = Path(tempfile.mkdtemp())
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(4)}
    specs = {name: TensorToWrite.of(tensor) for name, tensor in tensors.items()}

    def read_until_killed(name):
        if name == "t2":
            raise KeyboardInterrupt
        return tensors[name]

    arguments = {"max_shard_size": 32, "other_files": {"config.json": b"{}"}}
    for path in (f"{parent}/model", "memory://killed/model"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Draft, "discard", lambda draft: None)  # nobody tidies up
            write_folder(path, specs, read_until_killed, **arguments)
        left = f"{parent}/.model.draft" if "://" not in path else path
        files = os.listdir(left) if "://" not in path else [name.rpartition("/")[2] for name in fsspec_names(path)]
        # The memory of fsspec shows files that were not closed.
        assert sorted(files)[:2] == ["draft.json", "model-00001-of-00002.safetensors"]
        assert len(files) == 2 or "://" in path
        with pytest.raises(CheckpointCorruptError, match="broken off"):
            stored_tensors(left)
        write_folder(path, specs, tensors.__getitem__, **arguments)
        assert stored_tensors(path).keys() == tensors.keys()
    assert os.listdir(parent) == ["model"]


def fsspec_names(url: str) -> list[str]:
    return fsspec.filesystem("memory").find(url.removeprefix("memory:/"))


def test_damaged_heads_are_refused():
    folder = Path(tempfile.mkdtemp())
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:-1], whole + b"x", b"", whole[:4], b"\xff" * 40, whole.replace(b'"F32"', b'"F64"')):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointCorruptError, match="not a whole file"):
            stored_tensors(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "part.safetensors").write_bytes(whole)
    for weight_map, message in (({"b": "part.safetensors"}, "holds b"), ({"a": "gone.safetensors"}, "is missing")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointCorruptError, match=message):
            stored_tensors(folder)
    # The caches of Hugging Face hold links to files elsewhere, which have other names.
    (folder / "part.safetensors").rename(folder.parent / f"{folder.name}-blob")
    (folder / "part.safetensors").symlink_to(folder.parent / f"{folder.name}-blob")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with RectangleReader() as reader:
        assert reader.read(stored_tensors(folder)["a"], (1,), (2,)).equal(torch.zeros(2))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../part.safetensors"}}))
    with pytest.raises(CheckpointError, match="is not the name of a file below"):
        stored_tensors(folder)


def test_views_are_found_again():
    draw = random.Random(2)
    for _ in range(300):
        shape = [draw.randrange(1, 5) for _ in range(draw.randrange(0, 4))]
        whole = torch.arange(1000)[: torch.Size(shape).numel()].view(shape)
        view = whole
        for dim, length in enumerate(shape):
            start = draw.randrange(length)
            view = view.narrow(dim, start, draw.randrange(1, length - start + 1))
        dims = list(range(len(shape)))
        draw.shuffle(dims)
        view = view.permute(dims)
        offsets, sizes, order = _place_of(view, whole)
        again = whole
        for dim, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
            again = again.narrow(dim, start, length)
        assert again.permute(order).equal(view)
    assert _place_of(torch.zeros(6).view(2, 3), torch.zeros(6)) is None
    assert _place_of(torch.zeros(2, 6)[:, ::2], torch.zeros(2, 6)) is None
