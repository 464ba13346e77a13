"""litellm's OpenAI-compatible provider, in its own virtual environment: see litellm_calls.py."""

import importlib.util
import json
import os
import select
import subprocess
import sys
import unittest

from sdk_support import CODE_OF, FACT, QUESTION, arguments_fit, hermes_call, spelled
from support import ROOT, ServeCase

HERE = os.path.dirname(os.path.abspath(__file__))


def interpreter():
    """A Python that has litellm, or None."""
    own = os.environ.get("TIDEPOOL_LITELLM_PYTHON", os.path.join(ROOT, "build", "venv-litellm", "bin", "python"))
    if os.path.exists(own):
        found = subprocess.run(
            [own, "-c", "import importlib.util, sys; sys.exit(not importlib.util.find_spec('litellm'))"]
        )
        if found.returncode == 0:
            return own
    return sys.executable if importlib.util.find_spec("litellm") else None


class Failed(Exception):
    def __init__(self, reply):
        super().__init__(f"{reply['error']}: {reply['message']}")
        self.kind, self.status, self.message = reply["error"], reply["status"], reply["message"]


class LitellmTest(ServeCase):
    @classmethod
    def setUpClass(cls):
        python = interpreter()
        if python is None:
            raise unittest.SkipTest("the PyPI package litellm is not installed")
        super().setUpClass()
        cls.process = subprocess.Popen(
            [python, "-B", os.path.join(HERE, "litellm_calls.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        cls.addClassCleanup(cls.stop)

    @classmethod
    def stop(cls):
        cls.process.stdin.close()
        try:
            cls.process.wait(10)
        except subprocess.TimeoutExpired:
            cls.process.kill()
            cls.process.wait()
        cls.process.stdout.close()

    def call(self, function, **fields):
        fields = {
            "model": f"openai/{self.model}",
            "api_base": f"http://{self.serve.http}/v1",
            "api_key": "none",
            "max_retries": 0,
            "timeout": 60,
            **fields,
        }
        self.process.stdin.write(json.dumps({"call": function, "fields": fields}).encode() + b"\n")
        self.process.stdin.flush()
        # The first call waits for the package's own import.
        self.assertTrue(select.select([self.process.stdout], [], [], 120)[0], "litellm did not answer")
        reply = json.loads(self.process.stdout.readline())
        if "error" in reply:
            raise Failed(reply)
        return reply["value"]

    def completion(self, *messages, **fields):
        messages = list(messages) or [{"role": "user", "content": f"{FACT} {QUESTION}"}]
        return self.call("completion", messages=messages, **{"temperature": 0, "max_tokens": 900, **fields})

    def test_completion(self):
        reply = self.completion()
        self.assertEqual(reply["choices"][0]["message"]["content"], FACT)
        self.assertEqual(reply["choices"][0]["finish_reason"], "stop")
        self.assertGreater(reply["usage"]["completion_tokens"], 0)

    def test_streaming(self):
        reply = self.completion(stream=True, stream_options={"include_usage": True})
        self.assertGreater(len(reply["chunks"]), 3)
        self.assertEqual(reply["whole"]["choices"][0]["message"]["content"], FACT)
        self.assertEqual(reply["whole"]["choices"][0]["finish_reason"], "stop")

    def test_tools(self):
        hello = {"role": "user", "content": "Hello!"}
        for stream in (False, True):
            reply = self.completion(hello, tools=[CODE_OF], tool_choice="required", stream=stream)
            choice = (reply["whole"] if stream else reply)["choices"][0]
            self.assertEqual(choice["finish_reason"], "tool_calls")
            for call in choice["message"]["tool_calls"]:
                self.assertTrue(call["id"])
                arguments_fit(self, call["function"]["name"], call["function"]["arguments"])
            text = hermes_call("code_of", {"door": "green", "old": True})
            reply = self.completion(hello, tools=[CODE_OF], stream=stream, extra_body=spelled(text))
            call = (reply["whole"] if stream else reply)["choices"][0]["message"]["tool_calls"][0]
            self.assertEqual(json.loads(call["function"]["arguments"]), {"door": "green", "old": True})

    def test_structured_output(self):
        schema = {
            "type": "object",
            "properties": {"door": {"enum": ["blue", "red"]}},
            "required": ["door"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "door", "schema": schema, "strict": True}}
        reply = self.completion(response_format=form)
        self.assertIn(json.loads(reply["choices"][0]["message"]["content"])["door"], ("blue", "red"))

    def test_text_completion(self):
        reply = self.call(
            "text_completion", model=f"text-completion-openai/{self.model}", prompt="The code", max_tokens=4
        )
        self.assertEqual(reply["usage"]["completion_tokens"], 4)

    def test_embedding(self):
        reply = self.call("embedding", input=[FACT, QUESTION], encoding_format="float")
        self.assertEqual([item["index"] for item in reply["data"]], [0, 1])
        self.assertNotEqual(reply["data"][0]["embedding"], reply["data"][1]["embedding"])

    def test_errors_are_its_own_classes(self):
        for fields, kind, status in (
            ({"temperature": 99}, "BadRequestError", 400),
            ({"model": "openai/no-such-model"}, "NotFoundError", 404),
        ):
            with self.subTest(kind):
                with self.assertRaises(Failed) as caught:
                    self.completion(**fields)
                self.assertEqual((caught.exception.kind, caught.exception.status), (kind, status))
        with self.assertRaises(Failed) as caught:
            self.completion({"role": "user", "content": "word " * 20000})
        self.assertEqual(caught.exception.kind, "ContextWindowExceededError")


if __name__ == "__main__":
    unittest.main()
