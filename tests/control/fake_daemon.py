"""The real daemon with stand-ins for the processes it starts. Run as a program by tests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from control.daemon import run
from control.processes import Programs

FAKES = Programs(
    replica_server=(sys.executable, "-P", "-m", "tests.control.fake_replica_server"),
    engine=(sys.executable, "-P", "-m", "tests.control.fake_engine"),
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--port", type=int, default=0)
    sys.exit(run(parser.parse_args(), FAKES))
