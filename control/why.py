"""Why something is not as desired: what is observed in, findings out, root cause first. Pure.

Owns which findings there are, their words, their order and what causes what. Does not own observing
(``control/observe.py``, ``control/cluster.py``), remembering since when (``control/since.py``) or printing
(``cli/why.py``).

A *root* is a fault by itself; every other finding names in ``because`` the root it follows from. Roots come
first, and among them what others stand on: the state store, nodes, engines, disks, replicas, then the volume.
The conditions of volumes and nodes are made of the same findings (``conditions_of_volume``), so that no two
commands tell two stories.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from control.model import Condition, Distrust, Model, Override, Who
from control.reconcile import NodeState
from control.sizes import format_size
from control.views import ReplicaState, ReplicaView, VolumeState, VolumeView

DISK_FULL_BYTES = 4 * 1024 * 1024
"""Free space under one region's size: the next region that is written to may not fit any more."""

CRASHING_ENDS = 3
"""Ends in a row (a node) or within a minute (an engine). Once is a kill, twice a coincidence."""

REASONS: dict[str, tuple[int, str]] = {
    "store_failed": (0, "the state store cannot be read or written"),
    "store_unreachable": (1, "an engine cannot reach the state store"),
    "node_stopped": (10, "an operator stopped the node"),
    "node_crashing": (10, "its replica server ends each time it is started"),
    "node_down": (10, "its replica server is not running"),
    "node_frozen": (10, "its replica server is stopped by a signal"),
    "node_silent": (10, "its replica server runs and does not answer"),
    "node_starting": (11, "its replica server recovers its replicas"),
    "engine_crashing": (12, "the engine ends each time it is started"),
    "engine_fenced": (12, "the engine met a newer epoch than its own"),
    "engine_down": (12, "the engine is not running"),
    "engine_frozen": (12, "the engine is stopped by a signal"),
    "engine_silent": (12, "the engine runs and does not answer"),
    "disk_full": (20, "the disk has no room"),
    "disk_failed": (21, "the disk refused something"),
    "replica_damaged": (22, "the replica's files cannot be opened"),
    "replica_missing": (22, "the disk does not hold the replica"),
    "replica_ahead": (23, "it was claimed in an epoch that was never granted"),
    "replica_restored": (24, "an older copy of its directory was put back"),
    "replica_cut_off": (25, "its server answers the daemon, and the engine cannot reach it"),
    "replica_suspect": (26, "it may have lost acknowledged writes"),
    "replica_forked": (27, "its history was given up by `dolmen volume recover`"),
    "store_distrusted": (28, "the state store may have missed records of the volume"),
    "override_waits": (29, "an operator's `dolmen volume recover` is not carried out yet"),
    "replica_opening": (30, "its server recovers it"),
    "replica_resyncing": (31, "it is brought up to date"),
    "replica_stale": (32, "it has missed writes"),
    "replica_offline": (33, "it is out of reach"),
    "engine_starting": (40, "the engine claims its replicas"),
    "scrub_findings": (45, "damaged blocks were found and are not repaired yet"),
    "volume_waiting": (50, "I/O waits"),
    "volume_degraded": (51, "fewer replicas are in sync than there are"),
    "volume_unserved": (52, "nobody can read or write"),
    "replica_stray": (60, "a disk holds a replica that the state store does not know"),
}
"""Every reason: its rank (roots of a lower one come first) and its meaning. Conditions of a plan in progress
(``control/reconcile.py``) have reasons of their own, and rank PLAN_RANK."""

PLAN_RANK = 48

REPLACEMENT_REASONS = frozenset({"replica_gone", "no_spare_node", "replica_replacing"})
"""Conditions of a plan that follow from the fault of a replica."""

EXIT_FENCED = 3
"""An engine's exit code, PROTOCOL.md."""

NODE_REASONS = frozenset(reason for reason in REASONS if reason.startswith("node_"))


