"""Collapsed cells of the chapters: what JupyterLab reads and what the site reads must agree."""
import argparse
import ast
import re
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parent.parent/"nbs"

# What JupyterLab reads under `jupyter`, and the tag that the site reads.
TAGS = {"source_hidden": "hide-input", "outputs_hidden": "hide-output"}


def hidden(cell, name: str) -> bool:
    "Whether JupyterLab collapses the source (`source_hidden`) or the outputs (`outputs_hidden`) of a cell"
    return bool(cell.metadata.get("jupyter", {}).get(name))


def tagged(cell, name: str) -> bool:
    "Whether the site collapses the same part of a cell"
    return TAGS[name] in cell.metadata.get("tags", [])


def collapse(cell, outputs: bool = False):
    "Collapse the source of a code cell, and its outputs if asked, in JupyterLab and on the site"
    names = ["source_hidden", *(["outputs_hidden"] if outputs else [])]
    for name in names:
        cell.metadata.setdefault("jupyter", {})[name] = True
        tags = cell.metadata.setdefault("tags", [])
        if TAGS[name] not in tags: tags.append(TAGS[name])


def answers(cells) -> list:
    "The code cells that belong to answers: those between an answer and the next markdown cell without one"
    found, answering = [], False
    for cell in cells:
        if cell.cell_type == "code" and answering: found.append(cell)
        if cell.cell_type == "markdown": answering = bool(re.search(r"<summary>\s*Answer", cell.source))
    return found


def is_set_up(cell) -> bool:
    "Whether a code cell names the module or does nothing but import"
    if cell.cell_type != "code": return False
    if cell.source.startswith("#| default_exp"): return True
    try: body = ast.parse(re.sub(r"^[!%].*$", "pass", cell.source, flags=re.M)).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def mend(cells):
    "Collapse on both sides what is collapsed on one, and set-up, and every answer with its outputs"
    for cell in cells:
        if cell.cell_type != "code": continue
        wanted = {name: hidden(cell, name) or tagged(cell, name) for name in TAGS}
        if any(wanted.values()) or is_set_up(cell): collapse(cell, outputs=wanted["outputs_hidden"])
    for cell in answers(cells): collapse(cell, outputs=bool(cell.outputs))


def check_collapsed() -> list[str]:
    "Code cells that JupyterLab and the site do not collapse alike, and answers that are not collapsed"
    found = []
    for path in sorted(NBS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        solutions = {cell.id for cell in answers(cells)}
        for cell in cells:
            if cell.cell_type != "code": continue
            where = f"{path.name}, cell {cell.id}"
            for name, tag in TAGS.items():
                in_lab, on_site = hidden(cell, name), tagged(cell, name)
                if in_lab and not on_site: found.append(f"{where} has {name} and no tag {tag}")
                if on_site and not in_lab: found.append(f"{where} has the tag {tag} and no {name}")
            if hidden(cell, "outputs_hidden") and not hidden(cell, "source_hidden"):
                found.append(f"{where} hides its outputs and shows its source")
            if is_set_up(cell) and not hidden(cell, "source_hidden"):
                found.append(f"{where} is set-up and is not collapsed")
            if cell.id in solutions:
                if not hidden(cell, "source_hidden"):
                    found.append(f"{where} is an answer and is not collapsed")
                elif cell.outputs and not hidden(cell, "outputs_hidden"):
                    found.append(f"{where} is an answer and shows its outputs")
    return found


def write(path: Path):
    book = nbformat.read(path, as_version=4)
    before = nbformat.writes(book)
    mend(book.cells)
    if nbformat.writes(book) != before: nbformat.write(book, path)


def main():
    parser = argparse.ArgumentParser(prog="collapsed.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="mend the notebooks")
    if parser.parse_args().write:
        for path in sorted(NBS.glob("*.ipynb")): write(path)
    sys.exit("\n".join(check_collapsed()) or None)


if __name__ == "__main__":
    main()
