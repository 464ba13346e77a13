"""/v1/messages through the official anthropic client, and the tools of its own that it runs."""

import asyncio
import unittest

from sdk_support import CODE_OF, FACT, OPEN_DOOR, QUESTION, hermes_call, needs, spelled
from support import ServeCase


def message_tool(tool):
    """A chat tool in the form of the messages API."""
    function = tool["function"]
    return {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}


TOOLS = [message_tool(CODE_OF), message_tool(OPEN_DOOR)]


@needs("anthropic")
class MessagesTest(ServeCase):
    @classmethod
    def setUpClass(cls):
        import anthropic

        super().setUpClass()
        cls.client = anthropic.Anthropic(
            base_url=f"http://{cls.serve.http}", api_key="none", timeout=60, max_retries=0
        )
        cls.addClassCleanup(cls.client.close)

    def ask(self, *messages, **fields):
        return {
            "model": self.model,
            "messages": list(messages) or [{"role": "user", "content": f"{FACT} {QUESTION}"}],
            "temperature": 0,
            "max_tokens": 900,
            **fields,
        }

    def create(self, *messages, **fields):
        # The client has no `temperature` any more: what it does not know goes in extra_body.
        body = self.ask(*messages, **fields)
        extra = {"temperature": body.pop("temperature"), **body.pop("extra_body", {})}
        return self.client.messages.create(**body, extra_body=extra)

    def stream(self, *messages, **fields):
        body = self.ask(*messages, **fields)
        extra = {"temperature": body.pop("temperature"), **body.pop("extra_body", {})}
        return self.client.messages.stream(**body, extra_body=extra)

    def test_an_answer_has_what_the_client_types_promise(self):
        reply = self.create(metadata={"user_id": "anna"})
        self.assertEqual((reply.type, reply.role, reply.model), ("message", "assistant", self.model))
        self.assertTrue(reply.id.startswith("msg_"))
        self.assertEqual([(block.type, block.text) for block in reply.content], [("text", FACT)])
        self.assertEqual((reply.stop_reason, reply.stop_sequence), ("end_turn", None))
        self.assertGreater(reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0), 0)
        self.assertGreater(reply.usage.output_tokens, 0)
        self.assertTrue(reply._request_id)

    def test_what_ends_an_answer(self):
        reply = self.create(max_tokens=2)
        self.assertEqual((reply.stop_reason, reply.usage.output_tokens), ("max_tokens", 2))
        reply = self.create(stop_sequences=["nowhere", "blue"])
        self.assertEqual((reply.stop_reason, reply.stop_sequence), ("stop_sequence", "blue"))
        self.assertEqual(reply.content[0].text, "The code of the ")

    def test_messages_in_all_their_forms(self):
        text = {"type": "text", "text": f"{FACT} {QUESTION}"}
        self.assertEqual(self.create({"role": "user", "content": [text]}).content[0].text, FACT)
        for system in (FACT, [{"type": "text", "text": FACT, "cache_control": {"type": "ephemeral"}}]):
            reply = self.create({"role": "user", "content": QUESTION}, system=system)
            self.assertEqual(reply.content[0].text, FACT)
        begun = self.create(
            {"role": "user", "content": f"{FACT} {QUESTION}"}, {"role": "assistant", "content": "The code of the blue"}
        )
        self.assertEqual(begun.content[0].text.strip(), "door is 4821.")

    def test_the_stream_helper_has_text_and_the_final_message(self):
        with self.stream() as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        self.assertEqual((text, final.content[0].text, final.stop_reason), (FACT, FACT, "end_turn"))
        self.assertGreater(final.usage.output_tokens, 0)
        self.assertGreater(final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0), 0)

    def test_the_events_of_a_stream_come_in_their_order(self):
        body = self.ask()
        extra = {"temperature": body.pop("temperature")}
        kinds = [event.type for event in self.client.messages.create(**body, extra_body=extra, stream=True)]
        self.assertEqual(kinds[:2], ["message_start", "content_block_start"])
        self.assertEqual(kinds[-3:], ["content_block_stop", "message_delta", "message_stop"])
        self.assertEqual(set(kinds[2:-3]), {"content_block_delta"})

    def check_call(self, reply, name=None):
        self.assertEqual(reply.stop_reason, "tool_use")
        calls = [block for block in reply.content if block.type == "tool_use"]
        self.assertTrue(calls)
        for call in calls:
            import jsonschema

            tool = next(tool for tool in TOOLS if tool["name"] == call.name)
            jsonschema.validate(call.input, tool["input_schema"])
            self.assertTrue(call.id)
            if name:
                self.assertEqual(call.name, name)
        return calls

    def test_tools_are_called_and_their_results_answered_from(self):
        hello = {"role": "user", "content": "Hello!"}
        for choice, name in (({"type": "any"}, None), ({"type": "tool", "name": "code_of"}, "code_of")):
            reply = self.create(hello, tools=TOOLS, tool_choice=choice)
            calls = self.check_call(reply, name)
            with self.stream(hello, tools=TOOLS, tool_choice=choice) as stream:
                streamed = stream.get_final_message()
            self.assertEqual([c.input for c in self.check_call(streamed, name)], [c.input for c in calls])
        one = self.create(hello, tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True})
        self.assertEqual(len(self.check_call(one)), 1)
        none = self.create(hello, tools=TOOLS, tool_choice={"type": "none"}, max_tokens=12)
        self.assertNotIn("tool_use", [block.type for block in none.content])
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": FACT} for call in calls]
        results[0]["content"] = [{"type": "text", "text": FACT}]
        answer = self.create(
            hello,
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in reply.content]},
            {"role": "user", "content": [*results, {"type": "text", "text": QUESTION}]},
            tools=TOOLS,
        )
        self.assertEqual(answer.content[0].text, FACT)

    def test_auto_finds_the_call_that_the_model_writes(self):
        text = hermes_call("open_door", {"code": 4821})
        reply = self.create(tools=TOOLS, extra_body=spelled(text))
        self.assertEqual([call.input for call in self.check_call(reply, "open_door")], [{"code": 4821}])
        with self.stream(tools=TOOLS, extra_body=spelled(text)) as stream:
            self.assertEqual([c.input for c in self.check_call(stream.get_final_message())], [{"code": 4821}])

    def test_the_clients_own_runner_of_tools(self):
        from typing import Literal

        from anthropic import beta_tool

        asked = []

        @beta_tool
        def code_of(door: Literal["blue", "red"]) -> str:
            """The code of a door."""
            asked.append(door)
            return f"{FACT} {QUESTION}"

        body = self.ask({"role": "user", "content": "Hello!"})
        extra = {"temperature": body.pop("temperature")}
        extra.update(spelled(hermes_call("code_of", {"door": "blue"})))
        for stream in (False, True):
            asked.clear()
            runner = self.client.beta.messages.tool_runner(
                **body, tools=[code_of], max_iterations=2, thread=False, stream=stream, extra_body=extra
            )
            kinds = []
            for turn in runner:
                message = turn.get_final_message() if stream else turn
                kinds.append([block.type for block in message.content])
            self.assertEqual(kinds, [["tool_use"], ["tool_use"]])
            self.assertGreaterEqual(asked, ["blue"])

    def test_tokens_are_counted_as_they_are_used(self):
        body = {"model": self.model, "messages": self.ask()["messages"], "system": FACT, "tools": TOOLS}
        count = self.client.messages.count_tokens(**body).input_tokens
        usage = self.create(*body["messages"], system=FACT, tools=TOOLS, max_tokens=1).usage
        used = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
        self.assertEqual(count, used)

    def test_an_answer_held_to_a_schema(self):
        from typing import Literal

        from pydantic import BaseModel

        class Door(BaseModel):
            colour: Literal["blue", "red"]
            locked: bool

        body = self.ask()
        extra = {"temperature": body.pop("temperature")}
        reply = self.client.messages.parse(**body, extra_body=extra, output_format=Door)
        self.assertIsInstance(reply.parsed_output, Door)

    def test_errors_are_the_clients_own_classes(self):
        import anthropic

        for fields, error, word in (
            ({"max_tokens": 100_000}, anthropic.BadRequestError, "max_tokens"),
            ({"temperature": 99}, anthropic.BadRequestError, "temperature"),
            ({"model": "no-such-model"}, anthropic.NotFoundError, "no-such-model"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError, "tools[0]"),
            ({"container": "c"}, anthropic.BadRequestError, "container"),
            ({"messages": [{"role": "tool", "content": "x"}]}, anthropic.BadRequestError, "messages[0].role"),
        ):
            with self.subTest(fields=str(fields)):
                with self.assertRaises(error) as caught:
                    self.create(**fields)
                self.assertEqual(caught.exception.body["type"], "error")
                self.assertIn(word, caught.exception.body["error"]["message"])
        with self.assertRaises(anthropic.BadRequestError) as caught:
            image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
            self.create({"role": "user", "content": [image]})
        self.assertEqual(caught.exception.body["error"]["type"], "invalid_request_error")
        self.assertIn("messages[0].content[0]", str(caught.exception))

    def test_asynchronous(self):
        import anthropic

        async def run():
            async with anthropic.AsyncAnthropic(
                base_url=f"http://{self.serve.http}", api_key="none", timeout=60, max_retries=0
            ) as client:
                body = self.ask()
                extra = {"temperature": body.pop("temperature")}
                async with client.messages.stream(**body, extra_body=extra) as stream:
                    return "".join([text async for text in stream.text_stream])

        self.assertEqual(asyncio.run(run()), FACT)


if __name__ == "__main__":
    unittest.main()
