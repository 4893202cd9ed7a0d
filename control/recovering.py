"""``dolmen volume recover``: looks at what is left of a volume, and does what an operator decided.

Owns asking the replicas and writing the decision. Does not own what can
be decided (``control/recovery.py``), how the decision reaches the next engine (``control/trust.py``), or
opening.

What a daemon that is killed leaves behind:

==  ==============================================  =====================================================
#   step                                            a kill after it leaves
==  ==============================================  =====================================================
1   the override, and an epoch that nobody has,     the engine before is fenced: it can store no record, and
    in one write of the volume's document           the next daemon ends it
2   the engine is ended                             no engine: the next grant carries the override
3   the engine of the new epoch opens and stores    the record, and the others as forked, in one write; the
    its first record                                override is gone
==  ==============================================  =====================================================

Proved by tests/control/test_trust.py, tests/control/test_cluster.py and tests/system/test_recover_volume.py.
"""

from __future__ import annotations

from datetime import UTC, datetime

import structlog

from control.cluster import Cluster
from control.model import KIND_VOLUME, Volume, VolumeStatus, record_of
from control.observe import ask_servers
from control.recovery import Recovery, RecoveryOrder, check_order, copy_of, judge
from control.trust import overridden, withdrawn
from control.views import SERVING, VolumeState, VolumeView
from protocol.errors import BadRequest, Conflict, VolumeNotFound


async def show_recovery(cluster: Cluster, name: str) -> Recovery:
    """What is left of a volume, and what may be decided. Changes nothing. Raises VolumeNotFound."""
    document = await cluster.store.get(KIND_VOLUME, name)
    if document is None:
        raise VolumeNotFound(volume=name)
    volume, view = Volume(document), await cluster.volume(name)
    nodes = {place.node for place in volume.spec.replicas}
    servers = await ask_servers(s for node, s in cluster.supervisors.items() if node in nodes)
    copies = []
    for place in volume.spec.replicas:
        held = servers[place.node].volumes if place.node in servers else None
        said = None if held is None else held.get(volume.spec.volume_id, {"state": "missing"})
        copies.append(copy_of(place.id, place.node, said))
    return judge(view, volume.membership, copies)


async def recover(cluster: Cluster, name: str, order: RecoveryOrder, *, wait_s: float) -> VolumeView:
    """Open with what an operator chose, and give up the rest. Raises BadRequest, which says why not."""
    recovery = await show_recovery(cluster, name)
    choice = check_order(recovery, order)
    if order.dry_run:
        return await cluster.volume(name)
    newest = (recovery.newest.epoch, recovery.newest.version)
    now = datetime.now(UTC).isoformat(timespec="seconds")

    def change(status: VolumeStatus) -> VolumeStatus:
        if record_of(status).stamp > newest:  # stored while we looked: the volume has gone on
            raise Conflict(kind="record of volume", name=name, revision=status.record.version)
        return overridden(status, tuple(sorted(choice.members)), newest, now)

    await cluster.write_membership(name, change)
    structlog.get_logger().warning(
        "an operator decided what a volume is opened with",
        volume=name,
        members=choice.members,
        newest=f"{newest[0]}.{newest[1]}",
        loses=choice.loses,
    )
    served = SERVING - {VolumeState.WAITING}
    return await cluster.view_when(name, lambda view: view.state in served, wait_s)


async def withdraw(cluster: Cluster, name: str) -> VolumeView:
    """Take back a decision that was not carried out. Raises BadRequest when there is none."""

    def change(status: VolumeStatus) -> VolumeStatus:
        if status.override is None:
            raise BadRequest(reason=f"no recovery of volume {name} is under way. `dolmen why {name}`")
        return withdrawn(status)

    await cluster.write_membership(name, change)
    return await cluster.volume(name)
