"""Makes one plausible mistake at a time in a copy of the project and prints which test notices it.

A chapter is run once, in its order and with the cells that `make test` runs. Before the cell
that a mutant changes, the process forks: the child runs the changed cell and those after it until
one fails, and the parent goes on unchanged. So each cell that stops a mutant is also run without it.
"""
import argparse
import ast
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nbformat
from book import NBS, ROOT, copy_project, directives, notebooks, settings, why_skipped
from mutant_list import MUTANTS

RESULTS = NBS/"runs"/"mutants.jsonl"

@dataclass(frozen=True)
class Mutant:
    "A mistake, as pairs of texts: what an exported cell holds, and what replaces it"
    name: str
    chapter: str
    what: str # in plain words
    changes: tuple[tuple[str, str], ...]


def all_mutants() -> list[Mutant]:
    return [Mutant(name, chapter, what, tuple(zip(texts[::2], texts[1::2])))
            for chapter, rows in MUTANTS.items() for name, what, *texts in rows]


def cells_of(chapter: str, root: Path = ROOT) -> list:
    return nbformat.read(root/"nbs"/f"{chapter}.ipynb", as_version=4).cells


def module_of(chapter: str, root: Path = ROOT) -> Path: return root/"gpt2_nb"/f"{chapter[3:]}.py"


def is_exported(cell) -> bool: return cell.cell_type == "code" and "export" in directives(cell.source)


def heading(cells: list, i: int) -> str:
    "The heading of the section that a cell is in"
    for cell in reversed(cells[:i]):
        found = re.findall(r"^#+ (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else []
        if found: return found[-1].strip()
    return ""


def complaints() -> list[str]:
    "Mutants that no longer fit: each text must occur exactly once in the chapter's exported cells"
    found, chapters = [], {p.stem: cells_of(p.stem) for p in notebooks()}
    mutants = all_mutants()
    for m in mutants:
        code = "\n".join(c.source for c in chapters[m.chapter] if is_exported(c))
        module = module_of(m.chapter).read_text(encoding="utf-8")
        for old, _ in m.changes:
            for where, text in ((m.chapter, code), (module_of(m.chapter).name, module)):
                if (n := text.count(old)) != 1:
                    found.append(f"mutant {m.name}: {old!r} occurs {n} times in {where}, "
                                 "expected once")
    names = [m.name for m in mutants]
    found += [f"two mutants are called {name}" for name in sorted(set(names)) if names.count(name) > 1]
    for chapter in chapters:
        few = sum(m.chapter == chapter for m in mutants) < 2
        if few and chapter != "index": found.append(f"{chapter} has fewer than two mutants")
    return found


def bare(source: str) -> str:
    "Code without comments and docstrings, so that better words don't make a result out of date"
    try: tree = ast.parse(re.sub(r"^\s*[!%].*$", "pass", source, flags=re.M))
    except SyntaxError: return source
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant): body.pop(0)
    return ast.dump(tree)


def fingerprint(m: Mutant) -> str: # 16 hexadecimal digits
    "A hash of a mutant and of the code of its chapter"
    sources = [bare(c.source) for c in cells_of(m.chapter) if c.cell_type == "code"]
    return hashlib.sha256(repr([m.changes, sources]).encode()).hexdigest()[:16]


# --- one chapter, in a process of its own ----------------------------------------------------------

class Chapter:
    "A chapter's cells in one IPython shell"
    def __init__(self, name: str, root: Path):
        from IPython.core.interactiveshell import InteractiveShell
        flags = set(settings("tst_flags"))
        self.cells = cells_of(name, root)
        self.run_these = [i for i, c in enumerate(self.cells)
                          if c.cell_type == "code" and not why_skipped(c.source, flags)]
        os.chdir(root/"nbs")
        self.shell = InteractiveShell.instance()
        self.shell.showtraceback = lambda *args, **kwargs: None
        self.shell.user_ns["__name__"] = "__main__"

    def run(self, i: int, source: str | None = None) -> dict | None: # None if the cell passes
        "Run cell i; what failed in it"
        source = self.cells[i].source if source is None else source
        result = self.shell.run_cell(source, store_history=False)
        error = result.error_in_exec or result.error_before_exec
        if error is None: return None
        lines, number = source.splitlines(), 1
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.name == "<module>" and frame.lineno <= len(lines): number = frame.lineno
        text = str(error).splitlines() or [""]
        return dict(line=lines[number - 1].strip(), error=f"{type(error).__name__}: {text[0]}"[:200])


