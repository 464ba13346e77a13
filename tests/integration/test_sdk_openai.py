"""The official openai client: chats, completions, models, embeddings, errors, headers; synchronous and not."""

import asyncio
import base64
import concurrent.futures
import hashlib
import json
import math
import os
import struct
import tempfile
import unittest

from harness import Serve
from sdk_support import FACT, QUESTION, OpenAiCase, needs, openai_client, spelled
from support import BINARY, ServeCase, chat, completion


def ask(model, *texts, **fields):
    messages = [{"role": "user", "content": f"{FACT} {QUESTION}"}] if not texts else list(texts)
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24, **fields}


@needs("openai")
class ChatTest(OpenAiCase):
    def create(self, *texts, **fields):
        return self.client.chat.completions.create(**ask(self.model, *texts, **fields))

    def test_an_answer_has_what_the_client_types_promise(self):
        reply = self.create()
        self.assertEqual(reply.object, "chat.completion")
        self.assertTrue(reply.id.startswith("chatcmpl-"))
        self.assertEqual(reply.model, self.model)
        self.assertGreater(reply.created, 1_700_000_000)
        self.assertEqual(len(reply.choices), 1)
        choice = reply.choices[0]
        self.assertEqual((choice.index, choice.finish_reason, choice.logprobs), (0, "stop", None))
        self.assertEqual((choice.message.role, choice.message.content), ("assistant", FACT))
        self.assertIsNone(choice.message.refusal)
        self.assertFalse(choice.message.tool_calls)
        usage = reply.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        self.assertIsInstance(usage.prompt_tokens_details.cached_tokens, int)
        # Nothing that the client would not know by name hides a misspelt field.
        known = type(reply).model_fields
        self.assertEqual({key for key in reply.model_dump() if key not in known}, set())

    def test_the_request_id_reaches_the_client(self):
        raw = self.client.chat.completions.with_raw_response.create(**ask(self.model))
        self.assertTrue(raw.headers["x-request-id"])
        self.assertEqual(raw.parse()._request_id, raw.headers["x-request-id"])
        named = self.create(extra_headers={"X-Request-Id": "mine-1"})
        self.assertEqual(named._request_id, "mine-1")

    def test_a_stream_says_what_the_whole_answer_says(self):
        whole = self.create()
        chunks = list(self.create(stream=True, stream_options={"include_usage": True}))
        first = chunks[0].choices[0]
        self.assertEqual((first.delta.role, first.delta.content, first.finish_reason), ("assistant", "", None))
        self.assertEqual(len({(c.id, c.created, c.model, c.object) for c in chunks}), 1)
        self.assertEqual(chunks[0].object, "chat.completion.chunk")
        self.assertEqual("".join(c.choices[0].delta.content or "" for c in chunks[:-1]), whole.choices[0].message.content)
        finishes = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        self.assertEqual(finishes, ["stop"])
        self.assertEqual(chunks[-2].choices[0].finish_reason, "stop")
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
        self.assertEqual([chunk.usage for chunk in chunks[:-1]], [None] * (len(chunks) - 1))

    def test_continuous_usage_counts_up(self):
        options = {"include_usage": True, "continuous_usage_stats": True}
        # The first chunk comes before there is anything to count.
        chunks = list(self.create(stream=True, stream_options=options))[1:]
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        self.assertEqual(counts, sorted(counts))
        self.assertGreater(counts[-1], counts[0])

    def test_the_stream_helper_fires_its_events(self):
        with self.client.chat.completions.stream(**ask(self.model), stream_options={"include_usage": True}) as stream:
            events = list(stream)
            final = stream.get_final_completion()
        kinds = [event.type for event in events]
        self.assertEqual(kinds.count("content.done"), 1)
        deltas = "".join(event.delta for event in events if event.type == "content.delta")
        done = next(event for event in events if event.type == "content.done")
        self.assertEqual((deltas, done.content, final.choices[0].message.content), (FACT, FACT, FACT))
        self.assertEqual(final.choices[0].finish_reason, "stop")
        self.assertGreater(final.usage.total_tokens, 0)

    def test_several_choices_are_drawn_and_can_be_drawn_again(self):
        # Nothing to look up: the model is unsure. The helper takes no answer that its length has cut.
        messages = [{"role": "user", "content": "Tell me more."}]
        fields = {"messages": messages, "n": 3, "temperature": 2, "seed": 7, "max_tokens": 120, "stop": ["."]}
        first = [choice.message.content for choice in self.create(**fields).choices]
        self.assertEqual(len(set(first)), 3)
        self.assertEqual([choice.message.content for choice in self.create(**fields).choices], first)
        # The helper takes choices by position: the stream has to begin them in their order.
        for _ in range(3):
            with self.client.chat.completions.stream(**ask(self.model, **fields)) as stream:
                final = stream.get_final_completion()
            self.assertEqual([choice.index for choice in final.choices], [0, 1, 2])
            self.assertEqual([choice.message.content for choice in final.choices], first)

    def test_logprobs_are_of_the_text(self):
        fields = {"logprobs": True, "top_logprobs": 3}
        choice = self.create(**fields).choices[0]
        tokens = choice.logprobs.content
        self.assertEqual("".join(token.token for token in tokens), choice.message.content)
        self.assertEqual(b"".join(bytes(token.bytes) for token in tokens).decode(), choice.message.content)
        for token in tokens:
            self.assertLessEqual(token.logprob, 0)
            self.assertEqual(len(token.top_logprobs), 3)
            self.assertEqual(token.top_logprobs[0].token, token.token)  # temperature 0
        with self.client.chat.completions.stream(**ask(self.model, **fields)) as stream:
            streamed = stream.get_final_completion().choices[0].logprobs.content
        self.assertEqual([t.token for t in streamed], [t.token for t in tokens])

    def test_stop_strings_and_length_end_an_answer(self):
        choice = self.create(stop=["blue", "nowhere"]).choices[0]
        self.assertEqual((choice.message.content, choice.finish_reason), ("The code of the ", "stop"))
        reply = self.create(max_tokens=None, max_completion_tokens=3)
        self.assertEqual((reply.choices[0].finish_reason, reply.usage.completion_tokens), ("length", 3))

    def test_messages_in_all_their_forms(self):
        parts = [{"type": "text", "text": FACT + " "}, {"type": "text", "text": QUESTION}]
        for messages in (
            [{"role": "user", "content": parts}],
            [{"role": "developer", "content": "Answer the question."}, {"role": "user", "content": f"{FACT} {QUESTION}"}],
            [{"role": "system", "content": [{"type": "text", "text": FACT}]}, {"role": "user", "content": QUESTION}],
            [
                {"role": "user", "content": FACT, "name": "anna"},
                {"role": "assistant", "content": [{"type": "text", "text": "I have read it."}]},
                {"role": "user", "content": QUESTION},
            ],
        ):
            with self.subTest(messages=messages):
                self.assertEqual(self.create(*messages).choices[0].message.content, FACT)

    def test_fields_that_change_no_text_are_taken(self):
        reply = self.create(
            user="anna",
            metadata={"team": "doors"},
            store=False,
            service_tier="auto",
            parallel_tool_calls=True,
            prompt_cache_key="doors",
            safety_identifier="anna",
            presence_penalty=0,
            frequency_penalty=0,
            logit_bias={},
            modalities=["text"],
            extra_body={"top_k": 5, "cache_salt": "a", "priority": 0},
        )
        self.assertEqual(reply.choices[0].message.content, FACT)

    def test_what_is_not_served_is_refused_by_name(self):
        import openai

        for field, value in (
            ("modalities", ["text", "audio"]),
            ("audio", {"voice": "alloy", "format": "wav"}),
            ("prediction", {"type": "content", "content": "x"}),
            ("web_search_options", {}),
            ("store", True),
            ("functions", [{"name": "f", "parameters": {}}]),
        ):
            with self.subTest(field=field):
                with self.assertRaises(openai.BadRequestError) as caught:
                    self.create(**{field: value})
                self.assertTrue(str(caught.exception.param).startswith(field), caught.exception.body)
                self.assertIn(field, str(caught.exception))
        with self.assertRaises(openai.BadRequestError) as caught:
            self.create({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]})
        self.assertIn("messages[0].content[0]", caught.exception.param)

    def test_a_stream_may_be_left(self):
        stream = self.create(max_tokens=500, extra_body={"ignore_eos": True}, stream=True)
        next(iter(stream))
        stream.close()
        self.assertEqual(self.create().choices[0].message.content, FACT)


