"""What the gateway costs and adds: many streams through one real gateway, worker and clients on one clock.

Usage: gateway_load.py [--build DIR] [--binary TIDEPOOL ...] [--streams N] [--tokens N] [--interval-ms F]
                       [--rounds N] [-o table|json]

For each round and each --binary (to compare two builds, in alternating order): start its gateway against
gateway_load (scheduler, worker and clients in one process, see server/bench/gateway_load.cc), warm it up, and
measure three loads: `paced` (every stream gets a token each --interval-ms), `flood` (as fast as they go) and
`few` (8 streams, a token each 5 ms: the latency without a queue), each beside the same load without a gateway.
Prints medians over the rounds. Exit code 1 where a stream did not end complete and correct.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "integration"))

from harness import eventually  # noqa: E402

MODEL = os.path.join(ROOT, "tools", "demo_model", "model")
FEW_STREAMS, FEW_TOKENS, FEW_INTERVAL_US = 8, 200, 5000


def digit_ids():
    with open(os.path.join(MODEL, "tokenizer.json")) as file:
        vocabulary = json.load(file)["model"]["vocab"]
    return [vocabulary[str(digit)] for digit in range(10)]


class Loader:
    """The gateway_load process."""

    def __init__(self, path):
        self.process = subprocess.Popen(
            [path, *map(str, digit_ids())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        word, self.scheduler = self.process.stdout.readline().split()
        assert word == "LISTENING"

    def run(self, **fields):
        self.process.stdin.write("run " + " ".join(f"{k}={v}" for k, v in fields.items()) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


class Gateway:
    """`tidepool gateway` of one binary, against `scheduler`."""

    def __init__(self, binary, scheduler):
        self.dir = tempfile.TemporaryDirectory()
        env = {k: v for k, v in os.environ.items() if not k.startswith("TIDEPOOL_")}
        read_end, write_end = os.pipe()
        env.update(XDG_RUNTIME_DIR=self.dir.name, TIDEPOOL_READY_FD=str(write_end))
        self.log = open(os.path.join(self.dir.name, "log"), "w+")
        self.process = subprocess.Popen(
            [binary, "gateway", "--cluster-scheduler", scheduler, "--model-path", MODEL]
            + ["--gateway-http-listen", "127.0.0.1:0", "--gateway-grpc-listen", "127.0.0.1:0"]
            + ["--gateway-max-inflight", "8192", "--gateway-max-connections", "8192", "--log-level", "warn"],
            env=env,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[write_end],
        )
        os.close(write_end)
        with os.fdopen(read_end) as ready:
            line = ready.readline()
        if not line.startswith("READY"):
            self.log.seek(0)
            sys.exit(f"{binary} gateway did not start:\n{self.log.read()}")
        self.http = dict(word.split("=", 1) for word in line.split()[1:])["http"]
        eventually(self.ready, 30, "the gateway is ready")

    def ready(self):
        try:
            with urllib.request.urlopen(f"http://{self.http}/readyz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def resident_mb(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) / 1024

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()
        self.dir.cleanup()


def measure(loader, binary, options):
    """{load: {metric: value}} of one round with one binary."""
    gateway = Gateway(binary, loader.scheduler)
    loads = {
        "paced": {
            "streams": options.streams,
            "tokens": options.tokens,
            "interval_us": int(options.interval_ms * 1000),
        },
        "flood": {"streams": options.streams, "tokens": options.tokens, "interval_us": 0},
        "few": {"streams": FEW_STREAMS, "tokens": FEW_TOKENS, "interval_us": FEW_INTERVAL_US},
    }
    out = {}
    try:
        loader.run(target=gateway.http, pid=gateway.process.pid, streams=64, tokens=50, interval_us=1000)
        for name, load in loads.items():
            direct = loader.run(target="direct", **load)
            through = loader.run(target=gateway.http, pid=gateway.process.pid, **load)
            through["incomplete"] = load["streams"] - through["complete"]
            through["direct_tokens_per_s"] = direct["tokens_per_s"]
            for percentile in ("p50", "p99"):
                through[f"direct_lag_us_{percentile}"] = direct[f"lag_us_{percentile}"]
                through[f"added_us_{percentile}"] = (
                    through[f"lag_us_{percentile}"] - direct[f"lag_us_{percentile}"]
                )
            cpu = through["gateway_cpu_us_per_token"]
            through["tokens_per_cpu_s"] = 1e6 / cpu if cpu > 0 else 0
            out[name] = through
        out["paced"]["gateway_peak_mb"] = gateway.resident_mb()
    finally:
        gateway.close()
    return out


def median_of(rounds):
    """Medians of the numbers; of what is none, the last."""
    out = {}
    for load in rounds[-1]:
        out[load] = {}
        for key, value in rounds[-1][load].items():
            values = [one[load][key] for one in rounds if key in one[load]]
            out[load][key] = statistics.median(values) if isinstance(value, (int, float)) else value
    return out


def print_table(results):
    columns = ["streams", "incomplete", "tokens_per_s", "gateway_cpu_us_per_token", "tokens_per_cpu_s"]
    columns += ["lag_us_p50", "lag_us_p99", "added_us_p50", "added_us_p99"]
    print(f"{'binary':32} {'load':6} " + " ".join(f"{column[:18]:>18}" for column in columns))
    for binary, loads in results.items():
        for load, numbers in loads.items():
            print(f"{binary[-32:]:32} {load:6} " + " ".join(f"{numbers[column]:18.1f}" for column in columns))
    if len(results) == 2:
        first, second = results.values()
        for load in first:
            a, b = (numbers[load]["gateway_cpu_us_per_token"] for numbers in (first, second))
            print(f"{load}: gateway CPU a token, second / first: {b / a:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "release"), help="where gateway_load is")
    parser.add_argument("--binary", action="append", help="default: the build's own; repeatable")
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--interval-ms", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    options = parser.parse_args()
    binaries = options.binary or [os.path.join(options.build, "bin", "tidepool")]
    rounds = {binary: [] for binary in binaries}
    loader = Loader(os.path.join(options.build, "bin", "gateway_load"))
    try:
        for number in range(options.rounds):
            # The order alternates, so that a machine that drifts favours nobody.
            for binary in binaries if number % 2 == 0 else reversed(binaries):
                rounds[binary].append(measure(loader, binary, options))
                print(f"round {number + 1}: {binary} done", file=sys.stderr)
    finally:
        loader.close()
    results = {binary: median_of(rounds[binary]) for binary in binaries}
    if options.output == "json":
        print(json.dumps({"rounds": rounds, "medians": results}, indent=1))
    else:
        print_table(results)
    bad = [
        one[load]["error"] or f"{one[load]['incomplete']} streams were wrong"
        for every in rounds.values()
        for one in every
        for load in one
        if one[load]["incomplete"]
    ]
    if bad:
        print(f"{len(bad)} loads had streams that did not end complete and correct: {bad[0]}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
