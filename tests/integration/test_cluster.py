"""3 schedulers, 2 gateways, 4 workers and etcd: what dies costs time, and no answer."""

import shutil
import signal
import threading
import time
import unittest

from cluster_harness import Cluster, needs_etcd
from harness import eventually
from support import EXACT, completion, text_of

TOKENS = 300
TAKEOVER_SECONDS = 5


class ClusterCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        needs_etcd()
        cls.cluster = cls.enterClassContext(Cluster(args=EXACT))
        cls.seeds = iter(range(1000, 100_000))

    def tearDown(self):
        # The next case finds everybody there again.
        for role in self.cluster.roles():
            if role.process.poll() is not None:
                role.start(wait=False)
                role.wait_ready()
        if self.cluster.etcd.process.poll() is not None:
            self.cluster.etcd.start()
        self.cluster.wait_leader()

    def body(self, tokens=TOKENS, **fields):
        return dict(completion("demo", next(self.seeds), tokens=tokens), **fields)

    def expected(self, body, gateway=0):
        """The whole answer where nothing dies. Another salt: the cache of the case itself stays cold."""
        status, reply = self.cluster.gateways[gateway].post("/v1/completions", dict(body, cache_salt="reference"))
        self.assertEqual(status, 200, reply)
        return reply

    def streams(self, bodies, gateways=(0, 1)):
        """Starts a stream of each body; their texts once all have begun. Wait for them with finish()."""
        running = [StreamThread(self.cluster.gateways[gateways[i % len(gateways)]], b) for i, b in enumerate(bodies)]
        for thread in running:
            thread.start()
        for thread in running:
            self.assertTrue(thread.begun.wait(60), "a stream begins")
        return running

    def finish(self, running, expected):
        for thread, whole in zip(running, expected):
            thread.join(120)
            self.assertFalse(thread.is_alive())
            self.assertIsNone(thread.error, thread.error)
            self.assertEqual(thread.events[-1], "[DONE]", thread.events[-1])
            self.assertEqual(text_of(thread.events), whole["choices"][0]["text"])
            self.assertEqual(thread.usage()["completion_tokens"], whole["usage"]["completion_tokens"])
            self.assertEqual(thread.usage()["prompt_tokens"], whole["usage"]["prompt_tokens"])


class StreamThread(threading.Thread):
    def __init__(self, gateway, body, at=5):
        super().__init__(daemon=True)
        self.gateway, self.at = gateway, at
        self.request = dict(body, stream_options={"include_usage": True})
        self.begun = threading.Event()
        self.events, self.error = [], None

    def run(self):
        try:
            with self.gateway.stream("/v1/completions", self.request, timeout=120) as stream:
                if stream.status != 200:
                    self.error = stream.response.read()
                    return
                for event in stream:
                    self.events.append(event)
                    if event != "[DONE]" and "error" in event:
                        self.error = event
                    if len(self.events) == self.at:
                        self.begun.set()
        except Exception as error:  # told in the test's own thread
            self.error = error
        finally:
            self.begun.set()

    def usage(self):
        return next(e["usage"] for e in reversed(self.events) if e != "[DONE]" and e.get("usage"))


