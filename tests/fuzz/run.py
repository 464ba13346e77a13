"""Runs the libFuzzer programs and writes what became of each.

Usage: run.py --build FOLDER --results FILE [--seconds N] [--seed N] [--jobs N] [--filter RE]
       run.py --results FILE --skip REASON

FOLDER holds the <target>_fuzz programs. Each starts from tests/fuzz/corpus/<target> and from what earlier runs
found (FOLDER/found/<target>); --seconds 0 only runs these once. In a fresh clone equal programs and an equal
--seed try the same inputs in the same order, so that a change is judged by itself and not by luck; --seed 0
draws another each time, for those who hunt. An input that fails is left in FOLDER/artifacts. FILE: JSON list of {name, result, detail} as tests/integration/run.py writes it. Exit code 1
if any failed.
"""

import argparse
import concurrent.futures
import glob
import json
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

# One input may take 10 s (of the wall clock: a busy machine must fail nothing), 2 GiB, and 512 MiB at a time: an
# input of a few KiB that needs more is a way to take the process down, as a crash is.
LIMITS = ["-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=512", "-max_len=8192"]


def targets():
    return sorted(os.path.basename(path)[: -len("_fuzz.cc")] for path in glob.glob(os.path.join(HERE, "*_fuzz.cc")))


def cause(log):
    """The line of a libFuzzer log that says what went wrong."""
    for pattern in (r"check failed.*", r"runtime error.*", r"ERROR: .*", r".*SUMMARY.*"):
        found = re.search(pattern, log)
        if found:
            return found.group(0)
    return log.strip().splitlines()[-1] if log.strip() else "no output"


def fuzz(build, target, seconds, seed):
    """(result, detail, log) of one target."""
    corpus = os.path.join(HERE, "corpus", target)
    found = os.path.join(build, "found", target)
    artifacts = os.path.join(build, "artifacts", "")
    for folder in (found, artifacts):
        os.makedirs(folder, exist_ok=True)
    command = [os.path.join(build, "bin", f"{target}_fuzz"), *LIMITS, f"-artifact_prefix={artifacts}{target}-"]
    dictionary = os.path.join(HERE, "dictionaries", f"{target}.dict")
    if os.path.exists(dictionary):
        command.append(f"-dict={dictionary}")
    if seconds > 0:
        # Without -reload=0 the clock decides when the folders are read again.
        command += [f"-max_total_time={seconds}", f"-seed={seed}", "-reload=0", "-print_final_stats=1", found, corpus]
    else:
        command += ["-runs=0", found, corpus]
    # The symbolizer of the compiler's own version; without one a report has addresses only.
    env = dict(os.environ)
    env.setdefault("ASAN_OPTIONS", "external_symbolizer_path=/usr/bin/llvm-symbolizer-16")
    env.setdefault("UBSAN_OPTIONS", "print_stacktrace=1")
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds + 120
        )
    except subprocess.TimeoutExpired as error:
        return (
            "failed",
            f"still running {seconds + 120} s after its start",
            (error.stdout or b"").decode(errors="replace"),
        )
    except OSError as error:
        return "failed", str(error), ""
    log = done.stdout.decode(errors="replace")
    if done.returncode == 0:
        runs = re.findall(r"#(\d+)\s+DONE", log) or re.findall(r"Done (\d+) runs", log)
        return "passed", f"{runs[-1] if runs else '?'} inputs", log
    artifact = re.search(r"Test unit written to (.+)", log)
    where = f"; the input is {artifact.group(1)}" if artifact else ""
    return "failed", cause(log) + where, log


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build")
    parser.add_argument("--results", required=True)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--filter", default="")
    parser.add_argument("--skip", help="run nothing: every target is skipped, for this reason")
    options = parser.parse_args()
    wanted = re.compile(options.filter)
    cases = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {}
        for target in targets():
            name = f"fuzz.{target}"
            if not wanted.search(name):
                continue
            if options.skip:
                cases[name] = ("skipped", options.skip)
            else:
                job = pool.submit(fuzz, os.path.abspath(options.build), target, options.seconds, options.seed)
                running[job] = name
        for future in concurrent.futures.as_completed(running):
            result, detail, log = future.result()
            name = running[future]
            cases[name] = (result, detail)
            if result == "failed":
                sys.stderr.write(log)
            print(f"{name} ... {result}: {detail}", file=sys.stderr, flush=True)
    with open(options.results, "w") as file:
        out = [{"name": name, "result": result, "detail": detail} for name, (result, detail) in sorted(cases.items())]
        json.dump(out, file, indent=1)
    return 1 if any(result == "failed" for result, _ in cases.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
