#!/usr/bin/env python3
"""Trains small tokenizers in the manner of model families whose files are not in this repository, with goldens.

    python3 tools/fidelity/make_tokenizers.py        (needs PyPI tokenizers; writes tests/golden/tokenizers)

Each <name>.json is what `tokenizers` saved; <name>.jsonl holds what it encodes and decodes with it: rows of
{"b64": text, "ids": with special tokens, "plain": without, "text": decoded, "skipped": decoded without specials}.
"""
import base64
import json
import pathlib
import struct
import sys
import unicodedata

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tokenizer_cases  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/tokenizers"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace("{1,3}", "")
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def corpus():
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("server/**/README.md")]):
        yield from path.read_text().split("\n")
    for text in tokenizer_cases.PROSE * 20:
        yield text


def charsmap():
    """sentencepiece's nmt_nfkc in miniature: a Darts double array over (source, replacement) pairs."""
    pairs = {chr(c): "" for c in [*range(0x01, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F, 0xAD]}
    pairs |= {c: " " for c in "\t\n\x0c\r\xa0\u1680\u2003\u2009\u2028\u2029\u202f\u205f\u3000\ufeff\u200b"}
    for c in [*range(0xA0, 0x180), *range(0x1E00, 0x1F00), *range(0x2100, 0x2190), *range(0x2460, 0x24D0),
              *range(0xFB00, 0xFB07), *range(0xFF01, 0xFFA0)]:
        form = unicodedata.normalize("NFKC", chr(c))
        if form != chr(c):
            pairs.setdefault(chr(c), form)
        parts = unicodedata.normalize("NFD", chr(c))
        if len(parts) == 2 and len(parts.encode()) < 6:
            pairs[parts] = form
    blob, offsets = b"", {}
    for value in sorted(set(pairs.values())):
        offsets[value] = len(blob)
        blob += value.encode() + b"\0"
    root = {}
    for key, value in pairs.items():
        node = root
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = offsets[value]
    units, used = [0], {0}

    def grow(n):
        while len(units) <= n:
            units.append(0)

    def place(at, node):
        """Lays out the children of `node`, whose unit is at `at`: child of byte b at base ^ b."""
        base = 1
        while any((base ^ b) in used for b in node) or (base ^ at) >= 1 << 21:
            base += 1
        for b in node:
            grow(base ^ b)
            used.add(base ^ b)
        units[at] |= (base ^ at) << 10 | (1 << 8 if 0 in node else 0)
        for b, child in sorted(node.items()):
            if b == 0:
                units[base] = 1 << 31 | child
            else:
                units[base ^ b] = b
                place(base ^ b, child)

    place(0, root)
    grow((len(units) | 0xFF) + 256)
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + blob


def bpe(pattern, specials, size=1200, ignore_merges=False, normalizer=None, pre=None):
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = pre or pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens(specials)
    return t


def llama3():
    t = bpe(LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            ignore_merges=True)
    bos = t.token_to_id("<|begin_of_text|>")
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B:1",
                                      special_tokens=[("<|begin_of_text|>", bos)])])
    return t


def qwen3():
    t = bpe(QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizer=normalizers.NFC())
    t.add_tokens([AddedToken(s, normalized=False) for s in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    return t


def smollm2():
    return bpe(None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
               pre=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]))


def o200k():
    return bpe(O200K, ["<|endoftext|>", "<|im_start|>", "<|im_sep|>"])


def deepseek():
    return bpe(None, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], pre=pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
        pre_tokenizers.Split(Regex(DEEPSEEK), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]))


def roberta():
    t = bpe(None, ["<s>", "</s>", "<pad>"], pre=pre_tokenizers.ByteLevel(add_prefix_space=True))
    t.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    t.add_tokens([AddedToken("word", single_word=True), AddedToken("  ", normalized=True), AddedToken("<r>", rstrip=True)])
    t.post_processor = processors.RobertaProcessing(("</s>", t.token_to_id("</s>")), ("<s>", t.token_to_id("<s>")))
    return t


