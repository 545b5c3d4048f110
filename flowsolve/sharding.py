r"""Where training keeps its arrays on a mesh of devices: data parallel, fully sharded (FSDP), or both.

    mesh = jax.make_mesh((2, 4), ("replicas", "shards"))
    fs.sharding.Layout(mesh)                           # every device has all parameters and a part of the batch
    fs.sharding.Layout(mesh, parameters="shards")      # parameters and optimiser in 4 parts, twice; a batch in 8

The batch is divided over all axes of the mesh, or over `data`. A parameter is divided over the axes `parameters` along
its longest side that they divide, if it has at least `least` elements; the optimiser's state and the moving averages
have the shapes of the parameters and go with them. All else is on every device. JAX's compiler then inserts what the
devices have to tell each other (GSPMD); the arithmetic is that of one device but for the order of sums.

With several processes (`jax.distributed`) a batch is the rows of the process itself, an equal part of the whole one.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ._checks import check_count, check_type, describe
from .batching import automatic

__all__ = ["Layout"]


class Layout(eqx.Module):
    """Where arrays go on a mesh.

    **Arguments:** `mesh`: the devices; `parameters`: the name of an axis, or several, over which parameters are
    divided, none by default; `data`: the axes over which a batch is divided, all by default; `least`: elements below
    which an array is not divided; `rule`: None, or (name, array) -> `PartitionSpec` or None, for arrays that are to be
    placed otherwise, where name is like ".flow.network.layers[0].weight" and None leaves it to the rest.

    **Raises:** `ValueError` for an axis that the mesh does not have.
    """

    mesh: Mesh = eqx.field(static=True)
    parameters: tuple[str, ...] = eqx.field(static=True)
    data: tuple[str, ...] = eqx.field(static=True)
    least: int = eqx.field(static=True)
    rule: Callable[[str, jax.ShapeDtypeStruct], PartitionSpec | None] | None = eqx.field(static=True)

    def __init__(
        self,
        mesh: Mesh,
        *,
        parameters: str | tuple[str, ...] = (),
        data: str | tuple[str, ...] | None = None,
        least: int = 4096,
        rule: Callable[[str, jax.ShapeDtypeStruct], PartitionSpec | None] | None = None,
    ):
        check_type(mesh, Mesh, "mesh", "a jax.sharding.Mesh, such as that of jax.make_mesh")
        # Explicit axes, those of jax.make_mesh, would have a network's own code name the sharding of every product.
        self.mesh = automatic(mesh)
        self.parameters = _axes(parameters, mesh, "parameters")
        self.data = mesh.axis_names if data is None else _axes(data, mesh, "data")
        self.least = check_count(least, "Layout got least")
        self.rule = rule

    def shardings(self, tree: PyTree) -> PyTree:
        """The sharding of every array of a training state, None in the place of all else."""

        def sharding(path: tuple, leaf: Any) -> NamedSharding | None:
            if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                return None
            return NamedSharding(self.mesh, self._spec(jax.tree_util.keystr(path), leaf))

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def place(self, tree: PyTree) -> PyTree:
        """A training state, or a flow, on the devices. With several processes each of them has the whole tree."""
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.tree.map(_put, arrays, self.shardings(arrays)), rest)

    def constrain(self, tree: PyTree) -> PyTree:
        """The same inside a jit."""
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.tree.map(jax.lax.with_sharding_constraint, arrays, self.shardings(arrays)), rest)

    def on_all(self, tree: PyTree) -> PyTree:
        """Arrays of which every device has all, inside a jit."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, everywhere), tree)

    def place_batch(self, batch: PyTree) -> PyTree:
        """A batch, any pytree of arrays with a leading batch axis, on the devices, divided over the axes `data`.

        **Raises:** `ValueError` if the devices do not divide it.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(self.data))
        local = math.prod(self.mesh.shape[name] for name in self.data) // jax.process_count()
        for leaf in jax.tree.leaves(batch):
            if leaf.ndim == 0 or leaf.shape[0] % max(local, 1):
                raise ValueError(
                    f"A batch of {describe(batch)} does not divide over the {local} devices of this process: give "
                    f"every array a leading axis that is a multiple of {local}."
                )
        if jax.process_count() == 1:
            return jax.device_put(batch, sharding)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)

    def _spec(self, name: str, leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
        if self.rule is not None:
            wanted = self.rule(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            if wanted is not None:
                return wanted
        parts = math.prod(self.mesh.shape[axis] for axis in self.parameters)
        sides = [side for side, length in enumerate(leaf.shape) if length % parts == 0]
        if parts == 1 or leaf.size < self.least or not sides:
            return PartitionSpec()
        longest = max(sides, key=lambda side: leaf.shape[side])
        return PartitionSpec(*(self.parameters if side == longest else None for side in range(longest + 1)))


def _axes(names: str | tuple[str, ...], mesh: Mesh, what: str) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in mesh.axis_names:
            raise ValueError(f"Layout got the axis {name!r} for {what}, but the mesh has {mesh.axis_names}.")
    return names


def _put(leaf: Array, sharding: NamedSharding) -> Array:
    """An array on the devices of all processes, each of which has all of it; in buffers of its own."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        placed = _put(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(leaf))
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding, may_alias=False)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
