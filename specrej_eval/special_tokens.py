"""Special tokens come from templates, never from content: the one place where content becomes token ids.

A user, a data set or the policy itself may write ``<|im_end|>``; read as a control token it ends the turn, and what
follows is a next turn of the writer's choice. So such text is read as text, letter by letter, while the template's own
tokens stay what they are. Where nobody writes any, which is nearly always, the tokenizer is called as ever.

How: each such text in a message gets a mark (a private-use character) inside, the template renders it, and only if the
rendering without its marks is exactly the one of the unmarked messages are the marks believed. Then the template's
tokens are replaced by placeholders, the marks taken out, and a twin of the tokenizer, whose special tokens *are* those
placeholders, reads the text: everything else of it (normaliser, pre-tokeniser, BOS) is the tokenizer's own.

"Special" is every added token (``special=False`` too: ``<think>``, ``<tool_call>``) but those of white space alone,
which Gemma and GPT-NeoX have for plain text.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from specrej_eval.errors import PromptError, RewardError
from specrej_eval.wording import counted

ENCODE_AS_TEXT = "encode_as_text"
ALLOW = "allow"
ERROR = "error"
RULES = (ENCODE_AS_TEXT, ALLOW, ERROR)

_MARKS = "\U000fff00\U000fff01\U0010ff00\U0010ff01"
"""One of them is used: the first that no text holds."""
_BASES = (0xF0000, 0x100000)
"""Where placeholders may begin: one code point for each special token."""
_CONTROL_LIKE = re.compile(
    r"<[|\uff5c][^<>\n]{0,80}>|<[^<>\n]{1,80}[|\uff5c]>"
    r"|</?(?:s|bos|eos|pad|unk|mask|sep|cls|start_of_turn|end_of_turn|extra_(?:id_)?\d+|reserved_\d+)>|<</?SYS>>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|THINK|CLS|SEP|PAD|MASK|UNK|gMASK)\]"
)
"""What looks like a control token where the tokenizer is not known."""
_NOTHING = r"(?!)"
"""A pattern that nothing matches."""
_JOINER = "\u200b"
"""Put behind the first character of such text where a server tokenises it: a zero-width space."""

_logger = logging.getLogger(__name__)

Placement = Literal["inside", "around", "wide"]
"""Where a token is marked. ``wide``: the template itself cuts the text at this token and at the white space around it,
so what it writes there is its own."""
_PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
"""The first is taken that the template does not notice."""


def check_text(text: str) -> None:
    """Raises:
    PromptError: the text holds half of a surrogate pair, for which there is no UTF-8 and so no token.
    """
    place = next((place for place, mark in enumerate(text) if "\ud800" <= mark <= "\udfff"), None)
    if place is not None:
        raise PromptError(
            f"the prompt has half of a surrogate pair ({text[place]!r}) in it, which is no text: "
            f"{text[max(0, place - 20) : place + 20]!r} (character {place + 1}).",
            hint="a character outside Unicode's first plane was cut in two; remove what is left of it, or restore it.",
        )


class SpecialTokenError(ValueError):
    """Special tokens in content that are not allowed, or that cannot be told from the template's."""


class _Part(NamedTuple):
    text: str
    is_content: bool


class ContentText(str):
    """A text that knows which parts of it are content: ``spans`` of (start, end)."""

    spans: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, spans: Sequence[tuple[int, int]]) -> ContentText:
        made = super().__new__(cls, text)
        made.spans = tuple(spans)
        return made

    @classmethod
    def around(cls, text: str, content: str) -> ContentText:
        """Every occurrence of ``content`` in ``text`` is content."""
        return cls(text, [match.span() for match in re.finditer(re.escape(content), text)] if content else [])