@needs("openai")
class StructuredOutputTest(OpenAiCase):
    def schema(self):
        from typing import Literal, Optional

        from pydantic import BaseModel, Field

        class Door(BaseModel):
            colour: Literal["blue", "red"]
            code: Literal[4821, 1907]

        class Report(BaseModel):
            """What is known of some doors."""

            doors: list[Door] = Field(min_length=1, max_length=2)
            locked: bool
            note: Optional[Literal["none", "old"]]

        return Report

    def test_parse_gives_the_pydantic_model(self):
        report = self.schema()
        reply = self.client.chat.completions.parse(**ask(self.model, max_tokens=300), response_format=report)
        parsed = reply.choices[0].message.parsed
        self.assertIsInstance(parsed, report)
        self.assertEqual(reply.choices[0].finish_reason, "stop")
        self.assertEqual(report.model_validate_json(reply.choices[0].message.content), parsed)

    def test_the_stream_helper_parses_on_the_way(self):
        report = self.schema()
        with self.client.chat.completions.stream(
            **ask(self.model, max_tokens=300), response_format=report
        ) as stream:
            events = list(stream)
            final = stream.get_final_completion()
        partial = [event.parsed for event in events if event.type == "content.delta" and event.parsed]
        self.assertGreater(len(partial), 1)
        self.assertIsInstance(final.choices[0].message.parsed, report)
        self.assertEqual(next(e for e in events if e.type == "content.done").parsed, final.choices[0].message.parsed)

    def test_an_answer_cut_by_its_length_is_the_clients_own_error(self):
        import openai

        with self.assertRaises(openai.LengthFinishReasonError):
            self.client.chat.completions.parse(**ask(self.model, max_tokens=3), response_format=self.schema())

    def test_a_schema_by_hand_and_any_object(self):
        import jsonschema

        schema = {
            "type": "object",
            "properties": {"code": {"type": "string", "pattern": "^[0-9]{4}$"}, "door": {"const": "blue"}},
            "required": ["code", "door"],
            "additionalProperties": False,
        }
        for strict in (True, False, None):
            form = {"name": "door", "schema": schema, **({} if strict is None else {"strict": strict})}
            reply = self.client.chat.completions.create(
                **ask(self.model, max_tokens=200), response_format={"type": "json_schema", "json_schema": form}
            )
            self.assertEqual(reply.choices[0].finish_reason, "stop")
            jsonschema.validate(json.loads(reply.choices[0].message.content), schema)
        # The demo model would write a long object: let it prefer to close.
        close = self.serve.post_json("/tokenize", {"model": self.model, "prompt": "}", "add_special_tokens": False})
        reply = self.client.chat.completions.create(
            **ask(self.model, max_tokens=200, logit_bias={str(close["tokens"][0]): 100}),
            response_format={"type": "json_object"},
        )
        self.assertEqual(reply.choices[0].finish_reason, "stop")
        self.assertIsInstance(json.loads(reply.choices[0].message.content), dict)
        text = self.client.chat.completions.create(**ask(self.model), response_format={"type": "text"})
        self.assertEqual(text.choices[0].message.content, FACT)

    def test_regex_choice_and_grammar(self):
        for form, expected in (
            ({"regex": "[0-9]{2}-[a-c]{3}"}, r"^[0-9]{2}-[a-c]{3}$"),
            ({"choice": ["open", "shut"]}, r"^(open|shut)$"),
            ({"grammar": 'root ::= "code " [0-9] [0-9] "."'}, r"^code [0-9]{2}\.$"),
            ({"json": {"enum": ["a", "b"]}}, r'^"[ab]"$'),
        ):
            with self.subTest(form=form):
                reply = self.client.chat.completions.create(
                    **ask(self.model, max_tokens=60), extra_body={"structured_outputs": form}
                )
                self.assertEqual(reply.choices[0].finish_reason, "stop")
                self.assertRegex(reply.choices[0].message.content, expected)

    def test_the_same_in_completions(self):
        reply = self.client.completions.create(
            model=self.model, prompt="The door is", max_tokens=8, temperature=0, extra_body=spelled(" open", " shut")
        )
        self.assertIn(reply.choices[0].text, (" open", " shut"))

    def test_what_cannot_be_held_to_is_refused_by_name(self):
        import openai

        for schema, word in (
            ({"type": "objekt"}, "type"),
            ({"type": "array", "contains": {"type": "string"}}, "contains"),
            ({"$ref": "https://elsewhere.example/schema"}, "$ref"),
        ):
            with self.subTest(schema=schema):
                with self.assertRaises(openai.BadRequestError) as caught:
                    self.client.chat.completions.create(
                        **ask(self.model),
                        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
                    )
                self.assertTrue(caught.exception.param.startswith("response_format"), caught.exception.param)
                self.assertIn(word, str(caught.exception))
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.chat.completions.create(**ask(self.model), extra_body={"structured_outputs": {"regex": "(a"}})
        self.assertTrue(caught.exception.param.startswith("structured_outputs"), caught.exception.param)


