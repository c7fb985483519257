"""Translate the cluster's refusals of a pod or a Job into reasons a person can act on; tell how the
words of two Jobs differ.

Pure. Each names the object at fault (a quota, a LimitRange, a label of the namespace) and how to
see it.
"""

from __future__ import annotations

import re
import shlex

SHORT = 240  # characters of the cluster's own words in one of our lines


def why_not_made(said: str) -> str:
    """Why a Job is not even made, in words; `said`: what the API server, or our maker, says."""
    refused = re.sub(r'^jobs\.batch "[^"]*" is forbidden: ', "", said)
    if "exceeded quota" not in refused:
        return short(said)
    return (
        f"quota: {short(refused)}: no Job can be made until others are deleted (those that ended"
        " count too)"
    )


def refused(message: str) -> tuple[str, bool]:
    """Why the Job controller may not make a pod, and whether waiting does not mend that."""
    said = re.sub(r'^Error creating: (pods "[^"]*" is forbidden: )?', "", message)
    if "exceeded quota" in said:
        return f"quota: {short(said)}", _can_never_fit(said)
    if "failed quota" in said:
        words = f"quota: {short(said)}: a ResourceQuota that wants what no pod of ours says"
        return f"{words} (kubectl get resourcequotas)", True
    if re.search(r"per (Container|Pod|PersistentVolumeClaim) is", said):
        words = f"quota or limit range: {short(said)} (kubectl get limitranges; site.memory_gib)"
        return words, True
    if "PriorityClass" in said:
        return f"{short(said)}: set site.priority_class to one that exists", True
    if "violates PodSecurity" in said:
        words = f"pod security: {short(said)} (pod-security label of the namespace)"
        return words, True
    found = re.search(r'serviceaccount "([^"]+)" not found', said)
    if found:
        words = f'service account "{found[1]}" is missing: apply k8s/access.yaml'
        return words, True
    if "must be less than or equal to" in said and "limit" in said:
        words = f"limit range: {short(said)}: a LimitRange of the namespace sets that limit"
        return f"{words} (kubectl get limitranges; site.cpu, site.memory_gib)", True
    is_passing = "failed calling webhook" in said or "timeout" in said.lower()
    return f"its pod is refused: {short(said)}", not is_passing


def _can_never_fit(said: str) -> bool:
    """Whether a pod asks more than a whole quota; else it waits until others leave room."""
    amounts: list[dict[str, float]] = []
    for word in ("requested", "limited"):
        found = re.search(rf"{word}: (\S+)", said)
        pairs = (pair.partition("=") for pair in (found[1].rstrip(",") if found else "").split(","))
        amounts.append({name: quantity(value) for name, _, value in pairs if value})
    requested, limited = amounts
    return any(amount > limited.get(name, amount) for name, amount in requested.items())


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: 500m is 0.5, 2Gi is 2147483648; NaN where it is none."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)(m|[kMGTPE]i?|Ki)?", text)
    if found is None:
        return float("nan")
    number, unit = float(found[1]), found[2] or ""
    if unit == "m":
        return number / 1000
    power = "kMGTPE".find(unit[:1].replace("K", "k")) + 1 if unit else 0
    return number * (1024 if unit.endswith("i") else 1000) ** power


def short(text: str | None) -> str:
    """One line of at most SHORT characters."""
    line = " ".join((text or "").split())
    return line if len(line) <= SHORT else line[: SHORT - 1] + "…"


def demands(asks: str | None) -> dict[str, str]:
    """What a Job says its site asks for, by knob; {} where it says nothing that can be read."""
    try:
        words = shlex.split(asks or "")
    except ValueError:  # somebody edited it
        return {}
    return dict(
        (knob, value) for knob, is_set, value in (w.partition("=") for w in words) if is_set
    )


def differing(there: str | None, here: str, unset: str = "null") -> str:
    """How a Job's words differ from ours, by knob; "" where they do not, or are unknown."""
    was, is_ = demands(there), demands(here)
    if not was:
        return ""
    return ", ".join(
        f"{knob} is {short(was.get(knob, unset))} there and {short(is_.get(knob, unset))} here"
        for knob in sorted({*was, *is_})
        if was.get(knob) != is_.get(knob)
    )
