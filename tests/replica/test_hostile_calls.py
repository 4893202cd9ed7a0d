"""Whatever arguments a peer sends, the answer is a result or a StorageError, and nothing else changes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import BadRequest, StorageError
from replica.calls import Calls
from tests.replica.fakes import SIZE_BYTES, VOLUME
from tests.replica.rig import Play, Rig

BAD_ARGS: list[tuple[str, dict[str, Any]]] = [
    ("nonsense", {}),
    ("create", {}),
    ("create", {"replica_id": "", "name": "data", "size_bytes": SIZE_BYTES}),
    ("create", {"replica_id": "r\n", "name": "data", "size_bytes": SIZE_BYTES}),
    ("create", {"replica_id": "r1", "name": "../x", "size_bytes": SIZE_BYTES}),
    ("create", {"replica_id": "r1", "name": "data\n", "size_bytes": SIZE_BYTES}),
    ("create", {"replica_id": "r1", "name": "x" * 64, "size_bytes": SIZE_BYTES}),
    ("create", {"replica_id": "r1", "name": "data", "size_bytes": SIZE_BYTES + 1}),
    ("create", {"replica_id": "r1", "name": "data", "size_bytes": 0}),
    ("create", {"replica_id": "r1", "name": "data", "size_bytes": 2**60}),
    ("create", {"replica_id": "r1", "name": "data", "size_bytes": -4096}),
    ("create", {"replica_id": "r1", "name": "data", "size_bytes": True}),
    ("create", {"replica_id": "r1", "name": "data", "size_bytes": SIZE_BYTES, "extra": 1}),
    ("create", {"replica_id": "r1", "name": "data", "size_bytes": SIZE_BYTES, "volume_id": "../../etc"}),
    ("create", {"replica_id": "r1", "name": "data", "size_bytes": SIZE_BYTES, "volume_id": ".new-x"}),
    ("delete", {"volume_id": ".."}),
    ("delete", {"volume_id": None}),
    ("inspect", {"volume_id": b"x"}),
    ("claim", {"epoch": 0, "engine_id": "A"}),
    ("claim", {"epoch": -1, "engine_id": "A"}),
    ("claim", {"epoch": 2**63 - 1, "engine_id": "A"}),
    ("claim", {"epoch": 2**64 - 1, "engine_id": "A"}),
    ("claim", {"epoch": "1", "engine_id": "A"}),
    ("claim", {"epoch": 1.0, "engine_id": "A"}),
    ("claim", {"epoch": 1, "engine_id": ""}),
    ("claim", {"epoch": 1}),
    ("persist_record", {"epoch": 1, "record": None}),
    ("persist_record", {"epoch": 1, "record": {"epoch": 1, "version": 1, "in_sync": "r1"}}),
    ("changed_since", {"epoch": 0, "version": -1}),
    ("begin_resync", {"epoch": 1, "regions": [1, 2]}),
    ("begin_resync", {"epoch": 1, "regions": b"abc"}),
    ("pull_regions", {"epoch": 1, "regions": b"", "source": "host:1"}),
    ("pull_regions", {"epoch": 1, "regions": b"", "source": ["h", 1], "rate_bytes_s": -1}),
    ("pull_regions", {"epoch": 1, "regions": b"", "source": ["h", 1], "take_damaged": 1}),
    ("pull_regions", {"epoch": 1, "regions": b"", "source": ["h", 0]}),
    ("pull_regions", {"epoch": 1, "regions": b"", "source": ["h", 65536]}),
    ("verify", {"first_region": 0, "region_count": 0}),
    ("verify", {"first_region": 0, "region_count": 2**40}),
    ("verify", {"first_region": -1, "region_count": 1}),
    ("resize", {"size_bytes": 1}),
]


@pytest.mark.parametrize(("name", "args"), BAD_ARGS, ids=range(len(BAD_ARGS)))
def test_bad_arguments_are_refused_and_change_nothing(
    play_calls: Play, name: str, args: dict[str, Any]
) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create(volume_id="other")
        before = sorted(str(path) for path in rig.path.rglob("*"))
        with pytest.raises(BadRequest):
            await rig.call(name, **args)
        assert sorted(str(path) for path in rig.path.rglob("*")) == before

    play_calls(scenario)


values = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=9) | st.just(VOLUME)
)
names = sorted(Calls(None).names)  # type: ignore[arg-type] # no call is made
arguments = st.sampled_from(
    ["volume_id", "epoch", "engine_id", "record", "regions", "source", "version", "name"]
)


@given(st.lists(st.tuples(st.sampled_from(names), st.dictionaries(arguments, values)), max_size=6))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_peer_calls_the_answer_is_a_result_or_a_storage_error(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    async def main() -> None:
        rig = Rig(tmp_path_factory.mktemp("fuzz") / "disk0")
        await rig.start()
        await rig.create()
        for name, args in calls:
            try:
                await rig.calls(name, {"volume_id": VOLUME} | args)
            except StorageError as error:
                assert error.code != "internal"
        await rig.kill()

    asyncio.run(main())
