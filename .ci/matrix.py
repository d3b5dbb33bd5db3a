"""Runs the notebooks that contain numbers under other instruction sets, flags, threads, hash seeds and orders, and all
notebooks under other versions of Python and torch; prints a table. Each row is a run in a copy of the project."""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path

import nbformat

from book import ROOT, copy_project, directives, notebooks, settings

RESULTS = ROOT/"runs"/"matrix"
OLDEST_TORCH, NEWEST_TORCH = "2.11.0", "2.14.1" # the ends of what settings.ini allows
OTHERS = [("3.10", OLDEST_TORCH), ("3.13", "2.13.0"), ("3.12", NEWEST_TORCH)] # Python, torch

FACTORS = {"isa": ["avx512", "avx2", "default"], "bf16": ["1", "0"], "threads": ["1", "2"], "seed": ["0", "1"],
           "order": ["sorted", "reversed"]}
# ATen, oneDNN and MKL each choose their kernels by themselves, and most matrix products in fp32 are MKL's
ISAS = {"avx512": ("avx512", "DEFAULT", "AVX512"),
        "avx2": ("avx2", "AVX2", "AVX2"),
        "default": ("default", "SSE41", "SSE4_2")}
LEVELS = ["DEFAULT", "AVX2", "AVX512"] # as torch.backends.cpu.get_cpu_capability names them

AUTO = '"bfloat16" if device.type == "cuda" and has_fast_bf16(device) else "float32"' # what pick_dtype does
PROBE = """
import json, os, platform, torch
from gpt2_nb import core
cpu = torch.device("cpu")
print(json.dumps(dict(isa=torch.backends.cpu.get_cpu_capability().lower(), threads=str(torch.get_num_threads()),
    bf16=str(int(core.has_fast_bf16(cpu))), auto=str(core.pick_dtype(cpu)), seed=os.environ.get("PYTHONHASHSEED", ""),
    python=platform.python_version(), torch=torch.__version__, package=core.__file__)))
"""


RUNNING = set() # leaders of the groups of processes that were started and have not ended


@dataclass(frozen=True)
class Row:
    number: int
    factors: dict = field(default_factory=dict) # values of FACTORS; none where the row is of something else
    python: str = "" # 3.12 for example; empty for the Python that runs this
    torch: str = ""
    auto_bf16: bool = False # pick_dtype's auto yields bf16 on the CPU, as it does on a GPU

    def describe(self) -> str:
        if self.auto_bf16: return "auto means bf16"
        if self.python: return f"python {self.python}, torch {self.torch}"
        f = self.factors
        threads = f"{f['threads']} thread{'s' * (f['threads'] != '1')}"
        return f"{f['isa']}, bf16 {f['bf16']}, {threads}, hash seed {f['seed']}, {f['order']}"


# --- rows ---------------------------------------------------------------------------------------------------------

def pairwise(factors: dict, size: int = 2) -> list[dict]:
    "Few rows in which each `size` values of different factors meet: again and again the row with most that is new"
    every = [dict(zip(factors, values)) for values in product(*factors.values())]
    def groups(row): return set(combinations(row.items(), size))
    missing, chosen = set().union(*map(groups, every)), []
    while missing:
        best = max(every, key=lambda row: len(groups(row) & missing)) # the first of equals, so always the same rows
        chosen.append(best)
        missing -= groups(best)
    return chosen


def all_rows() -> list[Row]:
    "Every pair of settings, then bf16 where `auto` is asked for, then the other Pythons"
    rows = [dict(factors=factors) for factors in pairwise(FACTORS)]
    rows.append(dict(auto_bf16=True))
    rows += [dict(python=python, torch=torch) for python, torch in OTHERS]
    return [Row(n, **row) for n, row in enumerate(rows, 1)]


def quick_rows(rows: list[Row]) -> list[Row]:
    "As few rows as have every value once, and the row of bf16"
    values = sum(len(v) for v in FACTORS.values())
    mixed = [row for row in rows if row.factors]
    for size in range(1, len(mixed) + 1):
        for some in combinations(mixed, size):
            if len(set().union(*(row.factors.items() for row in some))) == values:
                return [*some, *(row for row in rows if row.auto_bf16)]


