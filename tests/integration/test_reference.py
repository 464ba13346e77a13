"""A trained model's greedy answers against a float64 reference computed elsewhere, through HTTP and the handoff."""

import unittest

from support import EXACT, ServeCase, stories, stories_reference

# Where the reference's two best tokens are closer than this, float32 may choose the other.
SAFE_GAP = 1e-3
# How far a logprob may be off where weights and KV are rounded; the reference rounds only the weights.
NARROW_TOLERANCE = {"float16": 0.01, "bfloat16": 0.15}


class Forms:
    """Not a test by itself: what every form of the checkpoint has in common."""

    form = ""

    @classmethod
    def setUpClass(cls):
        cls.args = ["--model", stories(cls.form), "--model-tokenizer", stories("hf"), "--model-name", "stories", *EXACT]
        super().setUpClass()
        cls.items = stories_reference()

    def generate(self, prompt, tokens, **fields):
        body = {"model": "stories", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
        body.update(fields)
        return self.serve.post_json("/v1/completions", body)

    def test_a_long_prompt_is_handed_over(self):
        item = max(self.items, key=lambda item: len(item["prompt_ids"]))
        # Under a salt of its own: nothing of it may be in a pool already.
        prompt = (item["prompt_ids"] * 10)[:200]
        trace = self.generate(prompt, 8, cache_salt="handoff", return_trace=True)["tidepool_trace"]
        self.assertNotEqual(trace["prefill_pid"], trace["decode_pid"])
        self.assertGreater(trace["fetched_blocks"], 0)


class Float32Forms(Forms):
    """float32 numbers: token by token as the reference says."""

    def assert_agrees(self, item, prompt):
        choice = self.generate(prompt, item["max_new_tokens"])["choices"][0]
        got, expected = choice["token_ids"], item["output_ids"]
        if item["min_top1_top2_gap"] < SAFE_GAP:
            self.assertEqual(got[:1], expected[:1])
            return
        # The stop token is not delivered; the reference lists it or not.
        self.assertEqual(got, expected[: len(got)])
        self.assertLessEqual(len(expected) - len(got), 1 if item["finish_reason"] == "stop" else 0)
        self.assertEqual(choice["finish_reason"], item["finish_reason"])

    def test_prompts_as_ids(self):
        for item in self.items:
            with self.subTest(item["prompt"][:40]):
                self.assert_agrees(item, item["prompt_ids"])

    def test_prompts_as_text(self):
        for item in self.items:
            with self.subTest(item["prompt"][:40]):
                self.assert_agrees(item, item["prompt"])


class Float32Test(Float32Forms, ServeCase):
    form = "hf"


class ShardedTest(Float32Forms, ServeCase):
    form = "hf-sharded"


class NarrowForms(Forms):
    """Rounded weights: the first token's five best, against a reference with the same weights."""

    narrow = ""

    def test_first_tokens_logprobs(self):
        for item in stories_reference(self.narrow):
            for as_text in (False, True):
                with self.subTest(item["prompt"][:40], as_text=as_text):
                    prompt = item["prompt"] if as_text else item["prompt_ids"]
                    choice = self.generate(prompt, 1, logprobs=5)["choices"][0]
                    # The last position's; the reference has one list for each prompt token.
                    expected = item["top5"][-1]
                    self.assertAlmostEqual(
                        choice["logprobs"]["token_logprobs"][0], expected[0][1], delta=NARROW_TOLERANCE[self.narrow]
                    )
                    clear = expected[0][1] - expected[1][1] > 2 * NARROW_TOLERANCE[self.narrow]
                    if clear:
                        self.assertEqual(choice["token_ids"], [expected[0][0]])


class Float16Test(NarrowForms, ServeCase):
    form = "hf-float16"
    narrow = "float16"


class BFloat16Test(NarrowForms, ServeCase):
    form = "hf-bfloat16"
    narrow = "bfloat16"


if __name__ == "__main__":
    unittest.main()
