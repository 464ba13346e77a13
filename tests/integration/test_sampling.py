"""Sampling parameters end to end: the same seed gives the same text whichever way a request takes."""

import concurrent.futures
import unittest

from sdk_support import needs
from support import EXACT, ServeCase, completion, passage, text_of
from test_clients import GrpcStubs

SEED = 20240


def sampled(model, number=1, **fields):
    """A request whose text depends on every draw."""
    body = {
        "model": model,
        "prompt": passage(number),
        "max_tokens": 24,
        "temperature": 1.2,
        "top_p": 0.97,
        "seed": SEED,
        "ignore_eos": True,
    }
    body.update(fields)
    return body


class SamplingCase(ServeCase):
    args = EXACT

    def ask(self, **fields):
        return self.serve.post_json("/v1/completions", sampled(self.model, **fields))

    def text(self, **fields):
        return self.ask(**fields)["choices"][0]["text"]


class SameSeedSameTextTest(SamplingCase):
    # So that the decode worker holds prompts itself instead of reading them where they were computed.
    env = {"TIDEPOOL_TRANSPORT_SHARE_ARENA": "false"}

    FORMS = {
        "plain": {},
        "cuts": {"top_k": 40, "min_p": 0.001, "typical_p": 0.95},
        "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        "bias": {"logit_bias": {"5": 3, "9": -100}, "bad_words": ["the"], "min_tokens": 10},
    }

    def test_aggregated_or_disaggregated(self):
        for name, fields in self.FORMS.items():
            with self.subTest(name):
                # Nothing of it in any pool: handed over. Then the prompt sits on the decode worker.
                apart = self.ask(cache_salt="one " + name, return_trace=True, **fields)
                trace = apart["tidepool_trace"]
                self.assertNotEqual(trace["prefill_pid"], trace["decode_pid"])
                here = self.ask(cache_salt="one " + name, return_trace=True, **fields)
                self.assertEqual(here["tidepool_trace"]["prefill_pid"], here["tidepool_trace"]["decode_pid"])
                # And once computed on the decode worker from the first token on.
                scored = self.ask(cache_salt="two " + name, prompt_logprobs=0, **fields)
                texts = [reply["choices"][0]["text"] for reply in (apart, here, scored)]
                self.assertEqual(texts[0], texts[1])
                self.assertEqual(texts[0], texts[2])

    def test_alone_or_in_a_busy_batch(self):
        alone = {name: self.text(**fields) for name, fields in self.FORMS.items()}
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            others = [
                pool.submit(self.serve.post_json, "/v1/completions", completion(self.model, 100 + i, tokens=96))
                for i in range(12)
            ]
            busy = {name: pool.submit(self.text, **fields) for name, fields in self.FORMS.items()}
            for name, text in busy.items():
                self.assertEqual(text.result(), alone[name], name)
            for other in others:
                other.result()

    def test_streamed_or_not(self):
        for name, fields in self.FORMS.items():
            with self.subTest(name), self.serve.stream("/v1/completions", sampled(self.model, **fields)) as stream:
                self.assertEqual(text_of(stream), self.text(**fields))

    def test_another_seed_is_another_text(self):
        texts = {self.text(seed=SEED + i) for i in range(4)}
        self.assertEqual(len(texts), 4)
        # Two may be equal by chance, all of them not.
        unseeded = {self.text(seed=None) for _ in range(8)}
        self.assertGreater(len(unseeded), 2)


