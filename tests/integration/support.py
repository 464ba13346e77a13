"""What the integration tests share: the binary, the outside data, the prompts."""

import json
import os
import unittest

from harness import Serve

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
BINARY = os.environ.get("TIDEPOOL_BINARY", os.path.join(ROOT, "build", "release", "bin", "tidepool"))
STORIES = os.path.join(ROOT, "..", "shared", "data", "tiny_llms", "stories260K")

# Same numbers whatever the batch, so that an answer can be compared with one from before a fault.
EXACT = ["--engine-batch-invariant", "true"]


def passage(seed, sentences=24):
    """A prompt of some hundred tokens that no other seed shares a block with."""
    colours = ["blue", "red", "green", "white", "black", "yellow"]
    lines = [
        f"The code of the {colours[i % 6]} door is {(seed * 7919 + i * 1237) % 9000 + 1000}." for i in range(sentences)
    ]
    return f"Note {seed}. " + " ".join(lines) + " What is the code of the blue door?"


def chat(model, seed, **fields):
    body = {
        "model": model,
        "messages": [{"role": "user", "content": passage(seed)}],
        "max_tokens": 24,
        "temperature": 0,
    }
    body.update(fields)
    return body


def completion(model, seed, tokens=64, **fields):
    """Runs to its token limit whatever the model wants: a request of known length."""
    body = {"model": model, "prompt": passage(seed), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body.update(fields)
    return body


def text_of(events):
    """The text of a streamed chat or completion."""
    out = ""
    for event in events:
        if event == "[DONE]":
            continue
        for choice in event.get("choices", []):
            out += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return out


class ServeCase(unittest.TestCase):
    """Tests of one class share a `tidepool serve` with `args` and `env`."""

    args = []
    env = {}

    @classmethod
    def setUpClass(cls):
        cls.serve = cls.enterClassContext(Serve(BINARY, cls.args, cls.env))
        cls.model = cls.serve.model()


def stories(form):
    path = os.path.join(STORIES, form)
    if not os.path.isdir(path):
        raise unittest.SkipTest(f"{path} is not there")
    return path


def stories_reference(name="dev"):
    with open(os.path.join(STORIES, f"reference_{name}.json")) as file:
        return json.load(file)["items"]
