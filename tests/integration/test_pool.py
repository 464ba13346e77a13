"""The KV pool end to end: what was computed once comes back from a disk or a peer, with the same answer, after restarts
and kills, and no fault of a disk fails a request."""

import os
import shutil
import signal
import subprocess
import tempfile
import unittest

from harness import Serve, eventually
from support import BINARY, EXACT, completion, passage

DISK_BYTES = "64MiB"


def total(metrics, name, **labels):
    """The sum of a metric's samples that have these labels."""
    wanted = set(labels.items())
    return sum(value for pairs, value in metrics.get(name, {}).items() if wanted <= set(pairs))


class PoolCase(unittest.TestCase):
    """A cluster with a disk tier in `self.disk`, which loads whatever there is."""

    load = "always"
    env = {}

    def setUp(self):
        self.disk = self.enterContext(tempfile.TemporaryDirectory(prefix="tidepool-disk-"))
        self.serve = self.start()
        self.model = self.serve.model()

    def start(self, **more):
        env = {"TIDEPOOL_KV_DISK_PATH": self.disk, "TIDEPOOL_KV_DISK_BYTES": DISK_BYTES, "TIDEPOOL_KV_LOAD": self.load}
        env.update(self.env)
        env.update(more)
        return self.enterContext(Serve(BINARY, EXACT, env))

    def ask(self, seed, **fields):
        """(text, cached tokens, trace) of one request."""
        body = completion(self.model, seed, tokens=24, return_trace=True, **fields)
        reply = self.serve.post_json("/v1/completions", body)
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        return reply["choices"][0]["text"], cached, reply["tidepool_trace"]

    def stored(self):
        return sum(
            total(self.serve.metrics(name), "tidepool_worker_stores_total", outcome="stored")
            for name in ("prefill", "decode")
        )

    def wait_stored(self, blocks=1):
        """Until the stores have come to rest with at least `blocks` written."""

        def rests():
            queued = sum(
                total(self.serve.metrics(name), "tidepool_worker_store_queue_blocks") for name in ("prefill", "decode")
            )
            return queued == 0 and self.stored() >= blocks

        eventually(rests, 20, f"{blocks} blocks are stored")

    def restart(self, *names, signal_number):
        """Kills the workers; returns when the scheduler knows the new ones, and no old one any more."""
        pids = {name: self.serve.kill(name, signal_number) for name in names}
        for name, pid in pids.items():
            self.serve.wait_restarted(name, pid)

        def known():
            now = {self.serve.children()[name]["pid"] for name in ("prefill", "decode")}
            return {row["pid"] for row in self.serve.ctl("workers") if row["state"] == "ready"} == now

        eventually(known, 20, "the scheduler knows the restarted workers")

    def hits(self, name, tier):
        return total(self.serve.metrics(name), "tidepool_prefix_cache_hit_tokens_total", tier=tier)


class RestartTest(PoolCase):
    def test_restarted_workers_answer_from_their_disks(self):
        text, cached, _ = self.ask(1)
        self.assertEqual(cached, 0)
        self.wait_stored(4)
        self.restart("prefill", "decode", signal_number=signal.SIGTERM)
        self.wait_on(("prefill",))
        again, cached, _ = self.ask(1)
        self.assertEqual(again, text)
        self.assertGreater(cached, 0)
        self.assertGreater(self.hits("prefill", "disk"), 0)
        # And the next one finds it in the host tier, with what had to be computed.
        once_more, more, _ = self.ask(1)
        self.assertEqual(once_more, text)
        self.assertGreaterEqual(more, cached)

    def test_killed_workers_answer_from_their_disks(self):
        text, _, _ = self.ask(2)
        self.wait_stored(4)
        self.restart("prefill", "decode", signal_number=signal.SIGKILL)
        self.wait_on(("prefill",))
        again, cached, _ = self.ask(2)
        self.assertEqual(again, text)
        self.assertGreater(cached, 0)

    def test_kills_at_any_moment_never_change_an_answer(self):
        expected = {seed: self.ask(seed)[0] for seed in range(10, 14)}
        for round_number in range(2):
            pid = self.serve.kill("prefill")
            self.serve.wait_restarted("prefill", pid)
            for seed, text in expected.items():
                with self.subTest(round=round_number, seed=seed):
                    self.assertEqual(self.ask(seed)[0], text)

    def wait_on(self, names):
        """Until the disk tiers are on again: they open by themselves, after the worker is ready."""
        for name in names:
            eventually(
                lambda name=name: total(self.serve.metrics(name), "tidepool_pool_objects", tier="disk") > 0,
                20,
                f"{name}'s disk tier is open",
            )


