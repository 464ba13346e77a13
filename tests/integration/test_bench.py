"""`tidepool bench serve` against a real daemon: what it reports is what the daemon counted."""

import json
import os
import signal
import subprocess
import tempfile
import unittest

from harness import eventually
from support import BINARY, ServeCase


class BenchServeTest(ServeCase):
    def setUp(self):
        self.dir = self.enterContext(tempfile.TemporaryDirectory())

    def bench(self, *args, code=0, output="json"):
        """Runs `bench serve` on the daemon. Returns (stdout, parsed where it is JSON), its stderr."""
        command = [BINARY, "bench", "serve", "--base-url", f"http://{self.serve.http}", "-o", output, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        self.assertEqual(done.returncode, code, done.stdout[-2000:] + done.stderr[-2000:])
        return (json.loads(done.stdout) if output == "json" else done.stdout), done.stderr

    def path(self, name):
        return os.path.join(self.dir, name)

    def lines(self, name):
        with open(self.path(name)) as file:
            return [json.loads(line) for line in file]

    def counted(self):
        """Of the daemon: (requests that ended in 200, generated tokens, prompt tokens)."""
        metrics = self.serve.metrics("gateway")
        requests = sum(
            value for labels, value in metrics["tidepool_requests_total"].items() if dict(labels)["code"] == "200"
        )
        return (
            requests,
            sum(metrics["tidepool_generation_tokens_total"].values()),
            sum(metrics["tidepool_prompt_tokens_total"].values()),
        )

    def test_counts_agree_with_the_daemons(self):
        # --prompt-ids: no request of its own to measure the words by.
        before = self.counted()
        result, _ = self.bench(
            *("--prompt-ids", "300-1200", "--input-len", "20-60", "--output-len", "5-20", "--ignore-eos"),
            *("--request-rate", "200", "--num-prompts", "80", "--seed", "7"),
            *("--requests-file", self.path("requests"), "--result-file", self.path("result"), "--save-detailed"),
        )
        after = self.counted()
        self.assertEqual((result["completed"], result["failed"]), (80, 0))
        self.assertEqual(after[0] - before[0], 80)
        self.assertEqual(after[1] - before[1], result["total_output_tokens"])
        self.assertEqual(after[2] - before[2], result["total_input_tokens"])
        self.assertEqual(result["token_counts"], "server")

        requests = self.lines("requests")
        self.assertEqual([line["index"] for line in requests], list(range(80)))
        self.assertEqual(sum(line["output_tokens"] for line in requests), result["total_output_tokens"])
        for line in requests:
            self.assertLessEqual(line["planned_s"], line["sent_s"])
            self.assertLessEqual(line["ttft_ms"], line["e2el_ms"])
            self.assertTrue(20 <= line["input_tokens"] <= 60 and 5 <= line["output_tokens"] <= 20, line)
            self.assertEqual(line["finish_reason"], "length")
        ttfts = sorted(line["ttft_ms"] for line in requests)
        self.assertAlmostEqual(result["median_ttft_ms"], (ttfts[39] + ttfts[40]) / 2, places=6)

        with open(self.path("result")) as file:
            saved = json.load(file)
        for key in ("ttfts", "itls", "input_lens", "output_lens", "errors"):
            self.assertEqual(len(saved[key]), 80, key)
        self.assertEqual(saved["seed"], 7)
        self.assertTrue(saved["git"] and saved["tidepool_version"])
        self.assertEqual(saved["config"]["input_len"], "20-60")
        # The trace is asked for where the server is Tidepool.
        self.assertEqual(saved["paths"]["traced"], 80)

    def test_words_are_measured_so_that_prompts_have_their_length(self):
        for endpoint in ("completions", "chat"):
            result, _ = self.bench(
                *("--endpoint-type", endpoint, "--input-len", "200", "--output-len", "2"),
                *("--max-concurrency", "4", "--num-prompts", "24"),
            )
            self.assertEqual(result["completed"], 24)
            self.assertAlmostEqual(result["total_input_tokens"] / 24, 200, delta=20)

    def test_shared_prefixes_are_found_in_the_cache(self):
        result, _ = self.bench(
            *("--workload", "shared-prefix", "--prefix-groups", "2", "--prefix-len", "320", "--input-len", "20"),
            *("--output-len", "2", "--max-concurrency", "1", "--num-prompts", "20", "--prompt-ids", "300-1200"),
        )
        # But for the first of each group, all whole blocks of the prefix.
        self.assertGreaterEqual(result["total_cached_tokens"], 18 * 288)
        other, _ = self.bench(
            *("--input-len", "340", "--output-len", "2", "--max-concurrency", "1", "--num-prompts", "10"),
            *("--prompt-ids", "300-1200"),
        )
        self.assertEqual(other["total_cached_tokens"], 0)

    def test_conversations_carry_what_was_said(self):
        self.bench(
            *("--endpoint-type", "chat", "--workload", "multi-turn", "--turns", "3", "--input-len", "40"),
            *("--output-len", "10", "--ignore-eos", "--max-concurrency", "3", "--num-prompts", "18"),
            *("--think-time", "10ms", "--requests-file", self.path("requests")),
        )
        sessions = {}
        for line in self.lines("requests"):
            sessions.setdefault(line["session"], []).append(line)
        # The last ones may be cut where the number of requests ends.
        whole = [turns for turns in sessions.values() if len(turns) == 3]
        self.assertGreaterEqual(len(whole), 4)
        for turns in sessions.values():
            self.assertEqual([line["turn"] for line in turns], list(range(len(turns))))
            for before, line in zip(turns, turns[1:]):
                self.assertGreater(line["input_tokens"], before["input_tokens"] + 30)
                self.assertAlmostEqual(line["planned_s"], before["end_s"] + 0.01, places=6)

    def test_a_mooncake_trace_is_replayed_on_time(self):
        with open(self.path("trace"), "w") as file:
            for i in range(20):
                ids = [0, 1, 100 + i]
                entry = {"timestamp": i * 100, "input_length": 1200, "output_length": 6, "hash_ids": ids}
                file.write(json.dumps(entry) + "\n")
        result, _ = self.bench(
            *("--trace", self.path("trace"), "--speed", "4", "--length-scale", "0.25", "--ignore-eos"),
            *("--prompt-ids", "300-1200", "--requests-file", self.path("requests")),
        )
        self.assertEqual((result["completed"], result["request_rate"]), (20, "trace"))
        self.assertEqual(result["total_input_tokens"], 20 * 300)
        for i, line in enumerate(self.lines("requests")):
            self.assertAlmostEqual(line["planned_s"], i * 0.025, places=6)
        # 2 blocks of 128 tokens shared by all; some may start before the first is in the cache.
        self.assertGreater(result["total_cached_tokens"], 8 * 256)

    def test_a_burstgpt_trace_is_replayed(self):
        with open(self.path("trace"), "w") as file:
            file.write("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n")
            for i in range(10):
                file.write(f"{i},GPT-4,{50 + i},{3 if i else 0},0,API log\n")
        result, errors = self.bench("--trace", self.path("trace"), "--speed", "50", "--prompt-ids", "300-1200")
        self.assertEqual(result["completed"], 9)
        self.assertEqual(result["config"]["trace_format"], "burstgpt")
        self.assertIn("1 entries of the trace have no input or no output", errors)

    def test_a_dataset_is_sent(self):
        with open(self.path("data"), "w") as file:
            file.write(json.dumps({"prompt": "The code of the blue door is 4821.", "max_tokens": 3}) + "\n")
            file.write(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
        result, _ = self.bench(
            *("--dataset", self.path("data"), "--endpoint-type", "chat", "--output-len", "5"),
            *("--num-prompts", "6", "--max-concurrency", "2"),
        )
        self.assertEqual(result["completed"], 6)

    def test_goodput_counts_what_meets_every_bound(self):
        load = ("--input-len", "30", "--output-len", "4", "--max-concurrency", "2", "--num-prompts", "12")
        good, _ = self.bench(*load, "--slo", "ttft:60s,itl:60s")
        self.assertEqual(good["slo_good"], 12)
        self.assertAlmostEqual(good["request_goodput"], good["request_throughput"])
        bad, _ = self.bench(*load, "--goodput", "ttft:60000", "e2el:0.001")
        self.assertEqual((bad["slo_good"], bad["request_goodput"]), (0, 0))

    def test_a_sweep_reports_its_steps(self):
        result, _ = self.bench(
            *("--input-len", "20", "--output-len", "2", "--num-prompts", "10", "--slo", "ttft:60s"),
            *("--sweep", "--request-rate", "100", "--sweep-steps", "3"),
        )
        sweep = result["sweep"]
        self.assertEqual(sweep["stop_reason"], "steps")
        self.assertEqual([step["request_rate"] for step in sweep["steps"]], [100, 200, 400])
        best = max(sweep["steps"], key=lambda step: step["request_goodput"])
        self.assertEqual(sweep["best_request_rate"], best["request_rate"])

    def test_the_table_is_vllms(self):
        table, errors = self.bench(
            *("--input-len", "20", "--output-len", "3", "--num-prompts", "4", "--max-concurrency", "2"), output="table"
        )
        self.assertIn("============ Serving Benchmark Result ============", table)
        self.assertRegex(table, r"Successful requests: +4 ")
        for line in ("Mean TTFT (ms):", "P99 TPOT (ms):", "Median ITL (ms):", "Request throughput (req/s):"):
            self.assertIn(line, table)
        self.assertIn("4 done", errors)

    def test_failures_are_the_exit_code(self):
        result, errors = self.bench(
            *("--input-len", "20", "--output-len", "2", "--num-prompts", "3", "--max-concurrency", "1"),
            *("--extra-body", '{"top_p": 7}', "--prompt-ids", "300-1200", "--requests-file", self.path("requests")),
            code=1,
        )
        self.assertEqual((result["completed"], result["failed"], result["rejected"]), (0, 3, 0))
        self.assertIn("top_p", errors)
        self.assertEqual([line["status"] for line in self.lines("requests")], [400] * 3)

    def test_usage_errors_name_the_flag(self):
        for args, named in (
            (("--input-len", "many"), "--input-len"),
            (("--slo", "speed:1"), "--slo"),
            (("--request-rate", "-1"), "--request-rate"),
            (("--sweep",), "--slo"),
            (("--trace", self.path("absent")), "absent"),
            (("--extra-body", "[]"), "--extra-body"),
            (("--workload", "trace"), "--trace"),
            (("--api-key-env", "TIDEPOOL_TEST_NOT_SET"), "TIDEPOOL_TEST_NOT_SET"),
            (("--base-url", "ftp://x"), "--base-url"),
        ):
            with self.subTest(args):
                command = [BINARY, "bench", "serve", "--base-url", f"http://{self.serve.http}", *args]
                done = subprocess.run(command, capture_output=True, text=True, timeout=60)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertIn(named, done.stderr)

    def test_an_interrupt_reports_what_was_measured(self):
        command = [BINARY, "bench", "serve", "--base-url", f"http://{self.serve.http}", "-o", "json", "--input-len"]
        command += ["20", "--output-len", "4", "--request-rate", "50", "--duration", "600s"]
        before = self.counted()[0]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            eventually(lambda: self.counted()[0] >= before + 20, 60, "twenty requests answered")
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        self.assertEqual(process.returncode, 1)
        result = json.loads(out)
        self.assertTrue(result["stopped"])
        self.assertGreaterEqual(result["completed"], 10)


if __name__ == "__main__":
    unittest.main()
