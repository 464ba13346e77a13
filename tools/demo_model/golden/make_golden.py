"""Makes the golden files of the demo model with Hugging Face `transformers`.

    python golden/make_golden.py

Run it again whenever the model changes.  It writes, beside itself:

demo_greedy.jsonl     First line: how it was made (versions, dtype).  Then 20
                      prompts, each continued greedily for 64 tokens; the end
                      tokens do not stop it.  Some positions carry the five best
                      log-probabilities.
demo_logits.json      For two short prompts, what `demo_logits.bin` holds: the
demo_logits.bin       logits of every position, row by row, float32 little-endian.
demo_tokenizer.jsonl  50 texts, their ids without and with added special tokens,
                      and the decoded text.
demo_template.jsonl   13 conversations, three with tools, the text the chat
                      template renders, and the ids of that text.

The model runs in float32 on the bfloat16 weights.  The greedy prompts are the
first of a seeded stream of candidates whose smallest gap between the best and
the second-best logit, over all 64 steps, is above MIN_GAP: an engine that
computes in another order or precision can then still reach the same tokens.
"""

import json
import sys
from pathlib import Path

import numpy
import tokenizers
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import generate  # noqa: E402  (it lies one folder up)

SEED = 777
NEW_TOKENS = 64
MIN_GAP = 0.02
TOP_POSITIONS = [0, 1, 2, 3, 7, 15, 31, 63]
# What to look for: (chat or raw, about how many tokens).
WANTED = [("chat", n) for n in (20, 20, 60, 60, 120, 120, 250, 250, 500, 500,
                                800, 1000, 1200, 1200)]
WANTED += [("raw", n) for n in (20, 40, 100, 200, 400, 900)]

TEXTS = [
    "", " ", "  ", "\n", "\t", "a", "The code of the blue door is 4821.",
    "What is the code of the blue door?", "Hello, world!", "hello world",
    " leading space", "trailing space ", "two  spaces", "five     spaces",
    "tab\tand\t\ttabs", "line\nline\n\nline", "windows\r\nline\r\n",
    "  \n  indented\n    more", "mixed \t \n \r\n end", "1234567890",
    "3.14159", "1,000,000", "a1b2c3", "x=42;y=-7", "I'm you're we've he'll she'd",
    "DON'T SHOUT", "caf\u00e9 na\u00efve", "cafe\u0301 combining",
    "\u00dcber Stra\u00dfe \u00c4\u00d6\u00dc", "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0665\u0666\u0667 \u00bd \u00b2 \u2167",
    "\U0001f600", "\U0001f44d\U0001f3fd ok \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u00a0no-break\u00a0space\u3000wide", "zero\u200bwidth\ufeffmark",
    "!!! ??? ... ---", "(brackets) [and] {braces}", "https://example.org/a?b=c&d=e#f",
    "def f(x):\n    return x + 1\n", "{\"key\": [1, 2, null]}",
    "<|begin_of_text|>", "<|user|>Hi!<|end|><|assistant|>",
    "<|user", "<|nothing|> <| end |>", "a<|end|>b <|pad|><|end_of_text|> c",
]

CONVERSATIONS = [
    ([("user", "Hello!")], True),
    ([("user", "Hello!")], False),
    ([("system", "Answer the question."), ("user", "Who are you?")], True),
    ([("system", "  Answer the question.\n"), ("user", "\n Who are you?  ")], True),
    ([("user", "Hi!"), ("assistant", "Hello! How can I help you?"),
      ("user", "What can you do?")], True),
    ([("user", "Hi!"), ("assistant", " Hello! ")], False),
    ([("user", "The code of the blue door is 4821. The code of the red door is "
       "1177. What is the code of the blue door?")], True),
    ([("user", "The key is in the attic."), ("assistant", "I have read it."),
      ("user", "Where is the key?"), ("assistant", "The key is in the attic."),
      ("user", "Thank you!")], True),
    ([("user", "Caf\u00e9 \U0001f600\nsecond line")], True),
    ([("user", ""), ("assistant", ""), ("user", "<|end|> is not the end")], True),
]

TOOLS = [
    {"type": "function", "function": {
        "name": "code_of", "description": "The code of a door.", "parameters": {
            "type": "object", "properties": {"door": {"type": "string"}},
            "required": ["door"]}}},
    {"type": "function", "function": {"name": "caf\u00e9"}},
]
CALLS = [
    {"id": "call_1", "type": "function",
     "function": {"name": "code_of", "arguments": {"door": "blue"}}},
    {"id": "call_2", "type": "function", "function": {"name": "caf\u00e9", "arguments": "{}"}},
]
TOOL_CONVERSATIONS = [
    [{"role": "user", "content": "What is the code of the blue door?"}],
    [{"role": "system", "content": " Answer the question. "},
     {"role": "user", "content": "What is the code of the blue door?"},
     {"role": "assistant", "content": None, "tool_calls": CALLS[:1]},
     {"role": "tool", "tool_call_id": "call_1", "content": "The code of the blue door is 4821."}],
    [{"role": "user", "content": "What is the code of the blue door?"},
     {"role": "assistant", "content": "I will look.", "tool_calls": CALLS},
     {"role": "tool", "tool_call_id": "call_1", "content": "The code of the blue door is 4821.\n"},
     {"role": "tool", "tool_call_id": "call_2", "content": ""},
     {"role": "assistant", "content": "The code of the blue door is 4821."},
     {"role": "user", "content": "Thank you!"}],
]


