"""The tokenizer that all the tiny checkpoints share: token i is byte i, four specials follow.

Written by hand: a byte-level BPE without merges, its bytes spelled as GPT-2 spells them (the printable ones as
themselves, the others from U+0100 on).
"""

import json

from cases import BOS, EOS, EOS2, PAD

FILES = ("tokenizer.json", "tokenizer_config.json")
SPECIALS = {"<bos>": BOS, "<eos>": EOS, "<end>": EOS2, "<pad>": PAD}


def byte_spellings():
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def tokenizer_json():
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for content, id in SPECIALS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelling: byte for byte, spelling in enumerate(byte_spellings())},
            "merges": [],
        },
    }


def tokenizer_config():
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(FILES, (tokenizer_json(), tokenizer_config())):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
