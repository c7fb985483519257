"""Compare the words of two Jobs: what their sites request, or what they were asked to do.

Pure. Each Job carries what its site requests (`manifest.asked`): whatever decides where and whether
it can start.
"""

from __future__ import annotations

import shlex

from stillhouse.sweep.cluster.refusals import short


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
