"""Texts that tokenizers trip over: a seeded generator, shared by the differential test and the goldens.

`texts(seed, count, specials)` yields `bytes`: mostly valid UTF-8, some of it broken. `specials` are the spellings of
the tokenizer's added tokens, which are spliced in whole, cut, nested and with white space round them.
"""
import random

PROSE = [
    "The quick brown fox jumps over the lazy dog, doesn't it? They've said we'll see; I'm sure he'd know.",
    "Dr. Smith's e-mail (j.smith@example.com) was re-sent on 2024-03-17 at 09:41:07, costing $1,234,567.89!",
    "Die Straße führt über die Brücke; größere Äpfel kosten 3,50 € — «vielleicht» weniger.",
    "L'été dernier, où l'on a vu naître l'œuvre d'un garçon très âgé, ça coûtait déjà cher.",
    "El niño comió piñas; ¿qué más? ¡Mañana será otro día!", "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "人工智能正在改变世界。他说：“今天天气很好，我们去公园吧！”", "吾輩は猫である。名前はまだ無い。カタカナとひらがな、漢字２０２４年。",
    "다람쥐 헌 쳇바퀴에 타고파. 안녕하세요, 세계!", "हिन्दी में लिखा हुआ एक वाक्य जिसमें संयुक्ताक्षर हैं: क्षत्रिय।",
    "السلام عليكم ورحمة الله وبركاته، كيف حالكَ اليومَ؟ ١٢٣٤", "שָׁלוֹם עוֹלָם, מה שלומך?", "สวัสดีชาวโลก นี่คือข้อความภาษาไทย ๑๒๓",
    "Tiếng Việt có dấu: Nguyễn Ái Quốc đã viết những điều ấy.", "ქართული ენა და მისი დამწერლობა.", "ትናንት ወደ ገበያ ሄድኩ።",
    "def f(x, *args, **kw):\n    return {k: v for k, v in kw.items() if k != 'x'}  # noqa\n",
    "for (int i = 0; i < n; ++i) {\n\tif (a[i] >= 0x1F && !b) { s += std::to_string(a[i]); }\n}\n",
    '{"role": "user", "content": "Hi\\n\\tthere", "n": [1, 2.50, -3e+10], "ok": true, "x": null}',
    "<html><body class=\"a b\">&nbsp;<!-- c --></body></html>", "SELECT * FROM t WHERE id=42 AND name LIKE '%o''b%';",
    "https://example.org/a/b?c=d&e=%20f#g", "x = \\frac{1}{2}\\sum_{i=1}^{n} a_i^2", "https://例え.jp/パス",
    "I'LL CAN'T DON'T We'Re 'tis y'all 'S 'ſ rock'n'roll O'Neil’s", "naïve café Zoë coöperate façade",
]
EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇫🇷🇯🇵", "❤️", "☺", "👩🏿‍💻", "🧑‍🤝‍🧑", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🫠", "🪿", "©️"]
SPACES = [" ", "  ", "    ", "\t", "\n", "\r\n", "\r", "\n\n", " \n ", "\t\t", "\v", "\f", "\x1c", "\x1f", "\x85", "\xa0",
          "\u1680", "\u180e", "\u2000", "\u2003", "\u2009", "\u200a", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f",
          "\u2060", "\u3000", "\ufeff", " \u3000 "]
MARKS = ["\u0301", "\u0323", "\u0308\u0301", "\u0327", "\u0345", "\u093c", "\u0e31", "\u3099", "\u20dd", "\ufe0f",
         "\u05b0\u05bc", "\u0315\u0300\u05ae\u0300\u0062", "\u1dce", "\u034f", "\u200d", "\u200c", "\u0338"]
ODD = ["\x00", "\x01", "\x07", "\x08", "\x1b[0m", "\x7f", "\x80", "\x9f", "\xad", "\u061c", "\u200e", "\u202e", "\ufff9", "\ufffc",
       "\ufffd", "\uffff", "\U0001ffff", "\U0010ffff", "\ue000", "\U000f0000", "ﬁ", "ﬆ", "ſ", "ß", "ẞ", "İ", "ı", "Ǆ", "ǆ", "K", "Å",
       "Ω", "㎏", "½", "²", "Ⅷ", "①", "㍿", "㋿", "ｶﾞ", "Ａｂｃ１２", "각", "가\u11a8", "\u1100\u1161\u11a8", "〇", "々", "ｰ", "ﷺ", "𝔘𝔫𝔦",
       "𝟘𝟙𝟚", "𐍈", "𒀀", "𓀀", "\U00011938", "\U00011935\U00011930", "\U0001e030", "\U000105c0", "\u1c89", "\ua7cb",
       "\U00010d40", "\U0001ccf0", "\u0897", "▁", "▁▁", "_", "Ġ", "ĠĠ", "Ċ", "<0x0A>", "<0xE2>", "##", "##ing", "</w>", "<unk>",
       "</s>", "<s>", "[UNK]", "[CLS]", "``", "''", "…", "—", "–", "«»", "“”", "‘’", "'s", "'S", "'ll", "'LL", "n't", "'ſ"]