class Finding(Model):
    """One thing that is not as desired."""

    about: str  # "node node2", "replica data-r2", "volume data", "the state store"
    reason: str
    text: str  # what is wrong
    then: str = ""  # what happens by itself, or what to look at
    command: str = ""  # what to run; several are joined by ", then "
    who: Who
    since: str = ""  # ISO 8601, UTC
    because: str = ""  # ``about`` of its root; "": it is one
    concerns: tuple[str, ...] = ()  # names of the nodes, replicas and volumes that it is about or harms

    @property
    def rank(self) -> int:
        return REASONS[self.reason][0] if self.reason in REASONS else PLAN_RANK


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """Of a replica server or an engine."""

    pid: int | None = None
    standing: bool = False  # stopped by a signal or a debugger
    answers: bool = False
    starting: bool = False  # it has not answered once yet
    how: str = ""  # how the last one ended: "killed by signal 9", "exit code 1"; "": none ended
    ended_ago_s: float = 0.0
    exit_code: int | None = None
    ends: int = 0  # without a long life between
    last_words: str = ""  # of its log
    log: str = ""
    since: str = ""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    name: str
    state: NodeState
    process: ProcessFacts
    path: str = ""
    space_total_bytes: int | None = None
    space_free_bytes: int | None = None
    strays: tuple[str, ...] = ()  # paths


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    view: VolumeView  # its conditions: those of the plan
    attached: bool
    process: ProcessFacts  # of its engine
    said: Mapping[str, Mapping[str, Any] | None]  # by replica: replica.inspect; None: nobody answered
    offline: frozenset[str] = frozenset()  # replicas that the engine has no session with
    reasons: Mapping[str, str] = field(default_factory=dict)  # why, as the engine says
    distrust: Distrust | None = None
    override: Override | None = None
    forked: tuple[str, ...] = ()
    left_at: Mapping[str, str] = field(default_factory=dict)
    scrub_found: Mapping[str, int] = field(default_factory=dict)  # by replica: blocks
    scrub_unreadable: Mapping[str, int] = field(default_factory=dict)  # of these: no replica has a good copy


@dataclass(frozen=True, slots=True)
class Facts:
    nodes: Sequence[NodeFacts] = ()
    volumes: Sequence[VolumeFacts] = ()
    store_error: str = ""


def explain(facts: Facts) -> list[Finding]:
    """All that is not as desired, roots first; of roots of one rank first what I/O waits for."""
    found = _sorted(_findings(facts))
    holding_up = {finding.because for finding in found if finding.reason == "volume_waiting"}
    return sorted(found, key=lambda f: (bool(f.because), f.rank, f.about not in holding_up))


def _findings(facts: Facts) -> Iterator[Finding]:
    if facts.store_error:
        names = tuple(volume.view.name for volume in facts.volumes)
        yield Finding(
            about="the state store",
            reason="store_failed",
            text=f"the state store cannot be used: {facts.store_error}",
            then="volumes are served as they are; what a record must be stored for waits",
            command="repair the disk under state.db, then `dolmen up`",
            who=Who.OPERATOR,
            concerns=names,
        )
    placed = _placed(facts.volumes)
    nodes = {}
    for node in facts.nodes:
        finding = _node(node, placed.get(node.name, ()))
        if finding is not None:
            nodes[node.name] = finding
            yield finding
        yield from _disk(node, placed.get(node.name, ()))
    full = {node.name for node in facts.nodes if _is_full(node)}
    for volume in facts.volumes:
        yield from _VolumeExplained(volume, nodes, full).findings()


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda f: (bool(f.because), f.rank, f.about))


def relevant(findings: Iterable[Finding], name: str) -> list[Finding]:
    """Those that are about a node, a replica or a volume of that name, or harm it."""
    return [finding for finding in findings if name in finding.concerns]


def _placed(volumes: Iterable[VolumeFacts]) -> dict[str, tuple[str, ...]]:
    """By node: names of what lives there."""
    placed: dict[str, tuple[str, ...]] = {}
    for volume in volumes:
        for replica in volume.view.replicas:
            placed[replica.node] = (*placed.get(replica.node, ()), replica.id, volume.view.name)
    return placed


def ago_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(0, round(seconds))} s ago"
    return f"{round(seconds / 60)} min ago" if seconds < 5400 else f"{round(seconds / 3600)} h ago"


@dataclass(frozen=True, slots=True)
class _Said:
    """A finding before it is known about what it is."""

    reason: str
    text: str
    then: str = ""
    command: str = ""
    who: Who = Who.DOLMEN

    def of(self, about: str, concerns: tuple[str, ...], *, since: str = "", because: str = "") -> Finding:
        return Finding(
            about=about,
            reason=self.reason,
            text=self.text,
            then=self.then,
            command=self.command,
            who=self.who,
            since=since,
            because=because,
            concerns=concerns,
        )