def gemma():
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Replace(" ", "▁")
    t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    # Training needs words; the saved file has Gemma's pre-tokenizer, which cuts nothing once spaces are gone.
    train = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    train.normalizer = t.normalizer
    train.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+"), "isolated")
    train.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", *byte_tokens], show_progress=False))
    spec = json.loads(t.to_str())
    spec["model"] = json.loads(train.to_str())["model"] | {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    t = Tokenizer.from_str(json.dumps(spec))
    t.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    t.add_tokens([AddedToken(s, normalized=False) for s in ("\n\n", "\n\n\n", "▁▁", "▁▁▁", "\t\t", "<table>")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = t.token_to_id("<bos>")
    t.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B:1",
                                                     special_tokens=[("<bos>", bos)])
    return t


def unigram(normalizer, pre, decoder, specials, byte_fallback=False):
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)] if byte_fallback else []
    t = Tokenizer(models.Unigram())
    t.normalizer, t.pre_tokenizer = normalizer, pre
    t.train_from_iterator(corpus(), trainers.UnigramTrainer(
        vocab_size=1400, special_tokens=[*specials, *byte_tokens], unk_token="<unk>", show_progress=False))
    spec = json.loads(t.to_str())
    spec["model"]["byte_fallback"] = byte_fallback
    # The trainer's scores have a last digit that depends on the machine.
    spec["model"]["vocab"] = [[token, round(score, 6)] for token, score in spec["model"]["vocab"]]
    spec["added_tokens"] = [e for e in spec["added_tokens"] if e["content"] in specials]
    t = Tokenizer.from_str(json.dumps(spec))
    t.decoder = decoder
    return t


def t5():
    t = unigram(normalizers.Precompiled(charsmap()), pre_tokenizers.Metaspace(prepend_scheme="always"),
                decoders.Metaspace(), ["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    t.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>",
                                                     special_tokens=[("</s>", t.token_to_id("</s>"))])
    return t


def xlmr():
    t = unigram(normalizers.Sequence([normalizers.Precompiled(charsmap()), normalizers.Replace(Regex(" {2,}"), " ")]),
                pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
                decoders.Metaspace(), ["<s>", "<pad>", "</s>", "<unk>"])
    t.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", t.token_to_id("<s>")), ("</s>", t.token_to_id("</s>"))])
    return t


def unigram_bytes():
    return unigram(normalizers.Sequence([normalizers.Strip(), normalizers.NFKC(), normalizers.StripAccents(),
                                         normalizers.Lowercase()]),
                   pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
                   decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)]), ["<s>", "</s>", "<unk>"], byte_fallback=True)


def bert_uncased():
    t = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=40))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.train_from_iterator(corpus(), trainers.WordPieceTrainer(
        vocab_size=1500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    t.decoder = decoders.WordPiece()
    t.post_processor = processors.BertProcessing(("[SEP]", t.token_to_id("[SEP]")), ("[CLS]", t.token_to_id("[CLS]")))
    return t


def word_level():
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("contiguous")])
    t.train_from_iterator(corpus(), trainers.WordLevelTrainer(vocab_size=800, special_tokens=["<unk>"], show_progress=False))
    return t


def bpe_suffix():
    t = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", continuing_subword_prefix="@@"))
    t.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<unk>", "<s>"], end_of_word_suffix="</w>", continuing_subword_prefix="@@",
        show_progress=False))
    t.decoder = decoders.BPEDecoder(suffix="</w>")
    return t


FAMILIES = dict(llama3=llama3, qwen3=qwen3, smollm2=smollm2, o200k=o200k, deepseek=deepseek, roberta=roberta, gemma=gemma,
                t5=t5, xlmr=xlmr, unigram_bytes=unigram_bytes, bert_uncased=bert_uncased, word_level=word_level,
                bpe_suffix=bpe_suffix)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "VERSIONS").write_text(f"tokenizers {tokenizers.__version__}\n")
    for name, make in FAMILIES.items():
        t = make()
        (OUT / f"{name}.json").write_text(json.dumps(json.loads(t.to_str()), ensure_ascii=False, separators=(",", ":")))
        t = Tokenizer.from_file(str(OUT / f"{name}.json"))
        specials = [token.content for token in t.get_added_tokens_decoder().values()]
        with open(OUT / f"{name}.jsonl", "w") as out:
            for data in tokenizer_cases.texts(7, 150, specials):
                text = data.decode("utf-8", "replace")
                ids, plain = t.encode(text).ids, t.encode(text, add_special_tokens=False).ids
                row = dict(b64=base64.b64encode(data).decode(), ids=ids, plain=plain,
                           text=t.decode(ids, skip_special_tokens=False), skipped=t.decode(ids, skip_special_tokens=True))
                out.write(json.dumps(row, separators=(",", ":")) + "\n")
        print(name, t.get_vocab_size(), (OUT / f"{name}.json").stat().st_size)


if __name__ == "__main__":
    main()