class SchedulerTest(ClusterCase):
    def test_everybody_is_listed(self):
        status = self.cluster.ctl("status")
        roles = sorted(member["role"] for member in status["members"])
        self.assertEqual(roles, ["decode"] * 2 + ["gateway"] * 2 + ["prefill"] * 2 + ["scheduler"] * 3)
        self.assertEqual(status["etcd"], "answers")
        self.assertEqual(status["scheduler"], self.cluster.leader().info["grpc"])
        for member in status["members"]:
            self.assertTrue(member["version"] and member["address"] and member["pid"], member)

    def test_leader_killed_while_streams_run(self):
        bodies = [self.body(tokens=600) for _ in range(4)]
        expected = [self.expected(body) for body in bodies]
        running = self.streams(bodies)
        leader = self.cluster.wait_leader()
        leader.kill()
        killed = time.monotonic()
        # New requests, all the time: none is refused, and none takes longer than a takeover.
        slowest = 0
        while time.monotonic() - killed < TAKEOVER_SECONDS + 1:
            began = time.monotonic()
            status, reply = self.cluster.gateways[0].post("/v1/completions", self.body(tokens=4))
            self.assertEqual(status, 200, reply)
            slowest = max(slowest, time.monotonic() - began)
            # Nor does a load balancer take a gateway out.
            status, report = self.cluster.gateways[1].get("/readyz")
            self.assertEqual(status, 200, report)
        self.assertLess(slowest, TAKEOVER_SECONDS)
        self.finish(running, expected)
        successor = self.cluster.wait_leader()
        self.assertIsNot(successor, leader)
        # Its state is the workers': all of them, and what they hold.
        workers = self.cluster.ctl("workers")
        self.assertEqual(len([w for w in workers if w["state"] == "ready"]), 4)
        print(f"takeover: the slowest new request took {slowest:.2f} s", flush=True)

    def test_leader_stopped_and_resumed_gives_way(self):
        leader = self.cluster.wait_leader()
        leader.kill(signal.SIGSTOP)
        try:
            began = time.monotonic()
            status, reply = self.cluster.gateways[0].post("/v1/completions", self.body(tokens=4))
            self.assertEqual(status, 200, reply)
            self.assertLess(time.monotonic() - began, 2 * TAKEOVER_SECONDS)
        finally:
            leader.kill(signal.SIGCONT)
        successor = eventually(
            lambda: self.cluster.leader() is not leader and self.cluster.leader(), 10, "another one leads"
        )
        self.assertIsNot(successor, leader)
        for gateway in self.cluster.gateways:
            self.assertEqual(gateway.post("/v1/completions", self.body(tokens=4))[0], 200)

    def test_leader_that_drains_hands_over_at_once(self):
        leader = self.cluster.wait_leader()
        leader.stop()
        began = time.monotonic()
        status, reply = self.cluster.gateways[1].post("/v1/completions", self.body(tokens=4))
        self.assertEqual(status, 200, reply)
        self.assertLess(time.monotonic() - began, 3)


class EtcdTest(ClusterCase):
    def test_etcd_killed_and_back(self):
        bodies = [self.body(tokens=600) for _ in range(2)]
        expected = [self.expected(body) for body in bodies]
        running = self.streams(bodies)
        leader = self.cluster.wait_leader()
        self.cluster.etcd.kill()
        # Longer than every lease.
        until = time.monotonic() + 5
        while time.monotonic() < until:
            for gateway in self.cluster.gateways:
                status, reply = gateway.post("/v1/completions", self.body(tokens=4))
                self.assertEqual(status, 200, reply)
        self.finish(running, expected)
        self.assertEqual(leader.metric("tidepool_cluster_leading"), 1)
        self.assertEqual(leader.metric("tidepool_cluster_etcd_up"), 0)
        # Membership stays as it was; ctl is told where the scheduler is, as etcd cannot say.
        status = self.cluster.ctl("status", "--scheduler", leader.info["grpc"])
        self.assertEqual(len(status["members"]), 9)
        self.assertIn("does not answer", status["etcd"])

        self.cluster.etcd.start()
        eventually(lambda: leader.metric("tidepool_cluster_etcd_up") == 1, 10, "etcd is found again")
        # Who comes now is a member as ever.
        fifth = self.cluster.worker("decode-late", "decode").start()
        try:
            eventually(
                lambda: "decode-late" in [m["id"] for m in self.cluster.ctl("status")["members"]],
                10,
                "the new worker is listed",
            )
        finally:
            fifth.stop()
        eventually(lambda: len(self.cluster.ctl("status")["members"]) == 9, 10, "it is gone, and the others are there")

    def test_etcd_loses_its_data(self):
        self.cluster.etcd.kill()
        shutil.rmtree(self.cluster.etcd.data)
        self.cluster.etcd.start()
        for gateway in self.cluster.gateways:
            self.assertEqual(gateway.post("/v1/completions", self.body(tokens=4))[0], 200)
        self.cluster.wait_leader()

        def all_there():
            try:
                return len(self.cluster.ctl("status")["members"]) == 9
            except AssertionError:  # the first to lead again may have to give way to a term that another remembers
                return False

        eventually(all_there, 15, "all are there again")


