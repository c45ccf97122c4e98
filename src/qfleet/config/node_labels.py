"""Labels by which the processes of a run choose nodes of a Ray cluster."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from qfleet.config.checks import check

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
"""A value of a label, and the name of one without its prefix. Ray takes the syntax of Kubernetes."""

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"(?:(?=[^/]{{1,253}}/){_WORD}(?:\.{_WORD})*/)?{_NAME}")
_RULE = re.compile(rf"!?(?:{_NAME}|in\({_NAME}(?:,{_NAME})*\))")
"""Rules that Ray reads as they are meant. Ray also takes a space after a comma, but then never finds what follows."""


def node_labels(config: Any) -> dict[str, Mapping[str, str]]:
    """Returns the labels that nodes must have, by the setting that asks for them; without settings that ask for none.

    Args:
      config: the config of a topology.
    """
    names = [field.name for field in dataclasses.fields(config) if field.name.endswith("_node_labels")]
    return {name: labels for name in names if (labels := getattr(config, name))}


def check_node_labels(config: Any) -> None:
    """Checks the labels that a topology's config asks for, and that it runs on a cluster whose nodes may have them.

    Raises:
      ConfigError: if Ray couldn't read them, or the run starts its Ray itself, whose only node has no labels.
    """
    for setting, labels in node_labels(config).items():
        is_cluster = config.ray_address not in (None, "local")
        rule = "empty, or given with ray_address auto or HOST:PORT: only nodes of a cluster of yours have labels"
        check(is_cluster, setting, rule, f"ray_address {config.ray_address}")
        for label, value in labels.items():
            rule = "labels whose names are as in Kubernetes, such as zone or example.com/zone"
            check(_LABEL.fullmatch(label) is not None, setting, rule, label)
            rule = "VALUE, !VALUE, in(VALUE,VALUE) or !in(VALUE,VALUE), of letters, digits, dots and dashes, no spaces"
            check(_RULE.fullmatch(value) is not None, f"{setting}[{label}]", rule, value)


def has_labels(node: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Returns whether a node has the labels that a setting asks for.

    Args:
      node: labels of the node.
      wanted: labels that it must have: VALUE or in(VALUE,VALUE). After a ! it must have none of these values.
    """
    for label, rule in wanted.items():
        values = rule.removeprefix("!")
        allowed = values[len("in(") : -1].split(",") if values.startswith("in(") else [values]
        if (node.get(label) in allowed) == rule.startswith("!"):
            return False
    return True