def write_lines(name, rows):
    with open(HERE / name, "w", encoding="utf-8", newline="\n") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


@torch.inference_mode()
def greedy(model, prompt_ids):
    """64 tokens, the log-probabilities on the way and the smallest gap.

    Gives up (None) at the first gap that is not above MIN_GAP.
    """
    cache, step_ids = None, torch.tensor([prompt_ids])
    output, tops, gap = [], [], float("inf")
    for position in range(NEW_TOKENS):
        result = model(step_ids, past_key_values=cache, use_cache=True)
        cache, logits = result.past_key_values, result.logits[0, -1]
        best = logits.topk(2).values
        gap = min(gap, (best[0] - best[1]).item())
        if gap <= MIN_GAP:
            return None
        if position in TOP_POSITIONS:
            values, ids = logits.log_softmax(-1).topk(5)
            tops.append({"position": position, "ids": ids.tolist(),
                         "logprobs": [round(v, 6) for v in values.tolist()]})
        output.append(logits.argmax().item())
        step_ids = torch.tensor([[output[-1]]])
    return output, tops, gap


def candidate(rng, tokenizer, style, length):
    """A prompt as text or messages, and its ids."""
    if style == "raw":
        pieces = generate.plain(rng, length)
        words = "".join(text for text, _ in pieces).split(" ")
        # Cut anywhere, also in the middle of a sentence.
        prompt = " ".join(words[:len(words) - rng.randint(0, 6)])
        return prompt, tokenizer.encode(prompt)
    if length <= 20 and rng.random() < 0.5:
        questions, _ = rng.choice(generate.SMALL_TALK)
        messages = [{"role": "user", "content": rng.choice(questions)}]
    else:
        # At least 40 tokens, so that there is room for one question.
        messages = generate.chat(rng, length // 3, max(length, 40))
        while messages[-1]["role"] == "assistant":
            messages.pop()
    text = tokenizer.apply_chat_template(messages, tokenize=False,
                                         add_generation_prompt=True)
    return messages, tokenizer.encode(text, add_special_tokens=False)


def greedy_rows(model, tokenizer):
    rng = generate.heldout_rng(SEED)
    rows, seen, tried = [], set(), 0
    for style, length in WANTED:
        while True:
            tried += 1
            prompt, prompt_ids = candidate(rng, tokenizer, style, length)
            if tuple(prompt_ids) in seen:
                continue
            if result := greedy(model, prompt_ids):
                break
        output, tops, gap = result
        seen.add(tuple(prompt_ids))
        rows.append({"kind": style, "prompt": prompt, "prompt_ids": prompt_ids,
                     "output_ids": output, "output_text": tokenizer.decode(output),
                     "top5_logprobs": tops, "min_top1_top2_gap": round(gap, 6)})
        print(f"{style} {len(prompt_ids)} tokens, gap {gap:.3f}", flush=True)
    about = {"transformers": transformers.__version__, "torch": torch.__version__,
             "tokenizers": tokenizers.__version__, "seed": SEED,
             "weights_dtype": "bfloat16", "compute_dtype": "float32",
             "new_tokens": NEW_TOKENS, "ignore_eos": True, "min_gap": MIN_GAP,
             "candidates_tried": tried}
    return [about, *rows]


@torch.inference_mode()
def write_logits(model, tokenizer):
    prompts = ["The code of the blue door is 4821. The code of the",
               tokenizer.apply_chat_template(
                   [{"role": "user", "content": "Where is the key?"}],
                   tokenize=False, add_generation_prompt=True)]
    about, blocks, offset = [], [], 0
    for text, added in zip(prompts, (True, False)):
        ids = tokenizer.encode(text, add_special_tokens=added)
        logits = model(torch.tensor([ids])).logits[0].numpy().astype("<f4")
        about.append({"prompt": text, "prompt_ids": ids, "offset_floats": offset,
                      "rows": logits.shape[0], "columns": logits.shape[1]})
        blocks.append(logits.ravel())
        offset += logits.size
    numpy.concatenate(blocks).tofile(HERE / "demo_logits.bin")
    (HERE / "demo_logits.json").write_text(json.dumps(about, indent=1) + "\n")


def tokenizer_rows(tokenizer):
    assert len(TEXTS) == len(set(TEXTS)) == 50
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        yield {"text": text, "ids": ids,
               "ids_with_special": tokenizer.encode(text),
               "decoded": tokenizer.decode(ids),
               "decoded_skip_special": tokenizer.decode(ids, skip_special_tokens=True)}


def template_rows(tokenizer):
    assert len(CONVERSATIONS) == 10
    rows = [([{"role": role, "content": content} for role, content in turns], None, generation)
            for turns, generation in CONVERSATIONS]
    rows += [(messages, TOOLS, True) for messages in TOOL_CONVERSATIONS]
    for messages, tools, generation in rows:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                             add_generation_prompt=generation)
        yield {"messages": messages, **({"tools": tools} if tools else {}),
               "add_generation_prompt": generation, "rendered": text,
               "ids": tokenizer.encode(text, add_special_tokens=False)}


def main():
    folder = HERE.parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32).eval()
    write_lines("demo_tokenizer.jsonl", tokenizer_rows(tokenizer))
    write_lines("demo_template.jsonl", template_rows(tokenizer))
    write_logits(model, tokenizer)
    write_lines("demo_greedy.jsonl", greedy_rows(model, tokenizer))


if __name__ == "__main__":
    main()
