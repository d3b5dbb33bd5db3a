"""Measures how the book reads: a table of its notebooks and one of its modules, and what exceeds the limits of the house style."""
import argparse
import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import nbformat

from book import ROOT, directives, notebooks

MODULE_LINES = 300 # of code: without blank lines, comment lines and the list of names that nbdev writes
WIDEST = 110 # columns, of any line
WIDE = 100 # at most WIDE_SHARE of a notebook's lines may be longer
WIDE_SHARE = 0.02
MEDIAN_CELL = 5 # lines

# Modules that may be longer, with the reason.
LONGER = {"finetune": "two halves, examples made into windows and the run on them, which share their configuration",
          "checkpoint": "the files, what is saved, and the thread that saves it; each part is used by the next only",
          "generate": "choosing a token, the window, plain and recorded steps, and the command",
          "shards": "files of ids, their manifest, and checked copies of both from an object store",
          "documents": "readers, and sources by stream, by file and by part; each is a few lines on the one before",
          "fineweb": "documents to shards on one machine and on many, ready-made shards, and their command",
          "doctor": "fifteen independent checks with their limits, and a table of published losses",
          "plan": "memory, speed, communication, cost, loss and the report: one page of output, each part a formula",
          "core": "some 35 independent small tools; the longest function has 15 lines",
          "distributed": "many functions of a few lines around one call of PyTorch, and `Ranks` for the notebooks",
          "ladder": "rungs, what measures them, their record and picture, peers and the command; each uses the last",
          "hellaswag": "trees, scores and the command of one evaluation; each part is used by the next only",
          "recipe": "every flag of the trainer is a line of it",
          "train": "opening a run, its loop and its command: what the chapter is about is their order"}

# Two books with the rhythm that we look for; counted in their repositories in November 2026.
PEERS = {"miniai": "median cell 2 lines; at most 1% of lines over 100 columns",
         "LLMs-from-scratch": "at most 1% of lines over 100 columns; 17-20% blank; 11-27% with a comment"}


def code_cells(path: Path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def source_lines(source: str) -> list[str]:
    "The lines of a cell without its directives"
    return [line for line in source.splitlines() if not line.startswith("#|")]


def share(part: int, total: int) -> float:
    return part / total if total else 0.0


def is_visible(cell) -> bool:
    "Whether a reader of the notebook sees the cell, and a test runs it"
    d = directives(cell.source)
    collapsed = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    return not collapsed and "hide" not in d and d.get("eval") != "false"


def exports(cell) -> bool:
    return bool({"export", "exporti", "exports"} & directives(cell.source).keys())


def defined(source: str) -> list[str]:
    "Public functions and classes that a cell defines"
    body = ast.parse(source).body
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")]


def untested(cells: list) -> list[str]:
    "Exported definitions that no visible cell uses before the next export"
    found = []
    for i, cell in enumerate(cells):
        if not exports(cell): continue
        after = []
        for later in cells[i + 1:]:
            if exports(later): break
            if is_visible(later): after.append(later.source)
        text = "\n".join(after)
        found += [name for name in defined(cell.source) if not re.search(rf"\b{name}\b", text)]
    return found


def has_picture(cell) -> bool:
    return any("image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {}) for o in cell.outputs)


def is_drawing(cell) -> bool:
    "Whether a picture shows an idea rather than data: it has no axes"
    return has_picture(cell) and bool(re.search(r"""Drawing\(|axis\(["']off["']\)|set_axis_off""", cell.source))


@dataclass
class Notebook:
    name: str
    cells: int
    markdown: int
    median_cell: float # lines of a code cell
    longest_cell: int
    lines: int
    over: dict # columns -> lines that are longer
    blank: float # share of lines
    plots: int
    drawings: int
    exported: int
    untested: list[str]
    exercises: int
    seconds: float | None # of the last run of its tests on this machine

    def row(self) -> list:
        wide = [f"{100 * share(self.over[c], self.lines):.1f}" for c in (90, 100)]
        time = f"{self.seconds:.0f}" if self.seconds is not None else "-"
        return [self.name, self.cells, self.markdown, f"{self.median_cell:g}", self.longest_cell, self.lines, *wide,
                self.over[WIDEST], f"{100 * self.blank:.0f}", self.plots, self.drawings, self.exported,
                len(self.untested), self.exercises, time]


def read_seconds(root: Path) -> dict:
    "What each notebook took in the last `make test`, `make slow` or `make notebooks`"
    file = root/"runs"/"seconds.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def measure_notebook(path: Path, seconds: dict) -> Notebook:
    cells = nbformat.read(path, as_version=4).cells
    code = [c for c in cells if c.cell_type == "code"]
    sizes = [len([line for line in source_lines(c.source) if line.strip()]) for c in code]
    lines = [line for c in code for line in source_lines(c.source)]
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    _, _, exercises = text.partition("## Exercises")
    return Notebook(
        name=path.stem,
        cells=len(cells),
        markdown=len(cells) - len(code),
        median_cell=median(sizes) if sizes else 0,
        longest_cell=max(sizes, default=0),
        lines=len(lines),
        over={columns: sum(len(line) > columns for line in lines) for columns in (90, WIDE, WIDEST)},
        blank=share(sum(not line.strip() for line in lines), len(lines)),
        plots=sum(has_picture(c) and not is_drawing(c) for c in code),
        drawings=sum(is_drawing(c) for c in code),
        exported=sum(len(defined(c.source)) for c in code if exports(c)),
        untested=untested(code),
        exercises=len(re.findall(r"^\d+\. ", exercises.partition("<details>")[0], re.M)),
        seconds=seconds.get(path.stem))


@dataclass
class Module:
    name: str
    code: int # lines that are neither blank nor a comment
    lines: int # all lines but those that nbdev writes
    over: dict
    blank: float
    comments: float # share of lines with a comment, at their end or alone
    longest: int # lines of the longest function
    where: str # its name

    def row(self) -> list:
        wide = [f"{100 * share(self.over[c], self.lines):.1f}" for c in (90, 100)]
        return [self.name, self.code, *wide, self.over[WIDEST], f"{100 * self.blank:.0f}", f"{100 * self.comments:.0f}",
                self.longest, self.where]


def without_header(source: str) -> str:
    "A module without what nbdev writes into it: notes, the list of names, the docstring of one line"
    source = re.sub(r'\A""".*"""\n', "", source)
    source = re.sub(r"^__all__ = \[.*?\]\n", "", source, flags=re.M | re.S)
    return re.sub(r"^# (%%|AUTOGENERATED).*\n", "", source, flags=re.M)


def longest_function(source: str) -> tuple[int, str]:
    "Lines of code in the longest function, and its name"
    found = [(0, "-")]
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef): continue
        body = lines[node.body[0].lineno - 1:node.end_lineno]
        found.append((sum(bool(line.strip()) for line in body), node.name))
    return max(found)


def measure_module(path: Path) -> Module:
    source = without_header(path.read_text(encoding="utf-8"))
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    longest, where = longest_function(source)
    return Module(
        name=path.stem,
        code=sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines),
        lines=len(lines),
        over={columns: sum(len(line) > columns for line in lines) for columns in (90, WIDE, WIDEST)},
        blank=share(sum(not line.strip() for line in lines), len(lines)),
        comments=share(len(commented), len(lines)),
        longest=longest,
        where=where)