def has_numbers(path: Path) -> bool:
    "Whether a notebook tests numbers of torch: some cell that is not exported both names torch and tests something"
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    own = [source for source in cells if "export" not in directives(source)]
    return any(re.search(r"\btorch\b", s) and re.search(r"^\s*assert\b|\btest_\w+\(", s, re.M) for s in own)


def notebooks_of(row: Row) -> list[str]:
    "All for another Python; else those with numbers, and for the row of bf16 not the chapter whose subject `auto` is"
    if row.python: return [p.stem for p in notebooks()]
    return [p.stem for p in notebooks() if has_numbers(p) and not (row.auto_bf16 and p.stem == "00_core")]


# --- environments -------------------------------------------------------------------------------------------------

def interpreter(version: str) -> str:
    "Python `version`, of pyenv or on the PATH; empty where there is none"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home()/".pyenv"))/"versions"
    found = [p/"bin"/"python" for p in pyenv.glob(f"{version}.*") if re.fullmatch(r"[\d.]+", p.name)]
    found.sort(key=lambda p: int(p.parent.parent.name.split(".")[2]), reverse=True)
    for python in [*found, shutil.which(f"python{version}")]:
        if not python: continue
        ask = [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"] # a shim of pyenv may lead nowhere
        if subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version: return str(python)
    return ""


def environment(row: Row, folder: Path) -> str:
    "The Python that runs a row, installed if it is missing; empty where this machine has no such Python"
    if not row.python: return sys.executable
    env = folder.absolute()/f"py{row.python}-torch{row.torch}"
    python, stamp = env/"bin"/"python", env/".installed"
    words = settings("requirements") + settings("dev_requirements")
    if stamp.exists() and stamp.read_text(encoding="utf-8") in ("", " ".join(words)): return str(python)
    base = interpreter(row.python)
    if not base: return ""

    print(f"     installing {env.name}", flush=True)
    env.mkdir(parents=True, exist_ok=True)
    pins = (ROOT/"constraints.txt").read_text(encoding="utf-8")
    limits = env/"constraints.txt"
    limits.write_text(re.sub(r"^torch==.*$", f"torch=={row.torch}", pins, flags=re.M), encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(limits)]
    for command in ([base, "-m", "venv", str(env)], [*install, "torch"], [*install, *words]):
        subprocess.run(command, check=True) # the project itself is found by PYTHONPATH
    stamp.write_text(" ".join(words), encoding="utf-8")
    return str(python)


def variables(row: Row, project: Path, python: str) -> dict:
    "What the processes of a row find in their environment"
    ours = r"ATEN_|ONEDNN_|DNNL_|MKL_|OMP_|PYTHON|GPT2_NB_FAST|CUDA_VISIBLE|VIRTUAL_ENV"
    env = {k: v for k, v in os.environ.items() if not re.match(ours, k)}
    env |= {"PYTHONPATH": str(project), "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": f"{Path(python).parent}{os.pathsep}{env['PATH']}", "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(project.parent), # what notebooks leave goes with the row
            "OMP_NUM_THREADS": row.factors.get("threads", "1")}
    if not row.factors: return env
    aten, onednn, mkl = ISAS[row.factors["isa"]]
    return env | {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl,
                  "GPT2_NB_FAST_BF16": row.factors["bf16"], "PYTHONHASHSEED": row.factors["seed"]}


def capability() -> str:
    "The best instruction set that torch finds here; it uses one that ATEN_CPU_CAPABILITY names without looking"
    env = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    ask = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    return subprocess.run(ask, capture_output=True, text=True, check=True, env=env).stdout.strip()


# --- running ------------------------------------------------------------------------------------------------------

def end_group(pid: int):
    "End what a process started, if anything is left; torchrun needs a moment to end its workers"
    try:
        os.killpg(pid, signal.SIGTERM)
        time.sleep(3)
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass


def run(command: list, timeout: float, **kwargs) -> tuple[int, str]:
    "Exit code and output of a command; whatever it started ends with it"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                               errors="replace", start_new_session=True, **kwargs)
    RUNNING.add(process.pid)
    try: output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired: return -1, f"\nTimeoutError: still running after {timeout:.0f} s"
    finally:
        end_group(process.pid)
        RUNNING.discard(process.pid)
    return process.returncode, output