# Nodes and disks


def _node(node: NodeFacts, placed: tuple[str, ...]) -> Finding | None:
    said = _node_said(node)
    if said is None:
        return None
    return said.of(f"node {node.name}", (node.name, *placed), since=node.process.since)


def _node_said(node: NodeFacts) -> _Said | None:
    process, name = node.process, node.name
    server, start = f"{name}'s replica server", f"`dolmen node start {name}`"
    ended = f"{process.how}, {ago_text(process.ended_ago_s)}" if process.how else ""
    if node.state is NodeState.STOPPED:
        return _Said("node_stopped", f"{name} was stopped by an operator", "", start, Who.OPERATOR)
    if process.pid is not None and process.standing:
        return _Said(
            "node_frozen",
            f"{server} (pid {process.pid}) is stopped by a signal (SIGSTOP) and answers nobody",
            "its replicas go on as soon as it is continued",
            f"`kill -CONT {process.pid}`",
            Who.OPERATOR,
        )
    if node.state is not NodeState.UP and process.ends >= CRASHING_ENDS:
        words = f": {process.last_words}" if process.last_words else ""
        return _Said(
            "node_crashing",
            f"{server} ends each time ({process.how}, {process.ends} times in a row){words}",
            f"it is tried again every few seconds; its log: {process.log}",
            who=Who.OPERATOR,
        )
    if node.state is NodeState.DOWN:
        text = f"{server} is not running" + (f" ({ended})" if ended else "")
        return _Said("node_down", text, "the daemon starts it again")
    if node.state is NodeState.STARTING:
        text = f"{server} starts" + (f" (the one before: {ended})" if ended else "")
        return _Said("node_starting", text, "it recovers its replicas, then it serves")
    if not process.answers:
        return _Said(
            "node_silent",
            f"{server} (pid {process.pid}) runs and does not answer: stuck, or the network to it is cut",
            "it is asked again all the time; if it stays so, start it anew",
            f"`dolmen node stop {name} --kill`, then {start}",
            Who.OPERATOR,
        )
    return None


def _is_full(node: NodeFacts) -> bool:
    return node.space_free_bytes is not None and node.space_free_bytes < DISK_FULL_BYTES


def _disk(node: NodeFacts, placed: tuple[str, ...]) -> Iterator[Finding]:
    if _is_full(node):
        free, total = format_size(node.space_free_bytes or 0), format_size(node.space_total_bytes or 0)
        yield Finding(
            about=f"disk of {node.name}",
            reason="disk_full",
            text=f"{node.name}'s disk is full ({free} free of {total})",
            then=f"free space under {node.path}; its replicas resume by themselves",
            who=Who.OPERATOR,
            concerns=(node.name, *placed),
        )
    for path in node.strays:
        yield Finding(
            about=f"disk of {node.name}",
            reason="replica_stray",
            text=f"{path} is a replica of a volume that the state store does not know",
            then="it is left alone: the volume may be one that a lost state store knew",
            who=Who.OPERATOR,
            concerns=(node.name,),
        )


# Volumes