def modules(root: Path) -> list[Path]:
    return [p for p in sorted((root/"gpt2_nb").glob("*.py")) if p.stem not in ("__init__", "_modidx")]


def upward_imports(path: Path, order: dict) -> list[str]:
    "What a notebook imports from a chapter that comes after it"
    found = []
    for i, cell in enumerate(code_cells(path)):
        try: tree = ast.parse(re.sub(r"^[!%].*$", "pass", cell.source, flags=re.M))
        except SyntaxError: continue # a cell may show code that cannot run
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("gpt2_nb."): continue
            other = node.module.partition(".")[2]
            if order.get(other, 99) > order[path.stem[3:]]: found.append(f"{path.name} imports {node.module}")
    return found


def complaints(root: Path = ROOT) -> list[str]:
    "What exceeds a limit of the house style"
    bad = []
    paths = [p for p in notebooks(root) if p.stem != "index"]
    order = {p.stem[3:]: int(p.stem[:2]) for p in paths}
    for path in paths:
        nb = measure_notebook(path, {})
        if nb.over[WIDEST]: bad.append(f"{path.name}: {nb.over[WIDEST]} lines over {WIDEST} columns")
        if share(nb.over[WIDE], nb.lines) > WIDE_SHARE:
            bad.append(f"{path.name}: {100 * share(nb.over[WIDE], nb.lines):.1f}% of lines over {WIDE} columns")
        if nb.median_cell > MEDIAN_CELL: bad.append(f"{path.name}: the median cell has {nb.median_cell:g} lines")
        if nb.untested: bad.append(f"{path.name}: no visible test before the next export: {', '.join(nb.untested)}")
        bad += upward_imports(path, order)
    for path in modules(root):
        m = measure_module(path)
        if m.code > MODULE_LINES and m.name not in LONGER: bad.append(f"{path.name}: {m.code} lines of code")
        if m.over[WIDEST]: bad.append(f"{path.name}: {m.over[WIDEST]} lines over {WIDEST} columns")
    return bad


def show_table(titles: list[str], rows: list[list]):
    "Print rows below their titles, words to the left and numbers to the right"
    rows = [[str(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))))


def main():
    parser = argparse.ArgumentParser(prog="stats.py", description=__doc__)
    parser.add_argument("notebooks", nargs="*", help="such as 02_attention; default all")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args()

    paths = [p for p in notebooks(args.root) if not args.notebooks or p.stem in args.notebooks]
    seconds = read_seconds(args.root)
    print("code of the notebooks; columns are in % of lines, but for the last, which counts lines\n")
    show_table(["notebook", "cells", "text", "median", "longest", "lines", ">90", ">100", f">{WIDEST}", "blank%", "plots",
                "drawings", "exported", "untested", "exercises", "seconds"],
               [measure_notebook(p, seconds).row() for p in paths])

    names = [p.stem[3:] for p in paths]
    print("\nmodules\n")
    show_table(["module", "code", ">90", ">100", f">{WIDEST}", "blank%", "comments%", "longest", "function"],
               [measure_module(p).row() for p in modules(args.root) if p.stem in names])

    print("\nfor comparison")
    for name, text in PEERS.items(): print(f"  {name}: {text}")
    bad = [c for c in complaints(args.root) if not args.notebooks or any(n[3:] in c for n in args.notebooks)]
    print(f"\n{len(bad)} findings over the limits", *bad, sep="\n  ")


if __name__ == "__main__": main()
