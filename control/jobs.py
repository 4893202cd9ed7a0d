"""Work that takes longer than a request: started, then asked about. Today: verifications.

Owns the jobs of this daemon's life, in memory: a verification changes nothing, so one that a restart
forgot is simply started again. Does not own the comparison (``control/verify.py``).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from control.cluster import Cluster
from control.errors import JobNotFound
from control.verify import CALL_TIMEOUT_S, Verification
from control.views import JobState, JobView, ReplicaState, VolumeState, VolumeView
from protocol.errors import BadRequest, Conflict, StorageError

JOBS_KEPT_MAX = 100
"""Finished jobs that can still be asked about, the newest."""

RUNNING_MAX = 4
"""Verifications at once: each reads every disk as fast as it can."""


_NEXT: Mapping[JobState, frozenset[JobState]] = {
    JobState.RUNNING: frozenset({JobState.DONE, JobState.FAILED}),
    JobState.DONE: frozenset(),
    JobState.FAILED: frozenset(),
}
"""Which state may follow which."""


class _Job:
    def __init__(self, volume: str) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.volume = volume
        self.state = JobState.RUNNING
        self.error = ""
        self.verification: Verification | None = None
        self.result: Any = None

    def enter(self, state: JobState, *, error: str = "") -> None:
        """The only place that changes the state."""
        assert state in _NEXT[self.state], f"{self.state} -> {state}"
        self.state, self.error = state, error

    def view(self) -> JobView:
        progress = self.verification.progress if self.verification else None
        return JobView(
            id=self.id,
            kind="verify",
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
        view = await self._cluster.volume(name)
        _refuse_unfinished(view)
        for job in self._jobs.values():
            if job.volume == name and job.state is JobState.RUNNING:
                return job.view()
        if len(self._running) >= RUNNING_MAX:
            raise Conflict(
                f"{RUNNING_MAX} verifications are running. Try again when one is done.",
                kind="job",
                name=name,
                revision=0,
            )
        job = _Job(name)
        self._jobs[job.id] = job
        self._forget_old()
        task = self._tasks.create_task(self._run(job, view), name=f"verify {name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return job.view()

    def _forget_old(self) -> None:
        finished = [job.id for job in self._jobs.values() if job.state is not JobState.RUNNING]
        for job_id in finished[: max(0, len(self._jobs) - JOBS_KEPT_MAX)]:
            del self._jobs[job_id]

    async def _run(self, job: _Job, view: VolumeView) -> None:
        try:
            await self._verify(job, view)
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
        job.verification = Verification(
            compared,
            before.size_bytes,
            online=online,
            ask=self._asker(before.volume_id, compared),
        )
        await job.verification.run()
        after = await self._cluster.volume(job.volume)
        for replica in after.replicas:
            if replica.id in compared and replica.state is not ReplicaState.IN_SYNC:
                left_out[replica.id] = (replica.node, f"became {replica.state.value} meanwhile")
        job.result = job.verification.result(left_out)

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
        running = list(self._running)
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
