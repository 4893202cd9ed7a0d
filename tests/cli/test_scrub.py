"""What ``dolmen volume scrub`` says and with which code it ends, for every result there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from cli import scrub as command
from cli.output import Exit, Output
from control.views import DamagedBlock, ReplicaScrubbed, ScrubResult, ScrubVerdict


def replica(name: str, *, left: int = 0, repaired: int = 0, scrubbed: bool = True) -> ReplicaScrubbed:
    findings = [
        DamagedBlock(
            block_index=at, offset_bytes=at * 4096, repaired=at >= left, unreadable=at == 0 and left > 0
        )
        for at in range(left + repaired)
    ]
    reason = "" if scrubbed else "its replica server does not answer"
    return ReplicaScrubbed(
        id=name,
        node="node1",
        scrubbed=scrubbed,
        reason=reason,
        found_count=left + repaired,
        left_count=left,
        findings=findings,
    )


class FakeClient:
    def __init__(self, result: ScrubResult | None) -> None:
        self.result = result

    def scrub(self, name: str) -> dict[str, Any]:
        return {"id": "j", "state": "running", "done": 0, "total": 0}

    def job(self, job_id: str) -> dict[str, Any]:
        if self.result is None:
            return {"id": "j", "state": "failed", "error": "a bug"}
        return {"id": "j", "state": "done", "result": self.result.model_dump(mode="json")}


def run(monkeypatch: pytest.MonkeyPatch, result: ScrubResult | None, *, wait: bool = True) -> int:
    monkeypatch.setattr(command, "Client", lambda directory: FakeClient(result))
    try:
        command.scrub("data", wait, Path("/nowhere"), Output.TABLE)
    except typer.Exit as ended:
        return int(ended.exit_code)
    return 0


@pytest.mark.parametrize(
    ("verdict", "replicas", "attached", "code", "said"),
    [
        (
            ScrubVerdict.CLEAN,
            [replica("a"), replica("b")],
            True,
            Exit.OK,
            "clean: every checksum of 2 replicas",
        ),
        (
            ScrubVerdict.REPAIRED,
            [replica("a", repaired=2)],
            True,
            Exit.OK,
            "repaired: 2 damaged blocks found",
        ),
        (ScrubVerdict.DAMAGED, [replica("a", left=1)], True, Exit.DIFFERENT, "NO REPLICA HAS A GOOD COPY"),
        (
            ScrubVerdict.DAMAGED,
            [replica("a", left=2, repaired=1)],
            False,
            Exit.DIFFERENT,
            "DAMAGED: 2 of 3 damaged blocks left; they are repaired when the volume is attached",
        ),
        (
            ScrubVerdict.INCOMPLETE,
            [replica("a"), replica("b", scrubbed=False)],
            True,
            Exit.UNFINISHED,
            "incomplete: 1 of 2 replicas could not be read to the end",
        ),
        (
            ScrubVerdict.DAMAGED,
            [replica("a", left=50)],
            True,
            Exit.DIFFERENT,
            "a: and 30 more; `-o json` lists them",
        ),
    ],
)
def test_every_verdict_has_its_words_and_its_code(
    verdict: ScrubVerdict,
    replicas: list[ReplicaScrubbed],
    attached: bool,
    code: Exit,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = ScrubResult(verdict=verdict, attached=attached, replicas=replicas)
    assert run(monkeypatch, result) == code
    assert said in capsys.readouterr().out


def test_without_wait_it_is_only_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, None, wait=False) == Exit.OK
    told = capsys.readouterr()
    assert "being scrubbed" in told.out and "--wait" in told.err


def test_a_job_that_failed_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, None) == Exit.FAILED
    assert "could not finish: a bug" in capsys.readouterr().err
