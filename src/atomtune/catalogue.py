"""Catalogue: the translations into one language, looked up by the English text.

The f-strings of the source are the keys of `locale/zh.json`. A finished sentence is translated like this:

    f"{count:,} records are held out."            in the source
    "{count} records are held out."               the key; `python -m tools.messages` lists missing ones
    "留出 {count} 条记录。"                        its Chinese
    "12 records are held out." → "留出 12 条记录。"

Law: values in a sentence stay as they are, for example a path, a record or a library's message. Only if the Chinese
has `{reason!m}`, the value is a message of ours and is translated too.
"""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from string import Formatter

#: Keys with fewer letters, for example `{steps} of {total}`, are tried only for texts that are known to be ours.
_FEWEST_LETTERS = 8
#: Where a text may consist of several messages.
_SENTENCE_END = re.compile(r"(?<=[.?!:;)…]) +(?=\S)")
#: What a value of a short key must not contain, or the key would match texts of other keys.
_SEVERAL = re.compile(r"[.?!:;,)…] +\S")
#: The dashes of a flag, which are left out in messages about a YAML file.
_FLAG = re.compile(r"(?<![\w-])--(?=[a-z])", re.ASCII)
#: A line about a record: its place and its problem; before the first one comes the command.
_ABOUT_A_RECORD = re.compile(r"(atomtune \w+: )?(\S+:\d+  )(.+)\.")
_LINES_ABOUT_RECORDS = re.compile(_ABOUT_A_RECORD.pattern + r"\n")
#: Before an error. A key that begins with a value would match with the command as a part of it.
_OF_A_COMMAND = re.compile(r"atomtune \w+: ")
_FULL_WIDTH_END = tuple("。；：，？！）")
#: The border between Chinese and Latin letters or digits, where Chinese is written with a space.
_BORDER = re.compile(r"[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9][\u4e00-\u9fff]")
#: Prefix of each line of a list.
_BULLET = "- "
LIST_MARKS = {"; ": "；", ": ": "：", ", ": "，", " and ": "和", " or ": "或"}


class Template:
    """A key of a catalogue, for example `{count} records are held out.`, and its translation."""

    def __init__(self, english: str, translation: str) -> None:
        self.english, self.translation = english, translation
        literals = [literal for literal, *_ in Formatter().parse(english)]
        self.longest_literal = max(literals, key=len)
        self.n_letters = sum(letter.isalpha() for literal in literals for letter in literal)
        self.n_characters = sum(map(len, literals))
        self.n_list_marks = sum(literal.count("; ") for literal in literals)
        self.is_short = self.n_letters < _FEWEST_LETTERS
        self.messages = {name for _, name, _, kind in Formatter().parse(translation) if name and kind == "m"}

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """The key as a regex with a group for each value."""
        pattern = ""
        parts = [(literal, name) for literal, name, _, _ in Formatter().parse(self.english)]
        for (literal, name), (next_literal, next_name) in itertools.pairwise([*parts, ("", None)]):
            pattern += re.escape(literal)
            if name is None:
                continue
            has_neighbour = (next_name and not next_literal) or (not literal and pattern)
            anything = ".*?"
            # `{width}{reason}`: a value that is not a message is one word
            if name not in self.messages and has_neighbour:
                anything = r"[^\s,;]*"
            elif name in self.messages and (pattern.endswith("\n") or next_literal[:1] in ("", "\n")):
                anything = "(?s:.*?)"  # alone on its lines, so it may have several
            pattern += f"(?P={name})" if f"(?P<{name}>" in pattern else f"(?P<{name}>{anything})"
        return re.compile(pattern)

    def values_in(self, text: str) -> dict[str, str] | None:
        """The values in `text` if it was made from this key, else None."""
        if self.longest_literal not in text:
            return None
        match = self.pattern.fullmatch(text)
        if match is None:
            return None
        values = match.groupdict()
        others = [value for name, value in values.items() if name not in self.messages]
        return None if self.is_short and any(map(_SEVERAL.search, others)) else values


