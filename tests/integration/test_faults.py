"""Workers killed with -9 at several moments: the request ends in the right text or in a named error within its
deadline, and the next request works."""

import json
import threading
import time
import unittest

from support import EXACT, ServeCase, completion, text_of

# Of one request, restart of the worker included.
DEADLINE_SECONDS = 30
TOKENS = 200


class FaultTest(ServeCase):
    args = EXACT + ["--worker-prefill-timeout", "5s", "--gateway-request-timeout", "20s"]
    seeds = iter(range(100, 10_000))

    def setUp(self):
        # The answer without a fault; asking under another salt leaves the cache cold for the fault.
        self.seed = next(self.seeds)
        self.body = completion(self.model, self.seed, tokens=TOKENS)
        reference = dict(self.body, cache_salt="reference")
        self.expected = self.serve.post_json("/v1/completions", reference)["choices"][0]["text"]

    def run_with_kill(self, victim, when):
        """Streams the request; `when(stream_state)` decides when the victim dies. Returns the events."""
        killed = threading.Event()
        old = {}

        def kill():
            old["pid"] = self.serve.kill(victim)
            killed.set()

        started = time.monotonic()
        events = when(kill)
        self.assertLess(time.monotonic() - started, DEADLINE_SECONDS)
        self.assertTrue(killed.is_set())
        self.assert_right_or_named(events)
        self.serve.wait_restarted(victim, old["pid"])
        self.assert_next_works()

    def assert_right_or_named(self, events):
        errors = [event["error"] for event in events if event != "[DONE]" and "error" in event]
        if errors:
            self.assertTrue(errors[0]["code"] and errors[0]["message"], errors)
            # What was delivered before stays right: never retracted, repeated or skipped.
            self.assertTrue(self.expected.startswith(text_of(events)))
        else:
            self.assertEqual(text_of(events), self.expected)
            self.assertEqual(events[-1], "[DONE]")

    def assert_next_works(self):
        def right():
            status, _, reply = self.serve.post("/v1/completions", self.body, timeout=DEADLINE_SECONDS)
            if status == 200:
                self.assertEqual(reply["choices"][0]["text"], self.expected)
            # Until the restarted worker has registered, refusing with a name is right.
            elif status not in (429, 503):
                self.fail(f"HTTP {status}: {reply}")
            return status == 200

        deadline = time.monotonic() + 15
        while not right():
            self.assertLess(time.monotonic(), deadline, "no answer after the worker is back")
            time.sleep(0.1)

    def events_of(self, on_event=None):
        """Streams the request to its end; an HTTP error counts as an error event."""
        with self.serve.stream("/v1/completions", self.body, timeout=DEADLINE_SECONDS) as stream:
            if stream.status != 200:
                return [json.loads(stream.response.read())]
            events = []
            for event in stream:
                events.append(event)
                if on_event:
                    on_event(len(events))
            return events

    def after(self, seconds):
        def when(kill):
            timer = threading.Timer(seconds, kill)
            timer.start()
            events = self.events_of()
            timer.join()
            return events

        return when

    def at_event(self, number):
        def when(kill):
            return self.events_of(lambda count: kill() if count == number else None)

        return when

    def before(self, kill):
        kill()
        return self.events_of()

    def test_prefill_killed_before_the_request(self):
        self.run_with_kill("prefill", self.before)

    def test_prefill_killed_as_the_request_arrives(self):
        self.run_with_kill("prefill", self.after(0.001))

    def test_prefill_killed_while_it_computes(self):
        self.run_with_kill("prefill", self.after(0.010))

    def test_prefill_killed_around_the_handoff(self):
        self.run_with_kill("prefill", self.after(0.030))

    def test_prefill_killed_during_the_decode(self):
        self.run_with_kill("prefill", self.at_event(10))

    def test_decode_killed_before_the_request(self):
        self.run_with_kill("decode", self.before)

    def test_decode_killed_before_the_first_token(self):
        self.run_with_kill("decode", self.after(0.010))

    def test_decode_killed_in_the_middle_of_the_answer(self):
        self.run_with_kill("decode", self.at_event(10))

    def test_scheduler_killed_during_the_decode(self):
        self.run_with_kill("scheduler", self.at_event(10))


if __name__ == "__main__":
    unittest.main()
