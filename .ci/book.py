"Keeps the book whole: `check` its notebooks, package and README, `run` the notebooks, write the `readme`."
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
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT/"nbs", ROOT/"gpt2_nb"
PARTS = ["nbs", "gpt2_nb", "settings.ini", "setup.py", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE"]


def notebooks() -> list[Path]:
    return sorted(p for p in NBS.glob("*.ipynb") if not p.name.startswith((".", "_")))


def directives(source: str) -> dict:
    "The `#| name: value` lines at the top of a cell"
    return dict(re.findall(r"^#\|\s*([\w-]+):?\s*(.*)$", source, re.M))


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
        if c.cell_type == "code": c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
    nb.metadata["language_info"] = {"name": "python"} # the colours of its code
    body, resources = MarkdownExporter().from_notebook_node(nb, resources={"output_files_dir": "images", "unique_key": "index"})
    images = root/"nbs"/"images"
    for old in images.glob("index_*"): old.unlink()
    for name, data in resources.get("outputs", {}).items():
        images.mkdir(exist_ok=True)
        (images/Path(name).name).write_bytes(data)
    body = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", body) # links in the notebook are relative to nbs/
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    (root/"README.md").write_text(body, encoding="utf-8")


# --- running ------------------------------------------------------------------------------------------------------

def run_notebook(path: Path):
    "Run a notebook from top to bottom with Jupyter's kernel and save its outputs"
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **kw):
            if cell.cell_type == "code" and skipped(cell.source): return cell
            return await super().async_execute_cell(cell, cell_index, **kw)

    nb = nbformat.read(path, as_version=4)
    start = time.time()
    Client(nb, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(nb, path)
    subprocess.run(["nbdev_clean", "--fname", str(path)], check=True, cwd=ROOT)
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
        copy.mkdir()
        for part in PARTS:
            if (ROOT/part).is_dir(): shutil.copytree(ROOT/part, copy/part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs"))
            else: shutil.copy(ROOT/part, copy/part)
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


SHOWS = re.compile(r"(?<![\w.])(print|display|plt\.show|show_\w+)\s*\(|\.(plot|imshow|bar|barh|scatter|hist|matshow)\(")


def should_show(source: str) -> bool:
    "Whether a cell, when run, leaves something to see"
    try: body = ast.parse(re.sub(r"^[!%].*$", "pass", source, flags=re.M)).body
    except SyntaxError: return False
    if not body: return False
    for node in (n for part in body for n in ast.walk(part)): # a program in a string shows nothing
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


def check_bare_install():
    "In a new environment, `pip install .` alone must be enough to import every module"
    with tempfile.TemporaryDirectory() as t:
        copy, env = Path(t)/"source", Path(t)/"env"
        copy.mkdir()
        for part in PARTS:
            if (ROOT/part).is_dir(): shutil.copytree(ROOT/part, copy/part, ignore=shutil.ignore_patterns("__pycache__"))
            else: shutil.copy(ROOT/part, copy/part)
        modules = [f"gpt2_nb.{p.stem}" for p in sorted(LIB.glob("*.py")) if p.stem not in ("__init__", "_modidx")]
        python = env/("Scripts" if os.name == "nt" else "bin")/"python"
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        for command in ([sys.executable, "-m", "venv", env], [python, "-m", "pip", "install", "-q", "-c", copy/"constraints.txt", copy],
                        [python, "-c", f"import {', '.join(modules)}"], [env/python.parent.name/"gpt2_train", "--help"]):
            done = subprocess.run([str(c) for c in command], cwd=t, env=clean, capture_output=True, text=True)
            if done.returncode: return [f"{Path(command[0]).name} {command[1]}: {done.stderr.strip()[-800:]}"]
    return []


def check_notebooks() -> tuple[int, int]:
    "`nbdev_test`; returns how many notebooks were run to their end without an error, and how many were not"
    env = {**os.environ, "OMP_NUM_THREADS": "1"} # two workers share the cores
    start, ran, failed, in_list = time.time(), set(), set(), False
    with subprocess.Popen(["nbdev_test", "--do_print", "--timing"], cwd=ROOT, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            print("   ", line, end="", flush=True)
            if done := re.match(r"- Completed .*?([\w-]+\.ipynb)", line): ran.add(done[1])
            in_list = in_list or "Tests Failed On" in line
            if in_list and (name := re.match(r"\s+([\w-]+\.ipynb)\s*$", line)): failed.add(name[1])
    names = {p.name for p in notebooks()}
    if process.returncode and not failed: failed = names # it broke before it could say which
    failed |= names - ran
    print(f"    nbdev_test took {time.time() - start:.0f} s")
    return len(ran - failed), len(failed)


def check() -> int:
    checks = {"nbdev_export leaves no difference": check_export, "nbdev_clean leaves no difference": check_clean,
              "README.md is nbs/index.ipynb": check_readme, "outputs are there and clean": check_outputs,
              "modules import from lower numbers only": check_imports, "a bare install imports every module": check_bare_install}
    broken = []
    for name, f in checks.items():
        if complaints := f(): broken.append(name)
        print(f"{'FAIL' if complaints else 'ok  '} {name}", *(f"     {c}" for c in complaints), sep="\n", flush=True)
    print("     nbdev_test", flush=True)
    passed, failed = check_notebooks()
    if broken: print(f"checks that failed: {'; '.join(broken)}")
    print(f"{passed} passed, {failed} failed")
    return 1 if broken or failed or not passed else 0


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "check": sys.exit(check())
    elif what == "readme": write_readme()
    elif what == "run":
        for path in [Path(p).resolve() for p in sys.argv[2:]] or notebooks(): run_notebook(path)
    else: sys.exit(f"usage: {Path(sys.argv[0]).name} check | readme | run [NOTEBOOK ...]")
