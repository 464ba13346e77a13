"""The OpenAI-compatible surface as curl and plain HTTP clients see it."""

import json
import shutil
import subprocess
import tempfile
import unittest

from support import ServeCase, chat, completion, text_of


class HttpTest(ServeCase):
    def test_curl_gets_a_chat_answer(self):
        if shutil.which("curl") is None:
            self.skipTest("curl is not installed")
        done = subprocess.run(
            ["curl", "-sS", "--fail-with-body", "--max-time", "30", f"http://{self.serve.http}/v1/chat/completions"]
            + ["-H", "Content-Type: application/json", "-d", json.dumps(chat(self.model, 1))],
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        reply = json.loads(done.stdout)
        self.assertEqual(reply["object"], "chat.completion")
        self.assertTrue(reply["choices"][0]["message"]["content"])
        self.assertIn(reply["choices"][0]["finish_reason"], ("stop", "length"))

    def test_the_stream_says_what_the_whole_answer_says(self):
        whole = self.serve.post_json("/v1/completions", completion(self.model, 2))
        with self.serve.stream("/v1/completions", completion(self.model, 2)) as stream:
            self.assertEqual(stream.status, 200)
            events = list(stream)
        self.assertEqual(events[-1], "[DONE]")
        self.assertEqual(text_of(events), whole["choices"][0]["text"])
        self.assertEqual(len({event["id"] for event in events[:-1]}), 1)

    def test_prefill_and_decode_run_in_different_processes(self):
        trace = self.serve.post_json("/v1/chat/completions", chat(self.model, 3, return_trace=True))["tidepool_trace"]
        children = self.serve.children()
        self.assertEqual(trace["prefill_pid"], children["prefill"]["pid"])
        self.assertEqual(trace["decode_pid"], children["decode"]["pid"])
        self.assertGreater(trace["fetched_blocks"], 0)
        self.assertGreater(trace["fetched_bytes"], 0)

    def test_the_second_turn_reuses_the_first(self):
        first = chat(self.model, 4)
        reply = self.serve.post_json("/v1/chat/completions", first)
        self.assertEqual(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 0)
        second = dict(first)
        second["messages"] = first["messages"] + [
            {"role": "assistant", "content": reply["choices"][0]["message"]["content"]},
            {"role": "user", "content": "What is the code of the red door?"},
        ]
        usage = self.serve.post_json("/v1/chat/completions", second)["usage"]
        self.assertGreater(usage["prompt_tokens_details"]["cached_tokens"], 0)
        self.assertLess(usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"])

    def test_a_repeated_prompt_gives_the_same_answer_from_the_cache(self):
        cold = self.serve.post_json("/v1/completions", completion(self.model, 5))
        warm = self.serve.post_json("/v1/completions", completion(self.model, 5))
        self.assertEqual(cold["choices"][0]["text"], warm["choices"][0]["text"])
        self.assertGreater(warm["usage"]["prompt_tokens_details"]["cached_tokens"], 0)

    def test_bad_requests_name_the_field(self):
        for field, value in [("max_tokens", 0), ("temperature", -1), ("top_p", 2), ("stop", [1])]:
            status, _, reply = self.serve.post("/v1/completions", completion(self.model, 6, **{field: value}))
            self.assertEqual(status, 400, field)
            self.assertEqual(reply["error"]["param"], field)
        status, _, reply = self.serve.post("/v1/completions", completion("no-such-model", 6))
        self.assertEqual((status, reply["error"]["code"]), (404, "model_not_found"))

    def test_a_prompt_beyond_the_context_is_refused(self):
        body = completion(self.model, 7, prompt="word " * 20000)
        status, _, reply = self.serve.post("/v1/completions", body)
        self.assertEqual((status, reply["error"]["code"]), (400, "context_length_exceeded"))

    def test_tokenize_and_detokenize_are_inverse(self):
        ids = self.serve.post_json("/tokenize", {"model": self.model, "prompt": "The blue door.", "add_special_tokens": False})
        text = self.serve.post_json("/detokenize", {"model": self.model, "tokens": ids["tokens"]})
        self.assertEqual(text["prompt"], "The blue door.")

    def test_health_answers(self):
        for path in ("/livez", "/readyz", "/health"):
            self.assertEqual(self.serve.get(path)[0], 200, path)


class CtlTest(ServeCase):
    def test_status_finds_the_running_serve_by_itself(self):
        status = self.serve.ctl("status")
        self.assertEqual(status["model"], self.model)
        self.assertEqual(status["workers"], {"prefill ready": 1, "decode ready": 1})
        self.assertEqual({process["state"] for process in status["processes"]}, {"ready"})

    def test_workers_and_kv_show_the_pools(self):
        self.assertEqual({worker["role"] for worker in self.serve.ctl("workers")}, {"prefill", "decode"})
        for pool in self.serve.ctl("kv"):
            self.assertGreater(pool["slots_total"], 0)
            self.assertEqual(pool["slots_quarantined"], 0)

    def test_route_explain_names_candidates(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({"prompt_tokens": 512, "max_tokens": 16}, file)
            file.flush()
            explained = self.serve.ctl("route", "explain", file.name)
        self.assertFalse(explained["rejected"])
        self.assertTrue(any(candidate["chosen"] for candidate in explained["candidates"]))


if __name__ == "__main__":
    unittest.main()