def snapshot(folder: Path) -> dict: # path -> size and time
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            stat = path.stat()
            found[path] = stat.st_size, stat.st_mtime_ns
    return found


class Unchanged:
    "Within this block others may write into folders; afterwards these are as they were before"
    def __init__(self, folders: list[Path], backup: Path):
        self.folders, self.backup = folders, backup

    def __enter__(self):
        shutil.rmtree(self.backup, ignore_errors=True)
        self.before = []
        for i, folder in enumerate(self.folders):
            shutil.copytree(folder, self.backup/str(i), symlinks=True, ignore_dangling_symlinks=True)
            self.before.append((folder, snapshot(folder), set(folder.rglob("*"))))

    def __exit__(self, *_):
        for i, (folder, files, paths) in enumerate(self.before):
            for path in sorted(set(folder.rglob("*")) - paths, reverse=True):
                if path.is_dir() and not path.is_symlink(): shutil.rmtree(path, ignore_errors=True)
                else: path.unlink(missing_ok=True)
            now = snapshot(folder)
            for path in paths - set(folder.rglob("*")):
                if (self.backup/str(i)/path.relative_to(folder)).is_dir(): path.mkdir(parents=True)
            for path, stat in files.items():
                if now.get(path) != stat: shutil.copy2(self.backup/str(i)/path.relative_to(folder), path)


def changed(source: str, m: Mutant) -> str:
    for old, new in m.changes: source = source.replace(old, new)
    return source


def run_child(chapter: Chapter, start: int, m: Mutant | None, limit: float, report: Path) -> dict:
    "In a forked process, run cells from `start` on until one fails; what stopped it, or nothing"
    report.write_text("{}", encoding="utf-8")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for i in (i for i in chapter.run_these if i >= start):
            source = changed(chapter.cells[i].source, m) if m else chapter.cells[i].source
            if not m or not is_exported(chapter.cells[i]): source = chapter.cells[i].source
            report.write_text(json.dumps(dict(index=i, running=True)), encoding="utf-8")
            try: failed = chapter.run(i, source)
            except BaseException as e: failed = dict(line="", error=f"{type(e).__name__}: {e}"[:200])
            if failed:
                report.write_text(json.dumps(dict(index=i, **failed)), encoding="utf-8")
                break
        else: report.write_text("{}", encoding="utf-8")
        os._exit(0)

    end = time.time() + limit
    while time.time() < end:
        if os.waitpid(pid, os.WNOHANG)[0]: break
        time.sleep(0.05)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    found = json.loads(report.read_text(encoding="utf-8") or "{}")
    if found.pop("running", False): found |= dict(line="", error=f"not done after {limit:.0f} s")
    return found


def work(
    name: str, # the chapter
    root: Path, # of the copy of the project
    mutants: list[Mutant], # of the chapter
    limit: float, # seconds for each
    out: Path, # where results go, as lines of JSON
    mutated: Mutant | None, # one with which the chapter is run as a whole; the package has it already
    until: int, # run the unchanged chapter up to this cell, if it is not negative
):
    "Run one chapter with its mutants"
    tmp, backup, report = root.parent/"tmp", root.parent/"backup", root.parent/"report.json"
    tmp.mkdir(exist_ok=True)
    tempfile.tempdir = str(tmp)
    sink = open(os.devnull, "wb") # what the cells print
    keep = os.dup(1)
    os.dup2(sink.fileno(), 1)
    os.dup2(sink.fileno(), 2)
    chapter, last, caught = Chapter(name, root), -1, {}

    if mutated: # the package in `root` is that mutant's already
        own = mutated if mutated.chapter == name else None
        caught[mutated.name] = run_child(chapter, 0, own, limit, report)
    last, places = max(last, until), {}
    for m in mutants:
        texts = [old for old, _ in m.changes]
        own = [i for i, c in enumerate(chapter.cells)
               if is_exported(c) and any(text in c.source for text in texts)]
        places.setdefault(own[0], []).append(m)

    def write(values):
        with open(out, "a", encoding="utf-8") as f: f.write(json.dumps(values) + "\n")

    for i in chapter.run_these if mutants or until >= 0 else []:
        for m in places.get(i, []):
            module, start = module_of(name, root), time.time()
            source = module.read_text(encoding="utf-8")
            with Unchanged([tmp, root/"nbs"], backup):
                module.write_text(changed(source, m), encoding="utf-8")
                try: found = run_child(chapter, i, m, limit, report)
                finally: module.write_text(source, encoding="utf-8")
            cell = chapter.cells[found["index"]] if found else None
            section = heading(chapter.cells, found["index"]) if found else ""
            last = max(last, found.get("index", -1))
            write(dict(mutant=m.name, caught_in=name if found else "", cell=cell.id if found else "",
                       section=section, line=found.get("line", ""), error=found.get("error", ""),
                       seconds=round(time.time() - start, 1), index=found.get("index", -1)))
        later = any(place > i for place in places)
        if i > last and not later: break
        if failed := chapter.run(i): # the control
            write(dict(control=name, cell=chapter.cells[i].id, **failed))
            os._exit(3)

    if mutated:
        found = caught[mutated.name]
        if found and found["index"] >= 0:
            write(dict(mutant=mutated.name, caught_in=name, cell=chapter.cells[found["index"]].id,
                       section=heading(chapter.cells, found["index"]), **found))
    os.dup2(keep, 1)
    os._exit(0) # threads that a chapter left behind don't matter


