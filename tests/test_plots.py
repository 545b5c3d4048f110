"""What is drawn is what there is: states, fields, pixels, curves, bars, frames; what cannot be drawn is named."""

import functools
import subprocess
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

import flowsolve as fs
from flowsolve import plots

KEY = jax.random.key(0)
LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)


def network(t, x, args, *, key=None):
    """A velocity that turns and shrinks what comes from the noise, and goes away from `args`."""
    velocity = x + t * jnp.stack([-x[1], x[0]])
    return velocity if args is None else velocity - args


FLOW = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
STARTS = jnp.asarray([[2.0, 1.5], [-2.0, 1.0], [0.5, -1.5]])
STEPS = {"solver": diffrax.Euler(), "grid": fs.grids.Uniform(4)}
ADAPTIVE = {"solver": diffrax.Bosh3(), "controller": diffrax.PIDController(rtol=1e-3, atol=1e-3)}
# Two of them between the steps.
FRAMES = fs.grids.Given([1.0, 0.6, 0.3, 0.0])


def lines(ax):
    """The artist of the trajectories or trails."""
    (found,) = [artist for artist in ax.collections if hasattr(artist, "get_segments")]
    return found


def points(ax):
    """The places of those that are marked by points: of starts and of ends."""
    return [np.asarray(artist.get_offsets()) for artist in ax.collections if artist is not lines(ax)]


def solved(starts, saveat, **settings):
    """Solutions of `solve`, asked as `plots` does, so that both are one compiled program."""
    rest = dict.fromkeys(["grid", "controller", "dynamics", "t_start", "t_end"])
    return fs.batched(eqx.Partial(fs.solve, **{**rest, **settings}, saveat=saveat))(FLOW, starts, None)


def at_steps(starts, **settings):
    return solved(starts, diffrax.SaveAt(t0=True, steps=True), **settings)


def at_frames():
    return np.asarray(solved(STARTS, diffrax.SaveAt(ts=FRAMES.ts), **STEPS).ys)


# --- flows in the plane ---------------------------------------------------------------------------


def test_trajectories_are_the_states_of_solve():
    ax = plots.trajectories(FLOW, STARTS, **STEPS)
    xs = np.asarray(at_steps(STARTS, **STEPS).ys)
    assert xs.shape == (3, 5, 2)
    np.testing.assert_allclose(lines(ax).get_segments(), xs, rtol=1e-5)
    np.testing.assert_allclose(points(ax), [STARTS, xs[:, -1]], rtol=1e-5)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["start, t = 1", "end, t = 0"]
    # All of it lies inside the axes.
    low, high = np.asarray([ax.get_xlim(), ax.get_ylim()]).T
    assert np.all((low < xs) & (xs < high))


def test_trajectories_at_given_times():
    ax = plots.trajectories(FLOW, STARTS, at=FRAMES, **STEPS)
    np.testing.assert_allclose(lines(ax).get_segments(), at_frames(), rtol=1e-5)


def test_trajectories_of_adaptive_steps():
    """Each has its own steps, and none of the room that is left."""
    starts = jnp.stack([STARTS[0], 0 * STARTS[0]])
    found = lines(plots.trajectories(FLOW, starts, **ADAPTIVE)).get_segments()
    sol = at_steps(starts, **ADAPTIVE)
    for line, ts, xs in zip(found, sol.ts, sol.ys, strict=True):
        np.testing.assert_allclose(line, xs[np.isfinite(ts)], rtol=1e-5)
        assert ts[len(line) - 1] == 0
    assert 2 <= len(found[1]) < len(found[0])


def test_trajectories_end_in_the_samples_of_the_key():
    """Starts and, of a stochastic solver, noise are those of `sample`."""
    settings = {"num": 3, "key": KEY, "solver": fs.solvers.DDIM(eta=1.0), "grid": fs.grids.Uniform(2)}
    ax = plots.trajectories(FLOW, **settings)
    np.testing.assert_allclose(points(ax)[1], fs.sample(FLOW, LIKE, **settings), rtol=1e-4, atol=1e-5)


