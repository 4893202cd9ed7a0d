"""``dolmen volume recover`` on real processes: most of a volume is lost, and an operator goes on."""

from __future__ import annotations

import shlex
from typing import Any

from tests.support.cluster import Cluster, cluster
from tests.support.nbd_clients import ReconnectingClient

MIB = 2**20
OLD, NEWER, NEWEST, AFTER = (bytes([byte]) * 8192 for byte in (0xA1, 0xB2, 0xC3, 0xD4))


def order_of(dolmen: Cluster, name: str, members: list[str]) -> list[str]:
    """The command line that ``volume recover`` shows for a choice, without the program."""
    shown = dolmen.dolmen("volume", "recover", name).stdout
    wanted = f"--from {','.join(members)} "
    line = next(line for line in shown.splitlines() if "order it:" in line and wanted in line)
    return shlex.split(line.partition("order it: ")[2])[1:]


def refused(dolmen: Cluster, *arguments: str) -> str:
    done = dolmen.dolmen(*arguments, check=False)
    assert done.returncode in (1, 2), done
    return str(done.stdout)


def lose_the_newest(dolmen: Cluster, client: ReconnectingClient) -> None:
    """Only data-r1 ends with the newest record, then it is gone; only data-r3 is left, and behind."""
    client.write(0, OLD)
    client.write(8 * MIB, OLD)
    client.write(16 * MIB, OLD)
    client.flush()
    dolmen.dolmen("node", "stop", "node3", "--kill")
    client.write(8 * MIB, NEWER)
    dolmen.dolmen("node", "stop", "node2", "--kill")
    client.write(16 * MIB, NEWEST)
    client.write(20 * MIB, NEWEST)
    dolmen.dolmen("node", "stop", "node1", "--kill")
    dolmen.dolmen("node", "start", "node3")
    dolmen.wait_for_state("data", "waiting")


def why(dolmen: Cluster, *arguments: str) -> tuple[int, str]:
    done = dolmen.dolmen("why", *arguments, check=False)
    return done.returncode, done.stdout


def choice(found: dict[str, Any], members: list[str]) -> dict[str, Any]:
    return next(dict(choice) for choice in found["choices"] if choice["members"] == members)


def test_what_is_left_is_served_on_an_operator_s_word_and_the_others_are_overwritten() -> None:
    with cluster() as dolmen:
        uri = dolmen.create_and_attach("data", size="64MiB")
        places = {r["node"]: r["id"] for r in dolmen.show("data")["replicas"]}
        first, second, third = (places[f"node{index}"] for index in (1, 2, 3))
        assert "served" in refused(dolmen, "volume", "recover", "data")
        with ReconnectingClient(uri) as client:
            lose_the_newest(dolmen, client)

        # What is shown, and that nothing happens by accident.
        code, said = why(dolmen, "data")
        assert code == 6 and said.startswith("node1 was stopped by an operator")
        assert "dolmen volume recover data" in said
        found = dolmen.json("volume", "recover", "data")
        assert found["newest"]["in_sync"] == [first] and found["missing"] == [first]
        assert [c["members"] for c in found["choices"]] == [[third]]
        (lost, *_) = choice(found, [third])["loses"]
        assert f"only {first} held those" in lost
        order = order_of(dolmen, "data", [third])
        assert "spelled out" in refused(dolmen, "volume", "recover", "data", "--from", third, "--lose", "all")
        assert "no choice" in refused(
            dolmen, "volume", "recover", "data", "--from", first, "--lose", order[-1]
        )
        assert "nothing was changed" in dolmen.dolmen(*order, "--dry-run").stdout
        assert dolmen.show("data")["state"] == "waiting"

        # What was shown does not hold any more.
        dolmen.dolmen("node", "start", "node2")
        dolmen.wait_for_state("data", "waiting")
        assert "may have changed" in refused(dolmen, *order)
        dolmen.dolmen("node", "stop", "node2", "--kill")
        assert dolmen.show("data")["state"] == "waiting"

        order = order_of(dolmen, "data", [third])
        assert f"opened with {third}" in dolmen.dolmen(*order).stdout
        with ReconnectingClient(uri) as client:
            for offset in (0, 8 * MIB, 16 * MIB):
                assert client.read(offset, len(OLD)) == OLD
            assert client.read(20 * MIB, 8192) == bytes(8192)
            client.write(24 * MIB, AFTER)
            client.flush()

            # The others come back with newer writes of a history that was given up.
            for node in ("node1", "node2"):
                dolmen.dolmen("node", "start", node)
            dolmen.wait_for_state("data", "healthy")
            assert dolmen.verify("data")["result"]["verdict"] == "same"
            dolmen.dolmen("node", "stop", "node3", "--kill")  # read from those that were overwritten
            for offset in (0, 8 * MIB, 16 * MIB):
                assert client.read(offset, len(OLD)) == OLD
            assert client.read(20 * MIB, 8192) == bytes(8192)
            assert client.read(24 * MIB, len(AFTER)) == AFTER
        assert second in dolmen.show("data")["membership"]["in_sync"]
