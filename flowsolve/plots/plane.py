"""A flow in the plane: the ways of its samples, its field, and both as an animation."""

import io
import math
import os
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from .._checks import check_batch, check_count, check_key, check_type
from .._numerics import as_scalar
from .._settings import Settings, draw_prior, settle
from .._types import Args, PRNGKey, ScalarLike
from ..batching import batched
from ..dynamics import AbstractDynamics
from ..flow import AbstractFlow, AbstractVelocityFlow
from ..grids import AbstractGrid, Uniform
from ..predictions import AbstractPrediction
from ..sampling import solve
from ._axes import ABOVE, COLOURS, Axes, filling, import_matplotlib, plane

__all__ = ["animate", "trajectories", "vector_field"]

NOISE, DATA, BETWEEN, ARROW = COLOURS[1], COLOURS[0], "#808080", "#505050"


def trajectories(
    flow: AbstractVelocityFlow,
    x_start: Real[Array | np.ndarray, "num 2"] | None = None,
    args: Args = None,
    *,
    num: int | None = None,
    key: PRNGKey | None = None,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    dynamics: AbstractDynamics | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    at: AbstractGrid | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The ways of many points through the plane, from noise to data, with both ends of each marked.

    **Arguments:**

    - `flow`: a flow of examples of shape (2,); `x_start`: (num, 2), where the points start at `t_start`, or None for
      `num` draws of the flow's source, 64 by default, the starts of `sample` with the same `key`; `args`: with a
      leading axis of length num, or None;
    - `solver`, `grid`, `controller`, `dynamics`, `t_start`, `t_end`: as in `solve`; `key`: for the starts and for a
      stochastic dynamics;
    - `at`: a grid of the times whose states the lines join, such as `grids.Uniform(100)` where an adaptive solver's
      steps are long; None for those of the solver's steps;
    - `ax`: the axes to draw onto, or None for new ones.

    **Returns:** the axes, with one `LineCollection` of num lines, and the starts and the ends each as a
    `PathCollection`.

    **Raises:** as `solve`; `ValueError` for starts that are not in the plane; `ImportError` without matplotlib.
    """
    matplotlib = import_matplotlib("trajectories")
    request = _Request(solver, grid, controller, dynamics, t_start, t_end)
    solved = _solved("trajectories", flow, x_start, args, num, key, request, at)
    # An adaptive solve takes fewer steps than there is room for.
    lines = [xs[np.isfinite(ts)] for ts, xs in zip(solved.ts, solved.xs, strict=True)]
    starts, ends = (np.stack([line[place] for line in lines]) for place in (0, -1))
    ax = plane() if ax is None else ax
    ax.add_collection(matplotlib.collections.LineCollection(lines, colors=BETWEEN, linewidths=0.8, alpha=0.5))
    ax.scatter(*starts.T, s=10, color=NOISE, linewidths=0, zorder=3, label=f"start, t = {solved.start:g}")
    ax.scatter(*ends.T, s=10, color=DATA, linewidths=0, zorder=4, label=f"end, t = {solved.end:g}")
    ax.autoscale_view()
    ax.legend(**ABOVE, markerscale=1.5)
    return ax


def vector_field(
    flow: AbstractVelocityFlow,
    t: ScalarLike,
    x: Real[Array | np.ndarray, " columns"],
    y: Real[Array | np.ndarray, " rows"] | None = None,
    args: Args = None,
    *,
    prediction: AbstractPrediction | None = None,
    reverse: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """The velocity of a flow in the plane at one time, an arrow at each point of a grid.

    The arrows are dx/dt, so they point the way of growing t, from data to noise. `reverse` turns them round, the way of
    the samples.

    **Arguments:**

    - `flow`: a flow of examples of shape (2,); `t`: the time; `args`: one label, mask or context, of all points;
    - `x`, `y`: the two coordinates of the grid's points, (columns,) and (rows,); y is x if it is None;
    - `prediction`: None for the velocity, or another quantity of an `AbstractFlow`, such as `predictions.Score()`;
    - `reverse`: whether the arrows are minus the field; `ax`: the axes to draw onto, or None for new ones.

    **Returns:** the axes, with one `Quiver`.

    **Raises:** `ValueError` where the field is not finite, for a time outside the path and for coordinates that are no
    vectors; `TypeError` for a prediction of a flow that has its velocity alone; `ImportError` without matplotlib.
    """
    import_matplotlib("vector_field")
    check_type(flow, AbstractVelocityFlow, "flow", "an AbstractFlow such as fs.Flow(network, path, prediction)")
    columns, rows = np.asarray(x), np.asarray(x if y is None else y)
    if columns.ndim != 1 or rows.ndim != 1:
        raise ValueError(
            f"vector_field got coordinates x of shape {columns.shape} and y of shape {rows.shape}, but wants those of "
            "a grid's columns and rows: two vectors, such as np.linspace(-3, 3, 20)."
        )
    if prediction is not None:
        check_type(flow, AbstractFlow, "flow", "one that offers predictions other than its velocity, such as fs.Flow")
        check_type(prediction, AbstractPrediction, "prediction", "an instance such as fs.predictions.Score()")
    if not bool(flow.path.contains(t)):
        raise ValueError(
            f"vector_field got t = {float(t):g}, outside {type(flow.path).__name__}: take a time from t_data to "
            "t_noise."
        )
    points = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    field = np.asarray(_field(flow, as_scalar(t), jnp.asarray(points, float), args, prediction))
    infinite = int(np.sum(~np.all(np.isfinite(field), axis=1)))
    if infinite:
        raise ValueError(
            f"The field at t = {float(t):g} is not finite at {infinite} of {len(points)} points: take a time between "
            "the path's ends."
        )
    field = -field if reverse else field
    ax = plane() if ax is None else ax
    ax.quiver(*points.T, *field.T, angles="xy", pivot="mid", color=ARROW, width=0.004)
    return ax


def animate(
    flow: AbstractVelocityFlow,
    file: str | os.PathLike[str],
    x_start: Real[Array | np.ndarray, "num 2"] | None = None,
    args: Args = None,
    *,
    num: int | None = None,
    key: PRNGKey | None = None,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    dynamics: AbstractDynamics | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    frames: AbstractGrid = Uniform(40),
    seconds: float | int = 3.0,
    hold: float | int = 1.0,
    trail: int = 0,
    color: str | Real[Array | np.ndarray, "num channels"] = DATA,
    size: float | int = 8.0,
    ax: Axes | None = None,
) -> Axes:
    """An animation of many points that a flow carries through the plane, from noise to data, written as a GIF.

    **Arguments:**

    - `flow`, `x_start`, `args`, `num`, `key` and the settings of the solve: as in `trajectories`; `file`: what to
      write, ending in .gif;
    - `frames`: a grid of times, of which each is a frame, from the start of the solve to its end; equal steps in t by
      default. A frame between two of the solver's steps is its dense output;
    - `seconds`: from the first frame to the last, which is then held for `hold` seconds before the animation begins
      anew. A GIF counts in hundredths of a second;
    - `trail`: how many frames back a line behind each point reaches; `color`: one of all points, or one RGB or RGBA
      from 0 to 1 for each; `size`: of a point, in square points as in `Axes.scatter`;
    - `ax`: the axes to draw onto, whose whole figure is animated, at its own size and resolution. Their limits are
      set to a square that holds all frames, unless they were set before (`ax.set_xlim`). None for new axes that fill
      a figure of 480 x 480 pixels.

    **Returns:** the axes, as the last frame shows them.

    **Raises:** as `trajectories`; `ValueError` for a file that is no GIF or in no folder, for times that are not
    positive and finite, and for a colour that does not fit; `TypeError` for a file that is no path.
    """
    matplotlib = import_matplotlib("animate")
    from PIL import Image  # matplotlib's own dependency

    if not isinstance(file, str | os.PathLike):
        raise TypeError(f"animate got a file of type {type(file).__name__}, but wants its path, ending in .gif.")
    file = os.fspath(file)
    if not file.lower().endswith(".gif"):
        raise ValueError(f"animate got the file {file!r}, but writes a GIF: let its name end in .gif.")
    if not os.path.isdir(os.path.dirname(file) or "."):
        raise ValueError(f"animate got the file {file!r} in a folder that does not exist: make it first.")
    if not (0 < seconds < math.inf and 0 <= hold < math.inf):
        raise ValueError(f"animate got seconds = {seconds:g} and hold = {hold:g}, but wants finite > 0 and >= 0.")
    if isinstance(color, str) and not matplotlib.colors.is_color_like(color):
        raise ValueError(f"animate got the color {color!r}, which matplotlib does not know: give a name such as 'C0'.")
    trail = check_count(trail, "animate got trail", least=0)
    check_type(frames, AbstractGrid, "frames", "an instance such as fs.grids.Uniform(40)")
    request = _Request(solver, grid, controller, dynamics, t_start, t_end)
    xs = _solved("animate", flow, x_start, args, num, key, request, frames).xs
    if not isinstance(color, str) and np.shape(color) not in ((len(xs), 3), (len(xs), 4)):
        raise ValueError(
            f"animate got a color of shape {np.shape(color)} for {len(xs)} points, but wants one name, or RGB or RGBA "
            f"for each: ({len(xs)}, 3) or ({len(xs)}, 4)."
        )
    ax = filling((4.0, 4.0), 120) if ax is None else ax
    low, high = _limits(xs)
    if ax.get_autoscalex_on():
        ax.set_xlim(low[0], high[0])
    if ax.get_autoscaley_on():
        ax.set_ylim(low[1], high[1])
    colors = [color] * len(xs) if isinstance(color, str) else list(np.asarray(color))
    lines = matplotlib.collections.LineCollection([], colors=colors, linewidths=0.8, alpha=0.35)
    ax.add_collection(lines)
    points = ax.scatter(*xs[:, 0].T, s=size, c=colors, linewidths=0, zorder=3)
    figure, pictures = ax.get_figure(root=True), []
    assert figure is not None
    # A figure that is cut to what it shows would change its size from frame to frame.
    with matplotlib.rc_context({"savefig.bbox": None}):
        for number in range(xs.shape[1]):
            points.set_offsets(xs[:, number])
            lines.set_segments(xs[:, max(number - trail, 0) : number + 1] if trail else [])
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=figure.dpi, pil_kwargs={"compress_level": 1})
            pictures.append(Image.open(buffer).convert("RGB"))
    step = max(round(100 * seconds / max(len(pictures) - 1, 1)), 1)
    durations = [10 * step] * (len(pictures) - 1) + [10 * max(round(100 * hold), step)]
    palette = _palette(Image, [pictures[0], pictures[len(pictures) // 2], pictures[-1]])
    first, *rest = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    first.save(file, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)
    return ax


class _Request(NamedTuple):
    """How a solve is done, as the user said it."""

    solver: diffrax.AbstractSolver | None
    grid: AbstractGrid | None
    controller: diffrax.AbstractStepSizeController | None
    dynamics: AbstractDynamics | None
    t_start: ScalarLike | None
    t_end: ScalarLike | None


class _Solved(NamedTuple):
    """Where the points are at which time."""

    ts: Float[np.ndarray, "num times"]
    xs: Float[np.ndarray, "num times 2"]
    start: float
    end: float


def _solved(
    who: str,
    flow: AbstractVelocityFlow,
    x_start: Any,
    args: Args,
    num: int | None,
    key: PRNGKey | None,
    request: _Request,
    at: AbstractGrid | None,
) -> _Solved:
    """The states of many points at the times of a grid, or at those of the solver's steps."""
    settings = settle(flow, **request._asdict(), moments=(0.0, 0.0) if x_start is None else None)
    start, end = float(settings.t_start), float(settings.t_end)
    if at is None:
        saveat = diffrax.SaveAt(t0=True, steps=True)
    else:
        check_type(at, AbstractGrid, "at", "an instance such as fs.grids.Uniform(100)")
        # The ends themselves, which a grid may have rounded.
        inner = at(flow.path, settings.t_start, settings.t_end)[1:-1]
        saveat = diffrax.SaveAt(ts=jnp.concatenate([settings.t_start[None], inner, settings.t_end[None]]))
    if x_start is None:
        num = check_count(64 if num is None else num, f"{who} got num")
        key = check_key(key, f"{who} without x_start")
        one, rows = eqx.Partial(_from_source, settings=settings, request=request, saveat=saveat), jnp.arange(num)
    else:
        rows = jnp.asarray(x_start, float)
        if rows.ndim != 2 or rows.shape[1] != 2:
            raise ValueError(
                f"{who} got x_start of shape {rows.shape}, but draws in the plane: give points of shape (num, 2)."
            )
        if num is not None:
            raise ValueError(f"{who} got both x_start and num: num is for starts that are drawn; leave one out.")
        one = eqx.Partial(solve, **request._asdict(), saveat=saveat)
    check_batch(args, len(rows))
    sol = batched(one)(flow, rows, args, key=key)
    return _Solved(np.asarray(sol.ts), np.asarray(sol.ys), start, end)


def _from_source(
    flow: AbstractVelocityFlow,
    index: Array,
    args: Args,
    *,
    key: PRNGKey,
    settings: Settings,
    request: _Request,
    saveat: diffrax.SaveAt,
) -> diffrax.Solution:
    """The solution of one example that starts where that of `sample` does."""
    del index
    start_key, noise_key = jax.random.split(key)
    x_start = draw_prior(flow, settings, start_key, jax.ShapeDtypeStruct((2,), jnp.result_type(float)))
    return solve(flow, x_start, args, key=noise_key, **request._asdict(), saveat=saveat)


@eqx.filter_jit
def _field(flow, t, points, args, prediction) -> Float[Array, "points 2"]:
    if prediction is None:
        return jax.vmap(lambda x: flow.velocity(t, x, args))(points)
    return jax.vmap(lambda x: flow.predict(prediction, t, x, args))(points)


def _limits(xs: Float[np.ndarray, "num times 2"]) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " 2"]]:
    """The lower and the upper ends of a square that holds all points, with some room around them."""
    low, high = np.min(xs, axis=(0, 1)), np.max(xs, axis=(0, 1))
    half = 0.55 * np.max(high - low) or 1.0
    return 0.5 * (low + high) - half, 0.5 * (low + high) + half


def _palette(image: Any, pictures: list[Any]) -> Any:
    """The colours that stand for all frames, so that what does not move does not flicker."""
    width, height = pictures[0].size
    together = image.new("RGB", (width, height * len(pictures)))
    for number, picture in enumerate(pictures):
        together.paste(picture, (0, height * number))
    palette = together.quantize(64, method=image.Quantize.MEDIANCUT)
    colours = np.reshape(palette.getpalette(), (-1, 3))
    # The ground stays as it is, and nothing is nearly the same: a median is of many, and the nearest colour is found to
    # within four levels.
    ground = max(together.getcolors(width * height * len(pictures)))[1]
    near = np.max(np.abs(colours - ground), axis=1, keepdims=True) < 8
    palette.putpalette(np.where(near, ground, colours).ravel().tolist())
    return palette