class Tokeniser:
    """Turns messages and texts with content in them into ids.

    Args:
        tokenizer: of transformers.
        rule: ``encode_as_text``, ``allow`` (the tokenizer as it is) or ``error``.
    """

    def __init__(self, tokenizer: Any, rule: str = ENCODE_AS_TEXT) -> None:
        self.tokenizer = tokenizer
        self.rule = rule
        self._added: dict[str, Any] = _added_tokens(tokenizer)
        # as the tokenizer's own automaton: leftmost, longest
        texts = sorted(self._added, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, texts)) if texts else _NOTHING)
        # a normaliser that lowers letters may match what is not written so
        loose = any(entry.normalized for entry in self._added.values())
        self._search = re.compile(self._pattern.pattern, re.IGNORECASE) if loose else self._pattern
        self._heads = {text[:size] for text in texts for size in range(1, len(text))}
        self._tails = {text[size:] for text in texts for size in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)
        self._twins: dict[int, _Twin] = {}
        self._python_twin: _PythonTwin | None = None

    @property
    def special_ids(self) -> dict[int, str]:
        """Id -> text of every special token."""
        return {int(self.tokenizer.convert_tokens_to_ids(text)): text for text in self._added}

    def found_in(self, text: str) -> str | None:
        """The first special token that a text holds, or None."""
        match = self._search.search(text)
        return match[0] if match else None

    def check(self, contents: Sequence[str]) -> bool:
        """Whether any content holds a special token that has to be read as text.

        Raises:
            SpecialTokenError: the rule is ``error`` and one does.
        """
        if self.rule == ALLOW:
            return False
        for content in contents:
            own = self._own(content)
            token = own[0][0] if own else None
            if token is not None and self.rule == ERROR:
                raise SpecialTokenError(
                    f"the text holds the special token {token!r} (special_tokens_in_content=error): "
                    f"{_near(content, token)!r}"
                )
            if token is not None or any(self._edges(content)):
                return True
        return False

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """``apply_chat_template(messages, tokenize=True, return_dict=True, **options)``.

        Raises:
            SpecialTokenError: as ``render``.
        """
        if self.check([message["content"] for message in messages]):
            marked = self.render(messages, **options)
            if marked.marks:
                return self.encode(marked, add_special_tokens=False)
        return self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)

    def render(self, messages: Sequence[Mapping[str, str]], *, parts: str = "content", **options: Any) -> Marked:
        """The rendered text, its content's special tokens marked.

        Raises:
            SpecialTokenError: it cannot be told which special tokens of the rendered text are content.
        """
        texts = [message[parts] for message in messages]

        def rendered(contents: Sequence[str]) -> str:
            changed = [{**message, parts: text} for message, text in zip(messages, contents, strict=True)]
            text: str = self.tokenizer.apply_chat_template(changed, tokenize=False, **options)
            return text

        plain = rendered(texts)
        return self.marked(texts, rendered, plain) if self.check(texts) else Marked(plain, ())

    def marked(self, contents: Sequence[str], render: Callable[[Sequence[str]], str], plain: str) -> Marked:
        """``plain`` is ``render(contents)``; which of its special tokens are content.

        Raises:
            SpecialTokenError: it cannot be told.
        """
        mark = next((mark for mark in _MARKS if all(mark not in text for text in (plain, *contents))), None)
        if mark is None:
            raise SpecialTokenError("the text holds every private-use character that could mark its special tokens")
        tokens = sorted({match[0] for text in contents for match in self._own(text)})
        tried = functools.partial(self._try, contents, render, plain, mark)
        for edges in (True, False):
            if (found := tried(dict.fromkeys(tokens, "inside"), edges)) is not None:
                return found
            alone = {token: next((way for way in _PLACEMENTS if tried({token: way}, False)), None) for token in tokens}
            ways = {token: way for token, way in alone.items() if way is not None}
            if tokens and len(ways) == len(tokens) and (found := tried(ways, edges)) is not None:
                return found
        listed = ", ".join(map(repr, tokens))
        raise SpecialTokenError(
            f"the text holds {listed}, and in what the chat template makes of it, that cannot be told from the "
            "template's own special tokens (special_tokens_in_content=allow reads them all as control tokens)"
        )

    def _try(
        self,
        contents: Sequence[str],
        render: Callable[[Sequence[str]], str],
        plain: str,
        mark: str,
        ways: Mapping[str, Placement],
        edges: bool,
    ) -> Marked | None:
        try:
            text = render([self._with_marks(content, mark, ways, edges) for content in contents])
        except Exception:  # the template refuses what it takes unmarked: jinja's errors and any other
            return None
        if text.replace(mark, "") != plain:
            return None
        marks = {match.start() - number for number, match in enumerate(re.finditer(mark, text))}
        protected = []
        for match in self._search.finditer(plain):
            start, end = match.span()
            inside = any(start < place < end for place in marks)
            if inside or (ways.get(match[0]) == "around" and start in marks and end in marks):
                protected.append((start, end))
        return Marked(plain, tuple(protected))

    def _with_marks(self, content: str, mark: str, ways: Mapping[str, Placement], edges: bool) -> str:
        made, last = [], 0
        for match in self._own(content):
            token, (start, end) = match[0], match.span()
            way = ways.get(token)
            if way is None:
                continue
            if way == "wide":
                while start > last and content[start - 1].isspace():
                    start -= 1
                while end < len(content) and content[end].isspace():
                    end += 1
            made.append(content[last:start])
            made.append(token[0] + mark + token[1:] if way == "inside" else mark + content[start:end] + mark)
            last = end
        made.append(content[last:])
        text = "".join(made)
        if edges and content:
            before, after = self._edges(content)
            text = (mark if before else "") + text + (mark if after else "")
        return text

    def _edges(self, content: str) -> tuple[bool, bool]:
        """Whether a content begins with the end of a special token, or ends with the beginning of one."""
        sizes = range(1, min(self._longest, len(content) + 1))
        return any(content[:n] in self._tails for n in sizes), any(content[-n:] in self._heads for n in sizes)

    def _own(self, content: str) -> list[re.Match[str]]:
        """The special tokens that somebody wrote, in a content or in the spans of a ``ContentText``."""
        found = list(self._search.finditer(content))
        if isinstance(content, ContentText):
            return [m for m in found if any(a < m.end() and m.start() < b for a, b in content.spans)]
        return found

    def text(self, parts: str, **options: Any) -> Any:
        """``tokenizer(text, **options)`` of a text that is all content, or a ``ContentText``."""
        return self.encode(self.all_content(parts), **options)

    def all_content(self, text: str) -> Marked:
        """A text that is all content (or what its spans say), marked.

        Raises:
            SpecialTokenError: the rule is ``error`` and it holds a special token.
        """
        return Marked(str(text), tuple(m.span() for m in self._own(text)) if self.check([text]) else ())

    def encode(self, marked: Marked, **options: Any) -> Any:
        """``tokenizer(text, **options)`` with the marked special tokens read as text.

        Raises:
            SpecialTokenError: this tokenizer, a class of Python code, cannot be made to do so.
        """
        if not marked.marks:
            return self.tokenizer(marked.text, **options)
        return self._twin_for(marked.text).encode(self._parts(marked), **options)

    def raw_context(self, marked: Marked, bos: str | None, add_bos_token: bool | None) -> list[int]:
        """Ids of a raw context that begins with BOS once: none is added where the text has it already.

        Args:
            add_bos_token: None = added.
        """
        begun = marked.without_leading(bos) != marked
        adds = not begun and (add_bos_token is None or bool(add_bos_token))
        return list(self.encode(marked, add_special_tokens=adds)["input_ids"])

    def pair(self, first: str, second: str) -> Any:
        """``tokenizer(first, second)``, both all content."""
        one, other = self.all_content(first), self.all_content(second)
        if not one.marks and not other.marks:
            return self.tokenizer(first, second)
        return self._twin_for(first + second).encode(self._parts(one), self._parts(other))

    def _parts(self, marked: Marked) -> list[_Part]:
        """The text in pieces: what lies outside special tokens of the template, and those tokens."""
        content = set(marked.marks)
        parts, last, place = [], 0, 0
        while (match := self._pattern.search(marked.text, place)) is not None:
            start, end = match.span()
            covered = next(((a, b) for a, b in content if a < end and start < b), None)
            alone = not self._added[match[0]].single_word or _is_alone(marked.text, start, end)
            if covered is not None or not alone:
                place = max(start + 1, covered[1] if covered else 0)
                continue
            parts += [_Part(marked.text[last:start], True), _Part(match[0], False)]
            last = place = end
        return [*parts, _Part(marked.text[last:], True)]

    def _twin_for(self, text: str) -> _Twin | _PythonTwin:
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            self._python_twin = self._python_twin or _PythonTwin(self)
            return self._python_twin
        size = len(self._added)
        for base in _BASES:
            if not any(base <= ord(letter) < base + size for letter in text):
                if base not in self._twins:
                    self._twins[base] = _Twin(self.tokenizer, list(self._added), base)
                return self._twins[base]
        raise SpecialTokenError("the text holds private-use characters of both planes beside special tokens")


