"""Generates the text that the Tidepool demo model is trained and measured on.

Everything here is drawn from the small word lists below and from a seeded
random generator: there is no outside text.  A *passage* is a list of short
sentences, some of which state facts ("The code of the blue door is 4821.") and
some of which only fill.  A *chat* asks questions whose answers stand in the
passage.  Values are drawn at random for each passage, so a model can answer
only by reading the passage: there is nothing to memorise.

Training and held-out seeds come from disjoint ranges (see `train_rng` and
`heldout_rng`).

Run as a program, it prints a few documents:  python generate.py --count 3
"""

import argparse
import itertools
import random

COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey",
           "orange", "purple", "pink", "silver"]
LOCKED = ["door", "box", "gate", "safe", "locker", "chest", "drawer", "cabinet",
          "suitcase", "garage"]
NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry",
         "Ida", "Jack", "Kate", "Leo", "Maria", "Noah", "Olga", "Paul", "Rosa",
         "Simon", "Tina", "Victor", "Wendy", "Adam", "Bella", "Carl", "Diana",
         "Eric", "Fiona", "George", "Helen", "Ivan", "Julia", "Kevin", "Laura",
         "Martin", "Nina", "Oscar", "Petra", "Robert", "Sara", "Tom"]
CITIES = ["Paris", "London", "Berlin", "Rome", "Madrid", "Vienna", "Oslo",
          "Lisbon", "Athens", "Dublin", "Prague", "Warsaw", "Tokyo", "Cairo",
          "Boston", "Chicago", "Toronto", "Sydney", "Lima", "Delhi", "Geneva",
          "Milan", "Hamburg", "Seville"]
JOBS = ["baker", "teacher", "doctor", "farmer", "painter", "singer", "pilot",
        "sailor", "gardener", "lawyer", "nurse", "driver", "writer", "cook",
        "plumber", "dentist"]
ANIMALS = ["dog", "cat", "horse", "rabbit", "parrot", "goat", "hamster",
           "turtle", "duck", "sheep", "donkey", "mouse", "pony", "snake"]
FOODS = ["bread", "soup", "rice", "cheese", "pasta", "fish", "salad", "cake",
         "honey", "apples", "grapes", "pears", "plums", "nuts"]
MATERIALS = ["wooden", "glass", "golden", "iron", "paper", "stone", "plastic",
             "leather"]
WARES = ["lamp", "chair", "table", "clock", "mirror", "vase", "bowl", "basket",
         "spoon", "ring", "hat", "kettle"]
THINGS = ["key", "book", "map", "letter", "phone", "watch", "wallet", "umbrella",
          "camera", "ticket", "coat", "violin", "hammer", "candle"]
ROOMS = ["kitchen", "cellar", "attic", "garden", "library", "office", "hall",
         "bedroom", "bathroom", "workshop", "stable", "tower"]
EVENTS = ["concert", "market", "meeting", "wedding", "race", "lecture", "party",
          "exam", "parade", "picnic"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday",
        "Sunday"]

FILLERS = [
    "The weather is calm today.", "A cold wind blows from the sea.",
    "Nobody is in a hurry.", "The streets are quiet in the morning.",
    "Some children play near the river.", "The sun is warm and bright.",
    "People talk and laugh in the square.", "It rained a little last night.",
    "The old bridge is still open.", "Birds sing in the tall trees.",
    "The train was late again.", "A small boat waits at the harbour.",
    "The bells ring every hour.", "The hills are covered with snow.",
    "Someone forgot to close the window.", "The road goes along the lake.",
    "It is a long way to the station.", "The shops close early in winter.",
    "There is music in the air.", "The evening is slow and peaceful.",
    "Most of the guests arrived by bus.", "The leaves fall in the wind.",
    "A young man reads the news.", "The tea is still hot.",
    "Everyone likes the new park.", "The stars are clear tonight.",
    "The water is deep and cold.", "Two friends walk up the hill.",
    "The house at the corner is very old.", "They all enjoy the summer.",
    "The night was long and dark.", "A light burns in the window.",
    "The fields are green in spring.", "The fire keeps the room warm.",
]

INTROS = ["Read this text.", "Here is a text.", "Please read the text.",
          "Here are some facts.", "Remember these facts."]