class ParametersTest(SamplingCase):
    def test_choices_are_single_requests_with_neighbouring_seeds(self):
        reply = self.ask(n=3, cache_salt="n")
        texts = [choice["text"] for choice in reply["choices"]]
        self.assertEqual([choice["index"] for choice in reply["choices"]], [0, 1, 2])
        self.assertEqual(len(set(texts)), 3)
        self.assertEqual(texts, [self.text(seed=SEED + i) for i in range(3)])
        self.assertEqual(reply["usage"]["completion_tokens"], 72)

    def test_choices_share_the_prefill(self):
        before = self.prefill_tokens()
        reply = self.ask(n=4, cache_salt="shared")
        prompt = reply["usage"]["prompt_tokens"]
        computed = self.prefill_tokens() - before
        # The prompt once, and at most the last block of it again for each other choice.
        self.assertLess(computed, prompt + 4 * 33)

    def prefill_tokens(self):
        total = 0
        for process in self.serve.children():
            for name, series in self.serve.metrics(process).items():
                if name == "tidepool_engine_computed_tokens_total":
                    total += sum(value for labels, value in series.items() if ("kind", "prefill") in labels)
        return total

    def test_streamed_choices_equal_the_whole(self):
        whole = {c["index"]: c["text"] for c in self.ask(n=3)["choices"]}
        body = sampled(self.model, n=3, stream_options={"include_usage": True})
        texts, reasons, usages = {}, {}, []
        with self.serve.stream("/v1/completions", body) as stream:
            events = list(stream)
        self.assertEqual(events[-1], "[DONE]")
        for event in events[:-1]:
            if event.get("usage"):
                usages.append(event["usage"])
            for choice in event["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                if choice["finish_reason"]:
                    reasons[choice["index"]] = choice["finish_reason"]
        self.assertEqual(texts, whole)
        self.assertEqual(reasons, {0: "length", 1: "length", 2: "length"})
        self.assertEqual([usage["completion_tokens"] for usage in usages], [72])

    def test_best_of_gives_the_likeliest(self):
        def mean(choice):
            logprobs = choice["logprobs"]["token_logprobs"]
            return sum(logprobs) / len(logprobs)

        every = self.ask(n=4, logprobs=0)["choices"]
        best = self.ask(n=2, best_of=4, logprobs=0)
        every.sort(key=mean, reverse=True)
        self.assertEqual([c["text"] for c in best["choices"]], [c["text"] for c in every[:2]])
        self.assertEqual(best["usage"]["completion_tokens"], 4 * 24)

    def test_stop_strings_do_not_leak(self):
        text = self.text(max_tokens=48)
        self.assertGreater(len(text), 12)
        stop = text[7:11]
        expected = text[: text.index(stop)]
        reply = self.ask(max_tokens=48, stop=[stop])["choices"][0]
        self.assertEqual((reply["text"], reply["finish_reason"], reply["stop_reason"]), (expected, "stop", stop))
        seen = ""
        with self.serve.stream("/v1/completions", sampled(self.model, max_tokens=48, stop=[stop])) as stream:
            for event in stream:
                if event != "[DONE]":
                    seen += "".join(choice["text"] for choice in event["choices"])
                    self.assertTrue(expected.startswith(seen), seen)
        self.assertEqual(seen, expected)

    def test_logprobs_are_the_same_streamed(self):
        whole = self.ask(logprobs=5)["choices"][0]["logprobs"]
        parts = {key: [] for key in whole}
        with self.serve.stream("/v1/completions", sampled(self.model, logprobs=5)) as stream:
            for event in stream:
                if event == "[DONE]":
                    continue
                for choice in event["choices"]:
                    for key, values in (choice["logprobs"] or {}).items():
                        parts[key] += values
        self.assertEqual(parts, whole)
        self.assertEqual(len(whole["tokens"]), 24)
        for top in whole["top_logprobs"]:
            self.assertIn(len(top), (5, 6))

    def test_echo_scores_the_prompt(self):
        reply = self.ask(echo=True, logprobs=2, return_token_ids=True, max_tokens=4)
        choice, prompt = reply["choices"][0], passage(1)
        self.assertTrue(choice["text"].startswith(prompt))
        logprobs = choice["logprobs"]
        ids = reply["prompt_token_ids"]
        self.assertEqual(len(logprobs["tokens"]), len(ids) + 4)
        self.assertIsNone(logprobs["token_logprobs"][0])
        self.assertIsNone(logprobs["top_logprobs"][0])
        for logprob, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:]):
            self.assertLessEqual(logprob, 0)
            self.assertIn(logprob, top.values())
        # Any one is what the model says of that token where the prompt ends before it.
        at = len(ids) // 2
        forced = self.serve.post_json(
            "/v1/completions",
            {"model": self.model, "prompt": ids[:at], "max_tokens": 1, "logprobs": 0, "allowed_token_ids": [ids[at]]},
        )["choices"][0]
        self.assertEqual(forced["logprobs"]["token_logprobs"][0], logprobs["token_logprobs"][at])
        # The prompt alone.
        alone = self.ask(echo=True, logprobs=2, max_tokens=0)
        self.assertEqual(alone["choices"][0]["text"], prompt)
        self.assertEqual(alone["choices"][0]["logprobs"]["token_logprobs"], logprobs["token_logprobs"][: len(ids)])
        self.assertEqual(alone["usage"]["completion_tokens"], 0)

    def test_prompt_logprobs_of_a_chat(self):
        body = {"model": self.model, "messages": [{"role": "user", "content": passage(3)}], "max_tokens": 2}
        reply = self.serve.post_json("/v1/chat/completions", dict(body, prompt_logprobs=3))
        self.assertEqual(len(reply["prompt_logprobs"]), reply["usage"]["prompt_tokens"])
        self.assertIsNone(reply["prompt_logprobs"][0])
        for scores in reply["prompt_logprobs"][1:]:
            self.assertIn(len(scores), (3, 4))
            ranks = sorted(score["rank"] for score in scores.values())
            self.assertEqual(ranks[:3], [1, 2, 3])

    def test_bad_words_allowed_ids_and_bias_hold(self):
        ids = self.ask(return_token_ids=True, temperature=0)["choices"][0]["token_ids"]
        first = ids[0]
        banned = self.ask(return_token_ids=True, temperature=0, logit_bias={str(first): -100})
        self.assertNotIn(first, banned["choices"][0]["token_ids"])
        wanted = self.ask(return_token_ids=True, temperature=0, logit_bias={"7": 100}, max_tokens=3)
        self.assertEqual(wanted["choices"][0]["token_ids"], [7, 7, 7])
        allowed = self.ask(return_token_ids=True, allowed_token_ids=[3, 5, 8])["choices"][0]["token_ids"]
        self.assertLessEqual(set(allowed), {3, 5, 8})
        word = next(w for w in self.text(temperature=0).split() if w.isalpha())
        self.assertNotIn(word, self.text(temperature=0, bad_words=[word]).split())

    def test_every_bad_value_names_its_field(self):
        bad = {
            "temperature": [-1, 2.5, "1", []],
            "top_k": [-2, 1.5],
            "top_p": [0, 1.1],
            "min_p": [-0.1, 1.1],
            "typical_p": [0, 2],
            "repetition_penalty": [0, -1, 1000],
            "presence_penalty": [-2.1, 3],
            "frequency_penalty": [-2.1, 3],
            "logit_bias": [[], {"5": 101}, {"x": 1}, {"123456789": 1}],
            "seed": [1.5, "x"],
            "min_tokens": [-1, 25],
            "max_tokens": [0, -1, 1 << 30],
            "stop": [5, ["a"] * 5, [""]],
            "stop_token_ids": ["x", [-1], [123456789]],
            "include_stop_str_in_output": [1],
            "ignore_eos": ["yes"],
            "bad_words": ["x", [1], [""]],
            "allowed_token_ids": [[], [-1], [123456789]],
            "n": [0, 17, "2"],
            "best_of": [0, 17],
            "logprobs": [-1, 21],
            "prompt_logprobs": [-1, 21],
            "echo": ["yes"],
            "tools": [[{"type": "function"}]],
            "response_format": ["text", {"kind": "json_object"}],
        }
        for field, values in bad.items():
            for value in values:
                with self.subTest(field=field, value=value):
                    status, _, reply = self.serve.post("/v1/completions", sampled(self.model, **{field: value}))
                    self.assertEqual(status, 400, reply)
                    self.assertEqual(reply["error"]["param"], field)
                    self.assertIn(field, reply["error"]["message"])


