"""Work that takes longer than a request: started, then asked about. Today: verifications and scrubs.

Owns the jobs of this daemon's life, in memory: a verification changes nothing, and a scrub goes on at the
replica servers, so one that a restart forgot is simply asked for again. Does not own the comparison
(``control/verify.py``) or the repair (``control/scrub.py``).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import structlog

from control.cluster import Cluster
from control.errors import JobNotFound
from control.links import ASK_TIMEOUT_S
from control.model import KIND_VOLUME, Volume
from control.observe import ask_servers
from control.scrub import REPAIR_TIMEOUT_S, Ask, DamageKeeper, Repair, VolumeScrub, note_unreadable
from control.verify import CALL_TIMEOUT_S, Verification
from control.views import SERVING, JobState, JobView, ReplicaState, VolumeState, VolumeView
from protocol.errors import BadRequest, Conflict, StorageError

JOBS_KEPT_MAX = 100
"""Finished jobs that can still be asked about, the newest."""

RUNNING_MAX = 4
"""Jobs at once: each reads every disk as fast as it can."""


_NEXT: Mapping[JobState, frozenset[JobState]] = {
    JobState.RUNNING: frozenset({JobState.DONE, JobState.FAILED}),
    JobState.DONE: frozenset(),
    JobState.FAILED: frozenset(),
}
"""Which state may follow which."""


class _Counted(Protocol):
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


class _Job:
    def __init__(self, kind: str, volume: str) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.kind = kind
        self.volume = volume
        self.state = JobState.RUNNING
        self.error = ""
        self.progress: _Counted | None = None
        self.result: Any = None

    def enter(self, state: JobState, *, error: str = "") -> None:
        """The only place that changes the state."""
        assert state in _NEXT[self.state], f"{self.state} -> {state}"
        self.state, self.error = state, error

    def view(self) -> JobView:
        progress = self.progress
        return JobView(
            id=self.id,
            kind=self.kind,
            volume=self.volume,
            state=self.state,
            done=progress.done if progress else 0,
            total=progress.total if progress else 0,
            unit="regions",
            error=self.error,
            result=self.result,
        )


class Jobs:
    def __init__(self, cluster: Cluster, tasks: asyncio.TaskGroup) -> None:
        self._cluster = cluster
        self._tasks = tasks
        self._jobs: dict[str, _Job] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._keeper = self._damage_keeper()
        self._log = structlog.get_logger()

    def view(self, job_id: str) -> JobView:
        """Raises JobNotFound."""
        if job_id not in self._jobs:
            raise JobNotFound(job=job_id[:40])
        return self._jobs[job_id].view()

    def views(self) -> list[JobView]:
        return [job.view() for job in self._jobs.values()]

    async def verify(self, name: str) -> JobView:
        """Start a verification, or find the one that runs. Raises VolumeNotFound, Conflict."""
        return await self._start("verify", name, self._verify)

    async def scrub(self, name: str) -> JobView:
        """Start a scrub, or find the one that runs. Raises VolumeNotFound, Conflict."""
        return await self._start("scrub", name, self._scrub)

    async def _start(
        self, kind: str, name: str, work: Callable[[_Job, VolumeView], Awaitable[None]]
    ) -> JobView:
        view = await self._cluster.volume(name)
        _refuse_unfinished(view)
        for job in self._jobs.values():
            if (job.kind, job.volume) == (kind, name) and job.state is JobState.RUNNING:
                return job.view()
        if len(self._running) >= RUNNING_MAX:
            raise Conflict(
                f"{RUNNING_MAX} jobs are running. Try again when one is done.",
                kind="job",
                name=name,
                revision=0,
            )
        job = _Job(kind, name)
        self._jobs[job.id] = job
        self._forget_old()
        task = self._tasks.create_task(self._run(job, work(job, view)), name=f"{kind} {name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return job.view()

    def _forget_old(self) -> None:
        finished = [job.id for job in self._jobs.values() if job.state is not JobState.RUNNING]
        for job_id in finished[: max(0, len(self._jobs) - JOBS_KEPT_MAX)]:
            del self._jobs[job_id]

    async def _run(self, job: _Job, work: Awaitable[None]) -> None:
        try:
            await work
            job.enter(JobState.DONE)
        except StorageError as error:
            job.enter(JobState.FAILED, error=str(error))
        except Exception:  # noqa: BLE001 - a bug in one job must not take the daemon with it
            self._log.exception("job failed by a bug", job=job.id)
            job.enter(JobState.FAILED, error="internal error; the daemon's log has it")

    async def _verify(self, job: _Job, before: VolumeView) -> None:
        compared = {r.id: r.node for r in before.replicas if r.state is ReplicaState.IN_SYNC}
        left_out = {
            r.id: (r.node, f"{r.state.value}: {r.reason}".rstrip(": "))
            for r in before.replicas
            if r.id not in compared
        }
        online = before.state is not VolumeState.DETACHED
        verification = Verification(
            compared,
            before.size_bytes,
            online=online,
            ask=self._asker(before.volume_id, compared),
        )
        job.progress = verification.progress
        await verification.run()
        after = await self._cluster.volume(job.volume)
        for replica in after.replicas:
            if replica.id in compared and replica.state is not ReplicaState.IN_SYNC:
                left_out[replica.id] = (replica.node, f"became {replica.state.value} meanwhile")
        job.result = verification.result(left_out)

    async def _scrub(self, job: _Job, before: VolumeView) -> None:
        nodes = {replica.id: replica.node for replica in before.replicas}
        scrub = VolumeScrub(
            nodes,
            ask=self._replica_asker(before.volume_id, nodes),
            repair=self._repairer(job.volume),
            now_s=asyncio.get_running_loop().time,
        )
        job.progress = scrub.progress
        await scrub.run()
        after = await self._cluster.volume(job.volume)
        job.result = scrub.result(attached=after.state in SERVING)

    def _replica_asker(self, volume_id: str, nodes: Mapping[str, str]) -> Ask:
        async def ask(replica_id: str, call: str, *, timeout_s: float = ASK_TIMEOUT_S, **args: Any) -> Any:
            link = self._cluster.link(nodes[replica_id])
            return await link.call(call, timeout_s=timeout_s, volume_id=volume_id, **args)

        return ask

    def _repairer(self, name: str) -> Repair:
        async def repair(replica_id: str, blocks: list[int]) -> Any:
            answer = await self._cluster.engine_call(
                name, "engine.repair", timeout_s=REPAIR_TIMEOUT_S, replica=replica_id, blocks=blocks
            )
            note_unreadable(self._cluster.unreadable, replica_id, blocks, answer)
            return answer

        return repair

    def keep_repairing(self) -> None:
        """From now on, what replicas know to be damaged is handed to the engines."""
        task = self._tasks.create_task(self._keeper.run(), name="damage keeper")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def attached(self) -> None:
        """A volume has an engine: what waited for that is looked at now."""
        self._keeper.wake()

    def _damage_keeper(self) -> DamageKeeper:
        places: dict[tuple[str, str], tuple[str, str]] = {}  # volume and replica -> volume id, node

        async def known() -> list[tuple[str, str, str, int]]:
            cluster, found = self._cluster, []
            servers = await ask_servers(cluster.supervisors.values())
            places.clear()
            for document in await cluster.store.list(KIND_VOLUME):
                volume = Volume(document)
                if volume.name not in cluster.slots:
                    continue  # no engine, nobody who could repair
                for place in volume.spec.replicas:
                    server = servers.get(place.node)
                    volumes = server.volumes if server is not None else None
                    count = (volumes or {}).get(volume.spec.volume_id, {}).get("damaged_count")
                    if isinstance(count, int):
                        places[volume.name, place.id] = (volume.spec.volume_id, place.node)
                        found.append((volume.name, place.id, place.node, count))
            return found

        def ask(volume: str, replica: str) -> Ask:
            volume_id, node = places[volume, replica]
            return self._replica_asker(volume_id, {replica: node})

        return DamageKeeper(known, ask=ask, repair=self._repairer, now_s=asyncio.get_running_loop().time)

    def _asker(self, volume_id: str, nodes: Mapping[str, str]) -> Callable[[str, int, int], Any]:
        async def ask(replica_id: str, first: int, count: int) -> Any:
            return await self._cluster.link(nodes[replica_id]).call(
                "replica.verify",
                timeout_s=CALL_TIMEOUT_S,
                volume_id=volume_id,
                first_region=first,
                region_count=count,
            )

        return ask

    async def cancel_all(self) -> None:
        running = [*self._running, *self._background]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _refuse_unfinished(view: VolumeView) -> None:
    """A volume that is being made or removed has nothing to compare. Raises BadRequest."""
    if view.state is VolumeState.CREATING:
        raise BadRequest(
            reason=f"volume {view.name} is still being created. "
            f"`dolmen volume show {view.name}` says what it waits for."
        )
    if view.state is VolumeState.DELETING:
        raise BadRequest(
            reason=f"volume {view.name} is being removed. "
            f"`dolmen volume rm {view.name} --missing-ok` waits for its end."
        )
