"""Compose the settings of the cluster that a command means, and the words that select it again.

A site consists of settings like any other (conf/site/): one of these files, a sweep's `site:` block
and words of a command line combine by the usual rules.
"""

from __future__ import annotations

import dataclasses

from stillhouse.compose import Overrides, as_command_line, compose
from stillhouse.spec import SiteSpec, TrainSpec
from stillhouse.text import shell_line

CLUSTER = "cluster"  # the backend, and the file of conf/site that counts where nobody names one
# What has to be known of a site to look at it from elsewhere.
WHERE = ("kube_context", "namespace", "runs_claim", "owner")


def site_of(overrides: Overrides) -> SiteSpec:
    """A cluster's site: conf/site/cluster.yaml, or the file that the overrides choose, and they.

    Raises:
        ConfigError: no such file, or a value that cannot be right.
    """
    groups = {"site": CLUSTER, **overrides.groups}
    return compose(dataclasses.replace(overrides, groups=groups), TrainSpec).site


def away_words(site: SiteSpec) -> str:
    """The words that select this site in any command: --backend cluster namespace=lab."""
    usual = site_of(Overrides({}, {}))
    other = {f"site.{key}": getattr(site, key) for key in WHERE}
    other = {k: v for k, v in other.items() if v != getattr(usual, k.partition(".")[2])}
    return shell_line(["--backend", CLUSTER, *as_command_line(Overrides({}, other))])