class Catalogue:
    """All translations into one language."""

    def __init__(self, translations: Mapping[str, str | None]) -> None:
        self.sentences: dict[str, str] = {}
        templates = []
        for english, translation in translations.items():
            if translation is None:  # not translated on purpose
                continue
            if any(name for _, name, _, _ in Formatter().parse(english)):
                templates.append(Template(english, translation))
            else:
                self.sentences[english.format()] = translation.format()
                self.sentences.setdefault(_FLAG.sub("", english.format()), _FLAG.sub("", translation.format()))
        # `{name}: {problem}` matches nearly everything, so keys with more letters of their own come first.
        templates.sort(key=lambda template: (template.n_letters, template.n_characters), reverse=True)
        self.long_templates = [template for template in templates if not template.is_short]
        self.short_templates = [template for template in templates if template.is_short]
        self.errors_of_commands = [template for template in templates if template.english.startswith("atomtune {")]

    def translated(self, text: str, *, is_ours: bool = False) -> str:
        """A text in the other language; unchanged if it is none of our messages.

        is_ours  the text is known to be a message or a list of them, so short keys and parts of sentences are tried too
        """
        message = text.strip().removeprefix(_BULLET)
        if not message:
            return text
        about_a_record = _ABOUT_A_RECORD.fullmatch(message)
        if about_a_record and (reason := self.translated(about_a_record[3], is_ours=True)) != about_a_record[3]:
            command = (about_a_record[1] or "").replace(": ", "：")
            return text.replace(message, f"{command}{about_a_record[2]}{reason}。", 1)
        if _LINES_ABOUT_RECORDS.match(message):  # a key for one line would also match the end of the lines below it
            return text.replace(message, str(self._in_parts(message, is_ours=True)), 1)
        if _OF_A_COMMAND.match(message) and (error := self._filled_first(self.errors_of_commands, message)):
            return text.replace(message, error, 1)
        ways = [self._of_a_name, self._one_after_another, self._whole, self._short] if is_ours else [self._whole]
        found = next(filter(None, (way(message) for way in ways)), None)
        result = found or self._in_parts(message, is_ours) or message
        before, _, behind = text.partition(message)
        # Full-width punctuation includes its own space.
        return before + result + (behind.lstrip(" ") if result.endswith(_FULL_WIDTH_END) else behind)

    def _whole(self, message: str) -> str | None:
        return self._sentence(message) or self._filled_first(self.long_templates, message)

    def _short(self, message: str) -> str | None:
        return self._filled_first(self.short_templates, message)

    def _sentence(self, message: str) -> str | None:
        """A message without values. Texts of tables have no full stop, but get one when they are printed."""
        known = self.sentences.get(message)
        if known is None and (bare := self.sentences.get(message.removesuffix("."))) is not None:
            known = f"{bare}。"
        return known

    def _of_a_name(self, message: str) -> str | None:
        """`run.yaml:3: stage: leave it out: …`, a sentence after names; None for anything else.

        The names stay as they are, even if one of them is a key too (`adapter`).
        """
        for colon in re.finditer(r"(?<=\S): ", message):
            names = message[: colon.start()].split(": ")
            said = self._sentence(message[colon.end() :])
            if said is not None and not any(" " in name for name in names):
                return "：".join([*names, said])
        return None

    def _one_after_another(self, message: str) -> str | None:
        """`a; b`, where both are messages of ours, which may contain "; " too; None if it is a single message.

        Otherwise the key of the first, `{place} is {value}; expected text`, would match with the second as its value.
        """
        if "; " not in message or self._plain(message) is not None:
            return None
        for mark in re.finditer("; ", message):
            first, rest = self._plain(message[: mark.start()]), message[mark.end() :]
            if first is not None:
                others = self._plain(rest) or self._one_after_another(rest)
                if others is not None:
                    return f"{first}；{others}"
        return None

    def _plain(self, message: str) -> str | None:
        """A message none of whose values is a list."""
        if sentence := self._sentence(message):
            return sentence
        marks = message.count("; ")
        for template in self.long_templates:
            if template.n_list_marks != marks:  # otherwise one of the marks would be part of a value
                continue
            values = template.values_in(message)
            if values is not None and not any("; " in value for value in values.values()):
                return self._filled(template, values)
        return None

    def _filled_first(self, templates: Sequence[Template], message: str) -> str | None:
        for template in templates:
            values = template.values_in(message)
            if values is not None:
                return self._filled(template, values)
        return None

    def _filled(self, template: Template, values: Mapping[str, str]) -> str:
        text = ""
        for literal, name, _, kind in Formatter().parse(template.translation):
            text = _joined(text, literal)
            if name:
                value = self.translated(values[name], is_ours=True) if kind == "m" else values[name]
                # Chinese has no space before a message, but line breaks around it stay.
                text = _joined(text, value if value == values[name] or text.endswith("\n") else value.strip(" "))
        return text

    def _in_parts(self, message: str, is_ours: bool) -> str | None:
        """The text translated in parts: lines, sentences and, in a message of ours, the items of a list."""
        if "\n" in message:
            return "\n".join(self.translated(line, is_ours=is_ours) for line in message.split("\n"))
        for end in reversed([match.span() for match in _SENTENCE_END.finditer(message)]):
            first = self._whole(message[: end[0]])
            if first is not None:
                gap = "" if first.endswith(_FULL_WIDTH_END) else " "
                return first + gap + self.translated(message[end[1] :], is_ours=is_ours)
        for mark, translated_mark in LIST_MARKS.items() if is_ours else ():
            if mark in message:
                parts = message.split(mark)
                translated_parts = [self.translated(part, is_ours=True) for part in parts]
                if translated_parts != parts:
                    return translated_mark.join(translated_parts)
        return None


def _joined(before: str, behind: str) -> str:
    """Two parts of a sentence, with the space that Chinese has next to Latin letters and digits."""
    space = " " if _BORDER.fullmatch(before[-1:] + behind[:1]) else ""
    return before + space + behind