@needs("openai")
class OpenAiClientTest(SamplingCase):
    def client(self):
        import openai

        return openai.OpenAI(base_url=f"http://{self.serve.http}/v1", api_key="none", timeout=60, max_retries=0)

    def test_chat_with_everything_of_openais(self):
        reply = self.client().chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": passage(2)}],
            max_completion_tokens=12,
            n=2,
            seed=5,
            temperature=0.9,
            top_p=0.95,
            presence_penalty=0.4,
            frequency_penalty=-0.4,
            logit_bias={"4": 1},
            logprobs=True,
            top_logprobs=3,
            stop=["\n\n\n"],
        )
        self.assertEqual([choice.index for choice in reply.choices], [0, 1])
        for choice in reply.choices:
            for token in choice.logprobs.content:
                self.assertEqual(len(token.top_logprobs), 3)

    def test_completion_with_everything_of_openais(self):
        body = sampled(self.model, n=2, best_of=3, logprobs=1, echo=True, max_tokens=8)
        body["extra_body"] = {"ignore_eos": body.pop("ignore_eos"), "min_p": 0.01, "prompt_logprobs": 1}
        reply = self.client().completions.create(**body)
        self.assertEqual(len(reply.choices), 2)
        self.assertIsNone(reply.choices[0].logprobs.token_logprobs[0])
        self.assertEqual(reply.usage.completion_tokens, 24)


@needs("grpc_tools")
class GrpcTest(GrpcStubs, SamplingCase):
    def generate(self, sampling, **fields):
        request = self.pb.GenerateRequest(
            model=self.model,
            text=passage(1),
            max_tokens=24,
            ignore_eos=True,
            sampling=self.pb.SamplingParams(temperature=1.2, top_p=0.97, seed=SEED, **sampling),
            **fields,
        )
        texts, tokens, logprobs = {}, {}, {}
        for event in self.stub().Generate(request, timeout=60):
            texts[event.index] = texts.get(event.index, "") + event.text
            tokens.setdefault(event.index, []).extend(event.token_ids)
            logprobs.setdefault(event.index, []).extend(score.logprob for score in event.logprobs)
        return texts, tokens, logprobs

    def test_the_text_is_that_of_http(self):
        for fields in (
            {},
            {"top_k": 30, "min_p": 0.001, "typical_p": 0.9},
            {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25},
            {"bad_words": ["the"], "allowed_token_ids": list(range(3, 400))},
        ):
            with self.subTest(fields):
                self.assertEqual(self.generate(fields)[0], {0: self.text(**fields)})
        bias = self.generate({"logit_bias": {5: 3.0}})[0]
        self.assertEqual(bias, {0: self.text(logit_bias={"5": 3})})

    def test_choices_and_logprobs_are_those_of_http(self):
        texts, tokens, logprobs = self.generate({}, n=2, logprobs=1)
        choices = self.ask(n=2, logprobs=1)["choices"]
        self.assertEqual(texts, {c["index"]: c["text"] for c in choices})
        for choice in choices:
            self.assertEqual(len(tokens[choice["index"]]), 24)
            for got, expected in zip(logprobs[choice["index"]], choice["logprobs"]["token_logprobs"]):
                self.assertAlmostEqual(got, expected, places=5)


if __name__ == "__main__":
    unittest.main()