def where_it_broke(output: str) -> str:
    "Cell and error of a notebook that failed, from what nbdev_test prints"
    cell = re.search(r"While Executing Cell #(\d+)", output)
    errors = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*$", output, re.M)
    said = errors[-1] if errors else (output.strip().splitlines() or ["no output"])[-1]
    return f"cell {int(cell[1]) - 1}: {said}" if cell else said # counted from 0, as the checks of book.py do


def run_notebook(name: str, project: Path, env: dict, log: Path) -> str:
    "Run a notebook's tests in a process of its own; returns where it broke, or nothing"
    program = shutil.which("nbdev_test", path=env["PATH"])
    code, output = run([program, "--path", f"nbs/{name}.ipynb", "--do_print"], timeout=1800, cwd=project, env=env)
    if code == 0: return ""
    log.mkdir(parents=True, exist_ok=True)
    (log/f"{name}.txt").write_text(output, encoding="utf-8")
    return where_it_broke(output)


def prepare(row: Row, source: Path, project: Path, env: dict, python: str) -> dict:
    "Copy the project and see that the row's settings hold in it; returns what was seen"
    copy_project(project, root=source)
    core = project/"gpt2_nb"/"core.py"
    if row.auto_bf16:
        text = core.read_text(encoding="utf-8")
        if text.count(AUTO) != 1: raise RuntimeError(f"core.py has {text.count(AUTO)} times {AUTO}")
        core.write_text(text.replace(AUTO, '"bfloat16"'), encoding="utf-8")
    code, output = run([python, "-c", PROBE], timeout=300, cwd=project, env=env)
    if code: raise RuntimeError(output.strip()[-500:])
    seen = json.loads(output.splitlines()[-1])

    wanted = {k: v for k, v in row.factors.items() if k != "order"} | {"package": str(core)}
    if row.auto_bf16: wanted["auto"] = "torch.bfloat16"
    wrong = {k: seen[k] for k, v in wanted.items() if seen[k] != v}
    if row.python and not seen["python"].startswith(row.python + "."): wrong["python"] = seen["python"]
    if row.torch and seen["torch"].partition("+")[0] != row.torch: wrong["torch"] = seen["torch"]
    if wrong: raise RuntimeError(f"a setting did not take: {wrong}")
    return seen


