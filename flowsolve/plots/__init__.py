r"""Pictures: what a flow does in the plane, samples, errors against the evaluations, schedules, losses by time.

    ax = fs.plots.trajectories(flow, num=64, key=key)           # x_t from noise to data, of a flow in the plane
    ax = fs.plots.vector_field(flow, 0.5, np.linspace(-3, 3, 20), ax=ax)
    ax.figure.savefig("flow.png")

Every function draws onto the `matplotlib.axes.Axes` that it is given and returns them; without any it makes some, in a
`matplotlib.figure.Figure` of their own that `pyplot` does not know: save it, or end a notebook's cell with `ax.figure`.
Nothing global is changed, and what was drawn is an artist of the axes, to restyle (`ax.collections`, `ax.lines`,
`ax.images`). Colours are those of Okabe & Ito, which the colour-blind tell apart as well.

Needs matplotlib, `pip install "flowsolve[plots]"`, when a function is called; importing this module does not.
"""

from .figures import loss_by_time, samples, schedule, work_precision
from .plane import animate, trajectories, vector_field

__all__ = ["animate", "loss_by_time", "samples", "schedule", "trajectories", "vector_field", "work_precision"]