@needs("openai")
class CompletionTest(OpenAiCase):
    def test_completions_whole_and_streamed(self):
        body = completion(self.model, 3)
        body["extra_body"] = {"ignore_eos": body.pop("ignore_eos")}
        reply = self.client.completions.create(**body)
        self.assertTrue(reply.id.startswith("cmpl-"))
        self.assertEqual((reply.object, reply.choices[0].finish_reason), ("text_completion", "length"))
        self.assertEqual(reply.usage.completion_tokens, 64)
        chunks = list(self.client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
        self.assertEqual("".join(c.choices[0].text for c in chunks if c.choices), reply.choices[0].text)
        self.assertEqual(chunks[-1].usage.completion_tokens, 64)

    def test_several_prompts_and_choices(self):
        prompts = ["The code of the", "Anna lives in"]
        alone = [
            self.client.completions.create(model=self.model, prompt=prompt, max_tokens=6, temperature=0).choices[0].text
            for prompt in prompts
        ]
        reply = self.client.completions.create(model=self.model, prompt=prompts, max_tokens=6, temperature=0, n=2)
        self.assertEqual([c.index for c in reply.choices], [0, 1, 2, 3])
        self.assertEqual([c.text for c in reply.choices], [alone[0]] * 2 + [alone[1]] * 2)

    def test_echo_with_logprobs(self):
        reply = self.client.completions.create(
            model=self.model, prompt="The blue door", echo=True, logprobs=2, max_tokens=4, temperature=0
        )
        choice = reply.choices[0]
        self.assertTrue(choice.text.startswith("The blue door"))
        self.assertEqual(len(choice.logprobs.tokens), len(choice.logprobs.token_logprobs))
        self.assertEqual(len(choice.logprobs.text_offset), len(choice.logprobs.tokens))
        self.assertIsNone(choice.logprobs.token_logprobs[0])

    def test_what_is_not_served_is_refused_by_name(self):
        import openai

        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.completions.create(model=self.model, prompt="a", suffix="b")
        self.assertEqual(caught.exception.param, "suffix")


@needs("openai")
class ModelTest(OpenAiCase):
    def test_models(self):
        import openai

        cards = list(self.client.models.list())
        self.assertEqual([card.id for card in cards], [self.model])
        self.assertEqual(cards[0].object, "model")
        self.assertEqual(self.client.models.retrieve(self.model).id, self.model)
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.models.retrieve("no-such-model")
        self.assertEqual(caught.exception.code, "model_not_found")


@needs("openai")
class EmbeddingTest(OpenAiCase):
    def test_the_default_is_base64_and_decodes_to_the_same_floats(self):
        texts = [FACT, QUESTION]
        default = self.client.embeddings.create(model=self.model, input=texts)
        floats = self.client.embeddings.create(model=self.model, input=texts, encoding_format="float")
        self.assertEqual([item.index for item in default.data], [0, 1])
        for one, other in zip(default.data, floats.data):
            self.assertEqual(one.object, "embedding")
            self.assertEqual(list(one.embedding), [struct.unpack("f", struct.pack("f", x))[0] for x in other.embedding])
            self.assertAlmostEqual(math.fsum(x * x for x in one.embedding), 1, places=4)
        self.assertEqual(default.usage.total_tokens, default.usage.prompt_tokens)
        self.assertGreater(default.usage.prompt_tokens, 0)
        raw = self.client.post(
            "/embeddings", body={"model": self.model, "input": FACT, "encoding_format": "base64"}, cast_to=object
        )
        packed = base64.b64decode(raw["data"][0]["embedding"])
        self.assertEqual(list(struct.unpack(f"<{len(packed) // 4}f", packed)), list(default.data[0].embedding))

    def test_one_text_alone_and_among_others_is_the_same(self):
        alone = self.client.embeddings.create(model=self.model, input=FACT, encoding_format="float").data[0].embedding
        among = self.client.embeddings.create(model=self.model, input=[QUESTION, FACT], encoding_format="float")
        for one, other in zip(alone, among.data[1].embedding):
            self.assertAlmostEqual(one, other, places=2)
        self.assertNotEqual(among.data[0].embedding, among.data[1].embedding)

    def test_token_ids(self):
        ids = self.serve.post_json("/tokenize", {"model": self.model, "prompt": FACT})["tokens"]
        text = self.client.embeddings.create(model=self.model, input=FACT, encoding_format="float")
        for given in (ids, [ids]):
            reply = self.client.embeddings.create(model=self.model, input=given, encoding_format="float")
            self.assertEqual(reply.usage.prompt_tokens, len(ids))
            for one, other in zip(reply.data[0].embedding, text.data[0].embedding):
                self.assertAlmostEqual(one, other, places=2)

    def test_bad_input_names_its_field(self):
        import openai

        for fields, param in (
            ({"input": ""}, "input"),
            ({"input": []}, "input"),
            ({"input": "a", "dimensions": 7}, "dimensions"),
            ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ):
            with self.subTest(fields=fields):
                with self.assertRaises(openai.BadRequestError) as caught:
                    self.client.embeddings.create(**{"model": self.model, "encoding_format": "float", **fields})
                self.assertTrue(str(caught.exception.param).startswith(param), caught.exception.body)
        with self.assertRaises(openai.NotFoundError):
            self.client.embeddings.create(model="no-such-model", input="a")


@needs("openai")
class ErrorTest(OpenAiCase):
    def test_errors_are_the_clients_own_classes(self):
        import openai

        create = self.client.chat.completions.create
        for fields, param, code in (
            ({"temperature": 99}, "temperature", "invalid_request"),
            ({"n": 0}, "n", "invalid_request"),
            ({"top_logprobs": 3}, "top_logprobs", "invalid_request"),
            ({"messages": []}, "messages", "invalid_request"),
            ({"messages": [{"role": "user", "content": "word " * 20000}]}, "messages", "context_length_exceeded"),
            ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ):
            with self.subTest(fields=str(fields)[:80]):
                with self.assertRaises(openai.BadRequestError) as caught:
                    create(**ask(self.model, **fields))
                error = caught.exception
                self.assertEqual((error.param, error.code, error.type), (param, code, "invalid_request_error"))
                self.assertTrue(error.request_id)
        with self.assertRaises(openai.NotFoundError) as caught:
            create(**ask("no-such-model"))
        self.assertEqual((caught.exception.code, caught.exception.param), ("model_not_found", "model"))

    def test_a_stream_that_cannot_begin_is_no_stream(self):
        import openai

        with self.assertRaises(openai.BadRequestError):
            self.client.chat.completions.create(**ask(self.model, temperature=99, stream=True))

    def test_an_unknown_path_is_not_found(self):
        import openai

        with self.assertRaises(openai.NotFoundError):
            self.client.images.generate(model=self.model, prompt="a door")

    def test_a_deadline_of_the_client(self):
        import openai

        slow = self.client.with_options(timeout=0.001)
        with self.assertRaises(openai.APITimeoutError):
            slow.chat.completions.create(**chat(self.model, 4, max_tokens=400), extra_body={"ignore_eos": True})


@needs("openai")
class AsyncTest(OpenAiCase):
    def test_many_at_once(self):
        import openai

        async def run():
            async with openai.AsyncOpenAI(
                base_url=f"http://{self.serve.http}/v1", api_key="none", timeout=60, max_retries=0
            ) as client:

                async def one(seed):
                    body = chat(self.model, seed)
                    if seed % 2:
                        return (await client.chat.completions.create(**body)).choices[0].message.content
                    async with client.chat.completions.stream(**body) as stream:
                        return (await stream.get_final_completion()).choices[0].message.content

                return await asyncio.gather(*(one(seed) for seed in range(20, 36)))

        answers = asyncio.run(run())
        alone = [self.client.chat.completions.create(**chat(self.model, seed)) for seed in range(20, 36)]
        self.assertEqual(answers, [reply.choices[0].message.content for reply in alone])
        self.assertGreater(len(set(answers)), 10)


@needs("openai")
class TenantTest(ServeCase):
    """Keys and limits, as a client with a key sees them."""

    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory(prefix="tidepool-keys-"))
        path = os.path.join(folder, "keys.yaml")
        keys = {"key-a": "team-a", "key-b": "team-b", "key-c": "team-c"}
        tenants = [{"name": "team-b", "requests_per_minute": 2}, {"name": "team-c", "max_inflight": 1}]
        with open(path, "w") as file:
            # JSON is YAML.
            json.dump({"keys": [key_entry(*item) for item in keys.items()], "tenants": tenants}, file)
        cls.args = ["--gateway-api-keys-file", path]
        cls.serve = cls.enterClassContext(Serve(BINARY, cls.args))
        cls.model = openai_client(cls.serve, api_key="key-a").models.list().data[0].id

    def create(self, key, **options):
        return openai_client(self.serve, api_key=key, **options).chat.completions.create(**ask(self.model))

    def test_only_who_has_a_key_is_let_in(self):
        import openai

        self.assertEqual(self.create("key-a").choices[0].message.content, FACT)
        with self.assertRaises(openai.AuthenticationError) as caught:
            self.create("key-x")
        self.assertEqual(caught.exception.code, "invalid_api_key")
        self.assertNotIn("key-x", str(caught.exception))
        with self.assertRaises(openai.AuthenticationError):
            openai_client(self.serve, api_key="key-x").models.list()

    def test_a_limit_is_the_clients_own_class_and_says_when_to_come_back(self):
        import openai

        with self.assertRaises(openai.RateLimitError) as caught:
            for _ in range(4):
                self.create("key-b")
        self.assertEqual(caught.exception.code, "rate_limit_exceeded")
        self.assertGreater(int(caught.exception.response.headers["retry-after"]), 0)
        self.assertEqual(self.create("key-a").choices[0].message.content, FACT)

    def test_the_clients_retries_get_through_when_there_is_room(self):
        import openai

        client = openai_client(self.serve, api_key="key-c")
        stream = client.chat.completions.create(
            **ask(self.model, max_tokens=1500, stream=True), extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        with self.assertRaises(openai.RateLimitError):
            self.create("key-c")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.create, "key-c", max_retries=8)
            stream.close()
            self.assertEqual(waiting.result(60).choices[0].message.content, FACT)


def key_entry(key, tenant):
    return {"key_sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant}


if __name__ == "__main__":
    unittest.main()
