"""``python -m tests.sim --seed N [--seeds COUNT] [--trace] [--minutes M]``: see the Makefile, sim and
sim-long."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.campaign import Summary, run_many, run_minutes
from tests.sim.cluster import run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Run simulated clusters.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--minutes", type=float, default=0.0, help="as many as fit")
    parser.add_argument("--theme", default="", help="another than the seed draws (tests/sim/themes.py)")
    parser.add_argument("--trace", action="store_true", help="print what happens")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    summary = Summary()
    if arguments.trace:
        summary.add(run_seed(arguments.seed, arguments.theme, trace=print))
    elif arguments.theme:
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            summary.add(run_seed(seed, arguments.theme))
    elif arguments.minutes:
        run_minutes(summary, arguments.seed, arguments.minutes, arguments.processes)
    else:
        run_many(summary, range(arguments.seed, arguments.seed + arguments.seeds), arguments.processes)
    print(summary.text(time.monotonic() - began))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
