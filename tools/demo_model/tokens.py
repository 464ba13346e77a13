"""The demo model's tokenizer and chat template, and documents as token ids."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import trainers

import generate

BOS, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = [BOS, EOT, PAD, SYSTEM, USER, ASSISTANT, END]
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

# Single digits (\p{N} without a count), so that a code is spelt digit by digit.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# A conversation without tools is what the model was trained on.  Tools and their
# results are written in Hermes' format, as Qwen's models do: the demo model cannot
# choose to call one, but a server can make it (`tool_choice`).
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}"
    "{{ '<|system|>' }}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] | trim + '\n' }}"
    "{% endif %}"
    "{{ 'To call functions, answer for each:\n<tool_call>\n"
    "{\"name\": <name>, \"arguments\": <object>}\n</tool_call>\nFunctions:' }}"
    "{% for tool in tools %}{{ '\n' + (tool['function'] | tojson) }}{% endfor %}"
    "{{ '<|end|>' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if not loop.first %}"
    "{{ raise_exception('The system message must come first.') }}"
    "{% endif %}"
    "{% if not tools %}"
    "{{ '<|system|>' + message['content'] | trim + '<|end|>' }}"
    "{% endif %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<|user|>' + message['content'] | trim + '<|end|>' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}"
    "{% if message['content'] %}{{ message['content'] | trim }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% if message['content'] or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n{\"name\": ' + (call['function']['name'] | tojson) + ', \"arguments\": ' }}"
    "{% if call['function']['arguments'] is string %}"
    "{{ call['function']['arguments'] }}"
    "{% else %}"
    "{{ call['function']['arguments'] | tojson }}"
    "{% endif %}"
    "{{ '}\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|end|>' }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|user|><tool_response>\n' + message['content'] | trim + '\n</tool_response><|end|>' }}"
    "{% else %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(vocab_size, seed, documents=4000):
    """A byte-level BPE trained on generated text, every byte in the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rng = generate.train_rng(seed)

    def texts():
        for _ in range(documents):
            for message in generate.chat(rng, 100, 250):
                yield message["content"]
            yield "".join(text for text, _ in generate.plain(rng, 100))

    tokenizer.train_from_iterator(texts(), trainer)
    # Text that is no chat starts with the begin token; a rendered chat already
    # holds it and is encoded without added special tokens.
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))]),
    ])
    return tokenizer


def save_tokenizer_config(folder, context_length):
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS, "eos_token": END, "pad_token": PAD,
        "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (Path(folder) / "tokenizer_config.json").write_text(text)


class Encoder:
    """Turns documents into token ids with a loss weight for each id."""

    def __init__(self, tokenizer, context_weight):
        self.tokenizer = tokenizer
        self.context_weight = context_weight
        self.special = {name: tokenizer.token_to_id(name) for name in SPECIALS}

    def text(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chat(self, messages):
        """What CHAT_TEMPLATE renders, as ids; answers have the loss weight 1."""
        ids, weights = [self.special[BOS]], [0.0]
        for message in messages:
            body = self.text(message["content"])
            answer = message["role"] == "assistant"
            ids += [self.special[ROLE_TOKENS[message["role"]]], *body,
                    self.special[END]]
            # The end of an answer is the model's to say; the role token is not.
            weight = 1.0 if answer else self.context_weight
            weights += [self.context_weight] + [weight] * (len(body) + 1)
        return ids, weights

    def plain(self, pieces):
        ids, weights = [self.special[BOS]], [0.0]
        for text, is_recall in pieces:
            body = self.text(text)
            ids += body
            weights += [1.0 if is_recall else self.context_weight] * len(body)
        return ids + [self.special[EOT]], weights + [self.context_weight]
