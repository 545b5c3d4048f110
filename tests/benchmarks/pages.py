"""What the benchmarks that write a page of docs/benchmarks have in common."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import jax
from timing import machine

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def page_options(description: str) -> argparse.ArgumentParser:
    """A parser of --smoke, --write and --docs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="small and quick, to see that it runs")
    parser.add_argument("--write", action="store_true", help="write the page, which is printed in any case")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the page")
    return parser


def show(name: str, heading: str, sections: Iterable[str], options: argparse.Namespace) -> None:
    """Print a page and, if that was asked for, write it. The heading ends with the machine."""
    measured = f"Measured on {machine()} with JAX {jax.__version__}.\n"
    page = "\n".join([heading, measured, *sections])
    print(page)
    if options.write:
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / f"{name}.md").write_text(page)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
