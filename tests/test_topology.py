"""Placement arithmetic against the documented tables. Pure: no process group, no torch."""

import itertools

import pytest

from modelparallel.config.topology import CommGroup, Coordinates, GroupKind, RankType, Topology, all_strategies
from modelparallel.errors import GroupMembershipError, SMPConfigError

# 8 processes, pp = tp = rdp = 2: for each strategy the coordinates rdp,pp,tp of global ranks 0..7, then the TP, PP,
# RDP, DP and MP groups (smp-api section 2).
TABLE = {
    "DPT": ("000 001 010 011 100 101 110 111", "01 23 45 67", "02 13 46 57", "04 15 26 37", "0145 2367", "0123 4567"),
    "DTP": ("000 010 001 011 100 110 101 111", "02 13 46 57", "01 23 45 67", "04 15 26 37", "0246 1357", "0123 4567"),
    "PDT": ("000 001 100 101 010 011 110 111", "01 23 45 67", "04 15 26 37", "02 13 46 57", "0123 4567", "0145 2367"),
    "PTD": ("000 100 001 101 010 110 011 111", "02 13 46 57", "04 15 26 37", "01 23 45 67", "0123 4567", "0246 1357"),
    "TDP": ("000 010 100 110 001 011 101 111", "04 15 26 37", "01 23 45 67", "02 13 46 57", "0246 1357", "0145 2367"),
    "TPD": ("000 100 010 110 001 101 011 111", "04 15 26 37", "02 13 46 57", "01 23 45 67", "0145 2367", "0246 1357"),
}
KINDS = (GroupKind.TP, GroupKind.PP, GroupKind.RDP, GroupKind.DP, GroupKind.MP)


def factorisations(world_size: int) -> list[tuple[int, int]]:
    return [
        (pp_degree, tp_degree)
        for pp_degree, tp_degree in itertools.product(range(1, world_size + 1), repeat=2)
        if world_size % (pp_degree * tp_degree) == 0
    ]


def groups_of(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(digit) for digit in part) for part in text.split())


@pytest.mark.parametrize("strategy", sorted(TABLE))
def test_documented_table(strategy: str) -> None:
    topology = Topology(8, 2, 2, strategy)
    coordinates, *groups = TABLE[strategy]
    for global_rank, text in enumerate(coordinates.split()):
        rdp_rank, pp_rank, tp_rank = map(int, text)
        assert topology.coordinates(global_rank) == Coordinates(pp_rank=pp_rank, tp_rank=tp_rank, rdp_rank=rdp_rank)
    for kind, text in zip(KINDS, groups, strict=True):
        assert topology.all_groups(kind) == groups_of(text), kind


