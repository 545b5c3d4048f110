r"""A vmap that scales: the same examples, spread over the devices of a mesh and taken in chunks that fit.

`num` examples go to the data axes of a mesh in equal, contiguous parts, each device takes its part in chunks of equal
size, and a chunk is one `jax.vmap`. What does not divide is filled up with copies of the last example, which are cut
off again. Devices do not speak to each other inside (`jax.shard_map`): every example is computed as on one device.

To the last bit, where the compiler makes the same code of another number of rows or devices; else to rounding. On a CPU
XLA rounds products `x @ W` of two or more rows alike; one row alone, and a vmapped `W @ x`, which is how
`eqx.nn.Linear` has it, may get another matrix kernel.

    log_p = fs.batched(fs.log_prob, mesh=mesh, chunk=256)(flow, x)

Where a network's parameters are themselves sharded over axes of the mesh (FSDP, tensor parallel), the whole is left to
the compiler's partitioning, as in a plain `jax.jit`, with the examples over the other axes, or over all if there is no
other. Then devices do speak to each other, inside the loop of a solve as well.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import take_current_trace
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key, PyTree

from ._checks import check_count, check_key, check_type, describe
from ._integrate import raise_on_failure, with_results
from ._progress import ChunkBar, import_tqdm

__all__ = ["batched"]


def batched(
    function: Callable[..., PyTree], *, mesh: Mesh | None = None, chunk: int | None = None, progress: bool = False
) -> "_Batched":
    """`function`, of one example, as one of many.

        fast = fs.batched(eqx.Partial(fs.log_prob, divergence=fs.divergence.Hutchinson()), mesh=mesh, chunk=256)
        log_p = fast(flow, x, labels, key=key)

    In a call every `eqx.Module` (a flow) is shared by all examples, as are numbers and None; every array, alone or in a
    pytree, has a leading axis, one entry an example. Of one typed `key` example i gets `jax.random.fold_in(key, i)`, of
    several its own. Settings, and arrays that all examples share, are bound with `eqx.Partial`, which is a
    pytree: a new value does not retrace. (A new lambda does.)

    **Arguments:** `function`: of one example, for instance `solve`, `encode`, `log_prob` or one's own; `mesh`: the
    devices, any `jax.sharding.Mesh`, or None for that of `jax.set_mesh` if there is one, else one device; `chunk`: how
    many examples a device takes at a time, or None for all; `progress`: whether to show a bar of the chunks done and
    the samples a second, which needs tqdm, in a jit as well.

    **Returns:** a function of the same positional arguments, and `key`. Its value is that of `function` with a leading
    axis on every array, sharded over the mesh if its devices divide the examples. On a mesh a gradient through
    adaptive steps wants `adjoint=diffrax.DirectAdjoint()` in `function`: Diffrax's default does not pass through a
    shard_map. Inside one's own shard_map a function that raises, as solves do, wants `check_vma=False` there, or
    `throw=False`.

    **Raises:** `ValueError`, `TypeError` for a request that makes no sense, and for a call whose arrays do not have one
    leading axis; `RuntimeError` where a solve of the function would, for all examples together.
    """
    if not callable(function):
        raise TypeError(f"batched got a {type(function).__name__}, but wants a function of one example.")
    spreading(mesh, chunk, progress, None)
    return _Batched(function, mesh, chunk, progress)


class _Batched(eqx.Module):
    """What `batched` returns."""

    function: Callable[..., PyTree]
    mesh: Mesh | None = eqx.field(static=True)
    chunk: int | None = eqx.field(static=True)
    progress: bool = eqx.field(static=True)

    def __call__(self, *arguments: PyTree, key: Key[Array, "*keys"] | None = None) -> PyTree:
        rows, shared = eqx.partition(arguments, _has_rows, is_leaf=_is_module)
        one_key = None
        if key is not None and (jnp.ndim(key) == 0 or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
            one_key, key = check_key(key, "the function"), None
        num = _count((rows, key))
        over = spreading(self.mesh, self.chunk, self.progress, (self.function, shared))
        out, results = _compiled(self.function, rows, shared, one_key, key, num, over)
        out = with_automatic_axes(out)
        for result in results:
            out = raise_on_any_failure(result, out, over)
        return out


@eqx.filter_jit
def _compiled(function, rows, shared, one_key, keys, num, over) -> PyTree:
    def one(common: Any, row: Any) -> PyTree:
        function, shared, one_key = common
        index, arguments, key = row
        arguments = eqx.combine(arguments, shared, is_leaf=_is_module)
        if one_key is not None:
            key = jax.random.fold_in(one_key, index)
        return with_results(lambda: function(*arguments) if key is None else function(*arguments, key=key))

    return spread(one, (function, shared, one_key), (jnp.arange(num), rows, keys), num, over)


def _is_module(leaf: object) -> bool:
    return isinstance(leaf, eqx.Module)


def _has_rows(leaf: object) -> bool:
    return eqx.is_array_like(leaf) and not isinstance(leaf, bool | int | float | complex)


def _count(rows: PyTree) -> int:
    leaves = jax.tree.leaves(rows)
    if not leaves:
        raise ValueError(
            "A batched function got no arrays, but wants arrays with a leading axis, one entry an example."
        )
    num = np.shape(leaves[0])[0] if np.ndim(leaves[0]) else -1
    if any(np.ndim(leaf) == 0 or np.shape(leaf)[0] != num for leaf in leaves):
        raise ValueError(
            f"A batched function got arrays {describe(leaves)}, but wants one leading axis of the same length on each: "
            "bind what all examples share with eqx.Partial(function, name=value)."
        )
    if num == 0:
        raise ValueError("A batched function got arrays of length 0, but wants at least one example.")
    return num


class Spreading(eqx.Module):
    """Over which devices examples go, and how many at a time."""

    mesh: Mesh | AbstractMesh | None = eqx.field(static=True)
    #: The axes of the mesh that hold examples.
    axes: tuple[str, ...] = eqx.field(static=True)
    #: Whether devices work by themselves; if not, what they share is sharded as well.
    alone: bool = eqx.field(static=True)
    chunk: int | None = eqx.field(static=True)
    progress: bool = eqx.field(static=True)


def spreading(mesh: Mesh | None, chunk: int | None, progress: bool, shared: PyTree) -> Spreading:
    """For a mesh that was given, or that of `jax.set_mesh`; raise if it or the chunk is none."""
    if progress:
        import_tqdm("batched")
    if mesh is not None:
        check_type(mesh, Mesh, "mesh", "a jax.sharding.Mesh, such as that of jax.make_mesh")
        around = jax.sharding.get_abstract_mesh()
        if not around.empty and around.size != mesh.size:
            raise ValueError(
                f"mesh has {mesh.size} devices, but that of jax.set_mesh around the call has {around.size}, and JAX "
                "wants as many: leave mesh out, or call from outside."
            )
    chunk = None if chunk is None else check_count(chunk, "batched got chunk")
    found = _ambient() if mesh is None else mesh
    if found is None:
        return Spreading(None, (), True, chunk, progress)
    used: set[str] = set()
    for leaf in jax.tree.leaves(eqx.filter(shared, eqx.is_array)):
        sharding = getattr(jax.typeof(leaf) if isinstance(leaf, jax.core.Tracer) else leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            for entry in sharding.spec:
                used.update(entry if isinstance(entry, tuple) else () if entry is None else (entry,))
    free = tuple(name for name in found.axis_names if name not in used)
    return Spreading(found, free or tuple(found.axis_names), not used, chunk, progress)


def automatic(mesh: Mesh) -> Mesh:
    """The same devices with automatic axes."""
    assert mesh.devices is not None
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def with_automatic_axes(tree: PyTree) -> PyTree:
    """The same arrays on a mesh with automatic axes, where no mesh is ambient.

    On explicit axes, those of `jax.make_mesh`, an indexed or sorted result would want its sharding named each time.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return tree

    def relabelled(leaf: Any) -> Any:
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        mesh = sharding.mesh
        assert isinstance(mesh, Mesh)  # an array's, not that of a trace
        return jax.device_put(leaf, NamedSharding(automatic(mesh), sharding.spec))

    return jax.tree.map(relabelled, tree)


