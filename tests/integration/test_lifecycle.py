"""Start, admission, drain and death of `tidepool serve`."""

import os
import signal
import subprocess
import threading
import time
import unittest

from harness import Serve, ServeFailed, alive, eventually
from support import BINARY, completion, text_of


class AdmissionTest(unittest.TestCase):
    def test_a_prompt_that_would_miss_a_tiny_slo_is_rejected_early(self):
        with Serve(BINARY, ["--scheduler-slo-ttft", "1ms"]) as serve:
            model = serve.model()
            statuses = set()
            for seed in range(20):  # the first ones teach the latency model
                started = time.monotonic()
                status, headers, reply = serve.post("/v1/completions", completion(model, seed, tokens=4))
                statuses.add(status)
                if status == 429:
                    break
            self.assertIn(429, statuses)
            self.assertTrue(reply["error"]["code"], reply)
            self.assertGreaterEqual(int(headers["Retry-After"]), 1)
            self.assertLess(time.monotonic() - started, 1)
            rejected = serve.metrics("gateway")["tidepool_requests_rejected_total"]
            self.assertGreater(sum(rejected.values()), 0)


class DrainTest(unittest.TestCase):
    def test_sigterm_finishes_what_is_in_flight_and_exits_zero(self):
        with Serve(BINARY) as serve:
            model = serve.model()
            body = completion(model, 1, tokens=400)
            expected = serve.post_json("/v1/completions", body)["choices"][0]["text"]
            pids = [child["pid"] for child in serve.children().values()]
            with serve.stream("/v1/completions", body) as stream:
                events = []
                for event in stream:
                    events.append(event)
                    if len(events) == 3:
                        serve.process.send_signal(signal.SIGTERM)
            self.assertEqual(events[-1], "[DONE]")
            self.assertEqual(text_of(events), expected)
            self.assertEqual(serve.process.wait(30), 0)
            self.assertFalse([pid for pid in pids if alive(pid)])

    def test_a_second_signal_ends_it_at_once(self):
        with Serve(BINARY) as serve:
            pids = [child["pid"] for child in serve.children().values()]
            with serve.stream("/v1/completions", completion(serve.model(), 1, tokens=1000)) as stream:
                next(iter(stream))
                started = time.monotonic()
                serve.process.send_signal(signal.SIGTERM)
                time.sleep(0.05)  # two signals of one kind would merge while the first is pending
                serve.process.send_signal(signal.SIGTERM)
                code = serve.process.wait(10)
            self.assertLess(time.monotonic() - started, 5)
            self.assertIn(code, (0, 1))  # 0: the request was done before the second signal
            eventually(lambda: not any(alive(pid) for pid in pids), 5, "no child is left")


class DeathTest(unittest.TestCase):
    def test_no_orphan_survives_a_killed_supervisor(self):
        with Serve(BINARY) as serve:
            pids = [child["pid"] for child in serve.children().values()]
            self.assertEqual(len(pids), 4)
            self.assertTrue(all(alive(pid) for pid in pids))
            serve.process.kill()
            serve.process.wait(10)
            eventually(lambda: not any(alive(pid) for pid in pids), 5, "every child is gone")

    def test_a_killed_gateway_comes_back_on_the_same_port(self):
        with Serve(BINARY) as serve:
            old = serve.kill("gateway")
            serve.wait_restarted("gateway", old)
            eventually(lambda: serve.get("/readyz", check=False)[0] == 200, 15, "the front door answers again")
            self.assertTrue(serve.post_json("/v1/completions", completion(serve.model(), 1, tokens=4))["choices"])
            self.assertEqual(serve.children()["gateway"]["restarts"], 1)


class ConfigurationTest(unittest.TestCase):
    def run_tidepool(self, *args, env=None):
        return subprocess.run(
            [BINARY, *args], capture_output=True, text=True, timeout=30, env={**os.environ, **(env or {})}
        )

    def test_a_wrong_value_is_exit_code_two_with_its_place(self):
        done = self.run_tidepool("serve", env={"TIDEPOOL_ENGINE_MAX_BATCH": "0"})
        self.assertEqual(done.returncode, 2)
        self.assertIn("TIDEPOOL_ENGINE_MAX_BATCH: engine.max_batch '0' is out of range", done.stderr)

    def test_a_missing_model_is_exit_code_two(self):
        done = self.run_tidepool("serve", "--model", "/no/such/model")
        self.assertEqual(done.returncode, 2)
        self.assertIn("/no/such/model", done.stderr)

    def test_unknown_flags_and_commands_are_exit_code_two(self):
        self.assertEqual(self.run_tidepool("serve", "--no-such-flag").returncode, 2)
        self.assertEqual(self.run_tidepool("no-such-command").returncode, 2)
        self.assertEqual(self.run_tidepool().returncode, 2)

    def test_help_and_version_are_exit_code_zero(self):
        self.assertEqual(self.run_tidepool("--help").returncode, 0)
        self.assertEqual(self.run_tidepool("serve", "--help-all").returncode, 0)
        self.assertIn("tidepool ", self.run_tidepool("version").stdout)

    def test_a_port_that_is_taken_is_named(self):
        with Serve(BINARY) as serve:
            with self.assertRaises(ServeFailed):
                with Serve(BINARY, env={"TIDEPOOL_GATEWAY_HTTP_LISTEN": serve.http}) as second:
                    second.print_log()

    def test_two_serves_run_side_by_side(self):
        with Serve(BINARY) as one, Serve(BINARY) as two:
            answers = []
            body = completion(one.model(), 1, tokens=8)
            threads = [threading.Thread(target=lambda s=s: answers.append(s.post_json("/v1/completions", body)))
                       for s in (one, two)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(len(answers), 2)


if __name__ == "__main__":
    unittest.main()