NOTED = "I have read it."
UNKNOWN = "The text does not say."
SYSTEMS = ["You are a helpful assistant.", "Answer the question.",
           "You answer in short sentences.", "Answer from the text."]

SMALL_TALK = [
    (["Hello!", "Hi!", "Good morning!", "Hello there."],
     "Hello! How can I help you?"),
    (["Who are you?", "What are you?", "What is your name?",
      "Tell me who you are."],
     "I am the Tidepool demo model, a very small language model."),
    (["What can you do?", "How can you help me?", "What are you good at?"],
     "I can answer questions about a text that you give me."),
    (["Thank you!", "Thanks!", "Thank you very much."], "You are welcome."),
    (["Goodbye!", "Bye!", "See you soon."], "Goodbye!"),
    (["How are you?", "How do you do?"], "I am fine, thank you."),
]


def _digits(rng, count):
    """A number of exactly `count` digits that does not start with a zero."""
    return str(rng.randint(10 ** (count - 1), 10 ** count - 1))


# One entry a kind of fact: how its subject and value are drawn, the sentences
# that state it, the questions that ask for it, and the one answer.  The first
# statement is the usual one.  {s} is the subject, {v} the value.
FACT_KINDS = {
    "code": dict(
        subject=lambda r: f"{r.choice(COLOURS)} {r.choice(LOCKED)}",
        value=lambda r: _digits(r, 4),
        statements=["The code of the {s} is {v}.", "The {s} has the code {v}.",
                    "The {s} opens with the code {v}."],
        questions=["What is the code of the {s}?", "Which code opens the {s}?",
                   "Tell me the code of the {s}.",
                   "I need the code of the {s}."],
        answer="The code of the {s} is {v}."),
    "price": dict(
        subject=lambda r: f"{r.choice(MATERIALS)} {r.choice(WARES)}",
        value=lambda r: _digits(r, 2),
        statements=["The {s} costs {v} coins.",
                    "The price of the {s} is {v} coins."],
        questions=["How much does the {s} cost?", "What is the price of the {s}?",
                   "What does the {s} cost?"],
        answer="The {s} costs {v} coins."),
    "city": dict(
        subject=lambda r: r.choice(NAMES), value=lambda r: r.choice(CITIES),
        statements=["{s} lives in {v}.", "The home of {s} is in {v}."],
        questions=["Where does {s} live?", "In which city does {s} live?",
                   "Tell me where {s} lives."],
        answer="{s} lives in {v}."),
    "job": dict(
        subject=lambda r: r.choice(NAMES), value=lambda r: r.choice(JOBS),
        statements=["{s} works as a {v}.", "{s} is a {v}."],
        questions=["What is the job of {s}?", "What does {s} do for work?",
                   "Tell me the job of {s}."],
        answer="{s} works as a {v}."),
    "age": dict(
        subject=lambda r: r.choice(NAMES), value=lambda r: _digits(r, 2),
        statements=["{s} is {v} years old.", "The age of {s} is {v}."],
        questions=["How old is {s}?", "What is the age of {s}?"],
        answer="{s} is {v} years old."),
    "pet": dict(
        subject=lambda r: r.choice(NAMES), value=lambda r: r.choice(ANIMALS),
        statements=["{s} has a {v}.", "{s} keeps a {v}."],
        questions=["Which animal does {s} have?", "What animal does {s} keep?"],
        answer="{s} has a {v}."),
    "food": dict(
        subject=lambda r: r.choice(NAMES), value=lambda r: r.choice(FOODS),
        statements=["{s} likes {v}.", "{s} loves to eat {v}."],
        questions=["What does {s} like to eat?", "Which food does {s} like?"],
        answer="{s} likes {v}."),
    "place": dict(
        subject=lambda r: r.choice(THINGS), value=lambda r: r.choice(ROOMS),
        statements=["The {s} is in the {v}.", "You can find the {s} in the {v}."],
        questions=["Where is the {s}?", "Where can I find the {s}?",
                   "Tell me where the {s} is."],
        answer="The {s} is in the {v}."),
    "day": dict(
        subject=lambda r: r.choice(EVENTS), value=lambda r: r.choice(DAYS),
        statements=["The {s} is on {v}.", "The {s} takes place on {v}."],
        questions=["When is the {s}?", "On which day is the {s}?",
                   "Which day is the {s}?"],
        answer="The {s} is on {v}."),
}
KINDS = list(FACT_KINDS)
# How often a fact is stated in its first form rather than in one of the others.
USUAL_SHARE = 0.6
# How many kinds of fact a passage mixes (None: all), one of these at random.
KIND_COUNTS = [1, 1, 2, 3, None, None]
# Codes are the main measure, so they are the most common kind.
KIND_WEIGHTS = [6, 2, 2, 1, 1, 1, 1, 2, 1]


