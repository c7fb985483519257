"""Keep the names that people give to runs in one ConfigMap of a cluster: name -> run directory.

It is `stillhouse-names`. Claiming a name replaces the version that was read; where the ConfigMap
has changed since, it is read again.
"""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.errors import ConfigError
from stillhouse.sweep.cluster.connect import ApiError, Cluster
from stillhouse.sweep.cluster.ledger import ROOM
from stillhouse.sweep.cluster.manifest import config_map
from stillhouse.sweep.cluster.ownership import refuse_stranger

NAMES = "stillhouse-names"


class Names:
    """What people call their runs: one meaning each, in one namespace."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def read(self) -> dict[str, str]:
        """Every name, and the run directory that it means."""
        item = self.cluster.read("configmaps", NAMES)
        return dict(item.get("data") or {}) if item else {}

    def claim(self, name: str, directory: str) -> bool:
        """Make a name mean a run directory; False if it already did."""
        return bool(self.claim_all({name: directory}))

    def claim_all(self, names: Mapping[str, str]) -> set[str]:
        """Make names mean run directories, all or none; those that are new.

        Raises:
            ConfigError: a name already means another directory, there is no room, or the ConfigMap
                is not ours.
        """
        while True:
            item = self.cluster.read("configmaps", NAMES)
            refuse_stranger(item, None)
            there: dict[str, str] = (item or {}).get("data") or {}
            new = {name: to for name, to in names.items() if there.get(name) != to}
            for name in new.keys() & there.keys():
                raise ConfigError(
                    f'the name "{name}" already means {there[name]} on this cluster, and this is'
                    f" {new[name]}: another configuration. Choose another name"
                )
            if not new:
                return set()
            data = there | new
            if sum(len(name) + len(to) for name, to in data.items()) > ROOM:
                raise ConfigError(
                    f"configmap {NAMES}: full ({len(there)} names); remove some with `kubectl edit"
                    f" configmap {NAMES}`"
                )
            try:
                if item is None:
                    self.cluster.create("configmaps", config_map(NAMES, {}, data=data))
                else:
                    self.cluster.replace("configmaps", NAMES, item | {"data": data})
                return set(new)
            except ApiError as error:
                if error.status not in (404, 409):  # somebody was quicker: read again
                    raise