class Marked(NamedTuple):
    """A text, and where in it special tokens stand that are content."""

    text: str
    marks: tuple[tuple[int, int], ...]
    """(start, end), in order."""

    def without_leading(self, token: str | None) -> Marked:
        """Without the template's own token at the start, if it is there."""
        if not token or not self.text.startswith(token) or (self.marks and self.marks[0][0] < len(token)):
            return self
        size = len(token)
        return Marked(self.text[size:], tuple((start - size, end - size) for start, end in self.marks))

    @property
    def defused(self) -> str:
        """The text with a zero-width space in each marked token, for servers that tokenise texts themselves."""
        made, last = [], 0
        for start, _ in self.marks:
            made += [self.text[last : start + 1], _JOINER]
            last = start + 1
        return "".join([*made, self.text[last:]])


class _Twin:
    """The same tokenizer, its special tokens renamed to placeholders; ids are the original's."""

    def __init__(self, tokenizer: Any, tokens: Sequence[str], base: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        self._placeholders = {token: chr(base + place) for place, token in enumerate(tokens)}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        renamed = self._placeholders
        for entry in state["added_tokens"]:
            entry["content"] = renamed.get(entry["content"], entry["content"])
        model = state["model"]
        merges = model.get("merges") or ()
        made = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1) for pair in merges}
        kept = (
            made & renamed.keys()
        )  # a merge makes it too: it keeps its name, and the placeholder gets an id of its own
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {
                name if name in kept else renamed.get(name, name): number for name, number in model["vocab"].items()
            }
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token") in renamed and model["unk_token"] not in kept:
            model["unk_token"] = renamed[model["unk_token"]]
        self._twin = Tokenizer.from_str(json.dumps(state))
        self._ids = {}
        for token, placeholder in renamed.items():
            number = self._twin.token_to_id(placeholder)
            if number is None:
                raise SpecialTokenError(f"the tokenizer has no twin without {token!r}")
            self._ids[number] = int(tokenizer.convert_tokens_to_ids(token))

    def encode(
        self,
        parts: Sequence[_Part],
        pair: Sequence[_Part] | None = None,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
    ) -> dict[str, Any]:
        """As the tokenizer's own call."""
        sides = [parts] if pair is None else [parts, pair]
        texts = [
            "".join(part.text if part.is_content else self._placeholders[part.text] for part in side) for side in sides
        ]
        encoding = self._twin.encode(
            texts[0], texts[1] if pair is not None else None, add_special_tokens=add_special_tokens
        )
        ids = [self._ids.get(number, number) for number in encoding.ids]
        _check(self._tokenizer, set(self._ids.values()), sides, ids, add_special_tokens=add_special_tokens)
        found = _fields(self._tokenizer, ids, encoding.type_ids)
        if return_offsets_mapping:
            found["offset_mapping"] = list(encoding.offsets)
        return Encoded(found, tuple(encoding.sequence_ids))


