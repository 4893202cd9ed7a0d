"""The REST API of a running cluster against its own OpenAPI document, by schemathesis.

``python -m tests.fuzz.rest --seconds 60`` starts a cluster of its own with one volume, lets schemathesis send
what the document allows and what it does not, and checks afterwards that the cluster serves as before. No
answer may be a server error, and every answer must be one that the document names.

Shutdown is left out: it would end the cluster that is being tested.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.cluster import cluster

SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
CHECKS = ",".join(
    (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
)
REQUEST_TIMEOUT_S = 60
"""Some requests wait for what they ask for."""

LEFT_OUT = ("/v1/shutdown",)
"""Paths, as in the document."""

GENERATED = re.compile(r"(\d+) generated")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("-o", "--output", choices=("text", "json"), default="text")
    chosen = options.parse_args()
    if not SCHEMATHESIS.exists():
        print("schemathesis is not installed: 'make fuzz' installs it", file=sys.stderr)
        return 2
    with cluster() as dolmen, tempfile.TemporaryDirectory() as scratch:
        dolmen.create_and_attach("v1", size="64MiB")
        address = json.loads((dolmen.dir / "daemon.json").read_text())["tcp_address"]
        token = (dolmen.dir / "api.token").read_text().strip()
        done = _schemathesis(f"http://{address}", token, seconds=chosen.seconds, scratch=Path(scratch))
        dolmen.dolmen("status")  # it still answers
    output = done.stdout + done.stderr
    counted = GENERATED.search(output)
    executions = int(counted[1]) if counted else 0
    if done.returncode or not executions:
        print(output[-20000:], file=sys.stderr)
        return 1
    if chosen.output == "json":
        print(json.dumps({"executions": {"rest": executions}}))
    else:
        print(output[-3000:])
    return 0


def _schemathesis(url: str, token: str, *, seconds: float, scratch: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [SCHEMATHESIS, "run", f"{url}/openapi.json", "--no-color"]
    command += ["--header", f"Authorization: Bearer {token}", "--request-timeout", str(REQUEST_TIMEOUT_S)]
    command += ["--checks", CHECKS, "--max-time", str(max(1, int(seconds))), "--continue-on-failure"]
    command += ["--suppress-health-check", "all"]
    for path in LEFT_OUT:
        command += ["--exclude-path", path]
    return subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
