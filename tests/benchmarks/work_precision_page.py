"""The page and the pictures of work_precision.py, made from the figures that it keeps."""

import json
import os
from pathlib import Path

import jax
import matplotlib
import numpy as np
from pages import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: {"solver | grid": {NFE: [RMS, median]}}
Table = dict[str, dict[str, list[float]]]
#: {"solver | grid": {NFE: [[RMS, median, seconds to make the pair] for each problem]}}
Figures = dict[str, dict[str, list[list[float]]]]

INTRODUCTION = """\
# Work and precision

Which solver on which grid has the smallest error for a given number of network evaluations (NFE)? Measured on flows
whose samples are known, on a trained one, and for stochastic solvers by the distribution of their samples.

    python tests/benchmarks/work_precision.py --seeds {seeds} --noises {noises}

Measured on {cores} CPU cores with JAX {version}. The problem: mixtures of ten anisotropic Gaussians in 16 dimensions,
standard deviation 0.5 per element overall, one for each of the seeds {seeds}, each with its own {noises} start noises.
On `Linear` the solve goes from t = 1 onto the clean data at t = 0, on `EDM` from sigma = 80 to 0.002. Every solver and
grid carries the same noise to data in float32; the exact samples come from an adaptive solve in float64 with tolerance
1e-9.

Each cell is **RMS/median** over the samples of a sample's error, the root mean square over its elements; the mean over
the seeds. The RMS is ruled by the few samples that end in another component of the mixture, the median by the accuracy
of all others. A solver with several evaluations a step has a figure where they divide the NFE. Rows are sorted by the
last column, the geometric mean over the NFE of both errors relative to the smallest of all untuned rows. `Tuned` is
what `fs.tuning.tune` learns for the flow and the NFE from noises of its own.
"""

STOCHASTIC = """\
## Stochastic solvers

Their samples are no function of the start noise, so their distribution is measured: the sliced Wasserstein-2 distance
of 16,384 samples to as many exact ones, the root mean square over 256 directions of the difference of sorted
projections; the mean over the seeds. Two sets of exact samples are {floor} apart, with a standard deviation of {spread}
from one pair of sets to another: a row that near cannot be told from exact. The equation is that of the solver unless
an eta is named; the last four draw no noise.
"""

DIGITS = """\
## The trained digits flow

The flow of `examples/digits.py`: a residual network that predicts the velocity on `Linear`, trained on images of 8 x 8
pixels in [-1, 1]. Errors as above, of {samples} noises with labels 0 to 9, against an adaptive solve in float64 with
tolerance 1e-7. `Tuned` is learnt from {noises} noises in {updates} updates, as in the example.
"""

TUNED = """\
### Tuned on `{path}`, mixture by mixture

What was learnt against the whole table on the same mixture: its RMS over the smallest RMS of any untuned row, its
median over the smallest median of any, and the seconds that learning took (the first of an NFE compiles).
"""

FRECHET = """\
The Frechet distance of 1,000 samples to held-out digits, in the features of the example's classifier; the mean over
{draws} draws. An accurate solve has {accurate:.2f}, and a row below that errs to its advantage; the digits that the
flow was trained on have {real:.2f}.
"""

