"""The pages run: every block of Python in docs/ and the README, and every row of the pages "coming from".

A page is one program: its blocks run in their order in one namespace. What a page needs but does not show stands in a
comment of it that begins with `run first`. A training of 1,000 steps takes 10 here. On a page of docs/coming_from each
row of a table whose head is `| theirs | here | what differs |` has one line of code under "here", which runs by itself
after the blocks of the page.
The scripts that shell commands name exist, figures in the README are those of the pages that they come from, and the
pages of the examples are what `docs/generate/examples.py` writes.
"""

import ast
import contextlib
import functools
import io
import re
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
import pytest
from test_examples import load

import flowsolve as fs

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COMING_FROM = DOCS / "coming_from"
FENCED = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
RUN_FIRST = re.compile(r"<!-- run first\n(?P<code>.*?)-->", re.S)
# Sources that a page includes are run as examples.
INCLUDED = re.compile(r"^--8<-- ")


class Block(NamedTuple):
    """Code, and where it stands."""

    line: int
    code: str


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """What runs on a page, in its order."""
    text = page.read_text()
    found = [Block(text.count("\n", 0, match.start()) + 2, match["code"]) for match in RUN_FIRST.finditer(text)]
    for match in FENCED.finditer(text):
        code = "\n".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines())
        if not INCLUDED.match(code):
            found.append(Block(text.count("\n", 0, match.start()) + 2, code))
    return sorted(found)


class Row(NamedTuple):
    """A row of a page "coming from"."""

    line: int
    theirs: str
    here: str


def rows(page: Path) -> list[Row]:
    """The rows of the tables that say whose name is which code of ours."""
    found, inside = [], False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells[:1] == ["theirs"]:
            assert cells == ["theirs", "here", "what differs"], f"{name(page)}:{number}: the head of a table"
            inside = True
        elif not cells:
            inside = False
        elif inside and not set(line) <= set("|-: "):
            code = re.fullmatch(r"`+ ?(?P<code>.*?) ?`+", cells[1])
            assert len(cells) == 3 and code, f"{name(page)}:{number}: three cells, the second one line of code"
            found.append(Row(number, cells[0], code["code"].replace("\\|", "|")))
    return found


def run(code: str, namespace: dict, page: Path, line: int):
    """Run code, and return the value of its last expression. A traceback names the page and the line."""
    tree = ast.parse(code.replace("steps=1_000", "steps=10"), filename=name(page))
    ast.increment_lineno(tree, line - 1)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(tree, name(page), "exec"), namespace)
        if last is None:
            return None
        return eval(compile(ast.Expression(last.value), name(page), "eval"), namespace)


def run_blocks(page: Path) -> dict:
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        run(block.code, namespace, page, block.line)
    return namespace


def assert_finite(value) -> None:
    """A row that gives numbers gives finite ones."""
    for leaf in jax.tree.leaves(value):
        if eqx.is_inexact_array_like(leaf):
            assert np.all(np.isfinite(np.asarray(leaf)))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What a page writes goes to a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages() if "```python" in page.read_text()], ids=name)
def test_page_runs(page):
    namespace = run_blocks(page)
    failed = []
    for row in rows(page):
        try:
            assert_finite(run(row.here, dict(namespace), page, row.line))
        except Exception as error:  # all of them, not the first alone
            failed.append(f"{name(page)}:{row.line}: {row.here}\n    {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.quick
@pytest.mark.parametrize("page", sorted(COMING_FROM.glob("[!i]*.md")), ids=name)
def test_pages_coming_from_have_rows(page):
    assert len(rows(page)) >= 20


@pytest.mark.quick
def test_docstrings_name_what_exists():
    """Code in docstrings is not run, but what it calls is there."""
    missing = []
    for module in sorted((ROOT / "flowsolve").rglob("*.py")):
        for dotted in set(re.findall(r"\bfs((?:\.\w+)+)", module.read_text())):
            try:
                functools.reduce(getattr, dotted.split(".")[1:], fs)
            except AttributeError:
                missing.append(f"{name(module)}: fs{dotted}")
    assert not missing


# --- what pages say -----------------------------------------------------------------------------------


def table(page: Path, head: str, section: str = "") -> dict[tuple[str, ...], list[str]]:
    """The rows below a head, by their first two cells: from the section of a page that begins with a heading."""
    lines = page.read_text().partition(section)[2].splitlines() if section else page.read_text().splitlines()
    found = {}
    for line in lines[lines.index(head) + 2 :]:
        if not line.startswith("|"):
            break
        first, second, *rest = (cell.strip() for cell in line.split("|")[1:-1])
        found[first, second] = rest
    return found


@pytest.mark.quick
def test_accuracy_in_the_readme_is_the_measured_one():
    shown = table(ROOT / "README.md", "| solver | grid | 5 | 10 | 20 | 40 |")
    head = "| solver | grid | 5 | 8 | 10 | 15 | 20 | 40 | times best |"
    measured = table(DOCS / "benchmarks" / "work_precision.md", head, "\n## The trained digits flow\n")
    assert shown
    for row, cells in shown.items():
        rms = [cell.split("/")[0] for cell in measured[row]]
        assert cells == [rms[0], rms[2], rms[4], rms[5]], row


@pytest.mark.quick
def test_speed_in_the_readme_is_the_measured_one():
    shown = table(ROOT / "README.md", "| neighbour and method | difference | tiny | medium | image |")
    measured = {}
    for line in (DOCS / "benchmarks" / "peers.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 9 and cells[0] in ("tiny", "medium", "image"):
            peer = re.sub(r" \(.*\)", "", cells[1])
            measured[f"{peer}, {cells[2]}", cells[0]] = float(cells[4]), cells[8]
    assert shown
    for (method, difference), ratios in shown.items():
        rows = [measured.get((method, network)) for network in ("tiny", "medium", "image")]
        assert ratios == ["" if row is None else row[1] for row in rows], method
        assert float(difference) == max(row[0] for row in rows if row is not None), method


@pytest.mark.quick
def test_commands_on_pages_name_scripts_that_exist():
    missing = []
    for page in pages():
        for line in page.read_text().splitlines():
            scripts = re.findall(r"python3? ((?:examples|tests|docs)/[\w/]+\.py)", line)
            missing += [f"{name(page)}: {script}" for script in scripts if not (ROOT / script).exists()]
    assert not missing


@pytest.fixture(scope="module")
def generate():
    return load(DOCS / "generate" / "examples.py")


@pytest.mark.quick
def test_every_example_has_a_page_and_runs_in_ci(generate):
    assert sorted(generate.NAMES) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    for example in generate.NAMES:
        assert (DOCS / "examples" / f"{example}.md").read_text() == generate.page(example)
    assert (ROOT / "examples" / "README.md").read_text() == generate.readme()
    assert (DOCS / "examples" / "index.md").read_text() == generate.index()
    assert "for example in examples/*.py" in (ROOT / ".ci" / "run").read_text()