def start_worker(name: str, mutants: list[str], limit: float, mutated="", until=-1) -> list[dict]:
    "Run a chapter in a copy of the project; the lines of its results"
    with tempfile.TemporaryDirectory() as t:
        root, out = Path(t)/ROOT.name, Path(t)/"out.jsonl"
        copy_project(root)
        if mutated:
            m = {m.name: m for m in all_mutants()}[mutated]
            module = module_of(m.chapter, root)
            module.write_text(changed(module.read_text(encoding="utf-8"), m), encoding="utf-8")
        env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
               "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(Path(t)/"tmp")}
        (Path(t)/"tmp").mkdir()
        words = [sys.executable, __file__, "--work", name, "--root", root, "--out", out,
                 "--limit", limit, "--names", ",".join(mutants), "--mutated", mutated, "--until", until]
        done = subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True)
        text = out.read_text(encoding="utf-8") if out.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        if done.returncode not in (0, 3):
            lines.append(dict(control=name, cell="", line="", error=done.stderr[-300:]))
        return lines


def passes_until(name: str, last: int, limit: float) -> bool:
    "Whether the unchanged chapter passes up to and with its cell `last`"
    return start_worker(name, [], limit, until=last) == []


# --- all of them -----------------------------------------------------------------------------------

def importers(chapter: str) -> list[str]:
    "Later chapters whose modules import this chapter's, the nearest first"
    module, found = chapter[3:], []
    for path in notebooks():
        if path.stem == "index" or path.stem <= chapter: continue
        if re.search(rf"^from \.{module} import", module_of(path.stem).read_text(encoding="utf-8"), re.M):
            found.append(path.stem)
    return found


class BrokenChapter(Exception): pass


def run_chapter(name: str, mutants: list[Mutant], limit: float, later_chapters: int) -> list[dict]:
    "The results of one chapter's mutants"
    versions = dict(python=platform.python_version(), torch=metadata.version("torch"))
    lines = start_worker(name, [m.name for m in mutants], limit)
    if broken := next((line for line in lines if "control" in line), None):
        raise BrokenChapter(f"{name} fails without any mutant, in cell {broken['cell']}: {broken['line']} "
                            f"{broken['error']}; its mutants are not judged")
    found = {line["mutant"]: line for line in lines}
    results = []
    for m in mutants:
        line = found[m.name]
        # from the top, for processes that the chapter started early have the unchanged package
        for other in [name, *importers(name)[:later_chapters]] if not line["caught_in"] else []:
            start = time.time()
            more = start_worker(other, [], limit, mutated=m.name)
            if any("control" in part for part in more): raise BrokenChapter(f"{other}: {more}")
            if more and not passes_until(other, more[0]["index"], limit):
                raise BrokenChapter(f"{other} fails without any mutant; its mutants are not judged")
            seconds = line["seconds"] + time.time() - start
            if more: line = line | more[0]
            line["seconds"] = round(seconds, 1)
            if more: break
        line.pop("index", None)
        results.append(dict(chapter=name, what=m.what, **line, hash=fingerprint(m), versions=versions))
    return results


def saved() -> dict: # name -> its line
    if not RESULTS.exists(): return {}
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    return {line["mutant"]: line for line in map(json.loads, lines)}


