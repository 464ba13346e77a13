"""The pool's control API, with real processes: prefill, decode and a store under `tidepool serve`."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest

from harness import Serve, eventually
from support import BINARY, EXACT, ROOT, ServeCase, chat, completion

HERE = os.path.dirname(os.path.abspath(__file__))


class KvCase(ServeCase):
    """One `tidepool serve` with a store that takes over everything, and a disk tier in each process."""

    @classmethod
    def setUpClass(cls):
        disk = cls.enterClassContext(tempfile.TemporaryDirectory(prefix="tidepool-kv-"))
        cls.args = [
            *EXACT,
            "--serve-store",
            "true",
            "--store-follow",
            "all",
            "--kv-host-bytes",
            "64MiB",
            "--kv-disk-path",
            disk,
            "--kv-disk-bytes",
            "64MiB",
        ]
        super().setUpClass()
        cls.workers = {row["role"]: row["worker"] for row in cls.serve.ctl("workers")}

    def ask(self, seed, **fields):
        return self.serve.post_json("/v1/chat/completions", chat(self.model, seed, return_trace=True, **fields))

    def rows(self, *args):
        return self.serve.ctl("kv", *args)

    def keys_on(self, role, *selector):
        rows = self.rows("where", "--worker", self.workers[role], *(selector or ("--tenant", "default")))
        return [row["key"] for row in sorted(rows, key=lambda row: row["position"])]

    def host_keys(self, role):
        rows = self.rows("where", "--worker", self.workers[role], "--tenant", "default")
        return {row["key"] for row in rows if "host" in row["tiers"]}

    def fails(self, *args):
        env = dict(os.environ, XDG_RUNTIME_DIR=self.serve.dir)
        done = subprocess.run([BINARY, "ctl", *args], env=env, capture_output=True, text=True, timeout=30)
        self.assertNotEqual(done.returncode, 0, args)
        return done.returncode, done.stderr


class StoreTest(KvCase):
    def test_store_registers_as_a_holder_and_takes_over_what_workers_compute(self):
        self.assertEqual(set(self.workers), {"prefill", "decode", "store"})
        before = len(self.host_keys("store"))
        answer = self.ask(1)
        self.assertNotIn(self.workers["store"], answer["tidepool_trace"].values(), "a store computes nothing")
        computed = self.host_keys("prefill")
        self.assertTrue(computed)
        eventually(lambda: computed <= set(self.keys_on("store")), 20, "the store has the prompt's blocks")
        self.assertGreater(len(self.keys_on("store")), before)

    def test_prefix_that_only_the_store_holds_is_fetched_and_answers_the_same(self):
        first = self.ask(2)
        wanted = self.host_keys("prefill")
        eventually(lambda: wanted <= set(self.keys_on("store")), 20, "the store has the prompt's blocks")
        for role in ("prefill", "decode"):
            self.rows("clear", "--all", "--worker", self.workers[role])
            self.assertEqual(self.keys_on(role), [])

        def indexed():
            rows = {row["worker"]: row for row in self.rows()}
            return all(rows[self.workers[role]]["indexed_blocks"] == 0 for role in ("prefill", "decode"))

        eventually(indexed, 5, "the scheduler knows that the workers hold nothing")
        again = self.ask(2)
        self.assertEqual(again["choices"][0]["message"]["content"], first["choices"][0]["message"]["content"])
        prompt = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        if prompt == 0:
            # Computing it anew was predicted to be faster than the link: allowed, and then nothing is fetched.
            self.skipTest("the model is so small that recomputing wins")
        self.assertGreater(again["tidepool_trace"]["fetched_blocks"], 0)


class ControlTest(KvCase):
    def test_lookup_where_and_stats_agree(self):
        self.ask(11)
        keys = self.keys_on("prefill")
        rows = {row["worker"]: row for row in self.rows("lookup", "--keys", ",".join(keys[:1]))}
        self.assertEqual(rows[self.workers["prefill"]]["blocks"], 1)
        self.assertEqual(set(rows), set(self.workers.values()))
        stats = {row["worker"]: row for row in self.rows("stats")}
        mine = stats[self.workers["prefill"]]
        self.assertEqual(mine["disk"], "on")
        self.assertGreaterEqual(mine["host_blocks"], 1)
        self.assertEqual(stats[self.workers["store"]]["role"], "store")

    def test_session_of_a_request_marks_its_blocks(self):
        body = chat(self.model, 12)
        status, _, _ = self.serve.post("/v1/chat/completions", body, headers={"X-Session-Id": "porch"})
        self.assertEqual(status, 200)
        sessions = {row["session"] for row in self.rows("where", "--worker", self.workers["prefill"], "--all")}
        sessions.discard(0)
        self.assertEqual(len(sessions), 1)
        session = str(sessions.pop())
        self.assertTrue(self.rows("where", "--session", session))
        # By the body's name it is the same session.
        self.serve.post_json("/v1/chat/completions", chat(self.model, 13, prompt_cache_key="porch"))
        turns = self.rows("where", "--worker", self.workers["prefill"], "--session", session)
        self.assertGreater(len(turns), 0)
        pinned = self.rows("pin", "--session", session, "--ttl", "1m", "--hard")
        self.assertGreater(sum(row["pinned"] for row in pinned), 0)
        evicted = self.rows("evict", "--session", session, "--worker", self.workers["prefill"])
        self.assertGreater(evicted[0]["skipped"], 0)
        unpinned = self.rows("unpin", "--session", session)
        self.assertGreater(sum(row["unpinned"] for row in unpinned), 0)
        cleared = self.rows("clear", "--session", session)
        self.assertGreater(sum(row["done"] for row in cleared), 0)
        self.assertEqual(self.rows("where", "--session", session), [])

    def test_blocks_are_copied_moved_to_disk_and_brought_back(self):
        self.ask(14)
        source, target = self.workers["prefill"], self.workers["decode"]
        keys = self.keys_on("prefill")
        listing = "\n".join(keys)
        self.rows("evict", "--all", "--worker", target)
        with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
            file.write(listing)
            file.flush()
            copied = self.rows("copy", "--keys-file", file.name, "--from", source, "--to", target)[0]
            self.assertEqual(copied["done"], len(keys), copied)
            self.assertEqual(copied["skipped"], 0)
            self.assertLessEqual(set(keys), self.host_keys("decode"))
            moved = self.rows("move", "--keys-file", file.name, "--to-disk", "--worker", target)[0]
            self.assertEqual(moved["done"], len(keys), moved)
            self.assertFalse(set(keys) & self.host_keys("decode"))
            back = self.rows("prefetch", "--keys-file", file.name, "--worker", target)[0]
            self.assertEqual(back["done"], len(keys), back)
            self.assertLessEqual(set(keys), self.host_keys("decode"))
            # From whoever has them, to one that has not.
            self.rows("evict", "--all", "--disk", "--worker", target)

            def unindexed():
                rows = {row["worker"]: row for row in self.rows()}
                return rows[target]["indexed_blocks"] == 0

            eventually(unindexed, 5, "the scheduler knows that they are gone")
            replicated = self.rows("copy", "--keys-file", file.name, "--to", target)[0]
            self.assertEqual(replicated["done"], len(keys), replicated)

    def test_events_are_numbered_and_replayed(self):
        self.ask(15)
        worker = self.workers["prefill"]
        env = dict(os.environ, XDG_RUNTIME_DIR=self.serve.dir)
        lines = subprocess.run(
            [BINARY, "ctl", "kv", "events", "--worker", worker, "--from", "1", "--count", "3", "-o", "json"],
            env=env,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.splitlines()
        events = [json.loads(line) for line in lines]
        self.assertEqual([event["seq"] for event in events], [1, 2, 3])
        self.assertEqual(events[0]["event"], "stored")

    def test_errors_name_what_is_wrong(self):
        for args, text in [
            (("kv", "where"), "no blocks are named"),
            (("kv", "where", "--keys", "12"), "64 hex digits"),
            (("kv", "clear", "--all", "--tenant", "x"), "several ways"),
            (("kv", "pin", "--session", "1", "--ttl", "soon"), "--ttl 'soon'"),
            (("kv", "pin", "--session", "1", "--ttl", "48h"), "ttl_seconds"),
            (("kv", "stats", "--worker", "nobody"), "no worker 'nobody'"),
            (("kv", "events"), "--worker is needed"),
            (("kv", "copy", "--keys", "00" * 32), "say where to"),
            (("kv", "move", "--session", "7"), "from where to where"),
        ]:
            code, stderr = self.fails(*args)
            self.assertIn(text, stderr, args)
            self.assertIn(code, (1, 2), args)

    @unittest.skipUnless(importlib.util.find_spec("grpc_tools"), "grpcio-tools is not installed")
    def test_outside_router_follows_from_where_it_was(self):
        self.ask(16)
        with open(os.path.join(self.serve.dir, "tidepool", f"serve-{self.serve.process.pid}.json")) as file:
            token = json.load(file)["token"]
        address = next(row["grpc"] for row in self.serve.ctl("workers") if row["role"] == "prefill")
        blocks = len(self.keys_on("prefill"))
        command = [sys.executable, os.path.join(HERE, "kv_events_consumer.py"), address, os.path.join(ROOT, "proto")]

        def follow(*args):
            done = subprocess.run(
                [*command, "--token", token, *args], capture_output=True, text=True, timeout=60, check=True
            )
            return [json.loads(line) for line in done.stdout.splitlines()]

        first = follow("--until", str(blocks))
        self.assertTrue(first[0]["snapshot"])
        self.assertEqual(first[-1]["blocks"], blocks)
        self.ask(17)
        second = follow("--until", "1", "--resume", f"{first[-1]['next_seq']},{first[-1]['boot']}")
        self.assertFalse(second[0]["snapshot"], "it goes on, without a snapshot")
        # Another process's numbers are answered with a snapshot.
        third = follow("--until", "1", "--resume", f"{first[-1]['next_seq']},another")
        self.assertTrue(third[0]["snapshot"])


class EvacuationTest(unittest.TestCase):
    def test_drained_worker_leaves_its_blocks_with_others(self):
        with Serve(BINARY, [*EXACT, "--serve-store", "true", "--store-follow", "none"]) as serve:
            workers = {row["role"]: row["worker"] for row in serve.ctl("workers")}
            # Long enough to seal blocks of its own, of which the prefill worker knows nothing.
            serve.post_json("/v1/completions", completion(serve.model(), 21, tokens=100))
            held = {row["key"] for row in serve.ctl("kv", "where", "--worker", workers["decode"], "--all")}
            alone = held - {row["key"] for row in serve.ctl("kv", "where", "--worker", workers["prefill"], "--all")}
            self.assertTrue(alone, "the answer's blocks are on the decode worker only")

            def indexed():
                rows = {row["worker"]: row for row in serve.ctl("kv")}
                return rows[workers["decode"]]["indexed_blocks"] == len(held)

            eventually(indexed, 5, "the scheduler knows of them")
            env = dict(os.environ, XDG_RUNTIME_DIR=serve.dir)
            done = subprocess.run(
                [BINARY, "ctl", "drain", workers["decode"], "--evacuate"],
                env=env,
                capture_output=True,
                text=True,
                timeout=60,
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(f"{len(alone)} of {len(alone)} blocks copied", done.stdout)
            stored = {row["key"] for row in serve.ctl("kv", "where", "--worker", workers["store"], "--all")}
            self.assertLessEqual(alone, stored)
            states = {row["role"]: row["state"] for row in serve.ctl("workers")}
            eventually(
                lambda: {row["role"]: row["state"] for row in serve.ctl("workers")}["decode"] == "draining",
                5,
                f"decode drains: {states}",
            )


if __name__ == "__main__":
    unittest.main()