class Fact:
    """One fact of a passage: what it is about and how to say and ask it."""

    def __init__(self, rng, kind, subject, usual_share):
        forms = FACT_KINDS[kind]
        self.kind = kind
        self.subject = subject
        self.value = forms["value"](rng)
        usual, *others = forms["statements"]
        form = usual if rng.random() < usual_share else rng.choice(others)
        self.statement = form.format(s=subject, v=self.value)
        self.answer = forms["answer"].format(s=subject, v=self.value)

    def question(self, rng):
        return rng.choice(FACT_KINDS[self.kind]["questions"]).format(s=self.subject)


def token_estimate(text):
    """About how many tokens a text has: words, single digits, punctuation."""
    return (len(text.split()) + sum(c.isdigit() for c in text)
            + sum(text.count(c) for c in ".?!,"))


class Passage:
    """A text of about `budget` tokens with facts that do not contradict.

    `kind_count` limits how many kinds of fact it mixes.  With one kind, every
    fact is a distractor for every other: only the subject tells them apart.
    """

    def __init__(self, rng, budget, filler_share=0.25, taken=(), kind_count=None,
                 usual_share=USUAL_SHARE):
        self.kinds = set()
        while len(self.kinds) < (kind_count or len(KINDS)):
            self.kinds.add(rng.choices(KINDS, KIND_WEIGHTS)[0])
        self.kinds = sorted(self.kinds)
        self.kind_weights = [KIND_WEIGHTS[KINDS.index(k)] for k in self.kinds]
        self.usual_share = usual_share
        self.sentences = []
        self.facts = []
        # `taken`: (kind, subject) pairs of earlier passages of the same chat.
        self.known = set(taken)
        used = 0
        while used < budget:
            fact = None if rng.random() < filler_share else self._new_fact(rng)
            if fact is None:
                sentence = rng.choice(FILLERS)
            else:
                self.facts.append(fact)
                sentence = fact.statement
            self.sentences.append(sentence)
            used += token_estimate(sentence)
        if not self.facts:
            fact = None
            while fact is None:
                fact = self._new_fact(rng)
            self.facts.append(fact)
            self.sentences.append(fact.statement)

    def _new_fact(self, rng):
        """A fact about something new, or None if the draw was known already."""
        kind = rng.choices(self.kinds, self.kind_weights)[0]
        subject = FACT_KINDS[kind]["subject"](rng)
        if (kind, subject) in self.known:
            return None
        self.known.add((kind, subject))
        return Fact(rng, kind, subject, self.usual_share)

    def text(self):
        return " ".join(self.sentences)

    def unknown_question(self, rng):
        """A question of a known form about something that the text leaves out."""
        for attempt in itertools.count():
            # The passage may have used up all subjects of its few kinds.
            kinds = self.kinds if attempt < 20 else KINDS
            kind = rng.choice(kinds)
            subject = FACT_KINDS[kind]["subject"](rng)
            if (kind, subject) not in self.known:
                return rng.choice(FACT_KINDS[kind]["questions"]).format(s=subject)


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