#: The rows of the pictures, for each part that has one.
PICTURES = {
    "Linear": (
        ("diffrax Euler", "Uniform"),
        ("diffrax Heun", "Uniform"),
        ("DPMSolverPP 2", "Uniform"),
        ("UniPC 2", "Uniform"),
        ("DEIS 3", "VPPower(2)"),
        ("IPNDM 3", "Power(2)"),
        ("AdamsBashforth 2, data, Time", "Power(2)"),
        ("AdamsBashforth 4, velocity, Time", "VPPower(2)"),
        ("Tuned", "tuned"),
    ),
    "EDM": (
        ("DDIM", "Karras"),
        ("EDMHeun", "Karras"),
        ("DPMSolverPP 2", "Karras"),
        ("DPMSolverPP 2", "LogSNR"),
        ("UniPC 3", "VPPower(2)"),
        ("DEIS 3", "VPPower(2)"),
        ("IPNDM 3", "LogSNR"),
        ("AdamsBashforth 3, data, VPTime", "VPPower(2)"),
        ("Tuned", "tuned"),
    ),
    "digits": (
        ("diffrax Euler", "Uniform"),
        ("diffrax Heun", "Uniform"),
        ("DPMSolverPP 2", "Uniform"),
        ("UniPC 2", "Uniform"),
        ("DEIS 3", "VPPower(2)"),
        ("IPNDM 3", "VPPower(2)"),
        ("AdamsBashforth 2, data, Time", "Power(2)"),
        ("AdamsBashforth 4, velocity, Time", "VPPower(2)"),
        ("Tuned", "tuned"),
    ),
}
# Distinct also to the colour blind, and by their markers.
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F4F24", "#000000")
MARKERS = "osD^vP*X<"


def number(value: float) -> str:
    """Three digits, without the zero before the point; a dash for what is not finite."""
    if not np.isfinite(value):
        return "-"
    if value >= 100:
        return f"{value:.0e}"
    return f"{value:#.3g}".rstrip(".").removeprefix("0")


def mean(figures: Figures) -> Table:
    """The mean of the errors over the problems."""
    return {
        name: {nfe: np.mean(problems, axis=0)[:2].tolist() for nfe, problems in row.items()}
        for name, row in figures.items()
    }


def evaluations_of(table: dict[str, dict]) -> list[str]:
    """The NFE of a table, ascending."""
    return sorted({nfe for row in table.values() for nfe in row}, key=int)


def ranked(table: Table) -> list[tuple[str, float]]:
    """(row, geometric mean over NFE and both errors of the error over the smallest untuned one), smallest first."""
    untuned = [row for name, row in table.items() if not name.startswith("Tuned")]
    best = {nfe: np.nanmin([row[nfe] for row in untuned if nfe in row], axis=0) for nfe in evaluations_of(table)}

    def times_best(row: dict[str, list[float]]) -> float:
        ratios = np.concatenate([np.asarray(errors) / best[nfe] for nfe, errors in row.items()])
        return float(np.exp(np.mean(np.log(ratios)))) if np.all(np.isfinite(ratios)) else np.inf

    return sorted(((name, times_best(row)) for name, row in table.items()), key=lambda item: item[1])


def error_table(table: Table) -> str:
    """All rows."""
    columns = evaluations_of(table)
    rows = []
    for name, times in ranked(table):
        cells = ["/".join(map(number, table[name][nfe])) if nfe in table[name] else "" for nfe in columns]
        rows.append([*name.split(" | "), *cells, f"{times:.1f}" if times < 1000 else "-"])
    return markdown(["solver", "grid", *columns, "times best"], rows)


def best_table(table: Table) -> str:
    """The rows of the smallest median and of the smallest RMS at each NFE, tuned ones aside."""
    rows = []
    for nfe in evaluations_of(table):
        cells = [nfe]
        for which in (1, 0):
            known = {name: row[nfe] for name, row in table.items() if nfe in row and not name.startswith("Tuned")}
            name = min(known, key=lambda name, which=which: np.nan_to_num(known[name][which], nan=np.inf))
            cells += [" on ".join(name.split(" | ")), "/".join(map(number, known[name]))]
        if any(name.startswith("Tuned") for name in table):
            cells.append("/".join(map(number, table["Tuned | tuned"].get(nfe, []))))
        rows.append(cells)
    header = ["NFE", "smallest median", "RMS/median", "smallest RMS", "RMS/median"]
    return markdown(header + ["Tuned"] * (len(rows[0]) - len(header)), rows)


