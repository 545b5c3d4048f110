"""Tables: draw patients that a classifier cannot tell from real ones.

    python examples/tabular.py            # about a minute on 2 CPU cores
    python examples/tabular.py --smoke    # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples]"`. The breast-cancer table of scikit-learn, 569 tumours with 30 measurements and
a diagnosis, comes with it: nothing is downloaded. Two thirds of the rows train a flow over the measurements, given the
diagnosis, with early stopping by the log-density of a sixth; the last sixth judges: its log-density, a classifier
two-sample test (C2ST, 0.5 is best), the energy distance, and the accuracy of a logistic regression that was trained on
drawn rows and is asked about real ones. For comparison: a Gaussian for each diagnosis, and the training rows.
Expect about:

    rows               log-density             C2ST   energy  accuracy
    flow             -6.12 +- 1.02   0.498 +- 0.023   -0.016     0.968
    Gaussians        -7.46 +- 1.29   0.572 +- 0.025   -0.004     0.937
    training                         0.487 +- 0.022   -0.024     0.968

Written to `outputs/tabular/`: six measurements of real and drawn rows, tabular.png.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import QuantileTransformer

import flowsolve as fs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ACCURATE = {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-3, atol=1e-3)}
COLUMNS = (0, 1, 3, 4, 7, 27)  # of the picture


class Size(NamedTuple):
    """How much of everything."""

    steps: int
    every: int  # steps between two looks at the validation rows
    width: int


FULL = Size(steps=4_000, every=200, width=128)
SMOKE = Size(steps=6, every=3, width=16)


class Rows(NamedTuple):
    """Measurements, each brought to a normal distribution, and diagnoses."""

    x: jax.Array  # (n, 30)
    labels: jax.Array  # (n,), 0 malignant, 1 benign


def load() -> tuple[Rows, Rows, Rows, list[str]]:
    """Rows to train on, to stop by and to judge by, and the names of the measurements."""
    table = load_breast_cancer()
    split = {"random_state": 0, "stratify": table.target, "test_size": 190}
    train_x, rest_x, train_y, rest_y = train_test_split(table.data, table.target, **split)
    split = {"random_state": 0, "stratify": rest_y, "test_size": 95}
    stop_x, judge_x, stop_y, judge_y = train_test_split(rest_x, rest_y, **split)
    # Measurements are positive and skewed: each becomes normal by its rank among the training rows.
    scaler = QuantileTransformer(n_quantiles=100, output_distribution="normal", random_state=0).fit(train_x)

    def rows(x: np.ndarray, labels: np.ndarray) -> Rows:
        # Beyond the training rows' range a rank says nothing: three standard deviations.
        scaled = np.clip(scaler.transform(x), -3, 3)
        return Rows(jnp.asarray(scaled, jnp.float32), jnp.asarray(labels, jnp.int32))

    return rows(train_x, train_y), rows(stop_x, stop_y), rows(judge_x, judge_y), list(table.feature_names)


def log_density(flow: fs.AbstractFlow, rows: Rows) -> jax.Array:
    return fs.batched(eqx.Partial(fs.log_prob, **ACCURATE))(flow, rows.x, rows.labels)


def train(rows: Rows, stop: Rows, size: Size, key: jax.Array) -> tuple[fs.AbstractFlow, int]:
    """The flow with the best log-density of the validation rows, and after how many steps it was."""
    network_key, batch_key, loss_key = jax.random.split(key, 3)
    like = jax.ShapeDtypeStruct(rows.x.shape[1:], jnp.float32)
    network = fs.nn.ResidualMLP(like, width=size.width, depth=2, num_classes=2, dropout=0.1, key=network_key)
    # Given the diagnosis: pairs of one diagnosis only.
    coupling = fs.couplings.Assignment(fs.couplings.WithCondition(1e4))
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity(), source=fs.sources.CoupledNormal())

    def jitter(key: jax.Array, batch: tuple) -> tuple:
        x, labels = batch
        return x + 0.1 * jax.random.normal(key, x.shape), labels

    batches = fs.data.Batches(rows.x, rows.labels, batch_size=128, key=batch_key, transform=jitter)
    best, best_flow, best_step = -np.inf, flow, 0
    for state in fs.training.fit(
        fs.losses.Regression(times=fs.times.LogitNormal(), coupling=coupling),
        flow,
        batches,
        optax.adamw(5e-4, weight_decay=0.01),
        steps=size.steps,
        key=loss_key,
        ema=0.995,
        every=size.every,
    ):
        density = float(log_density(state.ema_flow, stop).mean())
        if density > best:
            best, best_flow, best_step = density, state.ema_flow, int(state.step)
        elif int(state.step) >= best_step + 5 * size.every:
            break  # not better for five looks
    return best_flow, best_step


class Gaussians(NamedTuple):
    """A Gaussian for each diagnosis, fitted to the training rows."""

    parts: list[fs.testing.Gaussian]

    @classmethod
    def of(cls, rows: Rows) -> "Gaussians":
        x, labels = np.asarray(rows.x), np.asarray(rows.labels)
        groups = [x[labels == label] for label in (0, 1)]
        # Thirty measurements are nearly dependent: a little more variance in all directions.
        ridge = 0.01 * np.eye(x.shape[1])
        return cls([fs.testing.Gaussian(g.mean(axis=0), np.cov(g, rowvar=False) + ridge) for g in groups])

    def draw(self, labels: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(labels))
        both = [jax.vmap(part.sample_data)(keys) for part in self.parts]
        return jnp.where((labels == 0)[:, None], *both)

    def log_density(self, rows: Rows) -> jax.Array:
        both = [jax.vmap(lambda x, p=part: p.log_prob(fs.paths.Linear(), 0.0, x))(rows.x) for part in self.parts]
        return jnp.where(rows.labels == 0, *both)


def judge(drawn: Rows, real: Rows, key: jax.Array) -> str:
    """C2ST, energy distance, and the accuracy of a classifier that learnt from `drawn`, as a line."""
    a = jnp.concatenate([drawn.x, drawn.labels[:, None].astype(jnp.float32)], axis=1)
    b = jnp.concatenate([real.x, real.labels[:, None].astype(jnp.float32)], axis=1)
    test = fs.metrics.classifier_two_sample(a, b, key=key)
    learnt = LogisticRegression(max_iter=2_000).fit(drawn.x, drawn.labels)
    accuracy = learnt.score(real.x, real.labels)
    shown = f"{float(test.accuracy):.3f} +- {float(test.standard_error):.3f}"
    return f"{shown:>17}{float(fs.metrics.energy_distance(a, b)):>9.3f}{accuracy:>10.3f}"


def draw_picture(real: Rows, drawn: Rows, names: list[str], file: Path) -> None:
    """Pairs of neighbouring columns, real above and drawn below."""
    pairs = list(zip(COLUMNS[::2], COLUMNS[1::2], strict=True))
    figure, axes = plt.subplots(2, len(pairs), figsize=(11, 7), sharex="col", sharey="col", layout="constrained")
    for row, (rows, title) in zip(axes, ((real, "real"), (drawn, "drawn")), strict=True):
        for axis, (first, second) in zip(row, pairs, strict=True):
            for label, colour, name in ((0, "tab:red", "malignant"), (1, "tab:blue", "benign")):
                points = np.asarray(rows.x)[np.asarray(rows.labels) == label]
                axis.plot(points[:, first], points[:, second], ".", color=colour, markersize=4, label=name)
            axis.set(xlabel=names[first], ylabel=names[second], title=title)
    axes[0, 0].legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/tabular"), help="folder for what is written")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    jax.config.update("jax_disable_most_optimizations", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    train_key, draw_key, judge_key = jax.random.split(jax.random.key(0), 3)
    rows, stop, real, names = load()

    flow, step = train(rows, stop, size, train_key)
    like = jax.ShapeDtypeStruct(rows.x.shape[1:], jnp.float32)
    x = fs.sample(flow, like, num=len(rows.labels), key=draw_key, args=rows.labels, **ACCURATE)
    drawn = Rows(x, rows.labels)
    gaussians = Gaussians.of(rows)
    fitted = Rows(gaussians.draw(rows.labels, draw_key), rows.labels)
    print(f"trained for {step} steps; {len(real.labels)} rows judge")
    print(f"{'rows':<12}{'log-density':>18}{'C2ST':>17}{'energy':>9}{'accuracy':>10}")
    for name, density, some in (
        ("flow", log_density(flow, real), drawn),
        ("Gaussians", gaussians.log_density(real), fitted),
        ("training", None, rows),
    ):
        shown = "" if density is None else f"{density.mean():.2f} +- {density.std() / len(density) ** 0.5:.2f}"
        print(f"{name:<12}{shown:>18}{judge(some, real, judge_key)}")
    file = options.out / "tabular.png"
    draw_picture(rows, drawn, names, file)
    print(f"picture: {file}\ntotal {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
