"""The trees of a checkpoint as names and leaves: how each array is called, described and stored."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

TreePath = tuple[str, ...]
"""The names on the way from the root of a tree to a leaf: of fields, keys and indices."""


def named_leaves(tree: PyTree) -> dict[TreePath, Any]:
    """Returns the leaves of a tree by their paths."""
    # Orbax needs a dictionary, and a tree that is a single array has an empty path. So such an array gets a name.
    return {tuple(map(_key_name, path)) or ("value",): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _key_name(entry: Any) -> str:
    """Returns the name of a child in its tree: the name of a field, the key in a dictionary, or an index."""
    return jax.tree_util.keystr((entry,), simple=True)


def nest(leaves: Iterable[tuple[TreePath, Any]]) -> Any:
    """Returns nested dictionaries with these leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def recorded_leaves(index: Mapping[str, Any], item: str) -> dict[TreePath, dict[str, Any]]:
    """Returns the entries of index.json for the arrays of an item, by their paths."""
    return {tuple(leaf["path"]): leaf for leaf in index["items"][item]}


def describe(leaf: Any) -> dict[str, Any]:
    """Returns the entry for an array in index.json."""
    if not is_jax(leaf):
        leaf = np.asarray(leaf)
    description = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if is_key(leaf) and isinstance(leaf, jax.Array):
        description["key_impl"] = str(jax.random.key_impl(leaf))
    return description


def spell(description: Mapping[str, Any]) -> str:
    """Returns type and shape of an array, from its entry in index.json."""
    return f"{description['dtype']}{description['shape']}"


def to_stored(leaf: Any) -> Any:
    """Returns the plain array that Orbax writes for `leaf`. Nothing that happens to `leaf` afterwards changes it."""
    if not isinstance(leaf, jax.Array):
        is_constant = isinstance(leaf, np.ndarray) and not leaf.flags.writeable
        return leaf if is_constant else np.array(leaf)
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    # From an accelerator, Orbax copies before it returns. On a CPU it writes from the array's own memory, and meanwhile
    # JAX silently copies the array at each update that should happen in place. Copying it here, once, avoids that.
    is_on_cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    if not is_on_cpu:
        return leaf
    if leaf.is_fully_addressable:  # jnp.copy would compile a program for each shape
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return jnp.copy(leaf)


def is_jax(leaf: Any) -> bool:
    """Returns whether a leaf is an array of JAX's, or the shape of one."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed random keys, or the shape of one."""
    return is_jax(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
    """Returns how an array of JAX's lies on devices: on the first one, if its leaf doesn't say."""
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
