"""The pure plan: what is done next, what is never done, and that it ends."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from control.documents import Document
from control.model import Attachment, AttachmentSpec, Volume, VolumeStatus, Who, dump, new_volume
from control.reconcile import (
    ENGINE_SILENT_MAX_S,
    Action,
    CreateReplica,
    DeleteReplica,
    DetachEngine,
    EndEngine,
    EngineSeen,
    GrantEpoch,
    GrowEngine,
    NodeState,
    RemoveAttachment,
    RemoveSockets,
    RemoveVolume,
    ResizeReplica,
    Seen,
    SetSize,
    StartEngine,
    plan,
)

MIB = 1024 * 1024
SIZE = 64 * MIB
NODES = ("node1", "node2", "node3")
ALL_UP = dict.fromkeys(NODES, NodeState.UP)
IDS = ("data-r1", "data-r2", "data-r3")
CREATED = dict.fromkeys(IDS, SIZE)


def volume(*, size_bytes: int = SIZE, deleting: bool = False, **status: object) -> Volume:
    document = new_volume("data", "id", SIZE, NODES).with_spec(size_bytes=size_bytes, deleting=deleting)
    return Volume(document.with_status(**{"replica_size_bytes": CREATED, **status}))


def attachment(*, detaching: bool = False, force: bool = False) -> Attachment:
    spec = AttachmentSpec(volume_id="id", node="node1", detaching=detaching, force=force)
    return Attachment(Document("attachment", "data", dump(spec)))


def granted(epoch: int) -> dict[str, object]:
    return {"epoch": epoch, "engine_id": f"e{epoch}", "node": "node1"}


def serving(epoch: int, *, size_bytes: int = SIZE) -> EngineSeen:
    return EngineSeen(epoch, size_bytes, answering=True, silent_s=0.0)


def actions(v: Volume, a: Attachment | None = None, **seen: object) -> list[Action]:
    return plan(v, a, Seen(**{"nodes": ALL_UP, **seen})).actions  # type: ignore[arg-type]


def test_a_new_volume_gets_its_replicas_all_at_once() -> None:
    made = actions(volume(replica_size_bytes={}))
    assert made == [CreateReplica(r, n, SIZE) for r, n in zip(IDS, NODES, strict=True)]


def test_a_replica_on_a_node_that_is_down_is_waited_for_and_the_reason_is_said() -> None:
    nodes = {**ALL_UP, "node2": NodeState.DOWN, "node3": NodeState.STOPPED}
    made = plan(volume(replica_size_bytes={}), None, Seen(nodes=nodes))
    assert made.actions == [CreateReplica("data-r1", "node1", SIZE)]
    whos = {condition.reason: condition.who for condition in made.conditions}
    assert whos["node_down"] is Who.DOLMEN and whos["node_stopped"] is Who.OPERATOR


def test_a_detached_volume_that_is_complete_needs_nothing() -> None:
    made = plan(volume(), None, Seen(nodes=ALL_UP))
    assert made.actions == [] and made.conditions == []


def test_an_epoch_is_granted_before_an_engine_starts_and_each_engine_gets_a_new_one() -> None:
    assert actions(volume(), attachment()) == [GrantEpoch(1)]
    one = volume(grant=granted(1))
    assert actions(one, attachment(), unused_epoch=1) == [StartEngine(1)]
    assert actions(one, attachment(), engine=serving(1)) == []
    # It died, or the daemon that granted the epoch did: whether somebody holds epoch 1 is unknown.
    assert actions(one, attachment()) == [GrantEpoch(2)]


def test_no_engine_starts_while_a_replica_was_never_created() -> None:
    made = actions(volume(replica_size_bytes={"data-r1": SIZE, "data-r2": SIZE}), attachment())
    assert made == [CreateReplica("data-r3", "node3", SIZE)]


def test_an_engine_of_an_older_epoch_is_ended() -> None:
    (made,) = actions(volume(grant=granted(3)), attachment(), engine=serving(2))
    assert isinstance(made, EndEngine)


def test_an_engine_that_is_silent_too_long_is_ended_and_not_before() -> None:
    v = volume(grant=granted(1))
    silent = EngineSeen(1, SIZE, answering=False, silent_s=ENGINE_SILENT_MAX_S - 1)
    waiting = plan(v, attachment(), Seen(nodes=ALL_UP, engine=silent))
    assert waiting.actions == [] and waiting.wake_in_s is not None
    (made,) = actions(v, attachment(), engine=replace(silent, silent_s=ENGINE_SILENT_MAX_S))
    assert isinstance(made, EndEngine)


def test_an_engine_that_keeps_dying_is_waited_for_with_its_reason() -> None:
    made = plan(volume(), attachment(), Seen(nodes=ALL_UP, engine_wait_s=0.5, engine_end="exit code 9"))
    assert made.actions == [] and made.wake_in_s == 0.5
    assert any("exit code 9" in condition.waits_for for condition in made.conditions)


def test_a_detach_ends_the_engine_then_removes_sockets_then_the_attachment() -> None:
    v, a = volume(grant=granted(1)), attachment(detaching=True)
    assert actions(v, a, engine=serving(1), sockets=True) == [DetachEngine(False)]
    assert actions(v, a, sockets=True) == [RemoveSockets()]
    assert actions(v, a) == [RemoveAttachment()]
    assert actions(v, attachment(detaching=True, force=True), engine=serving(1)) == [DetachEngine(True)]


def test_an_engine_nobody_wants_is_ended() -> None:
    (made,) = actions(volume(grant=granted(1)), None, engine=serving(1))
    assert isinstance(made, EndEngine)


def test_growing_goes_replicas_first_then_the_record_then_the_engine() -> None:
    grown = 2 * SIZE
    v = volume(size_bytes=grown, grant=granted(1))
    assert actions(v, attachment(), engine=serving(1)) == [
        ResizeReplica(r, n, grown) for r, n in zip(IDS, NODES, strict=True)
    ]
    v = volume(size_bytes=grown, grant=granted(1), replica_size_bytes=dict.fromkeys(IDS, grown))
    assert actions(v, attachment(), engine=serving(1)) == [SetSize(grown)]
    v = Volume(v.document.with_status(size_bytes=grown))
    assert actions(v, attachment(), engine=serving(1)) == [GrowEngine(grown)]
    assert actions(v, attachment(), engine=serving(1, size_bytes=grown)) == []


def test_a_replica_that_is_not_in_sync_does_not_hold_up_growth() -> None:
    grown = 2 * SIZE
    record = {"epoch": 1, "version": 2, "in_sync": ["data-r1", "data-r2"]}
    sizes = {"data-r1": grown, "data-r2": grown, "data-r3": SIZE}
    v = volume(size_bytes=grown, grant=granted(1), record=record, replica_size_bytes=sizes)
    nodes = {**ALL_UP, "node3": NodeState.DOWN}
    assert actions(v, attachment(), nodes=nodes, engine=serving(1)) == [SetSize(grown)]
    in_sync = volume(size_bytes=grown, grant=granted(1), replica_size_bytes=sizes)
    assert actions(in_sync, attachment(), nodes=nodes, engine=serving(1)) == []


def test_a_volume_is_deleted_replicas_first_and_its_document_last() -> None:
    assert actions(volume(deleting=True)) == [DeleteReplica(r, n) for r, n in zip(IDS, NODES, strict=True)]
    assert actions(volume(deleting=True, deleted=["data-r1", "data-r2", "data-r3"])) == [RemoveVolume()]
    nodes = {**ALL_UP, "node2": NodeState.STOPPED}
    made = plan(volume(deleting=True, deleted=["data-r1", "data-r3"]), None, Seen(nodes=nodes))
    assert made.actions == [] and {c.reason for c in made.conditions} == {"node_stopped", "deleting"}


def test_a_replica_that_may_have_been_created_without_a_note_is_deleted_too() -> None:
    assert len(actions(volume(deleting=True, replica_size_bytes={}))) == 3


class World:
    """Docs and processes as plain values; performs actions, and forgets what a killed daemon forgets."""

    def __init__(self) -> None:
        self.document: Document | None = new_volume("data", "id", SIZE, NODES)
        self.attachment: Attachment | None = None
        self.engine: EngineSeen | None = None
        self.sockets = False
        self.unused_epoch = 0
        self.replicas: dict[str, int] = {}
        self.engines_of_epoch: dict[int, int] = {}

    def seen(self) -> Seen:
        return Seen(ALL_UP, self.engine, self.unused_epoch, sockets=self.sockets)

    def status(self, **changes: object) -> None:
        assert self.document is not None
        self.document = self.document.with_status(**changes)
        VolumeStatus.model_validate(self.document.status)

    def plan(self) -> list[Action]:
        if self.document is None:
            return []
        return plan(Volume(self.document), self.attachment, self.seen()).actions

    def perform(self, action: Action, *, noted: bool) -> None:
        """``noted`` False: the daemon was killed after doing it and before writing it down."""
        assert self.document is not None
        now = Volume(self.document)
        match action:
            case CreateReplica(replica, _, size_bytes):
                assert self.replicas.setdefault(replica, size_bytes) == size_bytes
                if noted:
                    self.status(replica_size_bytes={**now.status.replica_size_bytes, replica: size_bytes})
            case ResizeReplica(replica, _, size_bytes):
                self.replicas[replica] = size_bytes
                if noted:
                    self.status(replica_size_bytes={**now.status.replica_size_bytes, replica: size_bytes})
            case DeleteReplica(replica, _):
                self.replicas.pop(replica, None)
                if noted:
                    self.status(deleted=sorted({*now.status.deleted, replica}))
            case SetSize(size_bytes):
                assert all(self.replicas[r] >= size_bytes for r in now.status.record.in_sync)
                self.status(size_bytes=size_bytes)
            case GrantEpoch(epoch):
                assert epoch == now.status.epoch + 1
                self.status(grant=granted(epoch))
                if noted:
                    self.unused_epoch = epoch
            case StartEngine(epoch):
                assert now.status.epoch == epoch and self.engine is None
                assert set(self.replicas) == set(IDS)
                self.engines_of_epoch[epoch] = self.engines_of_epoch.get(epoch, 0) + 1
                self.unused_epoch, self.sockets = 0, True
                self.engine = serving(epoch, size_bytes=now.status.size_bytes)
                self.status(record={"epoch": epoch, "version": 1, "in_sync": list(IDS)})
            case GrowEngine(size_bytes):
                assert self.engine is not None
                self.engine = replace(self.engine, size_bytes=size_bytes)
            case DetachEngine(_) | EndEngine(_):
                self.engine = None
            case RemoveSockets():
                assert self.engine is None
                self.sockets = False
            case RemoveAttachment():
                assert self.engine is None and not self.sockets
                self.attachment = None
            case RemoveVolume():
                assert not self.replicas and self.attachment is None
                self.document = None

    def kill_daemon(self) -> None:
        self.unused_epoch = 0

    def settle(self) -> None:
        for _ in range(50):
            todo = self.plan()
            if not todo:
                return
            for action in todo:
                self.perform(action, noted=True)
        raise AssertionError(f"does not end: {self.plan()}")


STEPS = st.sampled_from(
    ["attach", "detach", "grow", "kill engine", "kill daemon", "act", "act", "act", "act unnoted"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40), st.booleans())
def test_whatever_is_killed_in_between_every_goal_is_reached(steps: list[str], delete: bool) -> None:
    world = World()
    for step in steps:
        assert world.document is not None
        match step:
            case "attach" if world.attachment is None:
                world.attachment = attachment()
            case "detach" if world.attachment is not None:
                world.attachment = attachment(detaching=True)
            case "grow":
                size_bytes = world.document.spec["size_bytes"]
                world.document = world.document.with_spec(size_bytes=size_bytes + 4 * MIB)
            case "kill engine":
                world.engine = None
            case "kill daemon":
                world.kill_daemon()
            case "act" | "act unnoted":
                for action in world.plan()[:1]:
                    world.perform(action, noted=step == "act")
                    if step == "act unnoted":
                        world.kill_daemon()
        assert all(count == 1 for count in world.engines_of_epoch.values())
    wants_engine = world.attachment is not None and not world.attachment.spec.detaching
    if delete:
        if world.attachment is not None:
            world.attachment = attachment(detaching=True)
        assert world.document is not None
        world.document = world.document.with_spec(deleting=True)
    world.settle()
    if delete:
        assert world.document is None and not world.replicas and world.engine is None
        return
    assert world.document is not None
    now = Volume(world.document)
    assert (world.engine is not None) == wants_engine == (world.attachment is not None)
    assert now.status.size_bytes == now.spec.size_bytes
    assert set(world.replicas.values()) == {now.spec.size_bytes}
    if world.engine is not None:
        assert world.engine.size_bytes == now.spec.size_bytes and world.engine.epoch == now.status.epoch
    assert plan(now, world.attachment, world.seen()).conditions == []