class _VolumeExplained:
    """One volume's findings."""

    def __init__(self, facts: VolumeFacts, nodes: Mapping[str, Finding], full: Iterable[str]) -> None:
        self.facts = facts
        self.view = facts.view
        self.nodes = nodes
        self.full = frozenset(full)
        self.names = (facts.view.name, *(replica.id for replica in facts.view.replicas))

    def findings(self) -> Iterator[Finding]:
        found = [finding for replica in self.view.replicas for finding in self._replica(replica)]
        engine = self._engine()
        found += [*engine, *self._trust(), *self._scrub()]
        found += self._plan(bool(engine), self._replica_root_of(found))
        yield from found
        yield from self._volume(found)

    def _make(self, about: str, reason: str, text: str, **more: Any) -> Finding:
        more.setdefault("who", Who.DOLMEN)
        more.setdefault("concerns", (self.view.name,))
        return Finding(about=about, reason=reason, text=text, **more)

    # Replicas

    def _replica(self, replica: ReplicaView) -> list[Finding]:
        """Its root, unless that is its node's, and its state, unless it is in sync."""
        if self.view.state is VolumeState.CREATING:
            return []  # the plan says what it waits for
        about = f"replica {replica.id}"
        concerns = (self.view.name, replica.id, replica.node)
        found = []
        because = f"node {replica.node}" if replica.node in self.nodes else ""
        what = f"replica {replica.id} on {replica.node}"
        if not because and replica.node in self.full and replica.state is not ReplicaState.IN_SYNC:
            because = f"disk of {replica.node}"
        if not because:
            root = self._replica_root(replica, what)
            if root is not None:
                found.append(root.of(about, concerns))
                because = about
        if replica.state is not ReplicaState.IN_SYNC:
            said = self._replica_state(replica, what)
            since = self.facts.left_at.get(replica.id, "")
            found.append(said.of(about, concerns, since=since, because=because))
        return found

    def _replica_root(self, replica: ReplicaView, what: str) -> _Said | None:
        said = self.facts.said.get(replica.id)
        if said is None:
            return None
        state, reason = said.get("state"), str(said.get("reason") or "")
        if state == "open":
            return self._open_replica(replica, what, said)
        anew = f"`dolmen replica rebuild {self.view.name} {replica.id}`"
        if state == "damaged":
            text = f"{what} is damaged and cannot be opened: {reason}"
            return _Said("replica_damaged", text, "", anew, Who.OPERATOR)
        if state == "missing":
            text = f"{what} is missing: its disk does not hold it"
            return _Said("replica_missing", text, "", anew, Who.OPERATOR)
        if state == "failed":
            text = f"{replica.node}'s disk failed under replica {replica.id}: {reason}"
            then = f"it is opened again as soon as the disk works; look at the disk under {replica.path}"
            return _Said("disk_failed", text, then, "", Who.OPERATOR)
        if state == "opening":
            return _Said("replica_opening", f"{what} is being recovered by its server")
        return None

    def _open_replica(self, replica: ReplicaView, what: str, said: Mapping[str, Any]) -> _Said | None:
        id_, epoch, granted = replica.id, said.get("epoch"), self.view.epoch
        if isinstance(epoch, int) and epoch > granted:
            text = f"{what} was claimed in epoch {epoch}; the state store granted no more than {granted}"
            then = "the state store forgot something: the next grant is above it, and distrusts the store"
            return _Said("replica_ahead", text, then)
        if said.get("restored"):
            return _Said("replica_restored", f"{what} is an older copy that was put back", self._compared())
        if id_ in self.facts.offline:
            why = self.facts.reasons.get(id_, "")
            text = f"the engine cannot reach {what}, whose server answers the daemon"
            then = "it is tried again all the time; look at what lies between them: links, firewalls"
            return _Said("replica_cut_off", f"{text}: {why}" if why else text, then)
        if said.get("suspect"):
            text = f"{what} may have lost acknowledged writes: its machine or its disk failed before a flush"
            return _Said("replica_suspect", text, self._compared())
        # While the state store is distrusted all of them are, to be sure: that is the fault then.
        forked = id_ in self.facts.forked and self.facts.distrust is None
        if forked and replica.state is not ReplicaState.IN_SYNC:
            text = f"{what} may hold writes that were given up by `dolmen volume recover`"
            return _Said("replica_forked", text, self._compared())
        return None

    def _compared(self) -> str:
        if self.facts.attached:
            return "it is compared with the others before it counts again"
        return f"it is compared with the others when {self.view.name} is attached"

    def _replica_state(self, replica: ReplicaView, what: str) -> _Said:
        resync = replica.resync
        rest = f": {replica.reason}" if replica.reason else ""
        if replica.state is ReplicaState.RESYNCING:
            done = f" ({resync.regions_done} of {resync.regions_total} regions)" if resync else ""
            return _Said("replica_resyncing", f"{what} is brought up to date{done}{rest}")
        if replica.state is ReplicaState.OFFLINE:
            return _Said("replica_offline", f"{what} is offline{rest}")
        text = f"{what} is not in sync{rest}"
        if self.facts.attached:
            return _Said("replica_stale", text, "it is brought up to date by itself")
        command = f"`dolmen volume attach {self.view.name}`"
        then = "it is brought up to date while the volume is attached"
        return _Said("replica_stale", text, then, command, Who.OPERATOR)

    # The engine

    def _engine(self) -> list[Finding]:
        said = self._engine_said() if self.facts.attached else None
        if said is None:
            return []
        return [said.of(f"engine of {self.view.name}", self.names, since=self.facts.process.since)]

    def _engine_said(self) -> _Said | None:
        process, engine = self.facts.process, f"the engine of {self.view.name}"
        ended = f"{process.how}, {ago_text(process.ended_ago_s)}" if process.how else ""
        if process.pid is not None and process.answers and process.ends < CRASHING_ENDS:
            return None
        if process.pid is not None and process.standing:
            text = f"{engine} (pid {process.pid}) is stopped by a signal (SIGSTOP) and answers nobody"
            then = "the daemon ends it and starts another if it stays so for 15 s"
            return _Said("engine_frozen", text, then, f"`kill -CONT {process.pid}`")
        if process.ends >= CRASHING_ENDS:
            words = f": {process.last_words}" if process.last_words else ""
            text = f"{engine} keeps ending ({process.how}, {process.ends} times within a minute){words}"
            then = f"the daemon starts it again each time; its log: {process.log}"
            return _Said("engine_crashing", text, then, who=Who.OPERATOR)
        if process.exit_code == EXIT_FENCED and ended:
            text = f"{engine} was fenced ({ended}): a newer epoch than its own is known"
            return _Said("engine_fenced", text, "the daemon starts another in a newer epoch")
        if process.pid is None:
            text = f"{engine} is not running" + (f" ({ended})" if ended else "")
            return _Said("engine_down", text, "the daemon starts another")
        if ended:
            return _Said("engine_down", f"{engine} ended ({ended})", "another one starts")
        if process.starting:
            return None
        text = f"{engine} (pid {process.pid}) runs and does not answer"
        return _Said("engine_silent", text, "the daemon ends it and starts another after 15 s")

    # The volume

    def _trust(self) -> Iterator[Finding]:
        name, about = self.view.name, f"volume {self.view.name}"
        if self.facts.distrust is not None:
            yield self._make(
                f"{about}'s records",
                "store_distrusted",
                f"the state store may have missed records of volume {name}: {self.facts.distrust.reason}",
                then="it is opened only when every replica can be asked, and trusted after that",
                since=self.facts.distrust.since,
            )
        if self.facts.override is not None:
            members = ", ".join(self.facts.override.members)
            yield self._make(
                f"{about}'s recovery",
                "override_waits",
                f"volume {name} was ordered to open with {members}, and has not yet",
                then="it does when they are reachable and nothing newer was found",
                command=f"`dolmen volume recover {name}` shows what is there",
                since=self.facts.override.since,
            )
        for wait in self._waiting_for("store"):
            yield self._make(
                f"{about}'s store",
                "store_unreachable",
                f"the engine of {name} cannot reach the state store: {wait.get('reason', '')}",
                then="it goes on as soon as the daemon answers",
                concerns=self.names,
            )

    def _scrub(self) -> Iterator[Finding]:
        for replica in self.view.replicas:
            count = self.facts.scrub_found.get(replica.id, 0)
            if count:
                name, attached = self.view.name, self.facts.attached
                lost = min(count, self.facts.scrub_unreadable.get(replica.id, 0))
                blocks = f"{count} damaged block{'s' * (count != 1)}"
                where = f"in replica {replica.id} on {replica.node}"
                then = "they are repaired from the other replicas" + (
                    "" if attached else f" when {name} is attached"
                )
                command = "" if attached else f"`dolmen volume attach {name}`"
                if lost:
                    where += f"; of {lost} no replica has a good copy"
                    then = "reads of those fail until they are written anew, as from a backup"
                    command = f"`dolmen volume scrub {name} --wait` shows where"
                yield self._make(
                    f"blocks of {replica.id}",
                    "scrub_findings",
                    f"scrub found {blocks} {where}",
                    then=then,
                    command=command,
                    who=Who.OPERATOR if lost or not attached else Who.DOLMEN,
                    concerns=(self.view.name, replica.id, replica.node),
                )

    def _replica_root_of(self, found: Iterable[Finding], names: Collection[str] = ()) -> str:
        """Why the first of the replicas ``names`` (none: of all) is not in sync; "" if nothing says so."""
        abouts = [f"replica {name}" for name in names or [r.id for r in self.view.replicas]]
        of_them = sorted((f for f in found if f.about in abouts), key=lambda f: abouts.index(f.about))
        return next((finding.because or finding.about for finding in of_them), "")

    def _plan(self, engine_said: bool, replica_root: str) -> list[Finding]:
        """What the reconciler waits for. What is said better above is left out."""
        made = []
        for condition in self.view.conditions:
            if condition.reason in NODE_REASONS or (condition.reason == "engine_starting" and engine_said):
                continue
            follows = replica_root if condition.reason in REPLACEMENT_REASONS else ""
            made.append(
                Finding(
                    about=f"plan of {self.view.name}",
                    reason=condition.reason,
                    text=f"volume {self.view.name} waits for {condition.waits_for}",
                    who=condition.who,
                    since=condition.since,
                    because=self._node_root() or follows,
                    concerns=(self.view.name,),
                )
            )
        return made

    def _waiting_for(self, kind: str) -> list[dict[str, str]]:
        waits = self.view.engine.waiting_for if self.view.engine is not None else []
        return [wait for wait in waits if kind in wait]

    def _node_root(self) -> str:
        return next((f"node {r.node}" for r in self.view.replicas if r.node in self.nodes), "")

    def _volume(self, found: list[Finding]) -> Iterator[Finding]:
        """What all this means for whoever reads and writes. A root only if there is no other."""
        name, state = self.view.name, self.view.state
        roots = _sorted(f for f in found if not f.because)
        waits = self._waiting_for("replica")
        because = self._replica_root_of(found, [wait["replica"] for wait in waits]) if waits else ""
        because = because or self._node_root() or (roots[0].about if roots else "")
        because = because or next((f.because for f in found if f.because), "")
        if not because and found:
            because = found[0].about
        count, total = self._in_sync(), len(self.view.replicas)
        about = f"volume {name}"
        if state is VolumeState.WAITING or (state is VolumeState.ATTACHING and waits):
            for_whom = ", ".join(f"{w['replica']} ({w.get('reason', '')})" for w in waits)
            yield self._make(
                about,
                "volume_waiting",
                f"I/O of volume {name} waits" + (f" for {for_whom}" if for_whom else ""),
                then="it goes on by itself when they are back; nothing is lost",
                command=f"if they never come back: `dolmen volume recover {name}` shows what would be lost"
                if waits
                else "",
                because=because,
            )
        elif state is VolumeState.DEGRADED:
            text = f"volume {name} is served by {count} of {total} replicas"
            yield self._make(about, "volume_degraded", text, because=because)
        elif state is VolumeState.DETACHED and count < total:
            text = f"volume {name} is detached, with {count} of {total} replicas in sync"
            yield self._make(about, "volume_degraded", text, because=because)
        elif state in (VolumeState.ATTACHING, VolumeState.DETACHING) and found:
            text = f"volume {name} is {state.value}"
            yield self._make(about, "volume_unserved", text, because=because)
        elif state is VolumeState.ATTACHING:
            yield self._make(
                about, "engine_starting", f"the engine of {name} starts, and claims its replicas"
            )

    def _in_sync(self) -> int:
        return sum(replica.state is ReplicaState.IN_SYNC for replica in self.view.replicas)


