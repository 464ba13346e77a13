"""A conversation goes on wherever it lands: two prefill and two decode workers, of which the one that answered leaves
before the next turn, drained, killed, or cut off in the middle of answers."""

import os
import signal
import subprocess
import threading
import time
import unittest

from harness import Serve, alive, eventually
from roles import Role, cluster_of
from support import BINARY, EXACT, completion, passage


class TurnsCase(unittest.TestCase):
    """Two workers of each role; `serve` supervises the first of each."""

    env = {"TIDEPOOL_KV_LOAD": "always"}
    args = []

    def setUp(self):
        args = [*EXACT, *self.args]
        self.serve = self.enterContext(Serve(BINARY, args, self.env))
        self.more = {f"{role}-2": self.start_worker(role, f"{role}-2", args) for role in ("prefill", "decode")}
        self.model = self.serve.model()
        eventually(lambda: len(self.ready()) == 4, 10, "four workers are ready")

    def start_worker(self, role, name, args):
        command = ["worker", "--role", role, "--worker-id", name, *args]
        return self.enterContext(Role(name, command, {**self.env, **cluster_of(self.serve)}, self.serve.dir))

    def ready(self):
        return {row["worker"]: row for row in self.serve.ctl("workers") if row["state"] == "ready"}

    def ask(self, messages, **fields):
        """(answer, cached tokens, trace) of one turn."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": 72,
            "temperature": 0,
            # Nothing but text: an answer that is sent back is then made of the same tokens.
            "logit_bias": {str(token): -100 for token in range(8)},
            "return_trace": True,
            "return_token_ids": True,
        }
        reply = self.serve.post_json("/v1/chat/completions", dict(body, **fields))
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        return reply["choices"][0], cached, reply["tidepool_trace"]

    def prompt(self, messages):
        body = {"model": self.model, "messages": messages, "add_generation_prompt": True}
        return self.serve.post_json("/tokenize", body)["tokens"]

    def first_turn(self, seed):
        """(messages of the next turn, tokens of it that the first one left blocks of, trace of the first)."""
        messages = [{"role": "user", "content": passage(seed)}]
        choice, cached, trace = self.ask(messages)
        self.assertEqual(cached, 0)
        answer = choice["token_ids"]
        self.assertEqual(len(answer), 72)
        seen = self.prompt(messages) + answer[:-1]
        messages = messages + [
            {"role": "assistant", "content": choice["message"]["content"]},
            {"role": "user", "content": "And of the red one? " + passage(seed + 1000, 4)},
        ]
        following = self.prompt(messages)
        expected = self.shared_tokens(seen, following)
        prompt = len(self.prompt(messages[:1])) // 32
        # Beyond the prompt's own blocks, or the test would say nothing of the answer's.
        self.assertGreater(expected // 32, prompt)

        # What the scheduler has not heard of yet it cannot send anybody to.
        def indexed():
            rows = {row["worker"]: row["indexed_blocks"] for row in self.serve.ctl("kv")}
            answer_blocks = expected // 32 - prompt
            return rows[trace["prefill_worker"]] >= prompt and rows[trace["decode_worker"]] >= answer_blocks

        eventually(indexed, 10, "the scheduler knows of the answer's blocks")
        return messages, expected, trace

    @staticmethod
    def shared_tokens(seen, following):
        """Tokens of the whole blocks with which both begin."""
        same = next((i for i, pair in enumerate(zip(seen, following)) if pair[0] != pair[1]), len(seen))
        return same // 32 * 32

    def drain(self, worker, blocks):
        """Evacuates the worker and ends its process: the others have all `blocks` of the conversation then."""
        pid = self.ready()[worker]["pid"]
        env = dict(os.environ, XDG_RUNTIME_DIR=self.serve.dir)
        done = subprocess.run(
            [BINARY, "ctl", "drain", worker, "--evacuate"], env=env, capture_output=True, text=True, timeout=60
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        eventually(lambda: worker not in self.ready(), 5, f"{worker} is drained")

        # What was copied, each target says in its next report.
        def indexed():
            rows = {row["worker"]: row["indexed_blocks"] for row in self.serve.ctl("kv")}
            return sum(count for name, count in rows.items() if name in self.ready()) >= blocks

        eventually(indexed, 5, "the scheduler knows who has its blocks now")
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not alive(pid), 20, f"{worker} has ended")

    def wait_lost(self, worker):
        """Until nobody asks it any more, `ctl kv` neither."""
        eventually(
            lambda: all(row["worker"] != worker or row["state"] == "lost" for row in self.serve.ctl("workers")),
            15,
            f"{worker} is lost",
        )

    def assert_as_cold(self, messages, choice):
        """The same answer as if nothing had been there."""
        cold, cached, _ = self.ask(messages, cache_salt="cold")
        self.assertEqual(cached, 0)
        self.assertEqual(choice["token_ids"], cold["token_ids"])


class DrainedTest(TurnsCase):
    def test_next_turn_finds_prompt_and_answer_after_its_decode_worker_was_drained(self):
        messages, expected, first = self.first_turn(1)
        self.drain(first["decode_worker"], expected // 32)
        choice, cached, trace = self.ask(messages)
        self.assertNotEqual(trace["decode_worker"], first["decode_worker"])
        self.assertEqual(cached, expected, "prompt and answer of the first turn")
        self.assert_as_cold(messages, choice)

    def test_next_turn_finds_them_after_both_its_workers_were_drained(self):
        messages, expected, first = self.first_turn(2)
        self.drain(first["decode_worker"], expected // 32)
        self.wait_lost(first["decode_worker"])
        self.drain(first["prefill_worker"], expected // 32)
        choice, cached, trace = self.ask(messages)
        self.assertNotIn(trace["prefill_worker"], (first["prefill_worker"], first["decode_worker"]))
        self.assertEqual(cached, expected, "prompt and answer of the first turn")
        self.assert_as_cold(messages, choice)


class KilledTest(TurnsCase):
    def test_next_turn_computes_what_a_killed_decode_worker_held(self):
        messages, expected, first = self.first_turn(11)
        prompt = len(self.prompt(messages[:1])) // 32 * 32
        os.kill(self.ready()[first["decode_worker"]]["pid"], signal.SIGKILL)
        # At once: that it is gone is found out by this very turn.
        choice, cached, trace = self.ask(messages)
        self.assertNotEqual(trace["decode_worker"], first["decode_worker"])
        self.assertLess(cached, expected)
        self.assertEqual(cached, prompt, "the prompt's blocks are with the prefill worker")
        self.assert_as_cold(messages, choice)

    def test_next_turn_computes_everything_after_both_its_workers_were_killed(self):
        messages, _, first = self.first_turn(12)
        for role in ("prefill_worker", "decode_worker"):
            os.kill(self.ready()[first[role]]["pid"], signal.SIGKILL)
        choice, cached, _ = self.ask(messages)
        self.assertEqual(cached, 0)
        self.assert_as_cold(messages, choice)


class CutTest(TurnsCase):
    """A worker that is told to end while it decodes more than its drain time allows."""

    args = ["--cluster-drain-timeout", "1s", "--engine-threads", "1"]

    def test_every_stream_of_a_worker_that_ends_goes_on_elsewhere_to_its_end(self):
        out = []
        streams = 16
        begun = threading.Barrier(streams + 1)

        def go(seed):
            events = []
            with self.serve.stream("/v1/completions", completion(self.model, seed, tokens=1600)) as stream:
                for event in stream:
                    if not events:
                        begun.wait(30)
                    events.append(event)
            out.append(events)

        threads = [threading.Thread(target=go, args=(seed,)) for seed in range(20, 20 + streams)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        worker = self.more["decode-2"].process
        started = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        self.assertEqual(worker.wait(8), 0)
        took = time.monotonic() - started
        for thread in threads:
            thread.join(90)
        self.assertEqual(len(out), streams)
        self.assertLess(took, 5)
        for events in out:
            self.assertEqual(events[-1], "[DONE]", events[-1])
            reasons = [choice["finish_reason"] for event in events[:-1] for choice in event["choices"]]
            self.assertEqual([reason for reason in reasons if reason], ["length"])
        resumed = self.serve.metrics("gateway")["tidepool_gateway_resumed_total"][()]
        self.assertGreater(resumed, 0, "some were on the worker that ended: or it was no test")


if __name__ == "__main__":
    unittest.main()
