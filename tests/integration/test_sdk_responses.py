"""/v1/responses through the official openai client."""

import json
import unittest

from sdk_support import FACT, QUESTION, OpenAiCase, hermes_call, needs, spelled


def response_tool(tool):
    """A chat tool in the form of the responses API."""
    return {"type": "function", "strict": True, **tool["function"]}


@needs("openai")
class ResponsesTest(OpenAiCase):
    def ask(self, **fields):
        return {
            "model": self.model,
            "input": f"{FACT} {QUESTION}",
            "temperature": 0,
            "max_output_tokens": 900,
            "store": False,
            **fields,
        }

    def create(self, **fields):
        return self.client.responses.create(**self.ask(**fields))

    def test_an_answer_has_what_the_client_types_promise(self):
        reply = self.create(metadata={"team": "doors"})
        self.assertEqual((reply.object, reply.status, reply.error), ("response", "completed", None))
        self.assertTrue(reply.id.startswith("resp_"))
        self.assertEqual(reply.model, self.model)
        self.assertEqual(reply.output_text, FACT)
        self.assertEqual(reply.metadata, {"team": "doors"})
        self.assertIsNone(reply.incomplete_details)
        self.assertIs(reply.store, False)
        message = reply.output[0]
        self.assertEqual((message.type, message.role, message.status), ("message", "assistant", "completed"))
        self.assertTrue(message.id)
        self.assertEqual(message.content[0].type, "output_text")
        self.assertEqual(message.content[0].annotations, [])
        usage = reply.usage
        self.assertEqual(usage.total_tokens, usage.input_tokens + usage.output_tokens)
        self.assertIsInstance(usage.input_tokens_details.cached_tokens, int)
        self.assertIsInstance(usage.output_tokens_details.reasoning_tokens, int)
        # What the types call required is there.
        for field, info in type(reply).model_fields.items():
            if info.is_required():
                self.assertIn(field, reply.model_fields_set, field)

    def test_input_in_all_its_forms(self):
        text = f"{FACT} {QUESTION}"
        for given in (
            [{"role": "user", "content": text}],
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}],
            [
                {"role": "developer", "content": FACT},
                {"role": "user", "content": QUESTION},
            ],
            [
                {"role": "user", "content": FACT},
                {"role": "assistant", "content": "I have read it."},
                {"role": "user", "content": QUESTION},
            ],
        ):
            with self.subTest(given=given):
                self.assertEqual(self.create(input=given).output_text, FACT)
        self.assertEqual(self.create(instructions=FACT, input=QUESTION).output_text, FACT)

    def test_the_output_can_go_back_as_input(self):
        first = self.create(input=FACT)
        history = [{"role": "user", "content": FACT}]
        history += [item.model_dump(exclude_none=True) for item in first.output]
        history += [{"role": "user", "content": QUESTION}]
        self.assertEqual(self.create(input=history).output_text, FACT)

    def test_the_events_of_a_stream_come_in_their_order(self):
        events = list(self.create(stream=True))
        kinds = [event.type for event in events]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        self.assertEqual(
            [kind for kind in kinds if kind != "response.output_text.delta"],
            [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added",
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
                "response.completed",
            ],
        )
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        self.assertEqual("".join(deltas), FACT)
        self.assertEqual(events[0].response.status, "in_progress")
        self.assertEqual(events[-1].response.output_text, FACT)
        self.assertEqual(len({e.response.id for e in events if hasattr(e, "response")}), 1)
        items = {event.item_id for event in events if hasattr(event, "item_id")}
        self.assertEqual(items, {events[-1].response.output[0].id})

    def test_the_stream_helper_has_the_final_response(self):
        with self.client.responses.stream(**self.ask()) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            final = stream.get_final_response()
        self.assertEqual((text, final.output_text, final.status), (FACT, FACT, "completed"))
        self.assertGreater(final.usage.output_tokens, 0)

    def test_an_answer_cut_by_its_length_is_incomplete(self):
        reply = self.create(max_output_tokens=2)
        self.assertEqual(reply.status, "incomplete")
        self.assertEqual(reply.incomplete_details.reason, "max_output_tokens")
        events = list(self.create(max_output_tokens=2, stream=True))
        self.assertEqual(events[-1].type, "response.incomplete")

    def test_parse_gives_the_pydantic_model(self):
        from typing import Literal

        from pydantic import BaseModel

        class Door(BaseModel):
            colour: Literal["blue", "red"]
            locked: bool

        reply = self.client.responses.parse(**self.ask(), text_format=Door)
        self.assertIsInstance(reply.output_parsed, Door)
        with self.client.responses.stream(**self.ask(), text_format=Door) as stream:
            final = stream.get_final_response()
        self.assertIsInstance(final.output_parsed, Door)

    def tool(self, **options):
        from typing import Literal

        import openai
        from pydantic import BaseModel

        class CodeOf(BaseModel):
            """The code of a door."""

            door: Literal["blue", "red"]

        return CodeOf, openai.lib._tools.pydantic_responses_function_tool(CodeOf, name="code_of", **options)

    def test_a_function_is_called_and_its_output_answered_from(self):
        model, tool = self.tool()
        for choice in ("required", {"type": "function", "name": "code_of"}):
            with self.subTest(choice=choice):
                reply = self.client.responses.parse(**self.ask(input="Hello!", tools=[tool], tool_choice=choice))
                calls = [item for item in reply.output if item.type == "function_call"]
                self.assertTrue(calls)
                for call in calls:
                    self.assertTrue(call.call_id and call.id)
                    self.assertEqual((call.name, call.status), ("code_of", "completed"))
                    self.assertIsInstance(call.parsed_arguments, model)
        history = [{"role": "user", "content": "Hello!"}]
        for call in calls:
            history.append(call.model_dump(exclude_none=True, exclude={"parsed_arguments"}))
            history.append({"type": "function_call_output", "call_id": call.call_id, "output": FACT})
        history.append({"role": "user", "content": QUESTION})
        self.assertEqual(self.create(input=history, tools=[tool]).output_text, FACT)

    def test_the_arguments_of_a_call_are_streamed(self):
        _, tool = self.tool()
        with self.client.responses.stream(**self.ask(tools=[tool], tool_choice="required")) as stream:
            events = list(stream)
            final = stream.get_final_response()
        call = final.output[0]
        self.assertEqual(call.type, "function_call")
        added = next(event for event in events if event.type == "response.output_item.added")
        self.assertEqual((added.item.name, added.item.call_id), ("code_of", call.call_id))
        pieces = [
            event.delta
            for event in events
            if event.type == "response.function_call_arguments.delta" and event.output_index == 0
        ]
        self.assertEqual("".join(pieces), call.arguments)
        done = next(event for event in events if event.type == "response.function_call_arguments.done")
        self.assertEqual(done.arguments, call.arguments)

    def test_the_clients_own_runner_of_tools(self):
        try:
            from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolRunner
        except ImportError:
            self.skipTest("this openai package has no runner of tools for responses")
        asked = []

        def code_of(arguments):
            asked.append(arguments.door)
            return f"{FACT} {QUESTION}"

        _, tool = self.tool()
        runner = ResponsesToolRunner(functions=[RegisteredFunction.from_tool(tool, execute=code_of)])
        # The demo model calls nothing by itself, and would call without end when it has to: the first turn is made
        # to call, and the runner is left after it has sent the output back.
        text = hermes_call("code_of", {"door": "blue"})
        for stream in (False, True):
            asked.clear()
            turns = runner.iterate(
                self.client, self.ask(input="Hello!", extra_body=spelled(text)), max_steps=3, stream=stream
            )
            first, second = next(turns), next(turns)
            turns.close()
            self.assertEqual(first.response.output[0].type, "function_call")
            self.assertEqual(asked, ["blue"])
            self.assertEqual(second.response.status, "completed")

    def test_what_needs_a_store_is_refused_by_name(self):
        import openai

        for fields, param in (
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"background": True}, "background"),
            ({"conversation": "conv_1"}, "conversation"),
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
            ({"truncation": "auto"}, "truncation"),
        ):
            with self.subTest(param=param):
                with self.assertRaises(openai.BadRequestError) as caught:
                    self.create(**fields)
                self.assertTrue(str(caught.exception.param).startswith(param), caught.exception.body)
        with self.assertRaises(openai.NotFoundError):
            self.client.responses.retrieve("resp_1")

    def test_errors_name_the_responses_own_field(self):
        import openai

        with self.assertRaises(openai.BadRequestError) as caught:
            self.create(max_output_tokens=100_000)
        self.assertEqual((caught.exception.param, caught.exception.code), ("max_output_tokens", "context_length_exceeded"))
        with self.assertRaises(openai.BadRequestError) as caught:
            self.create(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}])
        self.assertTrue(caught.exception.param.startswith("input[0].content[0]"), caught.exception.body)

    def test_asynchronous(self):
        import asyncio

        import openai

        async def run():
            async with openai.AsyncOpenAI(
                base_url=f"http://{self.serve.http}/v1", api_key="none", timeout=60, max_retries=0
            ) as client:
                async with client.responses.stream(**self.ask()) as stream:
                    final = await stream.get_final_response()
                return final.output_text, (await client.responses.create(**self.ask())).output_text

        self.assertEqual(asyncio.run(run()), (FACT, FACT))


if __name__ == "__main__":
    unittest.main()