# Conditions: the same findings, as volumes and nodes show them


def conditions_of_volume(view: VolumeView, findings: Sequence[Finding]) -> list[Condition]:
    """The plan's, then one for each replica that is not in sync, with its root, then what else is wrong."""
    roots = {finding.about: finding for finding in reversed(findings) if not finding.because}
    made = list(view.conditions)
    for replica in view.replicas:
        about = f"replica {replica.id}"
        of_it = [f for f in findings if f.about == about]
        if of_it and view.state is not VolumeState.DELETING:
            root = roots.get(of_it[0].because, of_it[0])
            place = f"replica {replica.id} on {replica.node}"
            said = root.text if place in root.text else f"{place}: {root.text}"
            made.append(_condition(root, said))
    others = {"store_distrusted", "override_waits", "store_unreachable", "scrub_findings", "engine_frozen"}
    made += [_condition(f, f.text) for f in findings if f.reason in others and view.name in f.concerns]
    return made


def conditions_of_node(name: str, findings: Iterable[Finding]) -> list[Condition]:
    abouts = (f"node {name}", f"disk of {name}")
    # That it is stopped is its state, shown beside this.
    return [
        _condition(finding, "" if finding.reason == "node_stopped" else finding.text)
        for finding in findings
        if finding.about in abouts
    ]


def _condition(finding: Finding, text: str) -> Condition:
    said = "; ".join(part for part in (text, finding.then, finding.command) if part)
    return Condition(reason=finding.reason, waits_for=said, who=finding.who, since=finding.since)
