"""A launcher of several that is told to stop, or vanishes, while it only waits for the others: what these do."""

import signal
from dataclasses import replace

import pytest

from launched_jobs import job_of, write_script
from modelparallel.errors import LaunchError
from modelparallel.launch.failures import JobInterrupted
from modelparallel.launch.node_lead import Lead
from modelparallel.launch.node_place import NodePlace
from modelparallel.launch.node_plan import AttemptVerdict, End, Member, Offer, Plan
from modelparallel.launch.node_run import _NodeRun
from modelparallel.launch.node_store import Joined
from modelparallel.launch.supervision import RankMonitor

PLAN = Plan((Member(0, "a", 1), Member(1, "b", 1)))


class SaidOnly:
    """A store of a node that hears nothing but what it says, and is interrupted when it asks for a key."""

    lost_node = None

    def __init__(self, node, interrupted_at="", said=()):
        self.place = NodePlace("options", 1, 3, node, "a", 1, "job")
        self.joined = Joined(node, "", "", 0.0)
        self.said = dict(said)
        self._interrupted_at = interrupted_at

    def now(self):
        return 100.0

    def put(self, key, value):
        self.said[key] = value

    def value(self, key):
        if key == self._interrupted_at:
            raise JobInterrupted(signal.SIGTERM)
        return self.said.get(key)

    def follow(self, node):
        """Nobody is lost here."""

    def silence(self, node):
        return 0.0

    def is_lost(self, node):
        return node == self.lost_node

    def how_lost(self, node):
        return "no sign of life"


@pytest.fixture
def run_with(tmp_path):
    def make(store):
        job = job_of(tmp_path, write_script(tmp_path, "pass"))
        return _NodeRun(job, store, None, RankMonitor(), print, False, 60.0)

    return make


@pytest.mark.parametrize(("node", "stops_the_others"), [(1, True), (2, False)])
def test_a_node_that_waits_stops_the_others_but_a_spare_does_not(run_with, node, stops_the_others):
    store = SaidOnly(node, interrupted_at="verdict/1")
    verdict = run_with(store)._verdict(1, PLAN, End(node, 0), 90.0)
    assert (verdict.outcome.exit_code, verdict.outcome.is_stopped) == (143, True)
    assert ("trouble/1" in store.said) == stops_the_others


def test_all_say_the_same_when_node_0_is_stopped_while_it_waits(run_with):
    store = SaidOnly(0, interrupted_at="end/1/1")
    verdict = run_with(store)._verdict(1, PLAN, End(0, 0), 90.0)
    assert verdict.outcome.exit_code == 143
    assert AttemptVerdict.from_json(store.said["verdict/1"]) == verdict


def test_how_the_job_ended_counts_when_node_0_is_stopped_while_it_serves_the_others(run_with):
    store = SaidOnly(0, interrupted_at="left/1", said={"joined/1": 0, "joined/2": 1})
    run_with(store)._leave()
    assert store.said["left/0"]


def test_a_node_that_has_left_is_not_waited_for(run_with, monkeypatch):
    said = {"joined/1": 0, "joined/2": 1, "left/1": True, "offers/2/0": vars(Offer(0, "a", 1))}
    store = SaidOnly(0, said=said)
    lead = Lead(store, run_with(store)._job)
    assert [member.node for member in lead.gather_again(2, 3600.0).members] == [0]
    store.place = replace(store.place, least=3)
    with pytest.raises(LaunchError, match="1 of at least 3 nodes are there"):
        Lead(store, run_with(store)._job).gather_again(2, 3600.0)


def test_a_node_that_vanishes_when_its_processes_have_ended_is_no_loss(run_with):
    store = SaidOnly(0)
    store.lost_node = 1
    lead = Lead(store, run_with(store)._job)
    assert [loss.member.host for loss in lead.lost(1, PLAN)] == ["b"]
    store.put("end/1/1", End(1, 0).to_json())
    assert lead.lost(1, PLAN) == []
    assert lead.settle(1, PLAN, End(0, 0), 0, "job", 90.0).outcome.exit_code == 0
