"""Workers that change between prefill and decode, by order and by themselves, and that leave, while answers run."""

import json
import subprocess
import threading
import time
import unittest

from cluster_harness import Cluster, needs_etcd
from harness import eventually
from support import BINARY, EXACT, completion, text_of
from test_cluster import StreamThread

TOKENS = 300


class ElasticCase(unittest.TestCase):
    args = EXACT
    seeds = iter(range(1000, 100_000))

    @classmethod
    def setUpClass(cls):
        needs_etcd()
        cls.cluster = cls.enterClassContext(Cluster(schedulers=1, gateways=1, args=cls.args))

    def setUp(self):
        # Everybody is there again, as configured.
        for worker in self.cluster.workers:
            if worker.process.poll() is not None:
                worker.start()
            self.role(worker.name, worker.name.split("-")[0], "--wait")

    def run_ctl(self, *words):
        """(exit code, stdout, stderr) of `tidepool ctl WORDS`."""
        done = subprocess.run([BINARY, "ctl", *words], env=self.cluster.env, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    def role(self, worker, role, *more):
        code, out, err = self.run_ctl("role", worker, role, *more, "-o", "json")
        self.assertEqual(code, 0, err)
        return json.loads(out)

    def ready(self):
        """Role by name of the workers that requests are placed on."""
        return {row["worker"]: row["role"] for row in self.cluster.ctl("workers") if row["state"] == "ready"}

    def members(self):
        """Role by name of the workers that etcd knows."""
        return {m["id"]: m["role"] for m in self.cluster.ctl("status")["members"] if m["role"] in ("prefill", "decode", "both")}

    def reference(self, body):
        """The whole answer where nothing happens. Another salt: the cache of the case itself stays cold."""
        status, reply = self.cluster.gateways[0].post("/v1/completions", dict(body, cache_salt="reference"))
        self.assertEqual(status, 200, reply)
        return reply

    def streams(self, count, tokens=TOKENS):
        """(threads of running streams, what each has to answer)."""
        bodies = [completion("demo", next(self.seeds), tokens=tokens) for _ in range(count)]
        expected = [self.reference(body) for body in bodies]
        threads = [StreamThread(self.cluster.gateways[0], body) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            self.assertTrue(thread.begun.wait(60), "a stream begins")
        return threads, expected

    def finish(self, threads, expected):
        """Each answer is whole, and no token is missing or there twice."""
        for thread, whole in zip(threads, expected):
            thread.join(120)
            self.assertFalse(thread.is_alive())
            self.assertIsNone(thread.error, thread.error)
            self.assertEqual(thread.events[-1], "[DONE]", thread.events[-1])
            self.assertEqual(text_of(thread.events), whole["choices"][0]["text"])
            self.assertEqual(thread.usage()["completion_tokens"], whole["usage"]["completion_tokens"])


class RoleTest(ElasticCase):
    def test_roles_change_there_and_back_while_streams_run(self):
        threads, expected = self.streams(6)
        # Both at once: one of each kind stays.
        self.assertIn(self.role("decode-2", "prefill")["role"], ("decode", "prefill"))
        self.assertEqual(self.role("prefill-0", "decode", "--wait"), {"worker": "prefill-0", "role": "decode", "next_role": ""})
        more, more_expected = self.streams(3)
        self.finish(threads, expected)
        self.assertEqual(self.role("decode-2", "prefill", "--wait")["role"], "prefill")
        changed = {"prefill-0": "decode", "prefill-1": "prefill", "decode-2": "prefill", "decode-3": "decode"}
        self.assertEqual(self.ready(), changed)
        eventually(lambda: self.members() == changed, 15, "etcd knows of the roles, and of no old ones")
        self.finish(more, more_expected)
        # It does what it is now, where nobody else does.
        self.role("prefill-1", "decode", "--wait")
        body = dict(completion("demo", next(self.seeds), tokens=4), return_trace=True)
        status, reply = self.cluster.gateways[0].post("/v1/completions", body)
        self.assertEqual(status, 200, reply)
        self.assertEqual(reply["tidepool_trace"]["prefill_worker"], "decode-2", reply["tidepool_trace"])
        self.role("prefill-1", "prefill", "--wait")
        self.assertEqual(self.cluster.workers[2].metric("tidepool_worker_role_changes_total"), 1)
        threads, expected = self.streams(4)
        self.role("decode-2", "decode", "--wait")
        self.role("prefill-0", "prefill", "--wait")
        self.finish(threads, expected)
        self.assertEqual(self.ready(), {w.name: w.name.split("-")[0] for w in self.cluster.workers})

    def test_a_restarted_worker_is_what_it_is_configured_to_be(self):
        self.role("prefill-1", "both", "--wait")
        self.assertEqual(self.ready()["prefill-1"], "both")
        worker = self.cluster.workers[1]
        worker.kill()
        worker.start()
        eventually(lambda: self.ready().get("prefill-1") == "prefill", 30, "it prefills again")

    def test_orders_that_cannot_be_say_why(self):
        code, _, err = self.run_ctl("role", "nobody", "decode")
        self.assertEqual(code, 2, err)
        self.assertIn("prefill-0", err)
        code, _, err = self.run_ctl("role", "prefill-0", "store")
        self.assertEqual(code, 2, err)
        code, _, err = self.run_ctl("role", "prefill-0", "decode", "--wait=soon")
        self.assertEqual(code, 2, err)
        self.assertIn("--wait=30s", err)
        self.assertEqual(self.ready()["prefill-0"], "prefill")
        # --wait may have a value, before and behind the words of the command.
        for words in (
            ["prefill-0", "prefill", "--wait", "30s"],
            ["--wait", "30s", "prefill-0", "prefill"],
            ["--wait", "prefill-0", "prefill"],
        ):
            code, _, err = self.run_ctl("role", *words)
            self.assertEqual(code, 0, (words, err))
        for words in (["role", "prefill-0"], ["role", "--wait", "prefill"], ["drain"], ["drain", "--wait"]):
            code, _, err = self.run_ctl(*words)
            self.assertEqual(code, 2, (words, err))
            self.assertIn("required", err)

    def test_advice_is_there(self):
        def counted():
            advice = self.cluster.ctl("advice")
            return advice if (advice["prefill"], advice["decode"]) == (2, 2) else None

        advice = eventually(counted, 30, "the advice counts all workers")
        self.assertEqual(advice["mode"], "advise")
        for name in ("wanted_prefill", "wanted_decode", "prefill_pressure", "decode_pressure", "worker", "role", "reason"):
            self.assertIn(name, advice)
        self.assertTrue(advice["reason"].endswith("."), advice["reason"])


class DrainTest(ElasticCase):
    def test_workers_that_are_drained_under_load_end_by_themselves_and_fail_nobody(self):
        stop, failed, answered = threading.Event(), [], []

        def ask():
            while not stop.is_set():
                status, reply = self.cluster.gateways[0].post("/v1/completions", completion("demo", next(self.seeds), tokens=24))
                (answered if status == 200 else failed).append(reply)

        load = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
        threads, expected = self.streams(6)
        for thread in load:
            thread.start()
        for name in ("decode-3", "prefill-1"):
            code, _, err = self.run_ctl("drain", "--evacuate", "--wait", name, "--end")
            self.assertEqual(code, 0, err)
            worker = next(w for w in self.cluster.workers if w.name == name)
            self.assertEqual(worker.process.wait(30), 0, worker.log())
            self.assertNotIn(name, self.ready())
        before = len(answered)
        eventually(lambda: failed or len(answered) > before + 3, 60, "requests are answered without them")
        stop.set()
        for thread in load:
            thread.join(60)
        self.finish(threads, expected)
        self.assertEqual(failed, [])


class ActTest(ElasticCase):
    """A pool of so few blocks that long answers crowd the decode workers, and objectives that long prompts miss."""

    args = [
        *EXACT,
        *("--scheduler-elasticity", "act"),
        *("--scheduler-elasticity-dwell", "500ms"),
        *("--scheduler-slo-ttft", "50ms"),
        *("--scheduler-admission", "none"),
        *("--model-max-model-len", "1024"),
        *("--kv-host-bytes", "5MiB"),
    ]

    def setUp(self):
        pass  # they change by themselves

    def load(self, clients, body):
        """Context: so many clients that ask again and again, and again where there was no room."""
        test = self

        class Load:
            def __enter__(self):
                self.stop, self.wrong, self.done = threading.Event(), [], 0
                self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(clients)]
                for thread in self.threads:
                    thread.start()
                return self

            def run(self):
                while not self.stop.is_set():
                    status, reply = test.cluster.gateways[0].post("/v1/completions", body())
                    if status == 200:
                        self.done += 1
                    elif status == 429:
                        time.sleep(0.05)  # as Retry-After says, but sooner
                    else:
                        self.wrong.append(reply)

            def __exit__(self, *_):
                self.stop.set()
                for thread in self.threads:
                    thread.join(120)

        return Load()

    def counts(self):
        roles = list(self.ready().values())
        return roles.count("prefill"), roles.count("decode")

    def test_workers_follow_the_load_there_and_back(self):
        self.assertEqual(self.counts(), (2, 2))
        answers = lambda: dict(completion("demo", next(self.seeds), tokens=800), prompt=f"Story {next(self.seeds)}:")
        with self.load(10, answers) as load:
            eventually(lambda: self.counts() == (1, 3), 120, "a prefill worker decodes")
        self.assertEqual(load.wrong, [])
        self.assertGreater(load.done, 0)
        prompts = lambda: dict(completion("demo", next(self.seeds), tokens=1), cache_salt=str(next(self.seeds)))
        with self.load(10, prompts) as load:
            eventually(lambda: self.counts()[0] >= 2, 120, "a decode worker prefills")
        self.assertEqual(load.wrong, [])
        self.assertGreater(load.done, 0)
        self.assertGreaterEqual(self.cluster.ctl("advice")["flips"], 2)


if __name__ == "__main__":
    unittest.main()
