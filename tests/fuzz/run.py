"""``make fuzz SECONDS=n``: every fuzz target for so long; a table of executions; exit 1 on a finding.

Rust targets stand in ``dataplane/fuzz/`` and are built for libFuzzer on Rust stable (no sanitizer: the
crates forbid unsafe code); Python's are ``parsers.py``; the REST API is driven by schemathesis (``rest.py``),
which ``make fuzz`` installs. What libFuzzer learns stays in ``.cache/fuzz/corpus``, what it finds in
``.cache/fuzz/found``. A finding that was fixed goes into ``dataplane/fuzz/regressions/``, a folder per
target, and is run first from then on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "dataplane" / "fuzz"
CACHE = ROOT / ".cache" / "fuzz"
TRIPLE = "x86_64-unknown-linux-gnu"
COVERAGE_FLAGS = (
    "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
    " -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
    " -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
)
"""What cargo-fuzz passes, without a sanitizer."""

INPUT_BYTES_MAX = 512
"""A few dozen frames or requests: longer inputs find the same, slower."""

MEMORY_MIB_MAX = 2048
HANG_S = 30
EXECUTED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def targets() -> list[str]:
    return sorted(path.stem for path in (FUZZ / "fuzz_targets").glob("*.rs"))


def build() -> Path:
    """The directory of the built targets."""
    target_dir = CACHE / "target"
    environment = {**os.environ, "RUSTFLAGS": COVERAGE_FLAGS, "CARGO_TARGET_DIR": str(target_dir)}
    command = ["cargo", "build", "--release", "--locked", "-q", "--target", TRIPLE]
    subprocess.run(command, cwd=FUZZ, env=environment, check=True)
    return target_dir / TRIPLE / "release"


def run_rust(binary: Path, *, seconds: float) -> tuple[int, str]:
    """Executions, and what was found ("" for nothing)."""
    corpus, found = CACHE / "corpus" / binary.name, CACHE / "found" / binary.name
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    for regression in sorted((FUZZ / "regressions" / binary.name).glob("*")):
        done = subprocess.run([binary, regression], capture_output=True, text=True, check=False)
        if done.returncode:
            return 0, f"{regression} fails again:\n{done.stderr[-2000:]}"
    limits = [f"-max_total_time={int(seconds)}", f"-max_len={INPUT_BYTES_MAX}", f"-timeout={HANG_S}"]
    limits += [f"-rss_limit_mb={MEMORY_MIB_MAX}", f"-artifact_prefix={found}/", "-print_final_stats=1"]
    done = subprocess.run([binary, corpus, *limits], capture_output=True, text=True, check=False)
    counted = EXECUTED.search(done.stderr)
    executions = int(counted[1]) if counted else 0
    return executions, done.stderr[-2000:] if done.returncode else ""


def run_python(module: str, *, seconds: float) -> tuple[int, str]:
    command = [sys.executable, "-m", module, "--seconds", str(seconds), "-o", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return 0, (done.stdout + done.stderr)[-2000:]
    executions: dict[str, int] = json.loads(done.stdout)["executions"]
    return sum(executions.values()), ""


def main() -> int:
    options = argparse.ArgumentParser(description="Fuzz frames, NBD, store files, parsers and the REST API.")
    options.add_argument("--seconds", type=float, default=60.0, help="for each target")
    options.add_argument("--only", action="append", help="a target by name; repeatable")
    options.add_argument("-o", "--output", choices=("text", "json"), default="text")
    chosen = options.parse_args()
    python_targets = {"parsers": "tests.fuzz.parsers", "rest": "tests.fuzz.rest"}
    names = chosen.only or [*targets(), *python_targets]
    unknown = sorted(set(names) - set(targets()) - python_targets.keys())
    if unknown:
        options.error(f"no target {unknown[0]}; there are {', '.join([*targets(), *python_targets])}")
    built = build() if set(names) & set(targets()) else Path()
    results: dict[str, int] = {}
    findings: dict[str, str] = {}
    for name in names:
        if name in python_targets:
            results[name], finding = run_python(python_targets[name], seconds=chosen.seconds)
        else:
            results[name], finding = run_rust(built / name, seconds=chosen.seconds)
        if finding:
            findings[name] = finding
        if chosen.output == "text":
            print(
                f"{name:18} {results[name]:>14,} executions  {'FOUND SOMETHING' if finding else ''}",
                flush=True,
            )
    for name, finding in findings.items():
        print(f"--- {name}\n{finding}", file=sys.stderr)
    if chosen.output == "json":
        print(json.dumps({"seconds_each": chosen.seconds, "executions": results, "found": sorted(findings)}))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
