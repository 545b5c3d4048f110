"""Samples as images, and figures: error against evaluations, schedules, the loss by time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from .._checks import check_count, check_type, describe
from ..paths import AbstractPath
from ..weights import AbstractWeight
from ._axes import ABOVE, COLOURS, MARKERS, Axes, filling, import_matplotlib, row

__all__ = ["loss_by_time", "samples", "schedule", "work_precision"]


def samples(
    x: Real[Array | np.ndarray, "num *shape"],
    *,
    rows: int | None = None,
    columns: int | None = None,
    low: float | int = -1.0,
    high: float | int = 1.0,
    gap: int = 1,
    ax: Axes | None = None,
) -> Axes:
    """Images in rows and columns, the first at the top left and each row from left to right.

    **Arguments:**

    - `x`: (num, height, width), or (num, channels, height, width) with one channel or three, as in `nn`;
    - `rows`, `columns`: None for as near to a square as num allows; cells without an image are blank;
    - `low`, `high`: the values shown as black and as white (of a colour: as none and as all of it); those beyond are
      shown as these. Values that are not finite are blank;
    - `gap`: pixels between two images; `ax`: the axes to draw onto, or None for new ones.

    **Returns:** the axes, with one `AxesImage` (dark on light: `ax.images[-1].set_cmap("gray_r")`). Pixel (i, j) of the
    image in row r and column c is its element (r (height + gap) + i, c (width + gap) + j).

    **Raises:** `ValueError` for another shape, for fewer cells than images, unless low < high, both finite; `TypeError`
    for what are no real numbers; `ImportError` without matplotlib.
    """
    import_matplotlib("samples")
    images = np.asarray(x)
    # JAX's own, which knows half precisions that NumPy does not.
    if not jnp.issubdtype(images.dtype, jnp.number) or jnp.issubdtype(images.dtype, jnp.complexfloating):
        raise TypeError(f"samples got x of dtype {images.dtype}, but wants real numbers.")
    images = (images[:, None] if images.ndim == 3 else images).astype(float)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.size == 0:
        raise ValueError(
            f"samples got x of shape {np.shape(x)}, but wants images: (num, height, width), or (num, channels, height, "
            "width) with 1 or 3 channels."
        )
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"samples got low = {low:g} and high = {high:g}, but wants finite low < high.")
    num, channels, height, width = images.shape
    gap = check_count(gap, "samples got gap", least=0)
    rows, columns = _cells(num, rows, columns)
    # Blank is NaN in every channel.
    canvas = np.full((channels, rows * (height + gap), columns * (width + gap)), np.nan)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    canvas = canvas[:, : rows * (height + gap) - gap, : columns * (width + gap) - gap]
    if ax is None:
        # So large that a cell has about 0.6 inch, and none is wider than a page.
        inches = min(0.6 * columns, 8.0)
        ax = filling((inches, inches * canvas.shape[1] / canvas.shape[2]))
    if channels == 1:
        shown = np.ma.masked_invalid(canvas[0])
        ax.imshow(shown, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    else:
        finite = np.all(np.isfinite(canvas), axis=0)
        scaled = np.clip((np.where(finite, canvas, low) - low) / (high - low), 0, 1)
        ax.imshow(np.stack([*scaled, finite], axis=-1), interpolation="nearest")
    ax.set_axis_off()
    return ax


def _cells(num: int, rows: int | None, columns: int | None) -> tuple[int, int]:
    """How many rows and columns, as asked or near to a square."""
    if rows is not None:
        rows = check_count(rows, "samples got rows")
    if columns is not None:
        columns = check_count(columns, "samples got columns")
    if columns is None:
        columns = math.ceil(math.sqrt(num)) if rows is None else math.ceil(num / rows)
    rows = math.ceil(num / columns) if rows is None else rows
    if rows * columns < num:
        raise ValueError(
            f"samples got {num} images for {rows} rows and {columns} columns, which have {rows * columns} cells: give "
            "more of them, or fewer images."
        )
    return rows, columns


def work_precision(
    nfe: Real[Array | np.ndarray, " points"] | Sequence[int | float] | Mapping[str, Any],
    errors: Mapping[str, Any],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Error against the number of network evaluations, both on logarithmic axes, a line for each solver.

    **Arguments:** `nfe`: (points,), the evaluations of all lines, or a mapping of their own by name; `errors`: by name,
    (points,), positive; one that is not finite, of a solve that failed, is left out; `ax`: the axes to draw onto, or
    None for new ones.

    **Returns:** the axes, with a `Line2D` for each name, in the order of `errors`, and a legend.

    **Raises:** `ValueError` for lengths that differ, for a name without evaluations or without errors, for evaluations
    or errors that are not positive, which a logarithmic axis has no place for, and if no error is finite; `ImportError`
    without matplotlib.
    """
    matplotlib = import_matplotlib("work_precision")
    if not isinstance(errors, Mapping) or not errors:
        raise ValueError(f"work_precision got errors {errors!r}, but wants them by name: {{name: (points,) errors}}.")
    lines = {}
    for name, error in errors.items():
        if isinstance(nfe, Mapping) and name not in nfe:
            raise ValueError(f"work_precision got no nfe for {name!r}: give them by the names of the errors.")
        count = np.asarray(nfe[name] if isinstance(nfe, Mapping) else nfe, float)
        error = np.asarray(error, float)
        if count.ndim != 1 or count.size == 0 or count.shape != error.shape:
            raise ValueError(
                f"work_precision got nfe of shape {count.shape} and errors of shape {error.shape} for {name!r}, but "
                "wants two vectors of one length, of at least one point."
            )
        if not np.all((count > 0) & np.isfinite(count)) or np.any(error <= 0):
            raise ValueError(
                f"work_precision got an nfe or an error of {name!r} that is not positive and finite, but its "
                "axes are logarithmic: leave it out, or make an error NaN."
            )
        lines[name] = count, np.where(np.isfinite(error), error, np.nan)
    if isinstance(nfe, Mapping) and set(nfe) - set(errors):
        raise ValueError(
            f"work_precision got nfe for {sorted(set(nfe) - set(errors))}, which have no errors: name both."
        )
    if not any(np.any(np.isfinite(error)) for _, error in lines.values()):
        raise ValueError("work_precision got no error that is finite, so there is nothing to draw.")
    ax = row((5.6, 4.2), 1)[0] if ax is None else ax
    before = len(ax.lines)
    for number, (name, (count, error)) in enumerate(lines.items(), start=before):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        ax.plot(count, error, color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    # Of lines that were drawn so before, too, and of nothing else that a user put there.
    curves = [line for line in ax.lines if str(line.get_marker()) in MARKERS]
    counts = np.unique(np.concatenate([line.get_xdata() for line in curves]))
    if len(counts) <= 8:
        ax.set_xticks(counts, [f"{count:g}" for count in counts])
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.set_xlabel("network evaluations")
    ax.set_ylabel("error")
    ax.legend(frameon=False)
    return ax


def schedule(
    path: AbstractPath,
    weight: AbstractWeight | None = None,
    *,
    ts: Real[Array | np.ndarray, " times"] | None = None,
    log_t: bool = False,
    label: str | None = None,
    axes: Sequence[Axes] | None = None,
) -> tuple[Axes, ...]:
    """A path against its time: alpha and sigma, the log-SNR and, if one is given, a weight of the loss.

    What is infinite at an end, as the log-SNR is where sigma or alpha is 0, is left out there. A call with the axes of
    another puts a second path beside the first.

    **Arguments:**

    - `path`: the path; `weight`: None, or its weight on the data loss w(t), on a logarithmic axis;
    - `ts`: the times, 257 from `t_data` to `t_noise` by default;
    - `log_t`: whether the axis of t is logarithmic, as suits `paths.EDM`; the times are then spaced likewise;
    - `label`: the name of the path in the legends, or None;
    - `axes`: the two axes to draw onto, with a weight three, or None for new ones.

    **Returns:** the axes: of alpha (solid) and sigma (dashed), of the log-SNR, and of the weight.

    **Raises:** `ValueError` for times outside the path, for a logarithmic axis from t = 0, and for another number of
    axes; `ImportError` without matplotlib.
    """
    import_matplotlib("schedule")
    check_type(path, AbstractPath, "path", "an instance such as fs.paths.Linear()")
    if weight is not None:
        check_type(weight, AbstractWeight, "weight", "an instance such as fs.weights.MinSNR()")
    panels = 2 if weight is None else 3
    several = isinstance(axes, Sequence | np.ndarray)
    if axes is not None and (not several or len(axes) != panels):
        given = f"{len(axes)} axes" if several else f"axes of type {type(axes).__name__}"
        raise ValueError(f"schedule got {given}, but draws onto {panels}: alpha and sigma, log-SNR, weight.")
    low, high = float(path.t_data), float(path.t_noise)
    if ts is None:
        if log_t and low <= 0:
            raise ValueError(
                f"schedule got log_t for a path from t = {low:g}, which a logarithmic axis has no place for: give ts, "
                "positive times."
            )
        ts = np.geomspace(low, high, 257) if log_t else np.linspace(low, high, 257)
        # The power may have rounded them.
        ts = np.clip(ts, low, high)
    ts = jnp.asarray(ts, float)
    if ts.ndim != 1 or ts.size == 0 or not bool(jnp.all(jax.vmap(path.contains)(ts))):
        raise ValueError(
            f"schedule got ts of shape {ts.shape}, but wants a vector of times from t_data = {low:g} to t_noise = "
            f"{high:g}."
        )
    if log_t and not bool(jnp.all(ts > 0)):
        raise ValueError(
            "schedule got log_t and a time t = 0, which a logarithmic axis has no place for: leave it out."
        )
    alpha, sigma = (np.asarray(values) for values in jax.vmap(path.coefficients)(ts))
    curves = [np.asarray(jax.vmap(path.log_snr)(ts))]
    if weight is not None:
        weights = np.asarray(jax.vmap(lambda t: weight(path, t))(ts))
        curves.append(np.where(weights > 0, weights, np.nan))
    axes = row((4.0 * panels, 3.2), panels) if axes is None else tuple(axes)
    first, *others = axes
    ts, colour = np.asarray(ts), COLOURS[len(others[0].lines) % len(COLOURS)]
    of = "" if label is None else f", {label}"
    first.plot(ts, alpha, color=colour, label=f"alpha{of}")
    first.plot(ts, sigma, color=colour, linestyle="--", label=f"sigma{of}")
    first.legend(**ABOVE)
    for ax, curve, name in zip(others, curves, ("log-SNR", "weight on the data loss"), strict=False):
        ax.plot(ts, np.where(np.isfinite(curve), curve, np.nan), color=colour, label=label)
        ax.set_ylabel(name)
    if weight is not None:
        axes[2].set_yscale("log")
    for ax in axes:
        ax.set_xlabel("t")
        if log_t:
            ax.set_xscale("log")
    return axes


def loss_by_time(
    metrics: Mapping[str, Real[Array | np.ndarray, "..."]],
    *,
    log_t: bool = False,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The loss that `training.fit` measured in each of its bins of the time.

    Equally wide in arctan(sigma/alpha), the bins are those of `TrainState.metrics`. One in which no example fell is
    left out. A call with the axes of another puts a later state beside an earlier one.

    **Arguments:** `metrics`: `state.metrics` of a state that `fit` yielded, or any "loss_by_t", (bins,), with
    "t_edges", (bins + 1,); `log_t`: whether the axis of t is logarithmic, as suits `paths.EDM`; `label`: its name in a
    legend, or None; `ax`: the axes to draw onto, or None for new ones.

    **Returns:** the axes, with one `StepPatch`.

    **Raises:** `ValueError` for metrics without the loss by time, which the first state and that of a loss without
    `losses.Aux` have, for shapes that do not fit, and for a logarithmic axis from t = 0; `TypeError` for what are no
    metrics; `ImportError` without matplotlib.
    """
    matplotlib = import_matplotlib("loss_by_time")
    check_type(metrics, Mapping, "metrics", "state.metrics, of a state that training.fit yielded")
    if "loss_by_t" not in metrics or "t_edges" not in metrics:
        raise ValueError(
            f"loss_by_time got metrics with {', '.join(metrics) or 'nothing'}, but wants loss_by_t and t_edges: those "
            "of a state that training.fit yielded, with a loss that gives losses.Aux."
        )
    losses, edges = np.asarray(metrics["loss_by_t"]), np.asarray(metrics["t_edges"])
    if losses.ndim != 1 or edges.shape != (losses.size + 1,):
        raise ValueError(
            f"loss_by_time got {describe((losses, edges))} for loss_by_t and t_edges, but wants a vector, and another "
            "with one element more."
        )
    if log_t and not edges[0] > 0:
        raise ValueError(
            f"loss_by_time got log_t and a first edge t = {edges[0]:g}, which a logarithmic axis cannot show: leave "
            "log_t out."
        )
    ax = row((5.6, 3.6), 1)[0] if ax is None else ax
    colour = COLOURS[len(ax.patches) % len(COLOURS)]
    shades = {"facecolor": matplotlib.colors.to_rgba(colour, 0.25), "edgecolor": colour}
    ax.stairs(np.where(np.isfinite(losses), losses, np.nan), edges, fill=True, linewidth=1.6, label=label, **shades)
    if log_t:
        ax.set_xscale("log")
    ax.set_xlabel("t")
    ax.set_ylabel("loss")
    if label is not None:
        ax.legend(frameon=False)
    return ax
