"""Clients over devices: a mesh with axes ``clients`` and ``model``.

Every device row holds the whole model (or shares it along ``model``) and works on its own
clients' batches. Between rows only losses and scalars cross, C x K x (P + 1) numbers a round.

    mesh = meshes.make(clients=8)
    for report in simulation.run(alg, state, clients, ..., mesh=mesh): ...
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hiso_jax._engine import checks

CLIENTS, MODEL = "clients", "model"
LARGE = 2**16
"""Numbers that a leaf has at least to be split over ``model``."""


def make(clients: int, model: int = 1) -> Mesh:
    """Make a mesh of ``clients x model`` devices, of all processes.

    Raises:
      ValueError: there are not so many devices.

    Example:
      >>> make(clients=1).shape["clients"]
      1
    """
    checks.count("clients", clients)
    checks.count("model", model)
    if clients * model > jax.device_count():
        raise ValueError(
            f"mesh: {clients} x {model} devices wanted, {jax.device_count()} are there"
        )
    if jax.process_count() > 1 and clients * model != jax.device_count():
        raise ValueError(
            f"mesh: with several processes all {jax.device_count()} devices must be in it, "
            f"got {clients} x {model}"
        )
    devices = np.array(jax.devices()[: clients * model]).reshape(clients, model)
    return Mesh(devices, (CLIENTS, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def size(axis: str) -> int:
    """Devices along an axis of the mesh in use; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.axis_names else 1


def over_clients(function: Callable[[Any, Any], Any], state: Any, batches: Any) -> Any:
    """Call ``function(state, batches)`` on every row's own clients, and gather what it returns.

    Without a mesh in use (``jax.set_mesh``) a plain call.

    Args:
      function: returns arrays [C, ...].
      state: the same for all.
      batches: leaves [C, ...].

    Raises:
      ValueError: the rows cannot have equally many clients.
    """
    if (rows := size(CLIENTS)) == 1:
        return function(state, batches)
    _check_rows(batches, rows)
    sharded = jax.shard_map(
        function,
        in_specs=(PartitionSpec(), PartitionSpec(CLIENTS)),
        out_specs=PartitionSpec(CLIENTS),
        axis_names={CLIENTS},
        check_vma=False,
    )
    # Over some of a mesh's axes only inside jit.
    gathered = jax.jit(sharded, inline=True)(state, batches)
    everywhere = lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec())  # noqa: E731
    return jax.tree.map(everywhere, gathered)


def _check_rows(batches: Any, rows: int) -> None:
    count = len(jax.tree.leaves(batches)[0])
    if count % rows:
        raise ValueError(
            f"batches: {count} clients cannot be dealt out to {rows} rows of devices; take a "
            f"multiple of {rows}"
        )


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Place an array that every process has all of."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_state(mesh: Mesh, state: Any) -> Any:
    """Put a state, or any pytree, on a mesh.

    Large leaves are split along their last axis over ``model`` where that divides it;
    everything else is whole on every device.
    """
    width = mesh.shape[MODEL]

    def place(x: Any) -> jax.Array:
        split = width > 1 and x.ndim > 1 and x.size >= LARGE and x.shape[-1] % width == 0
        spec = PartitionSpec(*[None] * (x.ndim - 1), MODEL) if split else PartitionSpec()
        return _put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def place_batches(mesh: Mesh, batches: Any) -> Any:
    """Put batches [C, ...] on a mesh, every row its own clients'."""
    _check_rows(batches, mesh.shape[CLIENTS])
    sharding = NamedSharding(mesh, PartitionSpec(CLIENTS))
    return jax.tree.map(lambda x: _put(x, sharding), batches)
