"""Read the rights in `k8s/access.yaml`, so that an error can name the right that is missing.

The file that an administrator applies is also the list that is checked before the first Job.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

from stillhouse.compose import k8s_dir
from stillhouse.rundir import Json


@dataclass(frozen=True)
class Rule:
    """One right: a verb on a resource, and the Role that gives it."""

    role: str
    group: str  # "" is Kubernetes' core
    resource: str
    sub: str | None  # of pods/log: log
    verb: str

    def __str__(self) -> str:
        """As a person would ask an administrator for it."""
        what = f"{self.resource}/{self.sub}" if self.sub else self.resource
        return f"{self.verb} {what}{'.' * bool(self.group)}{self.group} (Role {self.role})"


@functools.cache
def _rules() -> tuple[Rule, ...]:
    import yaml

    found: list[Rule] = []
    text = (k8s_dir() / "access.yaml").read_text(encoding="utf-8")
    for document in cast("list[Json]", list(yaml.safe_load_all(text))):
        for rule in document.get("rules") or ():
            found += _unfolded(document["metadata"]["name"], rule)
    return tuple(found)


def _unfolded(role: str, rule: Json) -> list[Rule]:
    parts = [cast("str", name).partition("/") for name in rule["resources"]]
    groups, verbs = cast("list[Any]", rule["apiGroups"]), cast("list[Any]", rule["verbs"])
    return [
        Rule(role, group, resource, sub or None, verb)
        for group in groups
        for resource, _, sub in parts
        for verb in verbs
    ]


def rules(role: str | None = None) -> list[Rule]:
    """The rights that `k8s/access.yaml` gives: of one Role, or of all."""
    return [rule for rule in _rules() if role in (None, rule.role)]