def test_trajectories_with_conditions():
    """Each point has its own."""
    args = jnp.asarray([[1.0, 0.0], [0.0, -2.0], [3.0, 1.0]])
    ax = plots.trajectories(FLOW, STARTS, args, solver=diffrax.Euler(), grid=fs.grids.Uniform(2), t_end=0.5)
    for line, x, condition in zip(lines(ax).get_segments(), STARTS, args, strict=True):
        middle = x - 0.25 * network(1.0, x, condition)
        np.testing.assert_allclose(line, [x, middle, middle - 0.25 * network(0.75, middle, condition)], rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_vector_field_is_the_velocity(sign):
    x, y = np.linspace(-2, 2, 4), np.linspace(-1, 1, 3)
    ax = plots.vector_field(FLOW, 0.3, x, y, reverse=sign < 0)
    (quiver,) = ax.collections
    np.testing.assert_allclose(quiver.get_offsets(), [(a, b) for b in y for a in x])
    for place, u, v in zip(quiver.get_offsets(), quiver.U, quiver.V, strict=True):
        velocity = FLOW.velocity(0.3, jnp.asarray(place, jnp.float32))
        np.testing.assert_allclose([u, v], sign * velocity, rtol=1e-5, atol=1e-6)
    # An arrow points to where its two numbers say.
    assert quiver.angles == "xy"


def test_vector_field_of_the_score():
    args = jnp.asarray([1.0, -1.0])
    ax = plots.vector_field(FLOW, 0.3, np.linspace(-2, 2, 3), args=args, prediction=fs.predictions.Score())
    (quiver,) = ax.collections
    place = jnp.asarray(quiver.get_offsets()[5], jnp.float32)
    np.testing.assert_allclose([quiver.U[5], quiver.V[5]], FLOW.score(0.3, place, args), rtol=1e-5)


COLOURS = np.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])