def test_c001_tensor_parallel_alone() -> None:
    topology = Topology(8, 1, 4, "cluster")
    for global_rank in range(8):
        expected = Coordinates(pp_rank=0, tp_rank=global_rank % 4, rdp_rank=global_rank // 4)
        assert topology.coordinates(global_rank) == expected
        assert topology.rank_in(GroupKind.DP, global_rank) == global_rank
    sizes = [topology.group_size(kind) for kind in KINDS]
    assert sizes == [4, 1, 2, 8, 4]  # tp, pp, rdp, dp, mp


def test_c002_tensor_and_pipeline_parallel() -> None:
    topology = Topology(8, 2, 2, "cluster")
    assert topology.coordinates(5) == Coordinates(pp_rank=0, tp_rank=1, rdp_rank=1)
    assert (topology.rank_in(GroupKind.DP, 5), topology.rank_in(GroupKind.MP, 5)) == (3, 1)
    assert topology.coordinates(2) == Coordinates(pp_rank=1, tp_rank=0, rdp_rank=0)
    assert (topology.rank_in(GroupKind.DP, 2), topology.rank_in(GroupKind.MP, 2)) == (0, 2)
    assert [topology.group_size(kind) for kind in (GroupKind.DP, GroupKind.RDP, GroupKind.MP)] == [4, 2, 4]


def test_c003_ptd() -> None:
    topology = Topology(8, 2, 2, "PTD")
    assert topology.coordinates(5) == Coordinates(pp_rank=1, tp_rank=0, rdp_rank=1)
    assert topology.coordinates(2) == Coordinates(pp_rank=0, tp_rank=1, rdp_rank=0)


def test_c004_dtp() -> None:
    topology = Topology(8, 2, 2, "DTP")
    assert topology.coordinates(6) == Coordinates(pp_rank=0, tp_rank=1, rdp_rank=1)
    assert (topology.rank_in(GroupKind.DP, 6), topology.rank_in(GroupKind.MP, 6)) == (3, 2)
    assert topology.all_groups(GroupKind.TP) == ((0, 2), (1, 3), (4, 6), (5, 7))


@pytest.mark.parametrize(("name", "letters"), [("cluster", "DPT"), ("spread", "TPD")])
def test_c005_named_strategies(name: str, letters: str) -> None:
    for pp_degree, tp_degree in factorisations(8):
        named, spelled = Topology(8, pp_degree, tp_degree, name), Topology(8, pp_degree, tp_degree, letters)
        for global_rank in range(8):
            assert named.coordinates(global_rank) == spelled.coordinates(global_rank)
        for kind in GroupKind:
            assert named.all_groups(kind) == spelled.all_groups(kind)


def test_c006_pipeline_alone() -> None:
    spread, cluster = Topology(8, 2, 1, "spread"), Topology(8, 2, 1, "cluster")
    assert spread.all_groups(GroupKind.MP) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert (spread.rank_in(GroupKind.DP, 6), spread.rank_in(GroupKind.MP, 6)) == (2, 1)
    assert spread.all_groups(GroupKind.DP) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert cluster.all_groups(GroupKind.MP) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert cluster.all_groups(GroupKind.DP) == ((0, 2, 4, 6), (1, 3, 5, 7))


def every_topology() -> list[Topology]:
    return [
        Topology(world_size, pp_degree, tp_degree, strategy)
        for world_size in (8, 12)
        for strategy in all_strategies()
        for pp_degree, tp_degree in factorisations(world_size)
    ]


def test_c007_identities() -> None:
    for topology in every_topology():
        tp, pp, rdp, dp, mp = (topology.group_size(kind) for kind in KINDS)
        assert mp * rdp == pp * dp == pp * tp * rdp == topology.world_size
        assert (mp * dp == topology.world_size) == (tp == 1)
        for kind in GroupKind:
            groups = topology.all_groups(kind)
            assert sorted(itertools.chain.from_iterable(groups)) == list(range(topology.world_size))
            assert {len(ranks) for ranks in groups} == {topology.group_size(kind)}
        for global_rank in range(topology.world_size):
            assert topology.global_rank(topology.coordinates(global_rank)) == global_rank


def test_c008_group_relations() -> None:
    for topology in every_topology():
        if topology.pp_degree == 1:
            assert topology.all_groups(GroupKind.TP) == topology.all_groups(GroupKind.MP)
        if topology.tp_degree == 1:
            assert topology.all_groups(GroupKind.PP) == topology.all_groups(GroupKind.MP)
        for global_rank in range(topology.world_size):
            tp_group = set(topology.group_ranks(GroupKind.TP, global_rank))
            assert tp_group <= set(topology.group_ranks(GroupKind.DP, global_rank))
            assert tp_group <= set(topology.group_ranks(GroupKind.MP, global_rank))


def test_c009_groups_ascend_and_hold_the_rank() -> None:
    for topology in every_topology():
        for global_rank in range(topology.world_size):
            for kind in GroupKind:
                ranks = topology.group_ranks(kind, global_rank)
                assert list(ranks) == sorted(ranks)
                assert ranks.index(global_rank) == topology.rank_in(kind, global_rank)
            # The rank along an axis is the coordinate itself.
            position = topology.coordinates(global_rank)
            assert position.tp_rank == topology.rank_in(GroupKind.TP, global_rank)
            assert position.pp_rank == topology.rank_in(GroupKind.PP, global_rank)
            assert position.rdp_rank == topology.rank_in(GroupKind.RDP, global_rank)


def test_c011_indivisible_world() -> None:
    with pytest.raises(SMPConfigError, match=r"world size 8 .* = 3 \* 2 = 6"):
        Topology(8, 3, 2)


def test_wrong_ranks_and_strategies() -> None:
    with pytest.raises(GroupMembershipError, match=r"global rank 8 is outside the world 0\.\.7"):
        Topology(8).group_ranks(GroupKind.TP, 8)
    with pytest.raises(SMPConfigError, match="not a permutation of D,P,T"):
        Topology(8, placement_strategy="DDT")


def test_public_names_stand_for_kinds() -> None:
    assert [group.kind for group in CommGroup] == [rank_type.kind for rank_type in RankType]
    assert CommGroup.WORLD.kind is GroupKind.WORLD
    assert CommGroup.RDP_GROUP.kind is RankType.RDP_RANK.kind is GroupKind.RDP
