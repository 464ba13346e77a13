"""Clients that leave: every holder gives back what it held."""

import concurrent.futures
import random
import unittest

from harness import eventually
from support import ServeCase, completion

REQUESTS = 500
CANCELLED = 0.3


class CancelTest(ServeCase):
    def held(self):
        """What a cluster at rest does not hold, by name; only what is not zero."""
        out = {}
        for pool in self.serve.ctl("kv"):
            for key in ("slots_leased", "slots_quarantined", "offers"):
                out[f"{pool['role']} {key}"] = pool[key]
        for worker in self.serve.ctl("workers"):
            for key in ("running", "waiting", "queued_prefill_tokens"):
                out[f"{worker['role']} {key}"] = worker[key]
        for process, names in {
            "gateway": ["tidepool_requests_running"],
            "scheduler": ["tidepool_scheduler_inflight_requests"],
            "prefill": ["tidepool_worker_requests_active", "tidepool_requests_waiting", "tidepool_worker_slot_queue_length"],
            "decode": ["tidepool_worker_requests_active", "tidepool_requests_waiting", "tidepool_worker_slot_queue_length"],
        }.items():
            metrics = self.serve.metrics(process)
            for name in names:
                self.assertIn(name, metrics)
                out[f"{process} {name}"] = sum(metrics[name].values())
        return {name: value for name, value in out.items() if value != 0}

    def one(self, number):
        rng = random.Random(number)
        body = completion(self.model, number % 40, tokens=rng.randint(4, 48))
        cancel = rng.random() < CANCELLED
        # Somewhere between the head and the last token.
        leave_after = rng.randint(0, body["max_tokens"]) if cancel else None
        with self.serve.stream("/v1/completions", body, timeout=120) as stream:
            if stream.status != 200:
                return f"HTTP {stream.status}"
            events = 0
            last = None
            if leave_after == 0:
                return "cancelled"
            for event in stream:
                events += 1
                last = event
                if event != "[DONE]" and "error" in event:
                    return event["error"]["code"]
                if events == leave_after:
                    return "cancelled"
            return "done" if last == "[DONE]" else "cut"

    def test_everything_is_given_back_after_random_cancels(self):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            outcomes = list(pool.map(self.one, range(REQUESTS)))
        counts = {outcome: outcomes.count(outcome) for outcome in set(outcomes)}
        self.assertEqual(set(counts), {"done", "cancelled"}, counts)
        self.assertGreater(counts["cancelled"], REQUESTS * CANCELLED / 2)
        try:
            eventually(lambda: not self.held(), 45, "nothing is held")
        except AssertionError:
            self.fail(f"still held: {self.held()}")


if __name__ == "__main__":
    unittest.main()