def frames(file):
    """Pictures, from 0 to 1, with their times in milliseconds."""
    with Image.open(file) as gif:
        assert gif.info["loop"] == 0  # without end
        found = [(frame.convert("RGB").copy(), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
    return [(np.asarray(picture) / 255, duration) for picture, duration in found]


def test_animation_goes_from_the_starts_to_the_ends(tmp_path):
    figure = Figure((2, 1), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(-4, 4), ylim=(-2, 2))
    settings = {"frames": FRAMES, "seconds": 0.6, "hold": 1.5, "color": COLOURS, "ax": axes}
    file = tmp_path / "flow.gif"
    assert plots.animate(FLOW, file, STARTS, **settings, **STEPS) is axes
    pictures, durations = zip(*frames(file), strict=True)
    # Three steps of 0.2 s, and the last frame is held.
    assert durations == (200, 200, 200, 1500)
    rows, columns = np.indices((200, 400))
    for picture, xs in zip(pictures, np.moveaxis(at_frames(), 1, 0), strict=True):
        assert picture.shape == (200, 400, 3) and np.all(picture[0, 0] == 1)
        for colour, x in zip(COLOURS, xs, strict=True):
            found = np.linalg.norm(picture - colour, axis=-1) < 0.2
            assert np.sum(found) > 20
            place = [np.mean(columns[found]) + 0.5, 200 - np.mean(rows[found]) - 0.5]
            # Half a pixel.
            np.testing.assert_allclose(axes.transData.inverted().transform(place), x, atol=0.01)
    assert axes.get_xlim() == (-4, 4)


def test_animation_holds_all_points_and_their_trails(tmp_path):
    file = str(tmp_path / "flow.gif")
    ax = plots.animate(FLOW, file, STARTS, frames=FRAMES, color="black", trail=2, **STEPS)
    xs = at_frames()
    np.testing.assert_allclose(points(ax), [xs[:, -1]], rtol=1e-5)
    np.testing.assert_allclose(lines(ax).get_segments(), xs[:, 1:], rtol=1e-5)
    pictures = [picture for picture, _ in frames(file)]
    for picture in pictures:
        assert picture.shape == (480, 480, 3)
        edges = picture[[0, -1]], picture[:, [0, -1]]
        assert all(np.all(edge == 1) for edge in edges)  # no point is cut
    # One scale for both coordinates.
    unit = ax.transData.transform([[0, 0], [1, 1]])
    np.testing.assert_allclose(*np.diff(unit, axis=0)[0], rtol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_animation_wants_a_colour_for_each_point(tmp_path):
    with pytest.raises(ValueError, match=r"color of shape \(2, 3\) for 3 points.*\(3, 3\) or \(3, 4\)"):
        plots.animate(FLOW, tmp_path / "flow.gif", STARTS, color=COLOURS[:2], frames=FRAMES, **STEPS)


# --- images ---------------------------------------------------------------------------------------


def shown(ax):
    """What the image of the axes shows, RGBA from 0 to 1."""
    (image,) = ax.images
    return image.to_rgba(image.get_array())


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 1, 3, 4), (5, 3, 3, 4)])
def test_samples_show_every_pixel_in_its_cell(shape):
    x = np.random.default_rng(0).uniform(0, 10, shape).astype(np.float32)
    x.flat[0], x.flat[-1] = -3.0, 12.0  # beyond what is shown as black and white
    picture = shown(plots.samples(jnp.asarray(x), rows=3, columns=2, low=0.0, high=10.0, gap=2))
    assert picture.shape == (3 * 3 + 2 * 2, 2 * 4 + 2, 4)
    value = np.clip(x.reshape(5, -1, 3, 4) / 10, 0, 1)
    for k in range(5):
        top, left = k // 2 * (3 + 2), k % 2 * (4 + 2)
        cell = picture[top : top + 3, left : left + 4]
        wanted = np.broadcast_to(np.moveaxis(value[k], 0, -1), (3, 4, 3))
        np.testing.assert_allclose(cell[..., :3], wanted, atol=1 / 255)
        assert np.all(cell[..., 3] == 1)
    # Between the images, and where there is none, nothing.
    assert np.all(picture[3:5, :, 3] == 0) and np.all(picture[:, 4:6, 3] == 0) and np.all(picture[10:, 6:, 3] == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.uint8])
def test_samples_of_any_real_dtype(dtype):
    x = jnp.arange(16).reshape(4, 2, 2).astype(dtype)  # exact in all of them
    shown = plots.samples(x, low=0, high=15, gap=0, columns=4).images[0].get_array()
    np.testing.assert_array_equal(shown, np.concatenate(np.arange(16.0).reshape(4, 2, 2), axis=1))


def test_samples_leave_failed_ones_blank():
    x = np.zeros((2, 3, 2, 2))
    x[1] = np.nan
    picture = shown(plots.samples(x, rows=1, gap=0))
    assert np.all(picture[:, :2] == [0.5, 0.5, 0.5, 1]) and np.all(picture[:, 2:, 3] == 0)
    picture = shown(plots.samples(x[:, 0], rows=1, gap=0))
    assert np.all(picture[:, :2, 3] == 1) and np.all(picture[:, 2:, 3] == 0)


@pytest.mark.parametrize(
    ("num", "cells", "wanted"),
    [(9, {}, (3, 3)), (7, {}, (3, 3)), (5, {}, (2, 3)), (7, {"rows": 2}, (2, 4)), (7, {"columns": 7}, (1, 7))],
)
def test_samples_are_near_to_a_square(num, cells, wanted):
    ax = plots.samples(np.zeros((num, 2, 2)), gap=0, **cells)
    assert ax.images[0].get_array().shape == (2 * wanted[0], 2 * wanted[1])


# --- figures --------------------------------------------------------------------------------------


