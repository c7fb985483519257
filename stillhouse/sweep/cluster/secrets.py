"""Detect a secret before it could reach a manifest, and refuse it.

Everybody in the namespace can read what a Job holds, and every ledger and log repeats it. A secret
belongs in a Kubernetes Secret, which a site names (`wandb_secret`, `hf_secret`) and only the pod
opens. The patterns match keys that people do paste; a value that is refused is never printed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stillhouse.errors import ConfigError

BY_NAME = "a password or token"  # what is called so, whatever it looks like
_START, _END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
KINDS: dict[str, str] = {  # what it is -> how it looks
    "a Hugging Face token": rf"{_START}hf_[A-Za-z0-9]{{20,}}",
    "a W&B key": rf"{_START}(?:[0-9a-f]{{40}}{_END}|wandb_v1_[A-Za-z0-9_]{{20,}})",
    "an API key": rf"{_START}sk-[A-Za-z0-9_-]{{16,}}",
    "a GitHub token": rf"{_START}(?:gh[a-z]_[A-Za-z0-9]{{20,}}|github_pat_[A-Za-z0-9_]{{20,}})",
    "a GitLab token": rf"{_START}glpat-[A-Za-z0-9_-]{{16,}}",
    "an AWS key": rf"{_START}(?:AKIA|ASIA)[0-9A-Z]{{16}}{_END}",
    "a Google key": rf"{_START}AIza[0-9A-Za-z_-]{{35}}",
    "a Slack token": rf"{_START}xox[a-z]-[A-Za-z0-9-]{{8,}}",
    "a signed token": rf"{_START}eyJ[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{4,}}",
    "a key in PEM": r"-{5}BEGIN ",  # not spelt out: this file travels, too
    "a password in a URL": r"://[^/\s:@]*:[^/\s:@]+@",
    BY_NAME: (
        r"(?i)(?:^|[^a-z])(?:password|passwd|secret|token|(?:api|access|private|secret)[_-]?key)"
        r"[\"']?\s*[=:]\s*[\"']?[^\s\"']"
    ),
}
_KINDS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
_ANY = re.compile("|".join(f"(?:{p.replace('(?i)', '')})" for p in KINDS.values()), re.IGNORECASE)
_KEYS = {
    kind: re.compile(pattern)
    for kind, pattern in KINDS.items()
    if kind not in ("a W&B key", "a password or token")
} | {
    "a W&B key": re.compile(
        rf"{_START}wandb_v1_[A-Za-z0-9_]{{20,}}"
        rf"|(?i:(?:wandb|api)[a-z_-]*key)[\"']?\s*[=:]\s*[\"']?[0-9a-f]{{40}}{_END}"
    )
}
_ANY_KEY = re.compile("|".join(f"(?:{p.pattern})" for p in _KEYS.values()))
# The singular: max_new_tokens counts them.
_NAME = re.compile(
    r"(?i)(?:^|[_.-])(?:password|passwd|pwd|secret|token|credentials?"
    r"|(?:api|access|private|secret|account)[_-]?key)$"
)
_NAMES_A_SECRET = (
    "wandb_secret",
    "hf_secret",
    "pull_secret",
)  # knobs whose value is the name of a Secret


def find(text: str, name: str = "") -> str | None:
    """What kind of secret this value of `name` looks like; None for one that looks like none."""
    leaf = name.rpartition(".")[2]
    if _NAME.search(leaf) and leaf not in _NAMES_A_SECRET and text not in ("", "null"):
        return BY_NAME
    if _ANY.search(text) is None:  # one search for the many that are none
        return None
    for kind, pattern in _KINDS.items():
        # A commit of a model repository has forty digits too.
        is_commit = kind == "a W&B key" and leaf.endswith(("revision", "commits"))
        if pattern.search(text) and not is_commit:
            return kind
    return None


def find_key(text: str) -> str | None:
    """The kind of key in a user's rows or settings, where `find` would match too much.

    There, forty digits are a commit and `token: …` is a tokenizer's, or a sentence.
    """
    if _ANY_KEY.search(text) is None:
        return None
    return next((kind for kind, pattern in _KEYS.items() if pattern.search(text)), None)


def refuse_key(text: str, place: str) -> None:
    """Refuse a key in settings that nobody typed; `place` is where they are.

    Raises:
        ConfigError: there is one.
    """
    kind = find_key(text)
    if kind is not None:
        raise _refusal(place, kind)


def refuse_words(words: Sequence[str], where: str) -> None:
    """Refuse a secret among the words of a command line, in either dialect.

    Raises:
        ConfigError: one of them looks like a secret; the message names its knob, not its value.
    """
    flag = ""
    for number, word in enumerate(words, start=1):
        name, equals, value = word.partition("=")
        is_flag = re.fullmatch(r"--[\w.-]+", name) is not None
        if not equals:
            name, value = flag, "" if is_flag else word
        if not re.fullmatch(r"-*[\w.-]{1,60}", name) or find(name):
            name, value = "", word
        name = name.lstrip("-").replace("-", "_")
        refuse(value, name, f"{where}: {name or f'word {number}'}")
        flag = word if is_flag and not equals else ""


def refuse_values(values: Mapping[str, str], where: str) -> None:
    """Refuse a secret among named values: environment variables, say.

    Raises:
        ConfigError: one of them looks like a secret, or its name says that it is one.
    """
    for name, value in values.items():
        refuse(value, name, f"{where}.{name}")


def refuse_texts(texts: Sequence[str], where: str) -> None:
    """Refuse a secret among tags, names or lines.

    Raises:
        ConfigError: one of them looks like a secret.
    """
    for number, text in enumerate(texts):
        refuse(text, "", f"{where}[{number}]")


def refuse(value: str, name: str, place: str) -> None:
    kind = find(value, name)
    if kind is not None:
        raise _refusal(place, kind)


def _refusal(place: str, kind: str) -> ConfigError:
    return ConfigError(
        f"{place} looks like {kind}, and what a Job holds everybody can read. Put it into a"
        " Secret (kubectl create secret generic NAME --from-literal=token=...) and name that:"
        " wandb_secret=NAME or hf_secret=NAME"
    )