class _PythonTwin:
    """For tokenizers written in Python alone: their own split of plain text, between the template's tokens.

    Nobody can say what such a class does with a text, so it is trusted with one only if this gives the ids of its own
    call where all special tokens of that very text count as the template's.
    """

    def __init__(self, tokeniser: Tokeniser) -> None:
        self._tokeniser = tokeniser
        self._tokenizer = tokeniser.tokenizer

    def encode(
        self,
        parts: Sequence[_Part],
        pair: Sequence[_Part] | None = None,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
    ) -> dict[str, Any]:
        """As the tokenizer's own call."""
        sides = [parts] if pair is None else [parts, pair]
        if return_offsets_mapping or not all(map(self._is_understood, sides)):
            raise SpecialTokenError(
                "it holds special tokens, and this tokenizer (written in Python alone) cannot be made to read them as "
                "text"
            )
        split = [self._ids(side) for side in sides]
        ids = list(itertools.chain(*split))
        if add_special_tokens:
            ids = list(self._tokenizer.build_inputs_with_special_tokens(*split))
        special = set(self._tokeniser.special_ids)
        _check(self._tokenizer, special, sides, ids, add_special_tokens=add_special_tokens)
        types = [0] * len(ids)
        if "token_type_ids" in self._tokenizer.model_input_names and add_special_tokens:
            types = self._tokenizer.create_token_type_ids_from_sequences(*split)
        return Encoded(_fields(self._tokenizer, ids, types), self._sides(split, ids))

    def _sides(self, split: Sequence[list[int]], ids: Sequence[int]) -> tuple[int | None, ...]:
        """Which text an id is of; None for those that the tokenizer puts around them."""
        around = [0] * len(ids)
        if len(ids) > sum(map(len, split)):
            around = list(self._tokenizer.get_special_tokens_mask(*split))
        sides = iter([side for side, mine in enumerate(split) for _ in mine])
        return tuple(None if is_added else next(sides, None) for is_added in around)

    def _is_understood(self, parts: Sequence[_Part]) -> bool:
        text = "".join(part.text for part in parts)
        wanted = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            return bool(self._ids(self._tokeniser._parts(Marked(text, ()))) == list(wanted))
        except (AttributeError, NotImplementedError, TypeError):  # a class that splits text in another way
            return False

    def _ids(self, parts: Sequence[_Part]) -> list[int]:
        known, tokenizer = self._tokeniser._added, self._tokenizer
        shown = [part for part in parts if part.text]
        found: list[int] = []
        for place, (text, is_content) in enumerate(shown):
            if not is_content:
                found.append(int(tokenizer.convert_tokens_to_ids(text)))
                continue
            before, after = shown[place - 1] if place else None, shown[place + 1] if place + 1 < len(shown) else None
            if before is not None and not before.is_content and known[before.text].rstrip:
                text = text.lstrip()
            if after is not None and not after.is_content and known[after.text].lstrip:
                text = text.rstrip()
            if text:
                found += tokenizer.convert_tokens_to_ids(tokenizer._tokenize(text))
        return found