def raise_on_any_failure(result: diffrax.RESULTS, value: PyTree, over: Spreading) -> PyTree:
    """`raise_on_failure` for what was spread."""
    with _without_ambient() if isinstance(over.mesh, Mesh) else contextlib.nullcontext():
        return raise_on_failure(result, value, over.mesh)


def spread(function: Callable[[Any, Any], PyTree], shared: PyTree, rows: PyTree, num: int, over: Spreading) -> PyTree:
    """function(shared, row) for each of `num` rows. To be called in a jit."""
    shards = 1 if over.mesh is None else math.prod(over.mesh.shape[name] for name in over.axes)
    per_shard = -(-num // shards)
    chunks = 1 if over.chunk is None else -(-per_shard // over.chunk)
    size = -(-per_shard // chunks)
    total = shards * chunks * size
    if total != num:
        rows = jax.tree.map(lambda leaf: leaf[jnp.minimum(jnp.arange(total), num - 1)], rows)
    arrays, static = eqx.partition(shared, eqx.is_array)
    bar = ChunkBar(num, chunks * shards if over.alone else chunks) if over.progress else None
    rest = []

    def one(arrays: PyTree, row: PyTree) -> PyTree:
        out, other = eqx.partition(function(eqx.combine(arrays, static), row), eqx.is_array)
        rest.append(other)
        return out

    def together(arrays: PyTree, rows: PyTree, places: Int[Array, " size"]) -> PyTree:
        out = jax.vmap(one, in_axes=(None, 0))(arrays, rows)
        if bar is not None:
            # Its own number, known once all of it is done.
            out, number = jax.lax.optimization_barrier((out, places[0] // size))
            jax.debug.callback(bar, number)
        return out

    def local(arrays: PyTree, rows: PyTree) -> PyTree:
        if chunks == 1:
            return together(arrays, *rows)
        # Of all devices together a chunk is every `chunks`-th row, where they do not work by themselves.
        divided = jax.tree.map(lambda leaf: leaf.reshape(-1, chunks, size, *leaf.shape[1:]).swapaxes(0, 1), rows)
        divided = jax.tree.map(lambda leaf: leaf.reshape(chunks, -1, *leaf.shape[3:]), divided)
        out = jax.lax.map(lambda some: together(arrays, *some), divided)
        out = jax.tree.map(lambda leaf: leaf.reshape(chunks, -1, size, *leaf.shape[2:]).swapaxes(0, 1), out)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), out)

    rows = rows, jnp.arange(total)
    if over.mesh is not None:
        local, rows = _on_mesh(local, rows, over)
    with _without_ambient() if over.alone and isinstance(over.mesh, Mesh) else contextlib.nullcontext():
        out = local(arrays, rows)
        if total != num:
            if over.mesh is not None and num % shards:
                # Explicit axes hold equal parts only.
                out = _resharded(out, over.mesh, ())
            out = jax.tree.map(lambda leaf: leaf[:num], out)
    return eqx.combine(out, rest[0])


def _on_mesh(local: Callable, rows: PyTree, over: Spreading) -> tuple[Callable, PyTree]:
    assert over.mesh is not None
    examples = PartitionSpec(over.axes)
    rows = _resharded(rows, over.mesh, over.axes)
    if over.alone:
        local = jax.shard_map(
            local, mesh=over.mesh, in_specs=(PartitionSpec(), examples), out_specs=examples, check_vma=False
        )
        return local, rows
    if AxisType.Explicit in over.mesh.axis_types:
        return jax.sharding.auto_axes(local, out_sharding=_explicit(over.mesh, over.axes)), rows
    sharding = NamedSharding(over.mesh, examples)
    return local, jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), rows)


def _ambient() -> Mesh | AbstractMesh | None:
    """The mesh of `jax.set_mesh`, or of a jit around; None inside somebody's own shard_map."""
    abstract = jax.sharding.get_abstract_mesh()
    if abstract.empty or AxisType.Manual in abstract.axis_types:
        return None
    with take_current_trace():
        mesh = jax.sharding.get_mesh()
    return abstract if mesh.empty else mesh


@contextlib.contextmanager
def _without_ambient() -> Iterator[None]:
    """No mesh but those that are named.

    What Diffrax computes while it is traced (`jax.ensure_compile_time_eval`) fails inside a `jax.shard_map` on the mesh
    of `jax.set_mesh`.
    """
    with take_current_trace():
        none = jax.set_mesh(None)
    with none:
        yield


def _explicit(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> NamedSharding:
    """The sharding over those of the axes that are explicit."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in axes if types[name] == AxisType.Explicit)))


def _resharded(rows: PyTree, mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> PyTree:
    """The rows over these axes, of a mesh that has explicit ones; automatic axes see to it themselves."""
    if AxisType.Explicit not in mesh.axis_types:
        return rows
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, _explicit(mesh, axes)), rows)
