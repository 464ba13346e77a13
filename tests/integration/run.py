"""Runs the integration tests and writes what became of each case.

Usage: run.py --results FILE [--filter RE] [--retry]. FILE: JSON list of {name, result, detail}, result one of
passed, failed, skipped. --retry runs what failed once more; what passes then has `flaky`, how it failed first.
Exit code 1 if any failed.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))


class Result(unittest.TextTestResult):
    """Counts every case once; a case with failed subtests is one failure."""

    def __init__(self, *args):
        super().__init__(*args)
        self.cases = {}

    def record(self, test, result, detail=""):
        # The id of a subtest carries its parameters.
        name = (getattr(test, "test_case", None) or test).id()
        if self.cases.get(name, {}).get("result") != "failed":
            self.cases[name] = {"name": name, "result": result, "detail": detail}

    def addSuccess(self, test):
        super().addSuccess(test)
        self.record(test, "passed")

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.record(test, "failed", str(err[1]))

    def addError(self, test, err):
        super().addError(test, err)
        self.record(test, "failed", str(err[1]))

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.record(test, "failed", str(err[1]))

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.record(test, "skipped", reason)


def flatten(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flatten(item)
        else:
            yield item


def run(cases):
    """What became of each case, in order."""
    result = unittest.TextTestRunner(verbosity=2, resultclass=Result).run(unittest.TestSuite(cases))
    # What a class's set-up failed or skipped stands for each of its cases.
    out = dict(result.cases)
    for case in cases:
        if case.id() in out:
            continue
        holder = f"setUpClass ({type(case).__module__}.{type(case).__qualname__})"
        cause = out.get(holder, {"result": "failed", "detail": "did not run"})
        out[case.id()] = {"name": case.id(), "result": cause["result"], "detail": cause["detail"]}
    return {name: case for name, case in out.items() if not name.startswith("setUpClass ")}


def discover(wanted):
    return [case for case in flatten(unittest.defaultTestLoader.discover(HERE)) if wanted(case.id())]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", required=True)
    parser.add_argument("--filter", default="")
    parser.add_argument("--retry", action="store_true")
    options = parser.parse_args()
    # As an exception, so that what the tests have started and made is taken away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.path.insert(0, HERE)
    started = time.monotonic()
    out = run(discover(re.compile(options.filter).search))
    failed = {name: case["detail"] for name, case in out.items() if case["result"] == "failed"}
    if failed and options.retry:
        print(f"once more: {' '.join(failed)}", file=sys.stderr)
        # Cases that are made anew: a case that ran keeps what its first run left in it.
        for name, case in run(discover(failed.__contains__)).items():
            out[name] = case if case["result"] == "failed" else {**case, "flaky": failed.get(name, "")}
    print(f"{len(out)} cases in {time.monotonic() - started:.0f} s", file=sys.stderr)
    with open(options.results, "w") as file:
        json.dump(list(out.values()), file, indent=1)
    return 1 if any(case["result"] == "failed" for case in out.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
