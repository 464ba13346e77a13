"""Tools through the official openai client, for each way in which models write calls."""

import json
import unittest

from harness import Serve
from sdk_support import (
    CODE_OF,
    FACT,
    LLAMA3_TEMPLATE,
    MISTRAL_TEMPLATE,
    OPEN_DOOR,
    QUESTION,
    THINKING_TEMPLATE,
    TOOLS,
    DemoModelAs,
    OpenAiCase,
    arguments_fit,
    hermes_call,
    llama3_call,
    needs,
    openai_client,
    spelled,
)
from support import BINARY, ServeCase


def named(tool):
    return {"type": "function", "function": {"name": tool["function"]["name"]}}


class ToolTests:
    """For a class with `client` and `model`; not a test by itself."""

    def ask(self, *messages, **fields):
        return {
            "model": self.model,
            "messages": list(messages) or [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 900,
            "tools": TOOLS,
            **fields,
        }

    def create(self, *messages, **fields):
        return self.client.chat.completions.create(**self.ask(*messages, **fields))

    def check_calls(self, choice, finish_reason):
        """The calls of a choice are whole; returns [(name, arguments)]."""
        self.assertEqual(choice.finish_reason, finish_reason)
        calls = choice.message.tool_calls
        self.assertTrue(calls)
        self.assertEqual(len({call.id for call in calls}), len(calls))
        for call in calls:
            self.assertTrue(call.id)
            self.assertEqual(call.type, "function")
        return [(call.function.name, arguments_fit(self, call.function.name, call.function.arguments)) for call in calls]

    def test_required_calls_a_tool_and_says_nothing_else(self):
        choice = self.create(tool_choice="required").choices[0]
        self.check_calls(choice, "tool_calls")
        self.assertFalse(choice.message.content)

    def test_a_named_tool_is_called_once(self):
        for tool in TOOLS:
            choice = self.create(tool_choice=named(tool)).choices[0]
            calls = self.check_calls(choice, "stop")
            self.assertEqual([name for name, _ in calls], [tool["function"]["name"]])

    def test_allowed_tools_leave_those_to_choose_from(self):
        allowed = {"mode": "required", "tools": [named(OPEN_DOOR)]}
        choice = self.create(
            tool_choice={"type": "allowed_tools", "allowed_tools": allowed}, parallel_tool_calls=False
        ).choices[0]
        self.assertEqual({name for name, _ in self.check_calls(choice, "tool_calls")}, {"open_door"})

    def test_none_calls_nothing(self):
        message = self.create(tool_choice="none", max_tokens=12).choices[0].message
        self.assertFalse(message.tool_calls)
        self.assertTrue(message.content)

    def test_auto_may_just_answer(self):
        choice = self.create({"role": "user", "content": f"{FACT} {QUESTION}"}).choices[0]
        self.assertEqual((choice.message.content, choice.finish_reason), (FACT, "stop"))
        self.assertFalse(choice.message.tool_calls)

    def test_one_call_where_calls_may_not_be_parallel(self):
        calls = self.check_calls(
            self.create(tool_choice="required", parallel_tool_calls=False).choices[0], "tool_calls"
        )
        self.assertEqual(len(calls), 1)

    def test_a_stream_has_the_same_calls(self):
        for choice in ("required", named(CODE_OF)):
            with self.subTest(choice=choice):
                whole = self.create(tool_choice=choice).choices[0]
                calls, finishes = {}, []
                for chunk in self.create(tool_choice=choice, stream=True):
                    part = chunk.choices[0]
                    finishes += [part.finish_reason] if part.finish_reason else []
                    for delta in part.delta.tool_calls or []:
                        first = delta.index not in calls
                        call = calls.setdefault(delta.index, {"id": delta.id, "arguments": ""})
                        # Id and name come once, with the first delta of a call; then only pieces of arguments.
                        if first:
                            call["name"] = delta.function.name
                            self.assertTrue(delta.id and delta.function.name and delta.type == "function")
                        else:
                            self.assertFalse(delta.id or delta.function.name)
                        call["arguments"] += delta.function.arguments or ""
                self.assertEqual(finishes, [whole.finish_reason])
                self.assertEqual(list(calls), list(range(len(whole.message.tool_calls))))
                self.assertEqual(
                    [(call["name"], json.loads(call["arguments"])) for call in calls.values()],
                    [(c.function.name, json.loads(c.function.arguments)) for c in whole.message.tool_calls],
                )

    def test_the_stream_helper_fires_done_for_each_call(self):
        with self.client.chat.completions.stream(**self.ask(tool_choice="required")) as stream:
            events = list(stream)
            final = stream.get_final_completion().choices[0]
        done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        self.assertEqual(
            [(event.name, event.arguments) for event in done],
            [(call.function.name, call.function.arguments) for call in final.message.tool_calls],
        )
        for event in done:
            pieces = [
                part.arguments_delta
                for part in events
                if part.type == "tool_calls.function.arguments.delta" and part.index == event.index
            ]
            self.assertEqual("".join(pieces), event.arguments)
        self.check_calls(final, "tool_calls")

    def test_results_go_back_and_are_answered_from(self):
        question = {"role": "user", "content": "Hello!"}
        message = self.create(question, tool_choice=named(CODE_OF)).choices[0].message
        messages = [question, message.model_dump(exclude_none=True)]
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": FACT})
        reply = self.create(*messages, {"role": "user", "content": QUESTION}, max_tokens=40)
        self.assertEqual(reply.choices[0].message.content, FACT)
        # As the SDKs send it back: parts, and a null content beside the calls.
        messages[1]["content"] = None
        for result in messages[2:]:
            result["content"] = [{"type": "text", "text": FACT}]
        reply = self.create(*messages, {"role": "user", "content": QUESTION}, max_tokens=40)
        self.assertEqual(reply.choices[0].message.content, FACT)

    def test_bad_tools_are_refused_by_name(self):
        import openai

        strange = {"type": "function", "function": {"name": "no spaces!", "parameters": {}}}
        for fields, param in (
            ({"tools": [strange]}, "tools[0].function.name"),
            ({"tools": [CODE_OF, CODE_OF]}, "tools[1].function.name"),
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
            ({"tool_choice": "perhaps"}, "tool_choice"),
            ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ):
            with self.subTest(param=param):
                with self.assertRaises(openai.BadRequestError) as caught:
                    self.create(**fields)
                self.assertEqual(caught.exception.param, param, caught.exception.body)


class AutoTests(ToolTests):
    """The same where a structured output can spell a call, so that `auto` finds one."""

    @staticmethod
    def call(name, arguments):
        raise NotImplementedError

    BETWEEN = "\n"  # two calls

    def test_auto_finds_the_calls_that_the_model_writes(self):
        one = self.call("code_of", {"door": "blue", "old": False})
        other = self.call("open_door", {"code": 4821})
        for text, expected in (
            (one, [("code_of", {"door": "blue", "old": False})]),
            (one + self.BETWEEN + other, [("code_of", {"door": "blue", "old": False}), ("open_door", {"code": 4821})]),
        ):
            with self.subTest(text=text):
                choice = self.create(extra_body=spelled(text)).choices[0]
                self.assertEqual(self.check_calls(choice, "tool_calls"), expected)
                with self.client.chat.completions.stream(**self.ask(extra_body=spelled(text))) as stream:
                    streamed = stream.get_final_completion().choices[0]
                self.assertEqual(self.check_calls(streamed, "tool_calls"), expected)

    def test_only_the_first_of_calls_that_may_not_be_parallel(self):
        text = self.call("code_of", {"door": "red", "old": True}) + self.BETWEEN + self.call("open_door", {"code": 1907})
        choice = self.create(parallel_tool_calls=False, extra_body=spelled(text)).choices[0]
        self.assertEqual(self.check_calls(choice, "tool_calls"), [("code_of", {"door": "red", "old": True})])

    def test_a_loop_runs_until_there_is_an_answer(self):
        """What the Node client's runTools does; the Python client leaves it to its user."""
        doors = {"blue": FACT}
        messages = [{"role": "user", "content": "Hello!"}]
        # What the demo model would not think of by itself.
        script = [spelled(self.call("code_of", {"door": "blue", "old": False})), {}]
        for extra in script:
            choice = self.create(*messages, max_tokens=80, extra_body=extra).choices[0]
            messages.append(choice.message.model_dump(exclude_none=True))
            if choice.finish_reason != "tool_calls":
                break
            for call in choice.message.tool_calls:
                result = doors[json.loads(call.function.arguments)["door"]] + " " + QUESTION
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        self.assertEqual(choice.finish_reason, "stop")
        self.assertFalse(choice.message.tool_calls)
        self.assertTrue(choice.message.content)

    def test_a_pydantic_tool_is_parsed(self):
        from typing import Literal

        import openai
        from pydantic import BaseModel

        class Paint(BaseModel):
            """Paints a door."""

            door: Literal["blue", "red"]
            coats: Literal[1, 2]

        tool = openai.pydantic_function_tool(Paint)
        text = self.call("Paint", {"door": "red", "coats": 2})
        for fields in ({"tool_choice": "required"}, {"extra_body": spelled(text)}):
            reply = self.client.chat.completions.parse(**self.ask(**{**fields, "tools": [tool]}))
            for call in reply.choices[0].message.tool_calls:
                self.assertIsInstance(call.function.parsed_arguments, Paint)
            with self.client.chat.completions.stream(**self.ask(**{**fields, "tools": [tool]})) as stream:
                final = stream.get_final_completion()
            self.assertIsInstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Paint)


