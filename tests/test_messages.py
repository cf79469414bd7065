"""Ranks, groups and object messages between real processes."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from modelparallel.comm.objects import dumps, loads
from modelparallel.config import load_config
from modelparallel.config.topology import CommGroup, GroupKind, RankType
from modelparallel.errors import (
    CommunicationError,
    DivergenceError,
    GroupMembershipError,
    GroupTypeError,
    NotInitializedError,
    SMPConfigError,
    WaitTimeoutError,
)
from modelparallel.job import messages as smp
from modelparallel.job import rendezvous, session
from modelparallel.job.discovery import ProcessIdentity
from modelparallel.training import runtime
from pool import RankError, run_ranks

WORLD_RANK, MP_RANK, PP_RANK = RankType.WORLD_RANK, RankType.MP_RANK, RankType.PP_RANK
MP_GROUP, DP_GROUP, WORLD = CommGroup.MP_GROUP, CommGroup.DP_GROUP, CommGroup.WORLD
PIPELINE = {"partitions": 2, "ddp": True}
BOTH = {"partitions": 2, "tensor_parallel_degree": 2, "ddp": True}


@dataclasses.dataclass
class Record:
    name: str
    weight: torch.Tensor


def wait_for_files(paths: list[Path], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"missing: {[path.name for path in paths if not path.exists()]}"
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and groups


def ranks_and_groups(parameters: dict[str, Any]) -> dict[str, Any]:
    session.initialize(parameters)
    report: dict[str, Any] = {"world": (smp.rank(), smp.size(), list(range(smp.size())))}
    for kind in ("tp", "pp", "rdp", "dp", "mp"):
        numbers = [getattr(smp, f"{kind}_{what}")() for what in ("rank", "size")]
        report[kind] = (*numbers, getattr(smp, f"get_{kind}_group")())
    report["local"] = (smp.local_rank(), smp.local_size())
    for kind in ("world", "tp", "pp", "rdp", "dp", "mp"):
        process_group = getattr(smp, f"get_{kind}_process_group")()
        total = torch.ones(())
        dist.all_reduce(total, group=process_group)
        report[f"{kind} process group"] = (process_group.size(), int(total))
    return report


@pytest.mark.parametrize("parameters", [BOTH, {**PIPELINE, "placement_strategy": "spread"}, {"ddp": True}])
def test_c010_process_groups(parameters: dict[str, Any]) -> None:
    for global_rank, report in enumerate(run_ranks(ranks_and_groups, 8, parameters)):
        assert report["world"][0] == global_rank
        assert report["local"] == (global_rank, 8)
        for kind in ("world", "tp", "pp", "rdp", "dp", "mp"):
            rank_in_group, size, ranks = report[kind]
            assert ranks == sorted(ranks)
            assert len(ranks) == size
            assert ranks.index(global_rank) == rank_in_group
            assert report[f"{kind} process group"] == (size, size)


@pytest.mark.parametrize(
    "call",
    [smp.rank, smp.local_size, smp.get_dp_group, smp.get_world_process_group, smp.barrier, smp.mp_barrier],
)
def test_calls_before_init(call: Any) -> None:
    with pytest.raises(NotInitializedError, match=r"smp\.init\(\)"):
        call()


def init_twice() -> list[Any]:
    assert not session.is_initialized()
    with pytest.raises(NotInitializedError, match=r"smp\.init\(\)"):
        smp.rank()
    first = session.initialize({"ddp": True})
    assert session.is_initialized()
    before = (smp.rank(), smp.dp_size(), smp.get_dp_process_group())
    assert session.initialize() is first
    assert (smp.rank(), smp.dp_size(), smp.get_dp_process_group()) == before
    # New keys are merged, also those that change the groups as long as there is no model.
    session.initialize({"partitions": 2, "microbatches": 4})
    assert first.config.microbatches == 4
    smp.barrier()
    report = [smp.pp_size(), smp.dp_size(), smp.allgather(smp.rank(), MP_GROUP)]
    runtime.current().models.append(object())
    with pytest.raises(SMPConfigError, match=r"after smp\.DistributedModel"):
        session.initialize({"tensor_parallel_degree": 2})
    assert smp.tp_size() == 1
    session.shutdown()
    assert not session.is_initialized()
    return report


def test_c012_init_twice() -> None:
    reports = run_ranks(init_twice, 4)
    assert reports == [[2, 2, [0, 1]], [2, 2, [0, 1]], [2, 2, [2, 3]], [2, 2, [2, 3]]]


def microbatches_in_force(parameters: dict[str, Any]) -> tuple[int, str]:
    config = session.initialize(parameters).config
    return config.microbatches, config.sources["microbatches"]


def test_c013_launcher_over_init() -> None:
    environ = {"SM_HP_MP_PARAMETERS": '{"microbatches":4,"ddp":true}'}
    assert run_ranks(microbatches_in_force, 2, {"microbatches": 2}, environ=environ) == [(4, "environment")] * 2


def wrong_world() -> str:
    with pytest.raises(SMPConfigError) as caught:
        session.initialize({"partitions": 2, "ddp": True})
    assert not session.is_initialized()
    return str(caught.value)


def test_c011_world_is_checked_by_init() -> None:
    for message in run_ranks(wrong_world, 3):
        assert "world size 3" in message
        assert "= 2" in message


def configured_differently() -> str:
    with pytest.raises(DivergenceError) as caught:
        session.initialize({"ddp": True, "partitions": 1 + dist.get_rank() // 3})
    return str(caught.value)


def test_processes_must_agree_on_the_configuration() -> None:
    for message in run_ranks(configured_differently, 4):
        assert "pipeline_parallel_degree: 1 on rank 0, 2 on rank 3" in message


def alone() -> tuple[Any, ...]:
    """A single process, without any variables of a launcher, and without a default group."""
    dist.destroy_process_group()
    session.initialize({}, environ={})
    assert dist.is_initialized()
    smp.barrier()
    smp.broadcast("nobody listens", WORLD)
    with pytest.raises(GroupMembershipError, match="process itself"):
        smp.send(1, 0, WORLD_RANK)
    gathered = smp.allgather({"x": torch.ones(2)}, DP_GROUP)
    total = torch.ones(())
    dist.all_reduce(total, group=smp.get_tp_process_group())
    answer = (smp.rank(), smp.size(), smp.local_rank(), smp.local_size(), len(gathered), float(total))
    session.shutdown()
    assert not dist.is_initialized()
    return answer


def test_single_process() -> None:
    assert run_ranks(alone, 1) == [(0, 1, 0, 1, 1, 1.0)]


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def sample() -> dict[str, Any]:
    return {"a": [1, {"b": torch.arange(6.0).reshape(2, 3)}], "c": None, "record": Record("r", torch.ones(2))}


def assert_is_sample(received: Any) -> None:
    expected = sample()
    assert received["a"][0] == 1
    torch.testing.assert_close(received["a"][1]["b"], expected["a"][1]["b"], rtol=0, atol=0)
    assert received["c"] is None
    assert received["record"].name == "r"
    torch.testing.assert_close(received["record"].weight, torch.ones(2), rtol=0, atol=0)


def broadcast_from_zero() -> None:
    session.initialize({"ddp": True})
    if smp.rank() == 0:
        smp.broadcast(sample(), WORLD)
    else:
        assert_is_sample(smp.recv_from(0, WORLD_RANK))


def test_c014_broadcast() -> None:
    run_ranks(broadcast_from_zero, 4)


def send_in_model_group() -> Any:
    session.initialize(PIPELINE)
    got = None
    if smp.mp_rank() == 0:
        smp.send({"from": smp.rank(), "data": torch.full((3,), float(smp.rank()))}, 1, MP_RANK)
    else:
        got = smp.recv_from(0, MP_RANK)
        assert torch.equal(got["data"], torch.full((3,), float(smp.rank() - 1)))
        got = got["from"]
    smp.barrier()
    return got


def test_c015_send_stays_in_the_group() -> None:
    assert run_ranks(send_in_model_group, 4) == [None, 0, None, 2]


def gather() -> None:
    session.initialize(BOTH)
    tensors = smp.allgather(torch.full((smp.rank() + 1,), smp.rank()), MP_GROUP)
    expected = smp.get_mp_group()
    assert [tensor.tolist() for tensor in tensors] == [[rank] * (rank + 1) for rank in expected]
    # Types may differ from rank to rank.
    mixed = smp.allgather("zero" if smp.rank() == 0 else {"rank": smp.rank()}, WORLD)
    assert mixed == ["zero", *({"rank": rank} for rank in range(1, 8))]
    assert smp.allgather(smp.rank(), DP_GROUP) == smp.get_dp_group()


def test_c016_allgather() -> None:
    run_ranks(gather, 8)


def barriers(folder: str) -> None:
    session.initialize(PIPELINE)
    passed = [Path(folder) / f"mp{rank}" for rank in range(8)]
    # All pairs but (0, 1) pass their barrier although ranks 0 and 1 have not come to theirs.
    if smp.rank() in (0, 1):
        wait_for_files(passed[2:])
    smp.barrier(MP_GROUP)
    passed[smp.rank()].touch()
    wait_for_files(passed)
    # The odd ranks are one dp group, and pass theirs before the even ones come.
    passed = [Path(folder) / f"dp{rank}" for rank in range(8)]
    if smp.rank() % 2 == 0:
        wait_for_files(passed[1::2])
    smp.dp_barrier()
    passed[smp.rank()].touch()
    wait_for_files(passed)
    smp.mp_barrier()


def test_c017_barrier_waits_for_the_group_only(tmp_path: Path) -> None:
    run_ranks(barriers, 8, str(tmp_path))


def guarded_download(folder: str) -> None:
    session.initialize({"ddp": True})
    file = Path(folder) / "dataset"
    if smp.local_rank() == 0:
        time.sleep(0.3)
        file.write_text("complete")
    smp.barrier()
    assert file.read_text() == "complete"


def test_c098_guarded_work_and_barrier(tmp_path: Path) -> None:
    run_ranks(guarded_download, 4, str(tmp_path))


def barrier_holds(folder: str) -> None:
    session.initialize(PIPELINE)
    for turn in range(4):
        if smp.rank() == turn:
            time.sleep(0.05)
            (Path(folder) / f"late{turn}").touch()
        smp.barrier()
        assert (Path(folder) / f"late{turn}").exists()


def test_barrier_waits_for_the_last(tmp_path: Path) -> None:
    run_ranks(barrier_holds, 4, str(tmp_path))


def messages_in_order() -> None:
    session.initialize({"ddp": True})
    if smp.rank() == 0:
        for number in range(20):
            smp.send(torch.full((number * 1000,), number), 1, WORLD_RANK)
        smp.broadcast("last", WORLD)
    elif smp.rank() == 1:
        for number in range(20):
            got = smp.recv_from(0, WORLD_RANK)
            assert got.shape == (number * 1000,)
            assert (got == number).all()
        assert smp.recv_from(0, WORLD_RANK) == "last"
    else:
        assert smp.recv_from(0, WORLD_RANK) == "last"


def test_messages_of_a_pair_keep_their_order() -> None:
    run_ranks(messages_in_order, 3)


def send_waits(folder: str) -> None:
    session.initialize({"ddp": True})
    file = Path(folder) / "about-to-receive"
    if smp.rank() == 0:
        smp.send(1, 1, WORLD_RANK)
        assert file.exists()
    else:
        time.sleep(0.2)
        file.touch()
        assert smp.recv_from(0, WORLD_RANK) == 1


def test_send_returns_once_it_was_received(tmp_path: Path) -> None:
    run_ranks(send_waits, 2, str(tmp_path))


def unmatched(call: str) -> str:
    session.initialize({"partitions": 2, "message_timeout_seconds": 0.3})
    if smp.rank() == 1:
        time.sleep(0.6)
        return ""
    started = time.monotonic()
    calls = {
        "recv_from": lambda: smp.recv_from(1, PP_RANK),
        "send": lambda: smp.send([1], 1, PP_RANK),
        "barrier": lambda: smp.barrier(),
        "allgather": lambda: smp.allgather(1, MP_GROUP),
    }
    with pytest.raises(WaitTimeoutError) as caught:
        calls[call]()
    assert time.monotonic() - started < 5
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ("recv_from", ["smp.recv_from: global rank 0 waited at test_messages.py:", "for a message of global rank 1"]),
        ("send", ["smp.send: global rank 0 waited at test_messages.py:", "for global rank 1 to take"]),
        ("barrier", ["smp.barrier: global rank 0 waited at test_messages.py:", "the others of the world group [0, 1]"]),
        ("allgather", ["smp.allgather: global rank 0 waited", "the others of the mp group [0, 1]"]),
    ],
)
def test_waits_end_and_say_who_waits_for_whom(call: str, parts: list[str]) -> None:
    message = run_ranks(unmatched, 2, call)[0]
    for part in (*parts, "nothing came within message_timeout_seconds=0.3"):
        assert part in message


def peer_dies() -> None:
    session.initialize({"partitions": 2})
    smp.barrier()
    if smp.rank() == 1:
        os._exit(3)
    smp.recv_from(1, PP_RANK)


def test_dead_peer_is_an_error_at_once() -> None:
    started = time.monotonic()
    failures = run_ranks(peer_dies, 2, return_failures=True, timeout=20)
    assert time.monotonic() - started < 10
    assert "connection failed" in failures[0].summary
    assert "smp.recv_from: global rank 0 waited at test_messages.py:" in failures[0].summary
    assert "for a message of global rank 1" in failures[0].summary


def misuse() -> None:
    session.initialize(PIPELINE)
    own = smp.mp_rank()
    for call in (lambda rank: smp.send(1, rank, MP_RANK), lambda rank: smp.recv_from(rank, MP_RANK)):
        for wrong in (2, -1):
            with pytest.raises(GroupMembershipError, match=rf"mp rank {wrong} is outside the mp group"):
                call(wrong)
        with pytest.raises(ValueError, match="process itself"):
            call(own)
        with pytest.raises(ValueError, match="expected an int"):
            call("1")
    for wrong in (MP_GROUP, "MP_RANK", 1):
        with pytest.raises(GroupTypeError, match=r"rank_type: expected one of smp\.RankType\.WORLD_RANK"):
            smp.send(1, 1 - own, wrong)
    for wrong in (MP_RANK, "WORLD", None, smp.get_mp_process_group()):
        with pytest.raises(TypeError, match=r"group: expected one of smp\.CommGroup\.WORLD"):
            smp.barrier(wrong)
    with pytest.raises(CommunicationError, match="cannot be pickled"):
        smp.send(lambda: None, 1 - own, MP_RANK)
    # Nothing of this has disturbed the connection.
    assert smp.allgather(smp.rank(), MP_GROUP) == smp.get_mp_group()


def test_misuse() -> None:
    run_ranks(misuse, 4)


def both_receive() -> None:
    session.initialize({"partitions": 2})
    raise ValueError("a script's own error")


def test_error_of_a_script_passes() -> None:
    with pytest.raises(RankError, match="a script's own error"):
        run_ranks(both_receive, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Objects as bytes

# By torch 2.11.
SPARSE_WARNS = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.arange(12).reshape(3, 4).t(),
        torch.arange(100.0)[::10],
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.tensor([True, False]),
        torch.randn(3, 2).to(torch.bfloat16),
        pytest.param(torch.eye(3).to_sparse(), marks=SPARSE_WARNS),
        torch.randn(2, requires_grad=True),
        torch.nn.Parameter(torch.randn(2), requires_grad=False),
    ],
)
def test_tensors_survive(tensor: torch.Tensor) -> None:
    again = loads(dumps(tensor), torch.device("cpu"))
    assert type(again) is type(tensor)
    assert again.requires_grad == tensor.requires_grad
    torch.testing.assert_close(again.detach(), tensor.detach(), rtol=0, atol=0)


def test_only_the_elements_of_a_view_travel() -> None:
    assert dumps(torch.zeros(1_000_000)[:3]).numel() < 1000


def test_one_tensor_twice_is_one_tensor() -> None:
    shared = torch.ones(1000)
    payload = dumps([shared, shared])
    assert payload.numel() < 6000
    first, second = loads(payload, torch.device("cpu"))
    assert first is second
    first.add_(1)  # the memory is the receiver's own
    assert second[0] == 2
    assert shared[0] == 1


def test_results_of_autograd_travel_without_history() -> None:
    value = (torch.ones(2, requires_grad=True) * 3).exp()
    again = loads(dumps(value), torch.device("cpu"))
    assert again.is_leaf
    assert again.requires_grad


def test_groups_by_kind() -> None:
    (kinds,) = run_ranks(kinds_of_groups, 1)
    assert kinds == [kind.value for kind in GroupKind]


def kinds_of_groups() -> list[str]:
    groups = session.initialize().groups
    return [groups.of(kind).kind.value for kind in GroupKind]


# ---------------------------------------------------------------------------------------------------------------------
# Meeting point, device and the end of a process


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"MASTER_ADDR": "algo-1", "MASTER_PORT": "7778"}, ("algo-1", 7778)),
        ({"MASTER_ADDR": "algo-1"}, ("algo-1", 7777)),
        ({}, ("127.0.0.1", 7777)),
        ({"SLURM_JOB_NODELIST": "n[4-7]"}, ("127.0.0.1", 7777)),
    ],
)
def test_meeting_point_on_one_host(environ: dict[str, str], expected: tuple[str, int]) -> None:
    found = rendezvous._address(load_config({}, environ), ProcessIdentity(1, 2, 1, 2, "PMI"), environ)
    assert (found.host, found.port) == expected


def test_meeting_point_on_several_hosts() -> None:
    identity, config = ProcessIdentity(2, 4, 0, 2, "PMI"), load_config({}, {})
    found = rendezvous._address(config, identity, {"SLURM_JOB_NODELIST": "n[4-7]"})
    assert str(found) == "n4:7777 (MASTER_ADDR is not set, and this is the first node of Slurm's list)"
    with pytest.raises(SMPConfigError, match="MASTER_ADDR is not set, and PMI does not tell"):
        rendezvous._address(config, identity, {})
    with pytest.raises(SMPConfigError, match="MASTER_PORT: expected int"):
        rendezvous._address(config, identity, {"MASTER_ADDR": "a", "MASTER_PORT": "http"})


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = ProcessIdentity(5, 8, 5, 8, "torchrun")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert session._choose_device(ProcessIdentity(3, 8, 3, 8, "torchrun"), {}, may_share=False) == torch.device(
        "cuda", 3
    )
    with pytest.raises(SMPConfigError, match="local rank 5 has no GPU: 8 processes on 4 GPUs"):
        session._choose_device(identity, {}, may_share=False)
    assert session._choose_device(identity, {}, may_share=True) == torch.device("cuda", 1)
    on_cpu = {"MODELPARALLEL_DEVICE": "cpu"}
    assert session._choose_device(identity, on_cpu, may_share=True) == torch.device("cpu")
    with pytest.raises(SMPConfigError, match="must be one of 'auto', 'cpu', 'cuda', got 'tpu'"):
        session._choose_device(identity, {"MODELPARALLEL_DEVICE": "tpu"}, may_share=False)


def end_of_process() -> float:
    session.initialize({"ddp": True})
    smp.barrier()
    started = time.monotonic()
    session.shutdown()
    return time.monotonic() - started


def test_shutdown_is_quick() -> None:
    assert max(run_ranks(end_of_process, 2)) < 2
