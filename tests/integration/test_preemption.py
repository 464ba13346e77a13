"""KV slots for one long answer and a little more: what goes first gets them, what gives way ends all the same."""

import concurrent.futures
import unittest

from harness import eventually
from support import EXACT, ServeCase, completion, text_of

# Blocks of the built-in model are 64 KiB: 80 of them. A long request takes 61, a short one 17.
LONG = {"tokens": 1600, "priority": 5}
SHORT = {"tokens": 200, "priority": 0}


class PreemptionTest(ServeCase):
    args = EXACT
    env = {"TIDEPOOL_KV_HOST_BYTES": "5MiB"}

    def preemptions(self):
        return sum(self.serve.metrics("decode")["tidepool_engine_preemptions_total"].values())

    def stream(self, seed, **fields):
        """The text of an answer and whether it came whole."""
        with self.serve.stream("/v1/completions", completion(self.model, seed, **fields), timeout=120) as stream:
            self.assertEqual(stream.status, 200)
            events = list(stream)
        for event in events:
            self.assertNotIn("error", event)
        self.assertEqual(events[-1], "[DONE]")
        return text_of(events)

    def test_a_lower_priority_gives_way_and_every_answer_is_the_same(self):
        alone = {seed: self.stream(seed, **(LONG if seed < 2 else SHORT)) for seed in range(6)}
        before = self.preemptions()
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            # On a busy machine the short ones may come when the long ones have ended.
            for _ in range(30):
                running = {seed: pool.submit(self.stream, seed, **LONG) for seed in range(2)}
                eventually(
                    lambda: any(future.done() for future in running.values())
                    or any(worker["running"] for worker in self.serve.ctl("workers")),
                    60,
                    "a long request runs",
                )
                running |= {seed: pool.submit(self.stream, seed, **SHORT) for seed in range(2, 6)}
                for seed, future in running.items():
                    self.assertEqual(future.result(120), alone[seed], f"request {seed}")
                if self.preemptions() > before:
                    break
        self.assertGreater(self.preemptions(), before)
        self.at_rest()

    def at_rest(self):
        def held():
            return [pool for pool in self.serve.ctl("kv") if pool["slots_leased"] or pool["offers"]]

        eventually(lambda: not held(), 60, "all slots are given back")
        leases = self.serve.metrics("decode")["tidepool_pool_leases"]
        self.assertEqual(sum(leases.values()), 0, leases)


class RecomputeTest(PreemptionTest):
    env = {"TIDEPOOL_KV_HOST_BYTES": "5MiB", "TIDEPOOL_ENGINE_PREEMPTION": "recompute"}

    def test_what_is_kept_is_what_was_asked_for(self):
        counts = self.serve.metrics("decode")["tidepool_engine_preemptions_total"]
        swapped = sum(value for labels, value in counts.items() if ("how", "swap") in labels)
        self.assertEqual(swapped, 0)


if __name__ == "__main__":
    unittest.main()