@needs("openai")
class HermesTest(AutoTests, OpenAiCase):
    """The demo model as it is."""

    call = staticmethod(hermes_call)


class OtherModel(ServeCase):
    """Not a test by itself: the demo model behind another template."""

    template, special = "", None
    serve_args = []

    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(DemoModelAs(cls.template, cls.special))
        cls.serve = cls.enterClassContext(Serve(BINARY, ["--model-path", folder, *cls.serve_args]))
        cls.model = cls.serve.model()
        cls.client = openai_client(cls.serve)
        cls.addClassCleanup(cls.client.close)


@needs("openai")
class Llama3Test(AutoTests, OtherModel):
    template, special = LLAMA3_TEMPLATE, "<|python_tag|>"
    call = staticmethod(llama3_call)
    BETWEEN = "; "


@needs("openai")
class MistralTest(ToolTests, OtherModel):
    """`auto` cannot be made to call here: [TOOL_CALLS] is a token that no text spells."""

    template, special = MISTRAL_TEMPLATE, "[TOOL_CALLS]"


@needs("openai")
class NoToolsTest(OtherModel):
    """A model whose template does not take tools."""

    template = (
        "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )

    def test_tools_are_refused_before_the_answer(self):
        import openai

        messages = [{"role": "user", "content": QUESTION}]
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.chat.completions.create(model=self.model, messages=messages, tools=TOOLS)
        self.assertEqual(caught.exception.param, "tools")


@needs("openai")
class ThinkingTest(OtherModel):
    """The demo model has nothing to think about: the test begins a thought for it and makes it end soon."""

    template, special = THINKING_TEMPLATE, "</think>"

    def create(self, *more, **fields):
        messages = [{"role": "user", "content": f"{FACT} {QUESTION}"}, *more]
        return self.client.chat.completions.create(
            model=self.model, messages=messages, temperature=0, max_tokens=80, **fields
        )

    def think(self, **fields):
        extra = {"continue_final_message": True, **spelled("It is 4821."), **fields.pop("extra_body", {})}
        end = self.serve.post_json("/tokenize", {"model": self.model, "prompt": "</think>", "add_special_tokens": False})
        return self.create(
            {"role": "assistant", "content": "<think>\n"},
            logit_bias={str(end["tokens"][0]): 16},
            extra_body=extra,
            **fields,
        )

    def test_what_the_model_thinks_is_not_content(self):
        reply = self.think()
        message = reply.choices[0].message
        self.assertEqual(message.content, "It is 4821.")
        self.assertTrue(message.reasoning_content)
        self.assertNotIn("think>", message.reasoning_content)
        self.assertEqual(message.reasoning, message.reasoning_content)
        thought = reply.usage.completion_tokens_details.reasoning_tokens
        self.assertTrue(0 < thought < reply.usage.completion_tokens)
        reasoning = content = ""
        for chunk in self.think(stream=True):
            delta = chunk.choices[0].delta
            self.assertFalse(content and getattr(delta, "reasoning_content", None))
            reasoning += getattr(delta, "reasoning_content", None) or ""
            content += delta.content or ""
        self.assertEqual((reasoning, content), (message.reasoning_content, message.content))

    def test_thoughts_can_be_left_out(self):
        message = self.think(extra_body={"include_reasoning": False}).choices[0].message
        self.assertFalse(getattr(message, "reasoning_content", None))
        self.assertEqual(message.content, "It is 4821.")

    def test_what_the_model_does_not_think_is_content(self):
        message = self.create().choices[0].message
        self.assertEqual(message.content, FACT)
        self.assertFalse(getattr(message, "reasoning_content", None))

    def test_the_template_is_told_not_to_think(self):
        reply = self.create(reasoning_effort="none")
        self.assertFalse(getattr(reply.choices[0].message, "reasoning_content", None))
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hi!"}]}
        text = self.serve.post_json("/apply-template", {**body, "chat_template_kwargs": {"enable_thinking": False}})
        self.assertTrue(text["prompt"].endswith("<think>\n\n</think>\n\n"))


if __name__ == "__main__":
    unittest.main()
