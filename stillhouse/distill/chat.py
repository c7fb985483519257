"""Render conversations as text with the tokenizer's chat template, under one fixed date.

A prompt is what the template writes up to the point where the assistant speaks. An answer is cut
out of the template's own rendering of the whole conversation, so the student is trained on the
white space, think blocks, and turn ends that it will meet later. An answer ends in the token that
the template writes after an assistant's turn; rollouts stop at that token, too. This module does
not import torch; the caller passes the tokenizer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from stillhouse.distill import loading
from stillhouse.distill.formats import Skip
from stillhouse.distill.pairs import PreparedPair
from stillhouse.errors import ConfigError, nearest
from stillhouse.spec import DataSpec

Turn = Mapping[str, Any]  # for chat templates: role, content, and other fields they read

PROBE = "stillhouse"  # a text that no template writes by itself
# Variables that a template gets by other means than chat_template_kwargs.
OURS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")
# Names under which templates take today's date from their caller, written as Llama 3 writes it.
DATES = ("date_string", "date", "current_date")
NO_PREFIX = "answer that the chat template does not write behind its own prompt"


@dataclass(frozen=True)
class Rendered:
    """A row as text."""

    prompt: str
    answer: str | None  # including its end token; None: the row has no answer
    add_special_tokens: bool  # to the prompt; False if the template writes them itself


class Chat:
    """One tokenizer's chat template, with one set of kwargs and one date."""

    def __init__(self, tokenizer: Any, data: DataSpec, declared: Iterable[int] = ()) -> None:
        """`declared`: ids that a model's own configs name as end-of-text (`declared_stop_ids`).

        Raises ConfigError: the template cannot be compiled, or does not use a kwarg's name; no
        token is known that ends an answer.
        """
        self.tokenizer, self.kwargs, self.date = tokenizer, data.chat_template_kwargs, _day(data)
        self._compiled: dict[str, _Template] = {}
        self.has_template = bool(tokenizer.chat_template)
        if self.has_template:
            for template in self._sources():
                self._check_kwargs(self._template(template), data.data_name)
        elif self.kwargs:
            raise ConfigError(
                f"data {data.data_name}: chat_template_kwargs {self.kwargs} are of a chat template,"
                " and this pair's tokenizer has none"
            )
        declared = list(declared)
        end = self._usual(None).end if self.has_template else None
        named = [end, tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(declared)]
        self.end_token = next((token for token in named if token), "")
        if not self.end_token:
            raise ConfigError(
                "nothing says where an answer ends: the tokenizer names no EOS token, no config has"
                " an eos_token_id, and no chat template writes a token behind an assistant's turn"
            )
        self.end_id: int = tokenizer.convert_tokens_to_ids(self.end_token)
        if self._ids([(self.end_token, False)]) != [[self.end_id]]:
            raise ConfigError(
                f"answers end in {self.end_token!r}, which this tokenizer does not read as one"
                " token; name an EOS token that it does"
            )
        self.stop_ids = sorted({self.end_id, tokenizer.eos_token_id, *declared} - {None})
        self._ends = tuple(filter(None, tokenizer.convert_ids_to_tokens(self.stop_ids)))
        self._is_separable = self._reads_apart()

    # ------------------------------------------------------------ text

    def render(
        self,
        turns: Sequence[Turn],
        answer: str | Turn | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """The prompt of `turns`, and the assistant's `answer` to it (its text, or its whole turn).

        Raises Skip: the template refuses the turns, or does not render the answer after the prompt;
        the prompt would end in end-of-text.
        """
        template = self._usual(tools)
        prompt = self._write(template, turns, tools, True)
        if prompt.endswith(self._ends):
            raise Skip("prompt that the chat template ends in end-of-text", repr(prompt[-40:]))
        if answer is None:
            return Rendered(prompt, None, False)
        said = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        whole = self._write(template, [*turns, said], tools, False)
        if not whole.startswith(prompt):
            raise Skip(NO_PREFIX, self._parting(prompt, whole, template))
        return Rendered(prompt, self._cut(whole[len(prompt) :], template), False)

    def plain(self, prompt: str, answer: str | None = None) -> Rendered:
        """A prompt and its answer unchanged, for a tokenizer without a chat template."""
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and prompt.startswith(bos)
        return Rendered(prompt, None if answer is None else answer + self.end_token, not has_bos)

    def continued(self, turns: Sequence[Turn]) -> str:
        """The text of a conversation whose last assistant turn is unfinished and will be continued.

        Raises Skip: the template refuses the turns, or does not render the last one.
        """
        begun = str(turns[-1]["content"])
        marked = [*turns[:-1], {**turns[-1], "content": begun + PROBE}]
        before, mark, _ = self._write(self._usual(None), marked, None, False).rpartition(PROBE)
        if not mark:
            raise Skip("a begun turn that the chat template does not write", repr(begun[:40]))
        return before

    def _cut(self, written: str, template: _Template) -> str:
        """The assistant's turn, up to its end token, from all the text after a prompt."""
        if written.endswith(template.tail):
            said = written.removesuffix(template.tail)
            if template.end is None:
                return said + template.tail.rstrip() + self.end_token
            return said + template.tail[: template.tail.index(template.end)] + template.end
        said, end, _ = written.rpartition(template.end or self.end_token)
        if not end:
            raise Skip("answer that the chat template does not end", repr(written[-40:]))
        return said + end

    def _parting(self, prompt: str, whole: str, template: _Template) -> str:
        """Where a prompt and its whole conversation differ, and which kwargs may change that."""
        at = len(os.path.commonprefix([prompt, whole]))
        ours, theirs = prompt[at : at + 40], whole[at : at + 40]
        settable = ", ".join(self._settable(template)) or "nothing"
        return (
            f"the prompt goes on {ours!r}, the conversation {theirs!r};"
            f" chat_template_kwargs can set {settable}"
        )

    # ------------------------------------------------------------ ids

    def encode(self, rows: Sequence[Rendered]) -> list[tuple[list[int], list[int]]]:
        """(prompt, answer) as ids, for each row; an answer that is None gives no ids.

        The prompt is tokenized alone, as in generation. No prompt ends in end-of-text.
        """
        prompts = self._ids([(row.prompt, row.add_special_tokens) for row in rows])
        for row, ids in zip(rows, prompts, strict=True):
            # Some tokenizers append EOS to every text; the model would write after its end.
            while row.add_special_tokens and ids and ids[-1] in self.stop_ids:
                ids.pop()
        answers = self._ids([(row.answer or "", False) for row in rows])
        found = list(zip(prompts, answers, strict=True))
        if self._is_separable:
            return found
        texts = [(r.prompt + (r.answer or ""), r.add_special_tokens) for r in rows]
        return [
            (prompt, self._behind(prompt, whole, answer) if answer else [])
            for (prompt, answer), whole in zip(found, self._ids(texts), strict=True)
        ]

    def _behind(self, prompt: list[int], whole: list[int], alone: list[int]) -> list[int]:
        """The answer's ids after its prompt; its ids alone, if a token spans the two."""
        while whole[-2:] == [self.end_id] * 2:  # the tokenizer appends EOS to every text
            whole.pop()
        return whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone

    def _ids(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        found: list[list[int]] = [[]] * len(texts)
        for special in {add for _, add in texts}:
            rows = [i for i, (_, add) in enumerate(texts) if add is special]
            # Not verbose: rows that are too long are counted, which says more than one warning.
            encoded = self.tokenizer(
                [texts[i][0] for i in rows], add_special_tokens=special, verbose=False
            )
            for i, ids in zip(rows, encoded["input_ids"], strict=True):
                found[i] = list(ids)
        return found

    def _reads_apart(self) -> bool:
        """Whether text after a prompt has the same ids as it has alone.

        SentencePiece tokenizers put a space before the first word of every text.
        """
        newline, word, both, behind_end = self._ids(
            [(text, False) for text in ("\n", "a", "\na", self.end_token + "a")]
        )
        return both == newline + word and behind_end == [self.end_id, *word]

    # ------------------------------------------------------------ template

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the ids of a conversation, except the tokenizer itself."""
        return {
            "templates": [hashlib.sha256(t.encode()).hexdigest()[:16] for t in self._sources()],
            "chat_template_kwargs": dict(self.kwargs),
            "template_date": self.date.isoformat(),
            "end_token": self.end_token,
            "stop_ids": self.stop_ids,
        }

    def _sources(self) -> list[str]:
        templates = self.tokenizer.chat_template or {}
        return list(templates.values()) if isinstance(templates, dict) else [templates]

    def _usual(self, tools: Sequence[Mapping[str, Any]] | None) -> _Template:
        """The template that transformers would use."""
        try:
            return self._template(self.tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise ConfigError(f"the tokenizer's chat templates: {error}") from error

    def _template(self, source: str) -> _Template:
        if source not in self._compiled:
            compiled = _Template(source, self.tokenizer)
            self._compiled[source] = compiled
            compiled.given = {
                name: self._strftime("%d %b %Y")
                for name in DATES
                if name in compiled.reads and name not in compiled.guarded
            } | dict(self.kwargs)
            compiled.wants_parts = not self._shows(compiled, PROBE) and self._shows(
                compiled, [{"type": "text", "text": PROBE}]
            )
            self._find_end(compiled)
        return self._compiled[source]

    def _shows(self, template: _Template, content: Any) -> bool:
        """Whether the template renders the text in a content of this form."""
        try:
            return PROBE in self._write(
                template, [{"role": "user", "content": content}], None, True
            )
        except Skip:
            return False

    def _find_end(self, template: _Template) -> None:
        """Set the text the template writes after the last assistant turn, and the end token."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            _, said, tail = self._write(template, turns, None, False).rpartition(PROBE)
        except Skip:
            return
        if not said:
            return
        known = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        known |= set(self.tokenizer.all_special_tokens)
        # The earliest of them; of several there, the longest. White space is no end token.
        places = [(tail.find(t), -len(t), t) for t in known if t.strip() and t in tail]
        template.tail, template.end = tail, min(places)[2] if places else None

    def _check_kwargs(self, template: _Template, data_name: str) -> None:
        for name in self.kwargs:
            if name not in template.reads and len(self._sources()) == 1 or name in OURS:
                reads = self._settable(template)
                raise ConfigError(
                    f"data {data_name}: chat_template_kwargs: the tokenizer's chat template has no"
                    f" variable {name} to set; it reads {', '.join(reads) or 'none'}."
                    f"{nearest(name, reads)}"
                )

    def _settable(self, template: _Template) -> list[str]:
        return sorted(template.reads - {*OURS, *self.tokenizer.special_tokens_map})

    def _strftime(self, form: str) -> str:
        return datetime.combine(self.date, time()).strftime(form)

    def _write(
        self,
        template: _Template,
        turns: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        return template.render(
            turns,
            tools=None if tools is None else list(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=self._strftime,
        )


class _Template:
    """One chat template, compiled."""

    def __init__(self, source: str, tokenizer: Any) -> None:
        from jinja2 import TemplateError, meta, nodes

        # The library's own environment: sandbox, filters, {% generation %}. Its public function
        # takes no callable variables, so it would always write the current date.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            self._jinja: Any = _compile_jinja_template(source)
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template cannot be read: {error}") from error
        tree = self._jinja.environment.parse(source)
        self.reads = meta.find_undeclared_variables(tree) - {*self._jinja.globals}
        tested = [t.node for t in tree.find_all(nodes.Test) if t.name in ("defined", "undefined")]
        tested += [f.node for f in tree.find_all(nodes.Filter) if f.name in ("default", "d")]
        tested += [n for n in tree.find_all(nodes.Name) if n.ctx == "store"]
        # Variables that are optional for the template, or that it assigns itself.
        self.guarded = {node.name for node in tested if isinstance(node, nodes.Name)}
        self.special = dict(tokenizer.special_tokens_map)
        self.given: dict[str, Any] = {}
        self.wants_parts = False  # whether it reads content as parts, as multimodal ones do
        self.writes = {name for name in ("tools", "tool_calls") if name in source}
        self.tail = ""
        self.end: str | None = None

    def render(self, turns: Sequence[Turn], **variables: Any) -> str:
        """Raises Skip if the template refuses these turns, or fails on them."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _alias_reasoning_fields

        messages = [{k: v for k, v in turn.items() if v is not None} for turn in turns]
        if self.wants_parts:
            messages = [_with_parts(turn) for turn in messages]
        needed = {"tools"} if variables.get("tools") else set[str]()
        needed |= {"tool_calls"} if any("tool_calls" in turn for turn in messages) else set()
        for name in needed - self.writes:
            raise Skip(f"{name} that the chat template does not write")
        everything = {**self.special, **self.given, **variables}
        try:
            return self._jinja.render(messages=_alias_reasoning_fields(messages), **everything)
        except TemplateError as error:
            raise Skip("turns that the chat template refuses", str(error.message)) from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise Skip("turns that the chat template breaks on", repr(error)) from error


def _with_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with its text as a list of one part."""
    text = turn.get("content")
    parts = [{"type": "text", "text": text}] if text else []
    return turn | {"content": parts} if isinstance(text, str) else turn


def _day(data: DataSpec) -> date:
    return date.fromisoformat(data.template_date)


def chat_of(prepared: PreparedPair, tokenizer: Any, data: DataSpec) -> Chat:
    """The chat format of both models of a pair, with the stop ids of both."""
    student = declared_stop_ids(prepared.student, prepared.student_revision)
    teacher = declared_stop_ids(prepared.teacher, prepared.teacher_revision)
    return Chat(tokenizer, data, (*student, *teacher))


def declared_stop_ids(path: str, revision: str | None) -> list[int]:
    """The EOS ids of a model's config, its text config, and its generation config."""
    from transformers import GenerationConfig

    config = loading.config_of(path, revision)
    with loading.told(f"the config of {path}"):
        sources = [config, config.get_text_config()]
        file = Path(loading.files_of(path, revision)) / "generation_config.json"
        if file.is_file():  # many models come without one
            sources.append(GenerationConfig.from_pretrained(file.parent))
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return sorted(found)
