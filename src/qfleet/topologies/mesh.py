"""The mesh of one run: which devices its programs run on, and where their arrays lie."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qfleet.config import ConfigError, MeshConfig
from qfleet.core.learner import LearnerState
from qfleet.core.replicas import Replicas, over_axis
from qfleet.core.types import Network
from qfleet.networks.partition import MODEL_AXIS, partition_like, partition_params

DATA_AXIS = "data"
"""Mesh axis that lanes, replay and batches are divided over. Each device along it is a replica of the learner."""

MAX_GATHER_BYTES = 2**18
"""Bytes over all processes up to which CPUs add up vectors by an all-gather. Gloo's all-reduce takes four times as many
packets, and twice the time for a vector of 22 kB."""

REPLICATED: Any = PartitionSpec()
"""Spec of arrays that every device has whole."""


class Placement:
    """The devices of a run, as a mesh of `data` times `model`."""

    def __init__(self, config: MeshConfig, network: Network) -> None:
        """Takes the first devices of the kind that JAX prefers.

        Raises:
          ConfigError: if there are too few devices, or the network's own partitioning doesn't fit them.
        """
        num_devices = config.num_devices
        devices = jax.devices()
        if num_devices > len(devices):
            raise ConfigError(
                f"mesh.data x mesh.model must be at most the number of devices, got {config.data} x {config.model} = "
                f"{num_devices} for {len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}; "
                f"try a smaller mesh"
            )
        is_on_cpus = devices[0].platform == "cpu" and config.model == 1
        max_gather_bytes = MAX_GATHER_BYTES if jax.process_count() > 1 else 0
        self.replicas: Replicas = over_axis(
            DATA_AXIS, config.data, has_slow_messages=is_on_cpus, max_gather_bytes=max_gather_bytes
        )
        self.is_one_device = num_devices == 1
        """Whether the mesh is one device, so that `jit` is plain `jax.jit`."""
        self._network, self._num_model = network, config.model
        axes = (DATA_AXIS, MODEL_AXIS)
        self.mesh = jax.make_mesh(
            (config.data, config.model), axes, axis_types=(AxisType.Auto,) * 2, devices=devices[:num_devices]
        )

    def partition_learner(self, state: LearnerState) -> Any:
        """Returns how a learner's arrays are divided over the model axis, as a tree of `PartitionSpec`s."""
        params = partition_params(self._network, self._num_model)
        return LearnerState(
            params=params,
            target_params=params if state.target_params else (),
            optimiser_state=partition_like(state.optimiser_state, state.params, params),
            target_age=REPLICATED,
        )

    def jit(self, function: Callable, in_specs: Any, out_specs: Any, donate_argnums: tuple[int, ...] = ()) -> Any:
        """Returns a function of one replica's share as a jitted function of whole arrays.

        Args:
          function: computes one replica's share of the results from its share of the arguments; may use `replicas`.
          in_specs: for each argument, a tree of `PartitionSpec`s or a prefix of one.
          out_specs: the same for the result.
          donate_argnums: as for `jax.jit`.
        """
        if self.is_one_device:
            return jax.jit(function, donate_argnums=donate_argnums)
        if self.replicas.size > 1:
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=_over_data(in_specs),
                out_specs=_over_data(out_specs),
                axis_names={DATA_AXIS},
                check_vma=False,
            )
        return jax.jit(
            function,
            in_shardings=self.shardings(in_specs),
            out_shardings=self.shardings(out_specs),
            donate_argnums=donate_argnums,
        )

    def to_devices(self, share: Any, spec: PartitionSpec) -> Any:
        """Returns arrays that programs can take, made of the shares that all processes have on their hosts.

        With one process these are the arrays in `share` itself, because a program takes NumPy arrays from the host.

        Args:
          share: a tree of this process's shares.
          spec: how each whole array is divided.
        """
        if jax.process_count() == 1:
            return share
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), share)

    def to_host(self, array: jax.Array) -> np.ndarray:
        """Returns this process's share of an array over lanes, `[lanes, ...]`, or the whole of a replicated array."""
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        shares = {shard.index[0].start: shard.data for shard in array.addressable_shards}
        return np.concatenate([shares[start] for start in sorted(shares)])

    def own_copy(self, params: Any) -> Any:
        """Returns parameters for programs of this process alone."""
        if jax.process_count() == 1:
            return params
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)  # whole, since there is no model axis

    def shardings(self, specs: Any) -> Any:
        """Returns the specs as shardings on this mesh."""
        return _map_specs(lambda spec: NamedSharding(self.mesh, spec), specs)


def leaves_of(tree: Any) -> list[np.ndarray]:
    """Returns copies on the host of a tree's arrays, which stay valid when the tree's own are deleted."""
    return [np.array(leaf) for leaf in jax.device_get(jax.tree.leaves(tree))]


def _over_data(specs: Any) -> Any:
    """Returns the specs without the model axis, over which XLA divides computations on its own."""
    return _map_specs(lambda spec: PartitionSpec(*(name if name == DATA_AXIS else None for name in spec)), specs)


def _map_specs(function: Callable[[PartitionSpec], Any], specs: Any) -> Any:
    return jax.tree.map(function, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
