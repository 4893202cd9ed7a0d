"""For each fault that can be met, the first line of ``dolmen why`` names that fault. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cli.why import lines_of
from control.model import Condition, Distrust, Override, Who
from control.reconcile import NodeState
from control.since import FORGET_AFTER_S, Since
from control.views import (
    EngineView,
    MembershipView,
    ReplicaState,
    ReplicaView,
    ResyncView,
    VolumeState,
    VolumeView,
)
from control.why import (
    REASONS,
    Facts,
    Finding,
    NodeFacts,
    ProcessFacts,
    VolumeFacts,
    conditions_of_node,
    conditions_of_volume,
    explain,
    relevant,
)

GIB = 2**30
NODES = ("node1", "node2", "node3")
LONG_AGO = "2026-01-01T00:00:00+00:00"
OPEN: dict[str, Any] = {"state": "open", "reason": "", "epoch": 7, "suspect": False, "restored": False}
KILLED = {"how": "killed by signal 9", "ended_ago_s": 12.2, "ends": 1}


def node(name: str, state: NodeState = NodeState.UP, **process: Any) -> NodeFacts:
    facts = {"pid": 100, "answers": state is NodeState.UP, **process}
    return NodeFacts(name, state, ProcessFacts(**facts), f"/d/{name}", 64 * GIB, 32 * GIB)


def replica(index: int, state: ReplicaState = ReplicaState.IN_SYNC, reason: str = "") -> ReplicaView:
    return ReplicaView(
        id=f"data-r{index}", volume="data", node=f"node{index}", pid=1, state=state, reason=reason,
        path=f"/d/node{index}/r", size_bytes=GIB,
    )  # fmt: skip


class Case:
    """A healthy cluster with one attached volume; each test breaks something."""

    def __init__(self) -> None:
        self.nodes = [node(name) for name in NODES]
        self.replicas = [replica(index) for index in (1, 2, 3)]
        self.state = VolumeState.HEALTHY
        self.process = ProcessFacts(pid=200, answers=True)
        self.said: dict[str, dict[str, Any] | None] = {r.id: dict(OPEN) for r in self.replicas}
        self.waiting: list[dict[str, str]] = []
        self.plan: list[Condition] = []
        self.more: dict[str, Any] = {}
        self.attached = True

    def node2(self, state: NodeState, **process: Any) -> Case:
        self.nodes[1] = node("node2", state, **process)
        return self

    def lose(self, state: ReplicaState = ReplicaState.OFFLINE, reason: str = "no answer") -> Case:
        self.replicas[1] = replica(2, state, reason)
        self.state = VolumeState.DEGRADED
        return self

    def says(self, **inspect: Any) -> Case:
        self.said["data-r2"] = {**OPEN, **inspect}
        return self

    def unserved(self, state: VolumeState = VolumeState.ATTACHING, **process: Any) -> Case:
        self.state = state
        self.process = ProcessFacts(**{"pid": None, **process})
        return self

    def waits(self, *waiting: dict[str, str]) -> Case:
        self.state, self.waiting = VolumeState.WAITING, list(waiting)
        return self

    def so(self, **facts: Any) -> Case:
        self.more.update(facts)
        return self

    def detached(self) -> Case:
        self.state, self.attached, self.process = VolumeState.DETACHED, False, ProcessFacts()
        return self

    def view(self) -> VolumeView:
        engine = EngineView(node="node1", pid=200, answering=True, waiting_for=self.waiting)
        return VolumeView(
            name="data", volume_id="id", size_bytes=GIB, wanted_size_bytes=GIB, replica_count=3,
            state=self.state, nbd_uri=None, nbd_tcp_uri=None, epoch=7,
            membership=MembershipView(epoch=7, version=1, in_sync=[r.id for r in self.replicas]),
            engine=engine if self.process.pid else None, replicas=self.replicas, conditions=self.plan,
        )  # fmt: skip

    def facts(self) -> Facts:
        volume = VolumeFacts(self.view(), self.attached, self.process, self.said, **self.more)
        return Facts(self.nodes, [volume])

    def explained(self) -> list[Finding]:
        return explain(self.facts())


def cut_off(case: Case) -> Case:
    case.lose(reason="timed out").so(offline=frozenset({"data-r2"}), reasons={"data-r2": "timed out"})
    return case


def full_disk() -> Case:
    case = Case().lose(ReplicaState.STALE, "no space")
    case.nodes[1] = replace(case.nodes[1], space_free_bytes=0)
    return case


def resyncing() -> Case:
    case = Case().lose(ReplicaState.RESYNCING, "")
    progress = ResyncView(regions_done=3, regions_total=8, bytes_copied=9)
    case.replicas[1] = case.replicas[1].model_copy(update={"resync": progress})
    return case


def two_nodes_lost() -> Case:
    case = Case().waits({"replica": "data-r2", "reason": "a newer record may exist there"})
    case.nodes[1:] = [node("node2", NodeState.STOPPED, pid=None), node("node3", NodeState.STOPPED, pid=None)]
    case.replicas[1:] = [replica(2, ReplicaState.OFFLINE), replica(3, ReplicaState.OFFLINE)]
    case.said.update({"data-r2": None, "data-r3": None})
    return case


def stray() -> Case:
    case = Case()
    case.nodes[1] = replace(case.nodes[1], strays=("/d/node2/disk0/replicas/other",))
    return case


DISTRUST = Distrust(reason="an older copy of the state store was put back", epoch=7, since=LONG_AGO)
OVERRIDE = Override(members=("data-r1",), newest=(7, 1), epoch=7, since=LONG_AGO)
PLAN = Condition(
    reason="detach_waiting",
    waits_for="replica data-r2 on node2. `dolmen node start node2`",
    who=Who.OPERATOR,
    since=LONG_AGO,
)
DOWN = NodeState.DOWN

FAULTS: dict[str, tuple[Case, str, str]] = {
    # fault: what is seen, the reason, words of the first line
    "engine killed": (
        Case().unserved(how="killed by signal 9", ended_ago_s=0.2, ends=1),
        "engine_down",
        "the engine of data is not running (killed by signal 9, 0 s ago)",
    ),
    "engine killed, the next one starts": (
        Case().unserved(pid=201, starting=True, **KILLED),
        "engine_down",
        "killed by signal 9, 12 s ago",
    ),
    "engine crash-looping": (
        Case().unserved(how="exit code 9", exit_code=9, ends=5, last_words="boom"),
        "engine_crashing",
        "keeps ending (exit code 9, 5 times within a minute): boom",
    ),
    "engine stopped": (
        Case().unserved(pid=201, standing=True),
        "engine_frozen",
        "the engine of data (pid 201) is stopped by a signal",
    ),
    "engine silent": (
        Case().unserved(pid=201),
        "engine_silent",
        "the engine of data (pid 201) runs and does not answer",
    ),
    "engine fenced": (
        Case().unserved(how="exit code 3", exit_code=3, ends=1),
        "engine_fenced",
        "the engine of data was fenced",
    ),
    "replica server killed": (
        Case().lose().node2(DOWN, pid=None, **KILLED),
        "node_down",
        "node2's replica server is not running (killed by signal 9, 12 s ago)",
    ),
    "replica server starting again": (
        Case().lose().node2(NodeState.STARTING, **KILLED),
        "node_starting",
        "node2's replica server starts (the one before: killed by signal 9",
    ),
    "replica server crash-looping": (
        Case().lose().node2(DOWN, pid=None, how="exit code 1", ends=4, last_words="the mount is missing"),
        "node_crashing",
        "node2's replica server ends each time (exit code 1, 4 times in a row): the mount is missing",
    ),
    "replica server stopped": (
        Case().lose().node2(NodeState.UP, answers=False, standing=True),
        "node_frozen",
        "node2's replica server (pid 100) is stopped by a signal",
    ),
    "replica server silent": (
        Case().lose().node2(NodeState.UP, answers=False),
        "node_silent",
        "node2's replica server (pid 100) runs and does not answer",
    ),
    "node stopped by an operator": (
        Case().lose().node2(NodeState.STOPPED, pid=None),
        "node_stopped",
        "node2 was stopped by an operator",
    ),
    "disk full": (full_disk(), "disk_full", "node2's disk is full (0 B free of 64 GiB)"),
    "disk failed": (
        Case().lose(ReplicaState.STALE).says(state="failed", reason="fdatasync: Input/output error"),
        "disk_failed",
        "node2's disk failed under replica data-r2: fdatasync: Input/output error",
    ),
    "replica damaged": (
        Case().lose(ReplicaState.STALE).says(state="damaged", reason="map is short"),
        "replica_damaged",
        "replica data-r2 on node2 is damaged and cannot be opened: map is short",
    ),
    "replica missing": (
        Case().lose(ReplicaState.STALE).says(state="missing"),
        "replica_missing",
        "replica data-r2 on node2 is missing",
    ),
    "replica restored": (
        Case().lose(ReplicaState.STALE).says(restored=True, suspect=True),
        "replica_restored",
        "replica data-r2 on node2 is an older copy that was put back",
    ),
    "replica suspect": (
        Case().lose(ReplicaState.STALE).says(suspect=True),
        "replica_suspect",
        "replica data-r2 on node2 may have lost acknowledged writes",
    ),
    "replica claimed in an unknown epoch": (
        Case().lose(ReplicaState.STALE).says(epoch=9),
        "replica_ahead",
        "replica data-r2 on node2 was claimed in epoch 9",
    ),
    "replica forked": (
        Case().lose(ReplicaState.STALE).so(forked=("data-r2",)),
        "replica_forked",
        "replica data-r2 on node2 may hold writes that were given up",
    ),
    "replica opening": (
        Case().lose(ReplicaState.STALE).says(state="opening"),
        "replica_opening",
        "replica data-r2 on node2 is being recovered by its server",
    ),
    "replica stale": (
        Case().lose(ReplicaState.STALE, "it missed writes"),
        "replica_stale",
        "replica data-r2 on node2 is not in sync: it missed writes",
    ),
    "replica stale, detached": (
        Case().lose(ReplicaState.STALE, "it missed writes").detached(),
        "replica_stale",
        "replica data-r2 on node2 is not in sync",
    ),
    "resyncing": (
        resyncing(),
        "replica_resyncing",
        "replica data-r2 on node2 is brought up to date (3 of 8 regions)",
    ),
    "partition": (
        cut_off(Case()),
        "replica_cut_off",
        "the engine cannot reach replica data-r2 on node2, whose server answers the daemon: timed",
    ),
    "majority lost": (two_nodes_lost(), "node_stopped", "node2 was stopped by an operator"),
    "state store away": (
        Case().waits({"store": "state store", "reason": "connection refused"}),
        "store_unreachable",
        "the engine of data cannot reach the state store: connection refused",
    ),
    "state store distrusted": (
        Case().so(distrust=DISTRUST),
        "store_distrusted",
        "may have missed records of volume data: an older copy of the state store was put back",
    ),
    "recovery ordered": (
        Case().so(override=OVERRIDE),
        "override_waits",
        "volume data was ordered to open with data-r1",
    ),
    "detach waits": (Case(), "detach_waiting", "volume data waits for replica data-r2 on node2"),
    "scrub findings": (
        Case().so(scrub_found={"data-r2": 2}),
        "scrub_findings",
        "scrub found 2 damaged blocks in replica data-r2 on node2",
    ),
    "a block that is bad everywhere": (
        Case().so(scrub_found={"data-r2": 2}, scrub_unreadable={"data-r2": 1}),
        "scrub_findings",
        "scrub found 2 damaged blocks in replica data-r2 on node2; of 1 no replica has a good copy",
    ),
    "unknown replica": (
        stray(),
        "replica_stray",
        "/d/node2/disk0/replicas/other is a replica of a volume that the state store does not know",
    ),
}
FAULTS["detach waits"][0].plan = [PLAN]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_line_names_the_fault(fault: str) -> None:
    case, reason, words = FAULTS[fault]
    found = case.explained()
    assert found[0].reason == reason and not found[0].because
    first = lines_of([finding.model_dump(mode="json") for finding in found])[0]
    assert words in first
    needs_operator = found[0].who is Who.OPERATOR
    assert not needs_operator or found[0].command or found[0].then or "`" in first


def test_a_state_store_that_fails_is_the_root_of_all() -> None:
    found = explain(replace(Case().lose().facts(), store_error="disk I/O error"))
    assert found[0].reason == "store_failed" and "disk I/O error" in found[0].text


def test_a_healthy_cluster_has_nothing_to_explain() -> None:
    assert Case().explained() == [] and Case().detached().explained() == []
    assert conditions_of_volume(Case().view(), []) == []


def test_what_follows_from_a_fault_names_it_and_comes_after_it() -> None:
    found = Case().lose().node2(NodeState.DOWN, pid=None, **KILLED).explained()
    assert [(f.reason, f.because) for f in found] == [
        ("node_down", ""),
        ("replica_offline", "node node2"),
        ("volume_degraded", "node node2"),
    ]


def test_a_majority_that_is_lost_is_waited_for_by_name_with_the_way_out() -> None:
    found = two_nodes_lost().explained()
    waiting = next(f for f in found if f.reason == "volume_waiting")
    assert "data-r2 (a newer record may exist there)" in waiting.text
    assert "dolmen volume recover data" in waiting.command
    assert [f.about for f in found[:2]] == ["node node2", "node node3"]


def test_the_fault_that_io_waits_for_comes_first_among_its_equals() -> None:
    case = two_nodes_lost()
    (wait, *_) = case.waiting
    case.waits({**wait, "replica": "data-r3"})
    found = case.explained()
    assert [f.about for f in found[:2]] == ["node node3", "node node2"]
    assert next(f.because for f in found if f.reason == "volume_waiting") == "node node3"


def test_a_replacement_that_waits_follows_from_what_is_wrong_with_the_replica() -> None:
    case = Case().lose(ReplicaState.STALE).says(state="missing")
    case.plan = [PLAN.model_copy(update={"reason": "no_spare_node"})]
    found = case.explained()
    assert [f.reason for f in found if not f.because] == ["replica_missing"]
    assert next(f.because for f in found if f.reason == "no_spare_node") == "replica data-r2"


def test_a_full_disk_is_the_root_of_its_replica_s_state() -> None:
    found = full_disk().explained()
    assert [f.because for f in found if f.about == "replica data-r2"] == ["disk of node2"]


def test_only_what_concerns_a_name_is_told_of_it() -> None:
    found = Case().lose().node2(NodeState.STOPPED, pid=None).explained()
    assert relevant(found, "node1") == [] and relevant(found, "data-r1") == []
    for name in ("node2", "data-r2", "data"):
        assert relevant(found, name)[0].reason == "node_stopped"


def test_a_replica_that_left_the_record_says_since_when_durably() -> None:
    found = Case().lose().so(left_at={"data-r2": LONG_AGO}).explained()
    assert next(f.since for f in found if f.about == "replica data-r2") == LONG_AGO


def test_conditions_are_made_of_the_same_findings() -> None:
    case = Case().lose().node2(NodeState.STOPPED, pid=None)
    found = case.explained()
    (condition,) = conditions_of_volume(case.view(), found)
    assert condition.reason == "node_stopped" and condition.who is Who.OPERATOR
    assert "replica data-r2 on node2" in condition.waits_for
    assert "`dolmen node start node2`" in condition.waits_for
    (of_node,) = conditions_of_node("node2", found)
    assert of_node.waits_for == "`dolmen node start node2`"
    assert conditions_of_node("node1", found) == []


def test_every_reason_is_met_by_a_fault_of_this_file() -> None:
    met = {finding.reason for case, *_ in FAULTS.values() for finding in case.explained()}
    met |= {f.reason for f in Case().unserved(pid=201, starting=True).explained()}
    assert REASONS.keys() - met == {"store_failed"}  # above


def test_a_finding_keeps_since_when_it_was_first_seen_until_it_ended() -> None:
    since, (found, *_) = Since(), Case().lose(ReplicaState.STALE).explained()
    assert since.is_new(found)
    first = since.stamp([found], 1000.0)[0].since
    assert not since.is_new(found)
    assert since.stamp([found], 1020.0)[0].since == first
    since.stamp([], 1045.0)
    assert since.stamp([found], 1020.0 + FORGET_AFTER_S)[0].since == first  # a look at another part between
    assert since.stamp([found], 1100.0 + FORGET_AFTER_S)[0].since != first


def test_a_finding_that_knows_its_time_keeps_it() -> None:
    finding = Case().so(distrust=DISTRUST).explained()[0]
    assert Since().stamp([finding], 1e9)[0].since == LONG_AGO
