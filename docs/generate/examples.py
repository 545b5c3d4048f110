"""The pages of docs/examples: runs the examples and keeps what they print and draw.

    python docs/generate/examples.py two_moons tabular    # run these, then write every page
    python docs/generate/examples.py --all                # run every example: about an hour on 2 CPU cores
    python docs/generate/examples.py                      # only write the pages anew, and examples/README.md

Needs `pip install -e ".[examples,train]"`. A run leaves `docs/examples/NAME.txt`, what it printed and how long it took,
and its picture, `NAME.png`; a page puts them together with the example's own docstring and source.
"""

import argparse
import ast
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = ROOT / "docs" / "examples"
# In the order of the navigation: what it is an example of, then the example.
TOPICS = {
    "From another library": ("from_diffrax", "from_diffusers"),
    "Training and sampling": ("two_moons", "digits", "tabular", "posterior"),
    "Guidance, latents, measurements": ("digits_guided", "latent_digits", "inverse", "repa_digits"),
    "Few steps": ("meanflow_digits", "distill_digits"),
    "Many devices": ("train_sharded", "multihost"),
}
NAMES = [name for names in TOPICS.values() for name in names]
OUTPUT, PICTURE, TOOK = "{}.txt", "{}.png", re.compile(r"^\[(.*) of processor time\]$", re.MULTILINE)


def run(name: str) -> None:
    """Run an example at full size, and keep what it prints, its processor time and its picture."""
    out = ROOT / "outputs" / name
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    # Of the machine only what the reader has as well; in the place of its clock the time of its processor.
    lines = finished.stdout.replace(f"{ROOT}/", "").splitlines()
    printed = "\n".join(line.rstrip() for line in lines if not line.startswith(("total ", "seconds: ")))
    (PAGES / OUTPUT.format(name)).write_text(f"{printed.strip()}\n\n[{seconds:.0f} s of processor time]\n")
    for picture in sorted(out.glob("*.png")):
        shutil.copy(picture, PAGES / PICTURE.format(name))


def docstring(name: str) -> tuple[str, str]:
    """The title and the text of an example, without the numbers to expect: the page has those of a run."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) or ""
    title, *paragraphs = text.split("\n\n")
    kept, expected = [], False
    for paragraph in paragraphs:
        if expected and paragraph.startswith("    "):
            expected = False
            continue
        without = re.sub(r"\s*\bExpect\b[^.]*:\Z", "", paragraph)
        expected = without != paragraph
        kept.append(without)
    return title.rstrip("."), "\n\n".join(paragraph for paragraph in kept if paragraph)


def page(name: str) -> str:
    """An example's page."""
    title, text = docstring(name)
    title = title.split(":")[0] if len(title) > 60 else title
    parts = [f"# {title}", text]
    if (PAGES / PICTURE.format(name)).exists():
        parts.append(f"![What examples/{name}.py draws]({PICTURE.format(name)})")
    heading = "It prints, on 2 CPU cores that did other work too (so times of the clock in it are too long):"
    parts.append(f'{heading}\n\n```text\n--8<-- "docs/examples/{OUTPUT.format(name)}"\n```')
    parts.append(f'## examples/{name}.py\n\n```python\n--8<-- "examples/{name}.py"\n```')
    return "\n\n".join(parts) + "\n"


def took(name: str) -> str:
    """How long a run took, of processor time."""
    found = TOOK.search((PAGES / OUTPUT.format(name)).read_text())
    assert found is not None, f"docs/examples/{name}.txt says no time: run this script with {name}"
    seconds = int(found[1].split()[0])
    return f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def overview(row: Callable[[str, str, str], str]) -> str:
    """All examples: `row` makes a line from a name, what it shows and how long it takes."""
    lines = [
        "# Examples",
        "",
        "Each is one script that prints its numbers, with those to expect in its docstring; most write a picture to",
        "`outputs/`. `--smoke` makes everything tiny. Data come with scikit-learn or are drawn: nothing is downloaded.",
        "Times are of the processor, all cores together, compilation included. What each printed and drew stands on",
        "its page, made by `python docs/generate/examples.py --all`.",
        "",
        "```bash",
        'pip install -e ".[examples,train]"',
        "python examples/digits.py",
        "```",
    ]
    for topic, names in TOPICS.items():
        lines += ["", f"## {topic}", "", "| | what it shows | time |", "|---|---|---|"]
        lines += [row(name, " ".join(docstring(name)[0].split()), took(name)) for name in names]
    return "\n".join(lines) + "\n"


def readme() -> str:
    """examples/README.md."""
    return overview(
        lambda name, shown, time: f"| [{name}.py]({name}.py) | {shown}: [page](../docs/examples/{name}.md) | {time} |"
    )


def index() -> str:
    """docs/examples/index.md."""
    return overview(lambda name, shown, time: f"| [{name}.py]({name}.md) | {shown} | {time} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run examples and write their pages.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="examples to run")
    parser.add_argument("--all", action="store_true", help="run every example")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no example is called {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    for name in NAMES if options.all else options.names:
        print(f"examples/{name}.py", flush=True)
        run(name)
    for name in NAMES:
        (PAGES / f"{name}.md").write_text(page(name))
    (EXAMPLES / "README.md").write_text(readme())
    (PAGES / "index.md").write_text(index())


if __name__ == "__main__":
    main()
