"""`tidepool simulate`: a run from the command line, its JSON, its plot, and what it says of mistakes."""

import json
import os
import subprocess
import tempfile
import unittest

from support import BINARY

MIX = ["--rate", "5", "--requests", "300", "--input", "200-1000", "--output-tokens", "20", "--profile", "cpu-demo"]


def simulate(*arguments, code=0):
    done = subprocess.run([BINARY, "simulate", *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode != code:
        raise AssertionError(f"exit code {done.returncode}: {done.stderr}")
    return done.stdout if code == 0 else done.stderr


class Simulate(unittest.TestCase):
    def test_a_run_accounts_for_every_request_and_repeats_itself(self):
        arguments = [*MIX, "--pd", "1:1", "--tenants", "a:2,b:1", "--batch-share", "0.2", "-o", "json"]
        first, second = (json.loads(simulate(*arguments)) for _ in range(2))
        for run in (first, second):
            self.assertEqual(run["requests"], 300)
            self.assertEqual(run["completed"] + run["rejected"] + run["failed"], 300)
            self.assertEqual(sum(t["requests"] for t in run["tenants"].values()), 300)
            self.assertEqual(set(run["ttft_ms"]), {"mean", "p50", "p90", "p99"})
            for wall in ("wall_s", "decision_us"):
                del run[wall]
        self.assertEqual(first, second)

    def test_a_trace_is_swept_and_plotted(self):
        with tempfile.TemporaryDirectory() as folder:
            trace, plot = os.path.join(folder, "t.jsonl"), os.path.join(folder, "p.svg")
            with open(trace, "w") as out:
                for i in range(50):
                    out.write(json.dumps({"timestamp": i * 500, "input_length": 1024, "output_length": 20,
                                          "hash_ids": [0, i // 5 + 1]}) + "\n")
            runs = json.loads(simulate("--trace", trace, "--profile", "llama-3-8b-h200", "--sweep", "speed=1,4",
                                       "--sweep", "pd=1:1,2:1", "--jobs", "2", "--plot", plot, "-o", "json"))
            self.assertEqual([(r["settings"]["speed"], r["settings"]["pd"]) for r in runs],
                             [("1", "1:1"), ("1", "2:1"), ("4", "1:1"), ("4", "2:1")])
            self.assertGreater(runs[0]["hit_rate"], 0.3)
            with open(plot) as svg:
                self.assertIn("Goodput", svg.read())
            self.assertIn("TTFT MEAN", simulate("--trace", trace, "--profile", "llama-3-8b-h200", "--pd", "1:1"))

    def test_mistakes_are_named_with_their_fix(self):
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as trace:
            trace.write('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": []}\n{"timestamp": "x"}\n')
            trace.flush()
            self.assertIn(f"{trace.name}:2: timestamp", simulate("--trace", trace.name, "--pd", "1:1", code=2))
        self.assertIn("--prefill and --decode", simulate(*MIX, code=2))
        self.assertIn("cpu-demo", simulate("--profile", "none", "--pd", "1:1", code=2))
        self.assertIn("--policy: policy is 'best'", simulate(*MIX, "--pd", "1:1", "--policy", "best", code=2))


if __name__ == "__main__":
    unittest.main()
