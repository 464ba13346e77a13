"""What the tests of other people's clients share: who is installed, model directories, tools."""

import importlib.util
import json
import os
import shutil
import tempfile
import unittest

from support import ROOT, ServeCase

DEMO = os.path.join(ROOT, "tools", "demo_model", "model")


def needs(package):
    return unittest.skipUnless(importlib.util.find_spec(package), f"the PyPI package {package} is not installed")


def openai_client(serve, **options):
    import openai

    options = {"api_key": "none", "timeout": 60, "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"http://{serve.http}/v1", **options)


class OpenAiCase(ServeCase):
    """A served demo model and the official client on it, without retries: a test sees the first answer."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.client = openai_client(cls.serve)
        cls.addClassCleanup(cls.client.close)


# The demo model looks facts up but decides nothing else: it calls a tool only when it has to.

QUESTION = "What is the code of the blue door?"
FACT = "The code of the blue door is 4821."


def function_tool(name, description="", strict=None, **properties):
    """A tool of the chat API whose parameters are all required and bounded: any answer ends."""
    function = {
        "name": name,
        "description": description,
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        },
    }
    if strict is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


CODE_OF = function_tool(
    "code_of", "The code of a door.", door={"type": "string", "enum": ["blue", "red", "green"]}, old={"type": "boolean"}
)
OPEN_DOOR = function_tool("open_door", "Opens a door.", code={"type": "integer", "enum": [4821, 1907]})
TOOLS = [CODE_OF, OPEN_DOOR]


def arguments_fit(case, name, arguments):
    """`arguments`: JSON text of a call of one of TOOLS; asserts that it fits the tool's schema, and parses it."""
    import jsonschema

    tool = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == name)
    value = json.loads(arguments)
    jsonschema.validate(value, tool["parameters"])
    case.assertIsInstance(value, dict)
    return value


# How a model writes a call: what a structured output has to spell so that a test has `auto` call a tool.


def hermes_call(name, arguments):
    return '<tool_call>\n{"name": %s, "arguments": %s}\n</tool_call>' % (json.dumps(name), json.dumps(arguments))


def llama3_call(name, arguments):
    return '{"name": %s, "parameters": %s}' % (json.dumps(name), json.dumps(arguments))


def spelled(*choices):
    """extra_body that leaves the model these texts to choose from."""
    return {"structured_outputs": {"choice": list(choices)}}


class DemoModelAs:
    """Context manager: a directory with the demo model behind another chat template; `special` renames the token
    that the demo model has and never uses (<|pad|>)."""

    def __init__(self, chat_template, special=None):
        self.chat_template = chat_template
        self.special = special

    def __enter__(self):
        self.dir = tempfile.mkdtemp(prefix="tidepool-model-")
        for name in os.listdir(DEMO):
            shutil.copy(os.path.join(DEMO, name), self.dir)
        path = os.path.join(self.dir, "tokenizer_config.json")
        with open(path) as file:
            config = json.load(file)
        config["chat_template"] = self.chat_template
        if self.special:
            config["pad_token"] = self.special
            self._rename_pad()
        with open(path, "w") as file:
            json.dump(config, file)
        return self.dir

    def _rename_pad(self):
        path = os.path.join(self.dir, "tokenizer.json")
        with open(path) as file:
            tokenizer = json.load(file)
        for token in tokenizer["added_tokens"]:
            if token["content"] == "<|pad|>":
                token["content"] = self.special
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[self.special] = vocabulary.pop("<|pad|>")
        with open(path, "w") as file:
            json.dump(tokenizer, file)

    def __exit__(self, *_):
        shutil.rmtree(self.dir, ignore_errors=True)


# Templates that write tools, calls and results as the named models do, in the demo model's own roles.

_ROLES = (
    "{{ '<|' + message['role'] + '|>' }}{% if message['content'] %}{{ message['content'] | trim }}{% endif %}"
)
_GENERATE = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"

LLAMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|system|>Answer with a JSON for a function call: {\"name\": function name, \"parameters\": "
    "dictionary}.' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{% elif message['tool_calls'] %}"
    "{% if message['tool_calls'] | length != 1 %}{{ raise_exception('One call at once.') }}{% endif %}"
    "{% set call = message['tool_calls'][0]['function'] %}"
    "{{ '<|assistant|><|python_tag|>{\"name\": \"' + call['name'] + '\", \"parameters\": ' }}"
    "{{ call['arguments'] | tojson }}{{ '}<|end|>' }}"
    "{% else %}" + _ROLES + "{{ '<|end|>' }}{% endif %}"
    "{% endfor %}" + _GENERATE
)

MISTRAL_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|system|>[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|user|>[TOOL_RESULTS]{\"content\": ' + (message['content'] | tojson) + ', \"call_id\": \"' "
    "+ message['tool_call_id'] + '\"}[/TOOL_RESULTS]<|end|>' }}"
    "{% elif message['tool_calls'] %}"
    "{{ '<|assistant|>[TOOL_CALLS][' }}"
    "{% for call in message['tool_calls'] %}"
    "{{ '{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' + (call['function']['arguments'] | tojson) "
    "+ ', \"id\": \"' + call['id'] + '\"}' }}{% if not loop.last %}{{ ', ' }}{% endif %}"
    "{% endfor %}{{ ']<|end|>' }}"
    "{% else %}" + _ROLES + "{{ '<|end|>' }}{% endif %}"
    "{% endfor %}" + _GENERATE
)

# Thinks before it answers, as Qwen3 does: <think> ... </think> in the answer, not in the history.
THINKING_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + content | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
