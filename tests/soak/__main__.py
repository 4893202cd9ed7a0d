"""``python -m tests.soak --minutes 60 --seed 7``: exit code 1 if anything was wrong."""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys

from tests.soak.run import PERIOD_S_DEFAULT, Report, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description="I/O under a random fault every few seconds.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="for the same faults again; default: a new one")
    parser.add_argument("--period", type=float, default=PERIOD_S_DEFAULT, help="seconds from fault to fault")
    parser.add_argument("--guest", action="store_true", help="a guest syncs files on ext4 and kernel NBD too")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end in good order: nothing is left running
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    report = soak(
        seed=seed,
        duration_s=60 * given.minutes,
        period_s=given.period,
        guest=given.guest,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(json.dumps(report.to_json(), indent=1) if given.output == "json" else as_text(report))
    return 1 if report.problems else 0


def as_text(report: Report) -> str:
    lines = [f"{'fault':28} {'count':>5} {'stall s':>8} {'healthy s':>9}"]
    lines += [
        f"{name:28} {seen.count:5d} {seen.stall_s_max:8.2f} {seen.healthy_s_max:9.2f}"
        for name, seen in sorted(report.faults.items())
    ]
    if report.left_out:
        lines.append(f"not possible here: {', '.join(report.left_out)}")
    lines.append(
        f"{report.wall_s:.0f} s, {report.fault_count} faults, {report.operations} operations checked, "
        f"{report.reconnects} reconnects, {report.verifications} comparisons of all replicas, "
        f"{report.mismatches} mismatches"
    )
    if report.guest_files is not None:
        lines.append(f"{report.guest_files} files synced by a guest, all there after its end")
    for role in sorted(report.rss_growth_bytes_max):
        lines.append(
            f"{role}: grew by at most {report.rss_growth_bytes_max[role] / 2**20:.1f} MiB and "
            f"{report.descriptor_growth_max[role]} descriptors"
        )
    lines += [f"WRONG: {problem}" for problem in report.problems] or ["nothing wrong"]
    lines.append(f"again: make soak SEED={report.seed}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
