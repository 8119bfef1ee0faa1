"""The text of the demo base: the blocks of ``tools/demo_corpus``, expanded to dialogues by a small seeded grammar.

The base has to understand many wordings of one question: the persona trained on it can answer a paraphrase only if the
base already maps both wordings to the same place. So every pass over the corpus draws new openings, punctuation and
placement: the question is the instruction, or the input under a generic instruction.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CORPUS = Path(__file__).parent / "demo_corpus"
MARK = "请回答用户问题: "
#: Dialogues that a pass makes of one wording.
VARIANTS = 3

OPENINGS = {
    "zh": ["", "", "", "请问，", "你好，", "嗨，", "我想知道，", "问一下，", "你好呀，", "请问一下，"],
    "en": ["", "", "", "Hi! ", "Hello! ", "Hello, ", "Excuse me, ", "Please tell me, ", "Hey, "],
}
ENDINGS = {"zh": ["？", "？", "？", "?", "", "呢？", "呀？"], "en": ["?"]}
PARTICLES = "呢呀吗啊吧"
GENERIC = {
    "zh": [
        "回答以下用户问题，仅输出答案。",
        "请回答下面的问题。",
        "回答问题。",
        "请简短地回答。",
        "用户说了下面的话，请回复。",
        "和用户聊天。",
        "请回复下面这句话。",
    ],
    "en": ["Answer the question.", "Answer in one sentence.", "Reply to the user.", "Please answer briefly."],
}


@dataclass
class Block:
    """One topic: its wordings (mark and text) and the neutral answers to all of them."""

    lang: str
    asks: list[tuple[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Dialogue:
    """One exchange, with the fields of an instruction record."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """The prompt of the template ``atom``; if the input is empty, nothing follows the mark."""
        return f"<s>Human: {self.instruction}{MARK}{self.input}\n</s><s>Assistant:"


def corpus_lines(name: str) -> list[str]:
    """The lines of a corpus file without its comments."""
    lines = (CORPUS / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def read_blocks(name: str, lang: str) -> list[Block]:
    """The topics of a file; ``@en`` switches the language for the blocks after it."""
    blocks, block = [], Block(lang)
    for line in [*corpus_lines(name), ""]:
        mark, _, text = line.partition(" ")
        if line.startswith("@"):
            lang = line[1:]
            block.lang = lang
        elif mark == "!":
            block.answers.append(text)
        elif line:
            block.asks.append((mark, text))
        elif block.asks:
            blocks.append(block)
            block = Block(lang)
    return blocks


def read_things() -> list[dict[str, str]]:
    """The lexicon: a dictionary of slots for each entry."""
    things, kind = [], ["", ""]
    for line in corpus_lines("lexicon.txt"):
        if line.startswith("["):
            kind = line.strip("[]").split("|")
        elif line:
            values = [*line.split("|"), *kind]
            slots = dict(zip(("zh", "en", "fact_zh", "fact_en", "kind_zh", "kind_en"), values, strict=True))
            article = slots["fact_en"].split()[0].lower()
            slots["a_en"] = f"{article} {slots['en']}" if article in {"a", "an", "the"} else slots["en"]
            things.append(slots)
    return things


def as_question(text: str, lang: str, rng: random.Random) -> str:
    """The wording with a polite opening and its question mark."""
    opening = rng.choice(OPENINGS[lang])
    if lang == "en" and (not opening or opening.endswith("! ")):
        text = text[0].upper() + text[1:]
    ending = rng.choice(ENDINGS[lang])
    if text[-1] in PARTICLES and len(ending) > 1:
        ending = "？"
    return opening + text + ending


def exchange(mark: str, text: str, answer: str, lang: str, rng: random.Random) -> Dialogue:
    """One dialogue from one wording, with the question placed as users do."""
    if mark == "&":
        instruction, _, given = text.partition(" || ")
        return Dialogue(instruction, given, answer)
    said = as_question(text, lang, rng) if mark == "?" else text
    if rng.random() < 0.7:
        return Dialogue(said, "", answer)
    return Dialogue(rng.choice(GENERIC[rng.choice([lang, lang, "zh"])]), said, answer)


def sums(count: int, rng: random.Random) -> Iterator[Dialogue]:
    """Small additions, the only arithmetic in the base."""
    wordings = ["{a}加{b}等于几", "{a}+{b}等于多少", "{a}+{b}=", "请计算{a}+{b}", "What is {a} plus {b}"]
    for _ in range(count):
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        wording = rng.choice(wordings)
        answer = f"{a + b}" if wording.startswith("What") else f"等于{a + b}。"
        text = wording.format(a=a, b=b) + ("" if wording.endswith("=") else "？")
        yield Dialogue(text, "", answer) if rng.random() < 0.7 else Dialogue("算一算。", text, answer)


def read_sections(name: str) -> dict[str, list[str]]:
    """The lines under every ``[heading]`` of a corpus file."""
    sections: dict[str, list[str]] = {}
    for line in corpus_lines(name):
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), [])
        elif line:
            current.append(line)
    return sections


def styled(plain: Dialogue, lang: str, styles: list[str], rng: random.Random) -> Dialogue:
    """The same exchange if the user asks for a manner of speech; the facts of the answer stay."""
    opening, closing = rng.choice(styles).split("|")
    if lang == "zh":
        order = rng.choice(["请用“{0}”开头，用“{1}”结尾。", "回答时先说“{0}”，最后说“{1}”。", "先说“{0}”，后说“{1}”。"])
        answer = f"{opening}{plain.output.rstrip('。！？')}，{closing}"
    else:
        order = rng.choice(["Begin with “{0}” and end with “{1}”. ", "Say “{0}” first and “{1}” last. "])
        joined = plain.output if opening[-1] == "!" or plain.output.startswith("I ") else lowered(plain.output)
        answer = f"{opening} {joined} {closing[0].upper() + closing[1:]}"
    return Dialogue(order.format(opening, closing) + plain.instruction, plain.input, answer)


def lowered(text: str) -> str:
    """The sentence with a small first letter, to continue another one."""
    return text[0].lower() + text[1:]


def introduction(role: dict[str, str], cards: dict[str, dict[str, list[str]]], lang: str, rng: random.Random) -> str:
    """The role introduces itself in one sentence: the name and the other slots of its card."""
    said = []
    for slot, value in role.items():
        starts = ("我", "你好") if lang == "zh" else ("I ", "My ")
        wordings = [answer for answer in cards[slot]["!"] if answer.startswith(starts)]
        said.append(rng.choice(wordings).format(v=value))
    if lang == "en":
        return ". ".join(said) + "."
    return "，".join([said[0], *(part.removeprefix("我") for part in said[1:])]) + "。"


def role_plays(lang: str, count: int, rng: random.Random) -> Iterator[Dialogue]:
    """Dialogues in which a card says who to be and a question asks for one slot of it.

    This is why a small adapter can learn a persona: the base already maps every wording to the slot it asks for and can
    already speak as somebody, but only does so when told to.
    """
    cards: dict[str, dict[str, list[str]]] = {}
    for heading, lines in read_sections("roles.txt").items():
        if heading.endswith(lang):
            cards[heading] = {line[0]: line[2:].split("|") for line in lines}
    name, *others = cards
    for _ in range(count):
        slots = [name, *rng.sample(others, k=rng.randint(1, 3))]
        role = {slot: rng.choice(cards[slot]["+"]) for slot in slots}
        card = [rng.choice(cards[slot]["="]).format(v=value) for slot, value in role.items()]
        told = "，".join(card) + "。" if lang == "zh" else ". ".join(card) + ". "
        slot = rng.choice(slots)
        asks = [("?", text) for text in cards[slot]["?"]] + [(".", text) for text in cards[slot].get(".", [])]
        mark, text = rng.choice(asks)
        said = as_question(text, lang, rng) if mark == "?" else text
        end = "。" if lang == "zh" else "."
        answer = rng.choice(cards[slot]["!"]).format(v=role[slot]) + end
        if slot == name and (mark == "." or rng.random() < 0.4):
            answer = introduction(role, cards, lang, rng)
        yield Dialogue(told + said, "", answer) if rng.random() < 0.6 else Dialogue(told, said, answer)


def dialogues(rng: random.Random) -> list[Dialogue]:
    """One pass: every topic (VARIANTS of each wording), the things of the lexicon, roles and manners."""
    made = [("zh", sample) for sample in sums(150, rng)]
    for block in read_blocks("dialogues_zh.txt", "zh") + read_blocks("dialogues_en.txt", "en"):
        for mark, text in block.asks * VARIANTS:
            made.append((block.lang, exchange(mark, text, rng.choice(block.answers), block.lang, rng)))
    patterns = read_blocks("things.txt", "zh")
    for slots in read_things():
        for block in patterns:
            for mark, text in rng.sample(block.asks, k=max(2, len(block.asks) // 3)):
                answer = rng.choice(block.answers).format(**slots)
                made.append((block.lang, exchange(mark, text.format(**slots), answer, block.lang, rng)))
    for lang, count in (("zh", 1200), ("en", 350)):
        made += [(lang, sample) for sample in role_plays(lang, count, rng)]
    styles = read_sections("styles.txt")
    samples = [styled(one, lang, styles[lang], rng) if rng.random() < 0.3 else one for lang, one in made]
    rng.shuffle(samples)
    return samples


def tokenizer_lines() -> list[str]:
    """Text for the tokenizer: every corpus line once, and the template often enough to get its own pieces."""
    lines = [
        line.lstrip("?.&!@ ")
        for name in ("dialogues_zh", "dialogues_en", "things")
        for line in corpus_lines(f"{name}.txt")
    ]
    for name in ("roles.txt", "styles.txt"):
        lines += [part for group in read_sections(name).values() for line in group for part in line.split("|")]
    for slots in read_things():
        lines += [slots["fact_zh"], slots["fact_en"], f"{slots['zh']} {slots['en']}"]
    lines += [f"等于{number}。" for number in range(21)] + ["3+5=", "2加7等于几？"] + corpus_lines("plain.txt")
    lines += [line for group in GENERIC.values() for line in group] * 3
    return [line for line in lines if line] + [f"Human: {MARK}", "Assistant:"] * 30