class WorkersTest(ClusterCase):
    def decoder_of(self, thread):
        """Which worker decodes: the one that runs something, as there is one request only."""

        def busy():
            rows = [w for w in self.cluster.ctl("workers") if w["role"] == "decode" and w["running"] > 0]
            return rows and rows[0]

        row = eventually(busy, 10, "a worker decodes")
        return next(w for w in self.cluster.workers if w.name == row["worker"])

    def run_with_kill(self, **fields):
        body = self.body(tokens=800, **fields)
        expected = self.expected(body)
        thread = self.streams([body])[0]
        victim = self.decoder_of(thread)
        victim.kill()
        self.finish([thread], [expected])
        self.assertGreaterEqual(self.cluster.gateways[0].metric("tidepool_gateway_resumed_total"), 1)
        return thread

    def test_decode_killed_in_the_middle_greedy(self):
        self.run_with_kill()

    def test_decode_killed_in_the_middle_seeded_with_penalties(self):
        self.run_with_kill(
            temperature=1.0, seed=7, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.3, presence_penalty=0.2
        )

    def test_decode_killed_in_the_middle_of_a_structured_answer(self):
        self.run_with_kill(temperature=1.0, seed=11, guided_regex="[a-z ]+")

    def test_decode_killed_in_the_middle_of_an_answer_with_logprobs_and_stop(self):
        self.run_with_kill(logprobs=2, stop=["a string that does not come"])

    def test_both_decoders_killed_one_after_the_other(self):
        body = self.body(tokens=1200)
        expected = self.expected(body)
        thread = self.streams([body])[0]
        first = self.decoder_of(thread)
        first.kill()
        first.start()
        second = eventually(
            lambda: (w := self.decoder_of(thread)) is not first and w, 10, "another worker goes on with it"
        )
        second.kill()
        self.finish([thread], [expected])

    def test_prefill_killed_while_streams_run(self):
        bodies = [self.body() for _ in range(4)]
        expected = [self.expected(body) for body in bodies]
        running = self.streams(bodies)
        self.cluster.workers[0].kill()
        status, reply = self.cluster.gateways[0].post("/v1/completions", self.body(tokens=4))
        self.assertEqual(status, 200, reply)
        self.finish(running, expected)

    def test_worker_with_another_layout_is_refused_with_the_reason_by_every_leader(self):
        stranger = self.cluster.worker("stranger", "decode", "--kv-block-tokens", "16").start(wait=False)
        try:
            eventually(lambda: "does not accept reports" in stranger.log(), 30, "it is refused")
            self.assertIn("block", stranger.log())
            # Nor does it decide what the next leader takes.
            self.cluster.wait_leader().kill()
            status, reply = self.cluster.gateways[0].post("/v1/completions", self.body(tokens=4))
            self.assertEqual(status, 200, reply)
            self.cluster.wait_leader()
            ids = [m["id"] for m in self.cluster.ctl("status")["members"]]
            self.assertNotIn("stranger", ids)
            self.assertEqual(len([w for w in self.cluster.ctl("workers") if w["state"] == "ready"]), 4)
        finally:
            stranger.kill()


class GatewayTest(ClusterCase):
    def test_gateway_killed(self):
        body = self.body()
        expected = self.expected(body, gateway=1)
        lost = StreamThread(self.cluster.gateways[0], self.body(tokens=800))
        lost.start()
        self.assertTrue(lost.begun.wait(60))
        running = self.streams([body], gateways=(1,))
        self.cluster.gateways[0].kill()
        self.finish(running, [expected])
        lost.join(30)
        self.assertNotIn("[DONE]", lost.events)
        # Its requests are freed.
        eventually(lambda: all(w["running"] == 0 for w in self.cluster.ctl("workers")), 10, "the workers are idle")
        status, reply = self.cluster.gateways[1].post("/v1/completions", self.body(tokens=4))
        self.assertEqual(status, 200, reply)


if __name__ == "__main__":
    unittest.main()