def run_row(row: Row, names: list[str], source: Path, args: argparse.Namespace) -> dict:
    "Run the notebooks of a row; one by one where the order is the subject, else on all cores"
    start = time.time()
    result = dict(row=row.number, settings=row.describe(), notebooks=names)
    if row.factors and LEVELS.index(row.factors["isa"].upper()) > LEVELS.index(args.capability):
        return result | dict(not_here=f"no {row.factors['isa']}")
    try: python = environment(row, args.envs)
    except subprocess.CalledProcessError as e: return result | dict(failed={"environment": str(e)}, passed=[])
    if not python: return result | dict(not_here=f"no Python {row.python}")

    with tempfile.TemporaryDirectory() as t:
        project, logs = Path(t).resolve()/"gpt2_nb", RESULTS/f"row{row.number}"
        env = variables(row, project, python)
        shutil.rmtree(logs, ignore_errors=True)
        try: seen = prepare(row, source, project, env, python)
        except RuntimeError as e: return result | dict(failed={"setting": str(e)}, passed=[])

        backwards = row.factors.get("order") == "reversed"
        workers = 1 if backwards else args.workers or max(1, os.cpu_count() // int(env["OMP_NUM_THREADS"]))
        failed = {}

        def one(name):
            if broke := run_notebook(name, project, env, logs): failed[name] = broke
            print(f"     {name}: {broke or 'passed'}", flush=True)

        with ThreadPoolExecutor(workers) as pool:
            try: list(pool.map(one, names[::-1] if backwards else names))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for pid in list(RUNNING): end_group(pid)
                raise
    passed = [name for name in names if name not in failed]
    return result | dict(seen=seen, passed=passed, failed=failed, seconds=round(time.time() - start))


# --- results ------------------------------------------------------------------------------------------------------

def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    return done.stdout if done.returncode == 0 else ""


def tree_state() -> str:
    "The commit, and a hash of what differs from it: results count for one state of the project only"
    untracked = git("ls-files", "--others", "--exclude-standard").splitlines()
    extra = "".join(hashlib.sha256((ROOT/name).read_bytes()).hexdigest() for name in untracked if (ROOT/name).is_file())
    changes = git("diff", "HEAD") + "".join(untracked) + extra
    commit = git("rev-parse", "--short", "HEAD").strip()
    return f"{commit}+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if commit and changes else commit


def finished(state: str) -> list[dict]:
    "The rows that were run for this state of the project"
    path = RESULTS/"results.jsonl"
    if not state or not path.exists(): return [] # without git the state is not known
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [line for line in lines if line["tree"] == state]


def print_table(results: list[dict]):
    table = [("row", "settings", "instructions", "torch", "python", "passed", "failed", "seconds")]
    for r in results:
        seen = r.get("seen", {})
        counts = len(r.get("passed", "")), len(r.get("failed", "")), r.get("seconds", "")
        if "not_here" in r: counts = "not here:", r["not_here"], ""
        versions = (seen.get(k, "") for k in ("isa", "torch", "python"))
        table.append((r["row"], r["settings"], *versions, *counts))
    widths = [max(len(str(line[i])) for line in table) for i in range(len(table[0]))]
    for line in table: print("  ".join(str(value).ljust(width) for value, width in zip(line, widths)).rstrip())
    for r in results:
        for name, broke in r.get("failed", {}).items(): print(f"row {r['row']}: {name}, {broke}"[:300])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("--rows", help="numbers, such as 2,5; default all")
    parser.add_argument("--quick", action="store_true", help="few rows that have every value once, on this Python")
    parser.add_argument("--list", action="store_true", help="print the rows and run nothing")
    parser.add_argument("--fresh", action="store_true", help="run again what has a result for this state of the files")
    parser.add_argument("--notebooks", help="only these of each row's, such as 02_attention,12_optim")
    parser.add_argument("--envs", type=Path, default=ROOT/".matrix", help="folder of the environments of other Pythons")
    parser.add_argument("--workers", type=int, help="notebooks at a time; default as many as cores allow")
    return parser.parse_args()


def plan(args: argparse.Namespace) -> list[tuple[Row, list[str]]]:
    "The rows that were asked for, with their notebooks"
    rows = all_rows()
    if args.quick: rows = quick_rows(rows)
    if args.rows:
        numbers = {int(n) for n in args.rows.split(",")}
        rows = [row for row in rows if row.number in numbers]
    only = set(args.notebooks.split(",")) if args.notebooks else None
    return [(row, [n for n in notebooks_of(row) if only is None or n in only]) for row in rows]


def main() -> int:
    args = parse()
    planned = plan(args)
    if not any(names for _, names in planned): sys.exit("no such row or notebook")
    if args.list:
        for row, names in planned: print(f"{row.number:2}  {row.describe()}: {len(names)} notebooks")
        return 0

    state, args.capability, results = tree_state(), capability(), []
    if args.capability not in LEVELS: args.capability = "DEFAULT" # not an x86
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as t:
        source = Path(t)/"source" # all rows see the project as it is now
        copy_project(source)
        for row, names in planned:
            same = dict(row=row.number, settings=row.describe(), notebooks=names)
            done = [r for r in finished(state) if same.items() <= r.items() and "seen" in r]
            print(f"row {row.number}: {row.describe()}{', already run' if done and not args.fresh else ''}", flush=True)
            if not done or args.fresh:
                done = [dict(tree=state, **run_row(row, names, source, args))]
                with open(RESULTS/"results.jsonl", "a", encoding="utf-8") as f:
                    f.write(json.dumps(done[0]) + "\n")
            results.append(done[-1])

    print()
    print_table(results)
    absent, failed = sum("not_here" in r for r in results), sum(bool(r.get("failed")) for r in results)
    print(f"{len(results) - absent - failed} rows passed, {failed} failed, {absent} not here")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("stopped; the same command goes on with the row that was running")