class FaultyDiskTest(PoolCase):
    def test_a_disk_that_is_removed_fails_no_request(self):
        expected = {seed: self.ask(seed)[0] for seed in range(20, 24)}
        self.wait_stored(4)
        shutil.rmtree(self.disk)
        for seed in list(expected) + list(range(24, 28)):
            text = self.ask(seed)[0]
            self.assertEqual(text, expected.get(seed, text))
        os.makedirs(self.disk, exist_ok=True)  # for the context's own removal

    def test_a_full_disk_fails_no_request(self):
        small = os.path.join(self.disk, "small")
        os.makedirs(small)
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            self.skipTest("no file system can be mounted here")
        self.addCleanup(subprocess.run, ["umount", "-l", small], check=False)
        with Serve(BINARY, EXACT, dict(self.env, TIDEPOOL_KV_DISK_PATH=small, TIDEPOOL_KV_LOAD=self.load)) as serve:
            for seed in range(30, 36):
                mine = serve.post_json("/v1/completions", completion(self.model, seed, tokens=24))
                self.assertEqual(mine["choices"][0]["text"], self.ask(seed)[0])

    def test_a_disk_that_is_no_directory_fails_no_request(self):
        path = os.path.join(self.disk, "file")
        with open(path, "w"):
            pass
        with Serve(BINARY, EXACT, dict(self.env, TIDEPOOL_KV_DISK_PATH=path)) as serve:
            mine = serve.post_json("/v1/completions", completion(self.model, 40, tokens=24))
            self.assertEqual(mine["choices"][0]["text"], self.ask(40)[0])


class SlowDiskTest(PoolCase):
    # Less than a block a second: next to nothing is stored, and nobody waits for it.
    env = {"TIDEPOOL_KV_DISK_WRITE_BYTES_PER_SECOND": "64KiB"}
    load = "auto"

    def test_a_disk_that_is_slow_to_write_holds_nobody_up(self):
        expected = {seed: self.ask(seed)[0] for seed in range(50, 56)}
        for seed, text in expected.items():
            self.assertEqual(self.ask(seed)[0], text)


class NextTurnTest(PoolCase):
    def test_the_answers_blocks_are_found_by_the_next_turns_prefill(self):
        body = {"model": self.model, "max_tokens": 80, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        prompt = self.serve.post_json("/tokenize", {"prompt": passage(60)})["tokens"]
        first = self.serve.post_json("/v1/completions", dict(body, prompt=prompt))
        answer = first["choices"][0]["token_ids"]
        self.assertEqual(len(answer), 80)

        def indexed():
            rows = {row["role"]: row["indexed_blocks"] for row in self.serve.ctl("kv")}
            return rows["decode"] >= len(prompt + answer[:-1]) // 32 - len(prompt) // 32

        eventually(indexed, 10, "the scheduler knows of the answer's blocks")
        second = prompt + answer + self.serve.post_json("/tokenize", {"prompt": passage(61)})["tokens"]
        reply = self.serve.post_json("/v1/completions", dict(body, prompt=second))
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.assertEqual(cached, len(prompt + answer[:-1]) // 32 * 32, "the prompt and the answer")
        # As if nothing had been there.
        fresh = self.serve.post_json("/v1/completions", dict(body, prompt=second, cache_salt="cold"))
        self.assertEqual(reply["choices"][0]["token_ids"], fresh["choices"][0]["token_ids"])


if __name__ == "__main__":
    unittest.main()