def test_work_precision():
    errors = {"Euler": [0.4, 0.2, 0.1], "Heun": np.asarray([np.inf, 0.02, 0.005])}
    ax = plots.work_precision([4, 8, 16], errors)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [line.get_label() for line in ax.lines] == ["Euler", "Heun"]
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [(4, 0.4), (8, 0.2), (16, 0.1)])
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [(4, np.nan), (8, 0.02), (16, 0.005)])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["4", "8", "16"]
    # A third line has its own evaluations, and a colour and a marker of its own.
    plots.work_precision({"RK3": [6, 12]}, {"RK3": [0.01, 0.001]}, ax=ax)
    np.testing.assert_array_equal(ax.lines[2].get_xydata(), [(6, 0.01), (12, 0.001)])
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 3


@pytest.mark.parametrize(
    ("path", "ends", "options"),
    [
        (fs.paths.Linear(), (True, True), {}),
        (fs.paths.VP(), (False, False), {}),
        (fs.paths.Trigonometric(), (True, True), {}),
        (fs.paths.EDM(), (False, False), {"log_t": True}),
    ],
    ids=["Linear", "VP", "Trigonometric", "EDM"],
)
def test_schedule_draws_the_path(path, ends, options):
    weight = fs.weights.SNR()
    first, log_snr, weights = plots.schedule(path, weight, **options)
    ts = first.lines[0].get_xdata()
    assert len(ts) == 257
    np.testing.assert_allclose(ts[[0, -1]], [path.t_data, path.t_noise], rtol=1e-6)
    for at in (0, 1, 100, 255, 256):
        t = jnp.asarray(ts[at])
        found = [ax.lines[0].get_ydata()[at] for ax in (first, log_snr, weights)] + [first.lines[1].get_ydata()[at]]
        wanted = np.asarray([path.alpha(t), path.log_snr(t), weight(path, t), path.sigma(t)])
        if ends[0] and at == 0:
            assert wanted[1] == np.inf
            wanted[1:3] = np.nan  # where they are infinite nothing is drawn
        if ends[1] and at == 256:
            assert wanted[1] == -np.inf and wanted[2] == 0
            wanted[1:3] = np.nan
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert {ax.get_xscale() for ax in (first, log_snr, weights)} == {"log" if options else "linear"}
    assert weights.get_yscale() == "log"


def test_schedule_beside_another():
    axes = plots.schedule(fs.paths.Linear(), label="Linear")
    again = plots.schedule(fs.paths.Cosine(), ts=np.linspace(0.25, 0.75, 3), label="Cosine", axes=axes)
    assert all(a is b for a, b in zip(axes, again, strict=True)) and len(axes) == 2
    names = [line.get_label() for line in axes[0].lines]
    assert names == ["alpha, Linear", "sigma, Linear", "alpha, Cosine", "sigma, Cosine"]
    np.testing.assert_allclose(axes[1].lines[1].get_ydata()[1], fs.paths.Cosine().log_snr(0.5), rtol=1e-5)
    assert axes[1].lines[0].get_color() != axes[1].lines[1].get_color()


def test_loss_by_time_of_a_state():
    class Scaled(eqx.Module):
        scale: jax.Array

        def __call__(self, t, x, args, *, key=None):
            return self.scale * x

    flow = fs.Flow(Scaled(jnp.ones(())), fs.paths.Linear(), fs.predictions.Velocity())
    batch = jax.random.normal(KEY, (4, 2))
    (state,) = fs.training.fit(fs.losses.Regression(), flow, [batch] * 2, optax.sgd(1e-3), steps=2, key=KEY)
    losses = np.asarray(state.metrics["loss_by_t"])
    assert 0 < np.sum(np.isnan(losses)) < 8  # eight examples do not fill eight bins
    (bars,) = plots.loss_by_time(state.metrics).patches
    np.testing.assert_array_equal(bars.get_data().values, losses)
    np.testing.assert_array_equal(bars.get_data().edges, state.metrics["t_edges"])
    with pytest.raises(ValueError, match=r"metrics with loss, but wants loss_by_t"):
        plots.loss_by_time(fs.training.init(flow, optax.sgd(1e-3), key=KEY).metrics)


# --- what cannot be drawn, and what is left alone -------------------------------------------------


def give(function, *arguments, **options):
    return functools.partial(function, *arguments, **options)


