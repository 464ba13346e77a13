"""langchain-openai: its chat model and its embeddings, which many programs stand on."""

import unittest

from sdk_support import FACT, QUESTION, needs, spelled, hermes_call
from support import ServeCase


@needs("langchain_openai")
class LangchainTest(ServeCase):
    def chat(self, **options):
        from langchain_openai import ChatOpenAI

        options = {"temperature": 0, "max_tokens": 900, "max_retries": 0, "timeout": 60, **options}
        return ChatOpenAI(model=self.model, base_url=f"http://{self.serve.http}/v1", api_key="none", **options)

    def door(self):
        from typing import Literal

        from pydantic import BaseModel

        class Door(BaseModel):
            """A door."""

            colour: Literal["blue", "red"]
            locked: bool

        return Door

    def test_invoke(self):
        reply = self.chat().invoke(f"{FACT} {QUESTION}")
        self.assertEqual(reply.content, FACT)
        self.assertGreater(reply.usage_metadata["output_tokens"], 0)
        self.assertEqual(reply.response_metadata["finish_reason"], "stop")
        self.assertEqual(self.chat().invoke([("system", FACT), ("human", QUESTION)]).content, FACT)

    def test_stream(self):
        whole = None
        for chunk in self.chat(stream_usage=True).stream(f"{FACT} {QUESTION}"):
            whole = chunk if whole is None else whole + chunk
        self.assertEqual(whole.content, FACT)
        self.assertGreater(whole.usage_metadata["output_tokens"], 0)

    def test_batch_and_async(self):
        import asyncio

        prompts = [f"The code of the blue door is {code}. {QUESTION}" for code in (4821, 1907, 7730)]
        expected = [f"The code of the blue door is {code}." for code in (4821, 1907, 7730)]
        self.assertEqual([reply.content for reply in self.chat().batch(prompts)], expected)

        async def run():
            return [reply.content for reply in await self.chat().abatch(prompts)]

        self.assertEqual(asyncio.run(run()), expected)

    def test_bound_tools(self):
        from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
        from langchain_core.tools import tool
        from typing import Literal

        @tool
        def code_of(door: Literal["blue", "red"]) -> str:
            """The code of a door."""
            return FACT

        hello = HumanMessage("Hello!")
        for choice in ("any", "code_of"):
            reply = self.chat().bind_tools([code_of], tool_choice=choice).invoke([hello])
            self.assertIsInstance(reply, AIMessage)
            self.assertEqual({call["name"] for call in reply.tool_calls}, {"code_of"})
            self.assertFalse(reply.invalid_tool_calls)
        text = spelled(hermes_call("code_of", {"door": "red"}))
        whole = None
        for chunk in self.chat(extra_body=text).bind_tools([code_of]).stream([hello]):
            whole = chunk if whole is None else whole + chunk
        self.assertEqual([(call["name"], call["args"]) for call in whole.tool_calls], [("code_of", {"door": "red"})])
        messages = [hello, reply]
        for call in reply.tool_calls:
            messages.append(code_of.invoke(call))
            self.assertIsInstance(messages[-1], ToolMessage)
        answer = self.chat().bind_tools([code_of]).invoke([*messages, HumanMessage(QUESTION)])
        self.assertEqual(answer.content, FACT)

    def test_structured_output(self):
        door = self.door()
        for method in ("json_schema", "function_calling"):
            with self.subTest(method):
                reply = self.chat().with_structured_output(door, method=method).invoke(f"{FACT} {QUESTION}")
                self.assertIsInstance(reply, door)

    def test_the_responses_api(self):
        reply = self.chat(use_responses_api=True).invoke(f"{FACT} {QUESTION}")
        self.assertEqual(reply.text if isinstance(reply.text, str) else reply.text(), FACT)

    def test_embeddings(self):
        from langchain_openai import OpenAIEmbeddings

        # Without this it fetches OpenAI's own vocabulary to cut texts by tokens.
        model = OpenAIEmbeddings(
            model=self.model,
            base_url=f"http://{self.serve.http}/v1",
            api_key="none",
            check_embedding_ctx_length=False,
        )
        vectors = model.embed_documents([FACT, QUESTION])
        self.assertEqual(len(vectors), 2)
        for one, other in zip(model.embed_query(FACT), vectors[0]):
            self.assertAlmostEqual(one, other, places=2)


if __name__ == "__main__":
    unittest.main()
