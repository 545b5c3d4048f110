"""What all pictures share: matplotlib, imported when it is asked for; new axes; colours."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

# Okabe & Ito's colours, the yellow left out, which is faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>"
# A legend above the axes, out of the way of what they show.
ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 2,
    "frameon": False,
    "borderaxespad": 0,
}


def import_matplotlib(who: str) -> Any:
    """`matplotlib` with what is used of it; raise one sentence if it is not installed."""
    try:
        import matplotlib.collections
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError(
            f'{who} draws with matplotlib, which is not installed: pip install "flowsolve[plots]".'
        ) from error
    return matplotlib


def row(inches: tuple[float, float], panels: int) -> tuple[Axes, ...]:
    """New axes side by side, open at the top and on the right."""
    from matplotlib.figure import Figure

    axes = Figure(inches, layout="constrained").subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return tuple(axes)


def plane() -> Axes:
    """New axes on which both coordinates have one scale."""
    (ax,) = row((4.8, 4.8), 1)
    ax.set_aspect("equal", adjustable="datalim")
    return ax


def filling(inches: tuple[float, float], dpi: int = 100) -> Axes:
    """New axes that fill their figure, without a frame."""
    from matplotlib.figure import Figure

    ax = Figure(inches, dpi=dpi).add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    return ax