EDGES = np.linspace(0, 1, 3)
BRIDGE = fs.BridgeFlow(network, 0.5, fs.sources.Normal())
BAD = {
    "starts_in_space": (give(plots.trajectories, FLOW, jnp.zeros((5, 3))), ValueError, r"x_start of shape \(5, 3\)"),
    "one_start": (give(plots.trajectories, FLOW, jnp.zeros(2)), ValueError, r"x_start of shape \(2,\)"),
    "starts_and_num": (give(plots.trajectories, FLOW, STARTS, num=3), ValueError, "both x_start and num"),
    "no_key": (give(plots.trajectories, FLOW), ValueError, "key is missing: trajectories without x_start"),
    "args": (give(plots.trajectories, FLOW, STARTS, jnp.zeros(2, int)), ValueError, "num = 3 samples"),
    "at": (give(plots.trajectories, FLOW, STARTS, at=[1.0, 0.0]), TypeError, "at is a list.*Uniform"),
    "no_flow": (give(plots.trajectories, network, STARTS), TypeError, "flow is a function, but wants an AbstractFlow"),
    "field_of_none": (
        give(plots.vector_field, network, 0.5, EDGES),
        TypeError,
        "flow is a function, but wants an AbstractFlow",
    ),
    "field_of_a_matrix": (give(plots.vector_field, FLOW, 0.5, jnp.zeros((2, 2))), ValueError, r"x of shape \(2, 2\)"),
    "field_outside": (give(plots.vector_field, FLOW, 1.5, EDGES), ValueError, "t = 1.5, outside Linear"),
    "field_infinite": (
        give(plots.vector_field, FLOW, 0.0, EDGES, prediction=fs.predictions.Score()),
        ValueError,
        "at t = 0 is not finite at . of 9 points",
    ),
    "score_of_a_velocity": (
        give(plots.vector_field, BRIDGE, 0.5, EDGES, prediction=fs.predictions.Score()),
        TypeError,
        "flow is a BridgeFlow, but wants one that offers",
    ),
    "score_of_a_class": (
        give(plots.vector_field, FLOW, 0.5, EDGES, prediction=fs.predictions.Score),
        TypeError,
        "prediction is the class Score",
    ),
    "no_gif": (give(plots.animate, FLOW, "flow.mp4", STARTS), ValueError, "flow.mp4.*end in .gif"),
    "no_time": (give(plots.animate, FLOW, "a.gif", STARTS, seconds=0.0), ValueError, "seconds = 0"),
    "no_images": (give(plots.samples, jnp.zeros((4, 9))), ValueError, r"x of shape \(4, 9\).*num, height, width"),
    "channels_last": (give(plots.samples, jnp.zeros((4, 8, 8, 3))), ValueError, r"\(4, 8, 8, 3\).*1 or 3 channels"),
    "few_cells": (give(plots.samples, jnp.zeros((7, 2, 2)), rows=2, columns=3), ValueError, "7 images.*6 cells"),
    "no_range": (give(plots.samples, jnp.zeros((7, 2, 2)), low=1.0, high=1.0), ValueError, "low = 1 and high = 1"),
    "no_rows": (give(plots.samples, jnp.zeros((7, 2, 2)), rows=0), ValueError, "rows = 0"),
    "lengths": (give(plots.work_precision, [1, 2], {"a": [0.1]}), ValueError, r"nfe of shape \(2,\).*\(1,\) for 'a'"),
    "zero_error": (give(plots.work_precision, [1, 2], {"a": [0.1, 0.0]}), ValueError, "of 'a' that is not positive"),
    "no_nfe": (give(plots.work_precision, {"b": [1]}, {"a": [0.1]}), ValueError, "no nfe for 'a'"),
    "no_names": (give(plots.work_precision, [1], [0.1]), ValueError, "by name"),
    "path_class": (give(plots.schedule, fs.paths.Linear), TypeError, "path is the class Linear"),
    "weight": (give(plots.schedule, fs.paths.Linear(), lambda path, t: t), TypeError, "weight is a function"),
    "log_from_0": (give(plots.schedule, fs.paths.Linear(), log_t=True), ValueError, "log_t for a path from t = 0"),
    "time_outside": (give(plots.schedule, fs.paths.VP(), ts=EDGES * 2), ValueError, "from t_data = 0.0001 to t_noise"),
    "two_axes": (give(plots.schedule, fs.paths.VP(), fs.weights.SNR(), axes=[None] * 2), ValueError, "got 2 axes.*3"),
    "one_axes": (give(plots.schedule, fs.paths.VP(), axes=5), ValueError, "axes of type int, but draws onto 2"),
    "no_times": (give(plots.schedule, fs.paths.VP(), ts=np.zeros(0)), ValueError, r"ts of shape \(0,\)"),
    "log_of_0": (give(plots.schedule, fs.paths.Linear(), ts=EDGES, log_t=True), ValueError, "log_t and a time t = 0"),
    "log_edge": (
        give(plots.loss_by_time, {"loss_by_t": EDGES[1:], "t_edges": EDGES}, log_t=True),
        ValueError,
        "a first edge t = 0",
    ),
    "a_state": (give(plots.loss_by_time, None), TypeError, "metrics is a NoneType, but wants state.metrics"),
    "nan_errors": (give(plots.work_precision, [1], {"a": [np.nan]}), ValueError, "no error that is finite"),
    "no_points": (give(plots.work_precision, [], {"a": []}), ValueError, "at least one point"),
    "endless": (give(plots.work_precision, [np.inf], {"a": [0.1]}), ValueError, "of 'a' that is not positive and fin"),
    "misspelt": (give(plots.work_precision, {"a": [1], "A": [1]}, {"a": [0.1]}), ValueError, r"nfe for \['A'\]"),
    "words": (give(plots.samples, np.full((4, 2, 2), "a")), TypeError, "but wants real"),
    "complex": (give(plots.samples, np.zeros((4, 2, 2), complex)), TypeError, "dtype complex128, but wants real"),
    "open_range": (give(plots.samples, jnp.zeros((4, 2, 2)), low=-np.inf), ValueError, "low = -inf"),
    "no_file": (give(plots.animate, FLOW, 3, STARTS), TypeError, "file of type int, but wants its path"),
    "no_folder": (give(plots.animate, FLOW, "none/a.gif", STARTS), ValueError, "in a folder that does not exist"),
    "no_end": (give(plots.animate, FLOW, "a.gif", STARTS, seconds=np.inf), ValueError, "seconds = inf"),
    "no_colour": (give(plots.animate, FLOW, "a.gif", STARTS, color="nocolour"), ValueError, "color 'nocolour'"),
    "edges": (
        give(plots.loss_by_time, {"loss_by_t": EDGES, "t_edges": EDGES}),
        ValueError,
        r"float64\[3\], float64\[3\].*one element more",
    ),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name):
    draw, error, message = BAD[name]
    with pytest.raises(error, match=message) as raised:
        draw()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", plots.__all__)
def test_without_matplotlib(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = {
        "animate": (FLOW, "flow.gif", STARTS),
        "loss_by_time": ({"loss_by_t": EDGES[1:], "t_edges": EDGES},),
        "samples": (jnp.zeros((1, 2, 2)),),
        "schedule": (fs.paths.Linear(),),
        "trajectories": (FLOW, STARTS),
        "vector_field": (FLOW, 0.5, EDGES),
        "work_precision": ([1], {"a": [0.1]}),
    }
    with pytest.raises(ImportError, match=rf'{name} draws with matplotlib.*pip install "flowsolve\[plots\]"'):
        getattr(plots, name)(*given[name])


def test_matplotlib_is_imported_by_the_call_and_pyplot_never():
    code = """
import sys
import flowsolve as fs
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
fs.plots.work_precision([1, 2], {"a": [0.1, 0.2]}).figure.savefig(sys.argv[1], format="png")
assert "matplotlib.pyplot" not in sys.modules
changed = [name for name in before if name != 'backend' and matplotlib.rcParams[name] != before[name]]
assert not changed, changed
"""
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True)
