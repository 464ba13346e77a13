"""tools/ranking on a small trace of its own: all requests are answered, both worlds are ranked. No time is judged."""

import json
import os
import subprocess
import sys
import tempfile
import unittest

from support import BINARY, ROOT

TOOL = os.path.join(ROOT, "tools", "ranking")


class RankingTest(unittest.TestCase):
    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory(prefix="tidepool-ranking-test-"))
        self.trace = os.path.join(folder, "trace.jsonl")

    def write(self, entries):
        with open(self.trace, "w") as file:
            for entry in entries:
                file.write(json.dumps(entry) + "\n")

    def run_tool(self, *words):
        command = [sys.executable, TOOL, "--binary", BINARY, "--trace", self.trace, "--cpu-share", "0", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)

    def test_every_policy_is_measured_and_simulated(self):
        # Two conversations of four turns; one prompt is too long for the demo model, and one has no second turn: both
        # stay out.
        entries = [{"timestamp": 0, "input_length": 1000, "output_length": 10, "hash_ids": [0, 900]}]
        entries += [{"timestamp": 0, "input_length": 60_000, "output_length": 10, "hash_ids": list(range(500, 618))}]
        for turn in range(1, 5):
            for talk in range(2):
                blocks = [0] + [100 * (talk + 1) + i for i in range(4 * turn)]
                entry = {"timestamp": 400 * turn, "input_length": 512 * len(blocks), "output_length": 160}
                entries.append({**entry, "hash_ids": blocks})
        self.write(entries)
        done = self.run_tool("--rounds", "1", "--policies", "random,tidepool", "--workers", "2:1", "-o", "json")
        self.assertEqual(done.returncode, 0, done.stderr)
        result = json.loads(done.stdout)
        self.assertEqual(result["requests"], 8)
        self.assertEqual([row["placement"] for row in result["policies"]], ["random", "tidepool"])
        for row in result["policies"]:
            self.assertGreater(row["mean_ttft_ms"], 0)
            self.assertGreater(row["simulated_mean_ttft_ms"], 0)
        ours = result["policies"][1]
        self.assertGreater(ours["cached"], 0, "a later turn finds the earlier one's blocks")
        self.assertGreater(ours["simulated_cached"], 0)
        for order in result["order"].values():
            self.assertEqual(sorted(order), ["random", "tidepool"])

    def test_an_unknown_policy_is_named(self):
        self.write([])
        done = self.run_tool("--policies", "best")
        self.assertEqual(done.returncode, 2)
        self.assertIn("best", done.stderr)


if __name__ == "__main__":
    unittest.main()
