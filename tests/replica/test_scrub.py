"""The scrub of a replica: what is decided, what lasts, and what a real server finds."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadRequest, ReplicaNotFound
from protocol.frames import Status
from protocol.limits import BLOCK_BYTES, REGION_BLOCKS, REGION_BYTES
from replica import scrub, scrub_file
from replica.scrub import DAMAGED_KEPT_MAX, LOOK_MAX_S, RETRY_S, SCRUB_PERIOD_S, Pass, ScrubState
from replica.scrub_file import SCRUB_NAME, SCRUB_TMP_NAME, decode, encode, read_scrub, write_scrub
from tests.replica.fakes import SIZE_BYTES, VOLUME
from tests.replica.process import Server, blocks
from tests.replica.rig import Play, Rig

NOW_S = 1_800_000_000
REGIONS = SIZE_BYTES // REGION_BYTES
IDLE = ScrubState(due_s=NOW_S + 1000)


def walked(state: ScrubState, region: int, damaged: list[int] | None = None) -> ScrubState:
    found = damaged or []
    return scrub.verified(
        replace(state, position=region),
        first_region=region,
        region_count=1,
        blocks_verified=10,
        damaged=found,
        damaged_count=len(found),
    )


# -- decisions


def test_a_new_replica_is_due_within_the_period_and_not_all_at_once() -> None:
    due = [scrub.first_state(replica_id=f"r{number}", now_s=NOW_S).due_s for number in range(50)]
    assert all(NOW_S <= at < NOW_S + SCRUB_PERIOD_S for at in due)
    assert max(due) - min(due) > SCRUB_PERIOD_S / 2


def test_a_background_pass_begins_when_it_is_due_and_the_next_a_period_after_its_end() -> None:
    assert scrub.begun_if_due(IDLE, now_s=NOW_S) is IDLE
    begun = scrub.begun_if_due(IDLE, now_s=NOW_S + 1000)
    assert (begun.running, begun.position) == (Pass.BACKGROUND, 0)
    assert scrub.begun_if_due(begun, now_s=NOW_S + 2000) is begun
    done = scrub.finished(walked(begun, REGIONS - 1), now_s=NOW_S + 3000)
    assert done.passes_count == 1
    assert (done.running, done.last_done_s, done.due_s) == (
        Pass.NONE,
        NOW_S + 3000,
        NOW_S + 3000 + SCRUB_PERIOD_S,
    )


def test_a_clock_that_was_put_back_does_not_put_the_scrub_off_for_years() -> None:
    far = replace(IDLE, due_s=NOW_S + 5 * SCRUB_PERIOD_S)
    assert scrub.begun_if_due(far, now_s=NOW_S).running is Pass.BACKGROUND


def test_one_that_is_asked_for_begins_anew_and_is_not_begun_twice() -> None:
    half = walked(scrub.begun_if_due(replace(IDLE, due_s=0), now_s=NOW_S), 7, [7 * REGION_BLOCKS])
    asked = scrub.started(half)
    assert (asked.running, asked.position, asked.found_count) == (Pass.ASKED, 0, 0)
    assert asked.damaged == half.damaged  # what is known stays known
    further = walked(asked, 0)
    assert scrub.started(further) is further


def test_a_stopped_pass_did_not_happen() -> None:
    stopped = scrub.stopped(walked(scrub.started(IDLE), 3), due_s=NOW_S + RETRY_S)
    assert (stopped.running, stopped.position, stopped.last_done_s) == (Pass.NONE, 0, 0)
    assert scrub.stopped(stopped, due_s=5) is stopped


def test_what_is_read_again_and_good_is_no_longer_known_as_damaged() -> None:
    state = walked(scrub.started(IDLE), 2, [2 * REGION_BLOCKS, 2 * REGION_BLOCKS + 5])
    state = scrub.noted(state, 9 * REGION_BLOCKS)
    state = scrub.checked(state, first_region=2, region_count=1, damaged=[2 * REGION_BLOCKS + 5])
    assert state.damaged == (2 * REGION_BLOCKS + 5, 9 * REGION_BLOCKS)
    assert state.found_count == 2


@given(st.lists(st.integers(0, 40 * REGION_BLOCKS), max_size=60))
def test_known_damage_ascends_without_doubles_and_is_bounded(found: list[int]) -> None:
    state = IDLE
    for block in found:
        state = scrub.noted(state, block)
    assert list(state.damaged) == sorted(set(found))
    full = replace(state, damaged=tuple(range(DAMAGED_KEPT_MAX)))
    assert len(scrub.noted(full, DAMAGED_KEPT_MAX + 1).damaged) == DAMAGED_KEPT_MAX


def test_asked_for_comes_first_and_what_has_begun_is_finished_first() -> None:
    background = scrub.begun_if_due(replace(IDLE, due_s=0), now_s=NOW_S)
    states = {"a": background, "b": walked(background, 5), "c": IDLE}
    assert scrub.choose(states) == "b"
    assert scrub.choose(states | {"d": scrub.started(IDLE)}) == "d"
    assert scrub.choose({"c": IDLE}) is None


def test_an_idle_server_sleeps_until_somebody_is_due() -> None:
    assert scrub.seconds_to_look({}, now_s=NOW_S) == LOOK_MAX_S
    assert scrub.seconds_to_look({"a": IDLE}, now_s=NOW_S + 995) == 5
    assert scrub.seconds_to_look({"a": IDLE}, now_s=NOW_S + 2000) == 1


def test_the_pace_keeps_its_rate_gives_way_to_clients_and_takes_what_it_is_told() -> None:
    def rest(**changed: Any) -> float:
        usual = {"running": Pass.BACKGROUND, "blocks_verified": 1024, "took_s": 0.05, "busy": False}
        return scrub.pause_s(**(usual | changed))

    assert rest() == pytest.approx(4 / 16 - 0.05)
    assert rest(busy=True) == pytest.approx(8 * 4 / 16 - 0.05)
    assert rest(running=Pass.ASKED) == 0.0
    assert rest(rate_bytes_s=1024 * 1024) == pytest.approx(4 - 0.05)
    assert rest(blocks_verified=0) == 0.0
    assert scrub.is_busy(client_ops=101, window_s=1.0) and not scrub.is_busy(client_ops=99, window_s=1.0)
    strides = [1]
    for _ in range(8):
        strides.append(scrub.next_stride(strides[-1], blocks_verified=0))
    assert strides[-1] == scrub.STRIDE_REGIONS_MAX
    assert scrub.next_stride(16, blocks_verified=1) == 1


# -- the file

SOME = ScrubState(Pass.ASKED, 5, 40, 2, NOW_S, NOW_S - 5, 3, (7, 9000))


def test_the_file_says_what_was_written_and_damage_to_it_is_a_fresh_start(tmp_path: Path) -> None:
    assert read_scrub(str(tmp_path)) is None
    write_scrub(str(tmp_path), SOME)
    assert read_scrub(str(tmp_path)) == SOME
    data = encode(SOME)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        assert decode(bytes(flipped)) is None
    for length in range(len(data)):
        assert decode(data[:length]) is None
    longest = replace(SOME, damaged=tuple(range(2**40, 2**40 + DAMAGED_KEPT_MAX)))
    write_scrub(str(tmp_path), longest)
    assert read_scrub(str(tmp_path)) == longest


@pytest.mark.parametrize("cut", ["open", "write", "fsync", "rename"])
def test_a_cut_at_any_step_leaves_the_old_file(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scrub(str(tmp_path), SOME)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(5, "cut")

    with monkeypatch.context() as patch:
        patch.setattr(scrub_file.os, cut, fail)
        with pytest.raises(OSError):
            write_scrub(str(tmp_path), replace(SOME, position=6))
    assert read_scrub(str(tmp_path)) == SOME
    write_scrub(str(tmp_path), replace(SOME, position=6))
    assert {path.name for path in tmp_path.iterdir()} <= {SCRUB_NAME, SCRUB_TMP_NAME}


# -- the calls


@pytest.mark.parametrize(
    ("call", "args"),
    [
        ("scrub", {}),
        ("scrub", {"action": "begin"}),
        ("scrub", {"action": 1}),
        ("scrub", {"action": "start", "rate_bytes_s": -1}),
        ("scrub", {"action": "start", "rate_bytes_s": 2**41}),
        ("scrub", {"action": "start", "rate_bytes_s": True}),
        ("scrub", {"action": "start", "more": 1}),
        ("damaged", {"check": 1}),
        ("damaged", {"blocks": []}),
    ],
)
def test_wrong_arguments_are_refused(play_calls: Play, call: str, args: dict[str, Any]) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        with pytest.raises(BadRequest):
            await rig.call(call, **args)
        with pytest.raises(ReplicaNotFound):
            await rig.call("scrub", volume_id="unknown", action="start")

    play_calls(scenario)


def test_damage_that_a_read_met_is_listed(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.call("scrub", action="status")
        rig.io.deliver(("block_damaged", VOLUME, 77))
        assert (await rig.call("damaged")) == {"blocks": [77], "all_checked": False}
        assert (await rig.call("inspect"))["damaged_count"] == 1
        rig.io.damaged = {77}
        assert (await rig.call("damaged", check=True)) == {"blocks": [77], "all_checked": True}
        rig.io.damaged = set()
        assert (await rig.call("damaged", check=True)) == {"blocks": [], "all_checked": True}
        await rig.restart()
        assert (await rig.call("damaged")) == {"blocks": [], "all_checked": False}

    play_calls(scenario)


# -- a real server


def flip(server: Server, block: int) -> None:
    """One bit of a block on the disk, behind the server's back."""
    path = server.replica_path / "layer-1" / "data"
    with path.open("r+b") as file:
        file.seek(block * BLOCK_BYTES + 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
        file.flush()
        os.fsync(file.fileno())


async def fill(server: Server) -> None:
    """A block in each region, clean: in a dirty one recovery would take a flip for an unflushed write."""
    await server.prepare()
    data = await server.session()
    for region in range(REGIONS):
        assert await data.write(region * REGION_BYTES, blocks(region + 1)) is Status.OK
    assert await data.flush() is Status.OK
    data.close()
    async with server.client() as client:
        await client.detach_clean(VOLUME, epoch=1)


async def until_done(server: Server) -> dict[str, Any]:
    async with server.client() as client:
        while (status := await client.scrub(VOLUME, "status"))["state"] != "none":
            pass  # each look is a call; nothing announces the end of a pass
        return status


async def start(server: Server, *, rate_bytes_s: int = 0) -> dict[str, Any]:
    async with server.client() as client:
        return await client.scrub(VOLUME, "start", rate_bytes_s=rate_bytes_s)


async def damaged(server: Server, *, check: bool = False) -> list[int]:
    async with server.client() as client:
        found: list[int] = (await client.damaged(VOLUME, check=check))["blocks"]
        return found


def test_a_pass_reads_all_and_names_what_does_not_verify(tmp_path: Path) -> None:
    server = Server(tmp_path / "a")
    bad = [3 * REGION_BLOCKS, 9 * REGION_BLOCKS]
    with server.up():
        asyncio.run(fill(server))
        for block in bad:
            flip(server, block)
        asyncio.run(start(server))
        status = asyncio.run(until_done(server))
        assert (status["blocks_verified"], status["found"]) == (REGIONS - 2, 2)
        assert status["last_done"] > 0 and status["due"] == status["last_done"] + SCRUB_PERIOD_S
        assert asyncio.run(damaged(server)) == bad
        assert server.stop() == 0
    with server.up():  # the list outlives the server, and loses what is good again
        assert asyncio.run(until_done(server))["last_done"] == status["last_done"]
        assert asyncio.run(damaged(server)) == bad
        flip(server, bad[0])
        assert asyncio.run(damaged(server, check=True)) == bad[1:]


def test_a_killed_server_goes_on_from_its_cursor(tmp_path: Path) -> None:
    server = Server(tmp_path / "a")
    with server.up():
        asyncio.run(fill(server))
        flip(server, 4 * REGION_BLOCKS)
        asyncio.run(start(server, rate_bytes_s=BLOCK_BYTES * 10))
        while (state := read_scrub(str(server.replica_path))) is None or state.position < 5:
            pass  # what is found is written down at once
        server.kill()
    flip(server, 0)  # behind the cursor: the pass that goes on does not see it
    with server.up():
        status = asyncio.run(until_done(server))
        assert (status["blocks_verified"], status["found"]) == (REGIONS - 1, 1)
        assert asyncio.run(damaged(server)) == [4 * REGION_BLOCKS]
        asyncio.run(start(server))
        assert asyncio.run(until_done(server))["found"] == 2


def test_a_stopped_pass_ends_and_a_deleted_replica_disturbs_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path / "a")

    async def scenario() -> None:
        await fill(server)
        assert (await start(server, rate_bytes_s=1))["state"] == "asked"
        async with server.client() as client:
            assert (await client.scrub(VOLUME, "stop"))["state"] == "none"
            await client.scrub(VOLUME, "start", rate_bytes_s=1)
            stats = await client.stats(VOLUME)
            assert (stats["scrub_running"], stats["scrub_regions"]) == (1, REGIONS)
            await client.delete(VOLUME)
            with pytest.raises(ReplicaNotFound):
                await client.scrub(VOLUME, "status")
            assert (await client.status())["volumes"] == []

    with server.up():
        asyncio.run(scenario())
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