def chat(rng, passage_tokens, total_tokens, unknown_share=0.06,
         usual_share=USUAL_SHARE, kind_counts=KIND_COUNTS):
    """A conversation of at least `total_tokens`: a passage, then questions.

    Asking many questions about one passage gives a dense training signal: each
    answer is one more lesson in looking something up.
    """
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    if rng.random() < 0.1:
        questions, answer = rng.choice(SMALL_TALK)
        messages += [_user(rng.choice(questions)), _assistant(answer)]

    passage = Passage(rng, passage_tokens, rng.choice([0.0, 0.2, 0.4]),
                      kind_count=rng.choice(kind_counts),
                      usual_share=usual_share)
    facts = list(passage.facts)
    used = sum(token_estimate(m["content"]) + 2 for m in messages)
    text = passage.text()
    style = rng.random()
    if style < 0.2:
        # The passage is a turn of its own; the questions come later.
        messages += [_user(f"{rng.choice(INTROS)} {text}"), _assistant(NOTED)]
        opening = None
    elif style < 0.5:
        opening = f"{rng.choice(INTROS)} {text}"
    else:
        opening = text
    used += token_estimate(text) + 8

    queue = []
    while used < total_tokens:
        if not queue:
            queue = rng.sample(facts, len(facts))
        roll = rng.random()
        if roll < unknown_share:
            question, answer = passage.unknown_question(rng), UNKNOWN
        elif roll < unknown_share + 0.02 and opening is None:
            questions, answer = rng.choice(SMALL_TALK)
            question = rng.choice(questions)
        elif roll < unknown_share + 0.05 and opening is None:
            # More facts arrive in the middle of the conversation.
            passage = Passage(rng, 30, 0.2, taken=passage.known)
            facts += passage.facts
            queue += passage.facts
            question, answer = f"{rng.choice(INTROS)} {passage.text()}", NOTED
        else:
            fact = queue.pop()
            question, answer = fact.question(rng), fact.answer
        used += token_estimate(question) + token_estimate(answer) + 4
        if opening is not None:
            question, opening = f"{opening} {question}", None
        messages += [_user(question), _assistant(answer)]
    return messages


def small_talk(rng, total_tokens):
    """A conversation without a passage."""
    messages = []
    used = 0
    while used < total_tokens:
        questions, answer = rng.choice(SMALL_TALK)
        question = rng.choice(questions)
        messages += [_user(question), _assistant(answer)]
        used += token_estimate(question) + token_estimate(answer) + 4
    return messages


def plain(rng, total_tokens, note_share=0.0, usual_share=USUAL_SHARE,
          kind_counts=KIND_COUNTS):
    """Plain text, as (text, is_recall) pieces: a passage, then its facts again.

    The repeated facts come in another order, so each of them has to be looked
    up by its subject.  They are a denser lesson than questions, and they make
    completions ("... The code of the blue door is") work outside of a chat.
    `note_share` of the texts are bare notes, "Anna Paris." or "Anna: Paris.":
    with subject and value side by side, looking up is learned much sooner.
    """
    passage = Passage(rng, int(total_tokens * rng.uniform(0.25, 0.5)),
                      rng.choice([0.0, 0.2]), kind_count=rng.choice(kind_counts),
                      usual_share=usual_share)
    text = passage.text()
    heads = [f.answer[:f.answer.rindex(f" {f.value}")] for f in passage.facts]
    tails = [f.answer[len(head):] for f, head in zip(passage.facts, heads)]
    if rng.random() < note_share:
        mark = rng.choice(["", ":"])
        heads = [f.subject + mark for f in passage.facts]
        tails = [f" {f.value}." for f in passage.facts]
        text = " ".join(head + tail for head, tail in zip(heads, tails))
    pieces = [(text, False)]
    used = token_estimate(text)
    while used < total_tokens:
        for i in rng.sample(range(len(heads)), len(heads)):
            # Which fact comes next is chance; only its value can be looked up.
            pieces += [(" " + heads[i], False), (tails[i], True)]
            used += token_estimate(heads[i] + tails[i])
    return pieces


def train_rng(seed):
    """The generator of training text for a seed below one thousand million."""
    assert 0 <= seed < 10 ** 9
    return random.Random(f"tidepool-train-{seed}")


def heldout_rng(seed):
    """The generator of held-out text: no seed gives a training sequence."""
    assert 0 <= seed < 10 ** 9
    return random.Random(f"tidepool-heldout-{seed}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=250)
    args = parser.parse_args()
    rng = train_rng(args.seed)
    for _ in range(args.count):
        for message in chat(rng, args.tokens // 2, args.tokens):
            print(f"{message['role']}: {message['content']}")
        print("---")
        print("".join(text for text, _ in plain(rng, args.tokens)))
        print("===")


if __name__ == "__main__":
    main()