def _fields(tokenizer: Any, ids: Sequence[int], types: Sequence[int]) -> dict[str, Any]:
    found = {"input_ids": list(ids), "attention_mask": [1] * len(ids), "token_type_ids": list(types)}
    if "token_type_ids" not in tokenizer.model_input_names:
        del found["token_type_ids"]
    return found


def _check(
    tokenizer: Any, special: set[int], sides: Sequence[Sequence[_Part]], ids: Sequence[int], *, add_special_tokens: bool
) -> None:
    """Every special id comes from the template, or is one that the tokenizer puts around any text.

    Raises:
        SpecialTokenError: there are more, or fewer.
    """
    own = special - {tokenizer.unk_token_id}
    wanted = [part.text for side in sides for part in side if not part.is_content and part.text]
    added = tokenizer.num_special_tokens_to_add(pair=len(sides) > 1) if add_special_tokens else 0
    unknown = sum(tokenizer.convert_tokens_to_ids(token) == tokenizer.unk_token_id for token in wanted)
    if sum(number in own for number in ids) != len(wanted) - unknown + added:
        raise SpecialTokenError("special tokens in the text cannot be told from the template's by this tokenizer")


class Encoded(dict[str, Any]):
    """What a tokenizer gives, with the parts of a pair."""

    def __init__(self, values: Mapping[str, Any], sides: tuple[int | None, ...]) -> None:
        super().__init__(values)
        self._sides = sides
        self.encodings = True

    def sequence_ids(self, _: int = 0) -> list[int | None]:
        """0 = first text, 1 = second, None = added by the tokenizer."""
        return list(self._sides)