def tuned_table(figures: Figures) -> str:
    """Of each problem the tuned errors over the smallest of all untuned rows."""
    rows = []
    for nfe, problems in sorted(figures["Tuned | tuned"].items(), key=lambda item: int(item[0])):
        untuned = [row[nfe] for name, row in figures.items() if nfe in row and not name.startswith("Tuned")]
        best = np.nanmin(np.asarray(untuned)[..., :2], axis=0)
        ratios = np.asarray(problems)[:, :2] / best
        cells = ("/".join(number(value) for value in ratios[:, which]) for which in (0, 1))
        rows.append([nfe, *cells, "/".join(f"{seconds:.0f}" for _, _, seconds in problems)])
    return markdown(["NFE", "RMS over the smallest", "median over the smallest", "seconds"], rows)


def distance_table(table: dict[str, dict[str, float]]) -> str:
    """One number a cell, in the order of the rows."""
    columns = evaluations_of(table)
    rows = [
        [*name.split(" | "), *(number(row[nfe]) if nfe in row else "" for nfe in columns)]
        for name, row in table.items()
    ]
    return markdown(["solver", "grid", *columns], rows)


def picture(part: str, table: Table, file: Path) -> None:
    """Median and RMS against the NFE."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.6), sharex=True)
    columns = evaluations_of(table)
    for axis, which, name in zip(axes, (1, 0), ("median", "RMS"), strict=True):
        for pair, colour, marker in zip(PICTURES[part], COLOURS, MARKERS, strict=True):
            row = table.get(" | ".join(pair))
            if row is None:
                continue
            points = [(int(nfe), row[nfe][which]) for nfe in columns if nfe in row]
            label = pair[0] if pair[0] == "Tuned" else " on ".join(pair)
            width = 2.4 if pair[0] == "Tuned" else 1.4
            axis.loglog(*zip(*points, strict=True), color=colour, marker=marker, ms=6, lw=width, label=label)
        axis.set_xticks([int(nfe) for nfe in columns], columns)
        axis.minorticks_off()
        axis.set_xlabel("network evaluations")
        axis.set_title(f"{part}: {name} error of a sample", fontsize=11)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9.5)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def errors_of(part: str, figures: Figures, out: Path) -> list[str]:
    """A part's picture, which is drawn, and its table."""
    name = f"work_precision_{part.lower()}.png"
    picture(part, mean(figures), out / name)
    return [f"![Error against network evaluations, {part}]({name})\n", error_table(mean(figures))]


def write_page(figures: Path, out: Path) -> None:
    """work_precision.md and its pictures, from the parts that have been measured."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {file.stem: json.loads(file.read_text()) for file in sorted(figures.glob("*.json"))}
    settings = next(iter(parts.values()))["settings"]
    seeds = " ".join(map(str, settings["seeds"]))
    page = [INTRODUCTION.format(seeds=seeds, noises=settings["noises"], cores=os.cpu_count(), version=jax.__version__)]
    paths = [path for path in ("Linear", "EDM") if path in parts]
    page.append("## Best at each NFE\n")
    titles = {path: f"### On `{path}`\n" for path in paths}
    for part, title in {**titles, "digits": "### On the digits flow\n"}.items():
        if part in parts:
            page += [title, best_table(mean(parts[part]["errors"]))]
    for path in paths:
        page += [f"## On `{path}`\n", *errors_of(path, parts[path]["errors"], out)]
        if "Tuned | tuned" in parts[path]["errors"]:
            page += [TUNED.format(path=path), tuned_table(parts[path]["errors"])]
    if "stochastic" in parts:
        page.append(STOCHASTIC.format(**{k: number(parts["stochastic"][k]) for k in ("floor", "spread")}))
        for path, table in parts["stochastic"]["distances"].items():
            page += [f"### Stochastic on `{path}`\n", distance_table(table)]
    if "digits" in parts:
        digits = parts["digits"]
        page += [DIGITS.format(**digits["counts"]), *errors_of("digits", digits["errors"], out)]
        page += [FRECHET.format(draws=len(settings["seeds"]), **{k: digits[k] for k in ("accurate", "real")})]
        page.append(distance_table(digits["frechet"]))
    (out / "work_precision.md").write_text("\n".join(page))