def save(new: list[dict]):
    "Put lines into the file, in the order of the mutants"
    known = saved() | {line["mutant"]: line for line in new}
    lines = [json.dumps(known[m.name], ensure_ascii=False) for m in all_mutants() if m.name in known]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(mutants: list[Mutant]) -> str:
    "In Markdown: each mistake, and the test that stops it"
    known, rows = saved(), ["| chapter | mistake | caught in | by |", "|---|---|---|---|"]
    for m in mutants:
        line = known.get(m.name)
        if line is None: where, by = "not run", ""
        elif not line["caught_in"]: where, by = "SURVIVED", ""
        else:
            chapter = "" if line["caught_in"] == m.chapter else f"{line['caught_in']}: "
            where = chapter + line["section"]
            test = line["line"] or line["error"]
            by = f"{line['cell']}: `{test[:70].replace('|', chr(92) + '|')}`"
        rows.append(f"| {m.chapter} | {m.what} | {where} | {by} |")
    return "\n".join(rows)


def summary(mutants: list[Mutant]) -> str:
    "One sentence on the saved results, for the README"
    lines = [line for m in mutants if (line := saved().get(m.name))]
    caught = [line for line in lines if line["caught_in"]]
    own = sum(line["caught_in"] == line["chapter"] for line in caught)
    torch = ", ".join(sorted({line["versions"]["torch"] for line in lines}))
    return (f"{len(caught)} of {len(mutants)} mistakes are caught, {own} of them by a test in the chapter "
            f"where they were made (torch {torch}).")


def check_mutants() -> list[str]:
    "The mutants fit the chapters, and the saved results have all of them, caught"
    known = saved()
    missing = [m.name for m in all_mutants() if m.name not in known]
    alive = [name for name, line in known.items() if not line["caught_in"]]
    found = complaints() + [f"mutant {name} survives" for name in alive]
    return found + [f"mutant {name} has no result: make mutants" for name in missing]


def main():
    parser = argparse.ArgumentParser(prog="mutants.py", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the mutants, and run none")
    parser.add_argument("--table", action="store_true", help="print the saved results, and run none")
    parser.add_argument("--only", default="", help="names of mutants, with commas between them")
    parser.add_argument("--chapter", default="", help="chapters, such as 02_attention,03_model")
    parser.add_argument("--again", action="store_true", help="also run mutants whose results are up to date")
    parser.add_argument("--jobs", type=int, default=1, help="chapters that run at the same time")
    parser.add_argument("--later", type=int, default=2, help="chapters to try if a mutant survives its own")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a mutant may take")
    parser.add_argument("--until", type=int, default=-1, help=argparse.SUPPRESS)
    for name in ("work", "root", "out", "names", "mutated"): # of a process that runs one chapter
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    mutants = all_mutants()
    if args.work:
        by_name = {m.name: m for m in mutants}
        named = [by_name[n] for n in args.names.split(",") if n]
        return work(args.work, Path(args.root), named, args.limit, Path(args.out),
                    by_name.get(args.mutated), args.until)

    if args.only: mutants = [m for m in mutants if m.name in args.only.split(",")]
    if args.chapter: mutants = [m for m in mutants if m.chapter in args.chapter.split(",")]
    if not mutants: sys.exit("there is no such mutant: --list prints them")
    if args.list:
        for m in mutants: print(f"{m.chapter:14}  {m.name:20}  {m.what}")
        return
    if args.table: return print(f"{summary(mutants)}\n\n{table(mutants)}")
    if os.name == "nt": sys.exit("mutants.py forks, and Windows has no fork: run it in WSL")
    if found := complaints(): sys.exit("\n".join(found))

    known = saved()
    settled = {name for name, line in known.items() if line["caught_in"]}
    due = [m for m in mutants if args.again or m.name not in settled
           or known[m.name]["hash"] != fingerprint(m)]
    chapters, broken = {}, []
    for m in due: chapters.setdefault(m.chapter, []).append(m)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_chapter, name, group, args.limit, args.later)
                for name, group in chapters.items()]
        for job in jobs:
            try: lines = job.result()
            except BrokenChapter as e:
                broken.append(str(e))
                print(e, flush=True)
                continue
            save(lines)
            for line in lines:
                by = f"{line['caught_in']}, cell {line['cell']}" if line["caught_in"] else "SURVIVED"
                seconds = f"{line['seconds']:6.1f} s"
                print(f"{line['mutant']:20} {by:36} {seconds}  {line['line'][:80]}", flush=True)

    known = saved()
    alive = [m.name for m in mutants if not known.get(m.name, {}).get("caught_in")]
    print(f"\n{table(mutants)}\n\n{summary(mutants)}")
    if broken or alive: sys.exit("\n".join(broken + [f"not caught: {', '.join(alive)}"]))


if __name__ == "__main__": main()