DEFUSED = (
    "its server tokenises texts itself: special tokens that a prompt or an answer spells, such as '<|im_end|>', get a "
    "zero-width space behind their first character, so that they stay text (reported once). "
    "special_tokens_in_content=allow sends them as they are, error refuses them."
)


class ContentGuard:
    """Holds content that a server will tokenise to the rule.

    Args:
        name: of the reward model, for messages.
        tokeniser: of the server's tokenizer, if it is known; see ``defuse``.
    """

    def __init__(self, name: str, rule: str, tokeniser: Tokeniser | None = None) -> None:
        self.name = name
        self.rule = rule
        self.tokeniser = tokeniser
        self.num_defused = 0
        """Texts that were changed."""

    def text(self, content: str, row: int) -> str:
        """The content as it may be sent.

        Raises:
            RewardError: the rule is ``error`` and it holds what is, or looks like, a special token.
        """
        safe = content if self.rule == ALLOW else defuse(content, self.tokeniser)
        if safe == content:
            return content
        if self.rule == ERROR:
            place = next(i for i, (a, b) in enumerate(zip(content, safe, strict=False)) if a != b) - 1
            raise RewardError(
                f"reward_model={self.name!r}: row {row} or its prompt holds a special token "
                f"(special_tokens_in_content=error): {content[max(0, place - 30) : place + 40]!r}",
                hint="special_tokens_in_content=encode_as_text reads special tokens as text.",
            )
        if not self.num_defused:
            _logger.warning("reward_model=%s: %s", self.name, DEFUSED)
        self.num_defused += 1
        return safe


def defuse(text: str, tokeniser: Tokeniser | None) -> str:
    """The text with a zero-width space in what would be a special token: for servers that tokenise texts themselves.

    Args:
        tokeniser: of the server's tokenizer; None: what looks like a control token (``<|...|>``, ``<s>``, ``[INST]``,
            ``<start_of_turn>`` and the like) counts as one.
    """
    pattern = _CONTROL_LIKE if tokeniser is None else tokeniser._search
    return pattern.sub(lambda match: match[0][0] + _JOINER + match[0][1:], text)


def concerned(tokeniser: Tokeniser | None, prompts: Sequence[str]) -> str | None:
    """How many prompts hold special tokens that are read as such, in words; None if none does."""
    if tokeniser is None or tokeniser.rule != ALLOW:
        return None
    found = [token for token in map(tokeniser.found_in, prompts) if token is not None]
    if not found:
        return None
    return (
        f"special tokens such as {found[0]!r} stand in {len(found)} of {counted(len(prompts), 'prompt')}, and are read "
        "as control tokens, as --model hf does; special_tokens_in_content=encode_as_text reads them as text."
    )


def _added_tokens(tokenizer: Any) -> dict[str, Any]:
    """Every added token but those of white space alone, by its text."""
    decoder = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found = {str(entry.content): entry for entry in decoder.values()}
    return {text: entry for text, entry in found.items() if text.strip().strip("\u2581")}


def _is_alone(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    return not (re.match(r"\w", before) or re.match(r"\w", after))


def _near(text: str, token: str) -> str:
    place = text.find(token)
    return text[max(0, place - 30) : place + len(token) + 30]