BROKEN = [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80\x80",
          b"\xe2\x28\xa1", b"\xf0\x9f", b"\xf8\x88\x80\x80\x80", b"\xc3\x28", b"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SCRIPTS = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xFFF),
           (0x10A0, 0x13FF), (0x1E00, 0x206F), (0x2070, 0x2BFF), (0x2C00, 0x2FFF), (0x3000, 0x33FF), (0x4E00, 0x9FFF), (0xA000, 0xA95F),
           (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x10000, 0x1044F), (0x10D00, 0x11FFF), (0x12000, 0x12399), (0x16A00, 0x1BCAF),
           (0x1D000, 0x1D7FF), (0x1E000, 0x1EFFF), (0x1F000, 0x1FBFF), (0x20000, 0x2FA1F), (0x30000, 0x323AF), (0xE0000, 0xE01EF)]


def point(rng):
    first, last = SCRIPTS[rng.randrange(len(SCRIPTS))]
    while True:
        cp = rng.randint(first, last)
        if not 0xD800 <= cp <= 0xDFFF:
            return chr(cp)


def special(rng, specials):
    """A special token's spelling: whole, cut, changed, doubled, with white space."""
    text = rng.choice(specials)
    kind = rng.randrange(8)
    if kind == 0:
        cut = rng.randint(0, len(text))
        return text[:cut]
    if kind == 1:
        cut = rng.randint(0, len(text))
        return text[:cut] + text + text[cut:]
    if kind == 2:
        return rng.choice(SPACES) + text + rng.choice(SPACES)
    if kind == 3:
        return text + text
    if kind == 4:
        return rng.choice(LETTERS) + text + rng.choice(LETTERS)
    if kind == 5:
        cut = rng.randint(0, len(text))
        return text[:cut] + rng.choice(["\u200b", " ", "\u0301", ""]) + text[cut:]
    return text


def piece(rng, specials):
    kind = rng.randrange(18)
    if kind <= 3:
        text = rng.choice(PROSE)
        begin = rng.randint(0, len(text) - 1)
        return text[begin:begin + rng.randint(1, 40)]
    if kind == 4:
        return rng.choice(EMOJI) * rng.choice([1, 1, 1, 2, 5])
    if kind <= 6:
        return "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 4)))
    if kind == 7:
        return rng.choice(LETTERS + "éßжあ中한") + "".join(rng.choice(MARKS) for _ in range(rng.randint(1, 4)))
    if kind <= 9:
        return rng.choice(ODD)
    if kind == 10:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 12)))
    if kind == 11:
        return "".join(rng.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") for _ in range(rng.randint(1, 8)))
    if kind <= 13:
        return "".join(point(rng) for _ in range(rng.randint(1, 6)))
    if kind == 14:
        return rng.choice(["a", "ab", " ", "\n", "é", "中", "😀", "=", "0", "'", "\u0301", "▁", "the "]) * rng.randint(2, 40)
    if kind == 15 and specials:
        return special(rng, specials)
    if kind == 16:
        return "".join(rng.choice(LETTERS + "  '") for _ in range(rng.randint(1, 25)))
    if specials and rng.random() < 0.3:
        return special(rng, specials)
    return rng.choice(PROSE)


def texts(seed, count, specials=()):
    rng = random.Random(seed)
    specials = list(specials)
    yield b""
    for _ in range(count - 1):
        parts = [piece(rng, specials).encode("utf-8", "surrogatepass") for _ in range(rng.choice([1, 1, 2, 2, 3, 4, 6]))]
        if rng.random() < 0.06:
            parts.insert(rng.randint(0, len(parts)), rng.choice(BROKEN))
        data = b"".join(parts)
        if rng.random() < 0.02 and data:
            data = data[:rng.randint(0, len(data))]
        yield data
