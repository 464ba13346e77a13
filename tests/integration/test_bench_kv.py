"""`tidepool bench kv`: every suite gives its rows in the stable form, at sizes that take a moment."""

import json
import os
import subprocess
import tempfile
import unittest

from support import BINARY

FIELDS = {"name", "value", "unit", "reference", "ratio"}


def rows(*arguments):
    done = subprocess.run([BINARY, "bench", "kv", "-o", "json", *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


class BenchKv(unittest.TestCase):
    def check(self, got, compared):
        self.assertTrue(got)
        for row in got:
            self.assertLessEqual(FIELDS, set(row))
            self.assertGreater(row["value"], 0, row)
            if row["reference"] is not None:
                self.assertGreater(row["reference"], 0, row)
                self.assertGreater(row["ratio"], 0, row)
        self.assertGreaterEqual(sum(row["reference"] is not None for row in got), compared)

    def test_memory_suites_compare_with_the_machine(self):
        small = ["--bytes", str(8 << 20), "--block-bytes", str(256 << 10), "--rounds", "1"]
        self.check(rows("--suite", "host,index", "--index-blocks", "20000", *small), compared=4)

    def test_processes_hand_blocks_over_in_place(self):
        got = rows("--suite", "arena")
        self.check(got, compared=4)
        self.assertEqual([row["unit"] for row in got], ["us"] * 8, "handing over and letting go, of four numbers of blocks")

    def test_disk_suite_leaves_nothing_behind(self):
        with tempfile.TemporaryDirectory() as folder:
            self.check(
                rows("--suite", "disk", "--disk-path", folder, "--bytes", str(16 << 20), "--block-bytes",
                     str(1 << 20), "--rounds", "1"),
                compared=3)
            self.assertEqual(os.listdir(folder), [])

    def test_suite_without_its_input_is_refused_by_name(self):
        done = subprocess.run([BINARY, "bench", "kv", "--suite", "policy"], capture_output=True, text=True, timeout=60)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("--trace", done.stderr)


if __name__ == "__main__":
    unittest.main()
