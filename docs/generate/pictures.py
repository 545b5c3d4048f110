"""The pictures of docs/pictures: those that the page docs/plots.md makes, and that of the front page.

    python docs/generate/pictures.py

Needs `pip install -e ".[plots,examples]"`. One to two minutes on 2 CPU cores, and the same pictures each time. Those of
the page, its animation among them, are made by the code that stands there, run from top to bottom.
"""

import itertools
import os
import re
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import flowsolve as fs

DOCS = Path(__file__).resolve().parents[1]
PICTURES = DOCS / "pictures"
PAGE = DOCS / "plots.md"

# Eight colours that the colour-blind tell apart, in the order of the circle: neighbours differ in lightness as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#332288", "#56B4E9", "#D55E00", "#7F4F24")


def front(file: Path) -> None:
    """Noise becomes eight Gaussians on a circle, from left to right: points at five times, and the ways between."""
    angles = np.arange(8) * np.pi / 4
    centres = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    flow = fs.testing.GaussianMixture(np.ones(8), centres, 0.2**2).flow(fs.paths.Linear(), fs.predictions.Velocity())
    # Most happens near the data.
    shown = {1.0: "t = 1, noise", 0.6: "0.6", 0.35: "0.35", 0.15: "0.15", 0.0: "t = 0, data"}
    times = jnp.concatenate([jnp.linspace(a, b, 31)[:-1] for a, b in itertools.pairwise(shown)] + [jnp.zeros(1)])
    solve = eqx.Partial(fs.solve, solver=diffrax.Heun(), grid=fs.grids.Given(times), saveat=diffrax.SaveAt(ts=times))
    xs = np.asarray(fs.batched(solve)(flow, jax.random.normal(jax.random.key(0), (600, 2))).ys)
    nearest = np.argmin(np.linalg.norm(xs[:, -1:] - centres, axis=-1), axis=1)
    colours = np.asarray([to_rgb(COLOURS[k]) for k in nearest])
    # The plane moves to the right while time goes by.
    place = np.linspace(0, 20, len(times))
    strip = xs + np.stack([place, 0 * place], axis=-1)

    figure = Figure((12, 3.3), dpi=200)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.add_collection(LineCollection(strip[:150], colors=colours[:150], linewidths=0.7, alpha=0.35))
    for number, name in zip(range(0, 121, 30), shown.values(), strict=True):
        ax.scatter(*strip[:, number].T, s=10, c=colours, linewidths=0, zorder=2)
        ax.text(place[number], -3.6, name, fontsize=18, color="#404040", ha="center")
    ax.set(xlim=(-3.6, 23.2), ylim=(-3.9, 3.47))
    figure.savefig(file)


def run_page(page: Path) -> None:
    """Run the blocks of a page, which write where they are run."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), page.name, "exec"), {"__name__": "__main__"})


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    front(PICTURES / "front.png")
    os.chdir(PICTURES)
    run_page(PAGE)


if __name__ == "__main__":
    main()
