"""Runs what only a GPU can: the notebooks' `cuda` cells, then training speed. `make gpu` is this.

It installs nothing, reads notebooks with the standard library alone, and appends each result at once
to nbs/runs/gpu.jsonl. A notebook with `cuda` cells runs from top to bottom, because those cells need
what the ordinary ones define; as a by-product the ordinary tests meet a GPU, too. The measurements need
only the package and the cells marked `#| gpu`. Each notebook and each measurement has a process of its
own, so that a hang, a crash or a full memory costs that one result. Without a GPU the same path runs in
miniature on the CPU, into runs/rehearsal_cpu.jsonl.
"""
import argparse
import contextlib
import datetime
import hashlib
import io
import json
import linecache
import math
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
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
RESULTS = NBS/"runs"/"gpu.jsonl"
REHEARSAL = ROOT/"runs"/"rehearsal_cpu.jsonl"
PREFIX = "CPU rehearsal, not a GPU figure: "
CELL_S, CUDA_CELL_S = 60, 120 # limits for an ordinary cell, and for one on CUDA, which may compile
NOTEBOOK_S, RATE_S = 210, 120 # limits for a notebook and for a measurement
WORTH_S = 20 # with less time left, nothing new is begun


# --- notebooks and results ------------------------------------------------------------------------

def code_cells(path: Path) -> list[tuple[str, str]]:
    "Id and source of each code cell"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c["id"], "".join(c["source"])) for c in cells if c["cell_type"] == "code"]


def directives(source: str) -> dict:
    "The `#| name: value` lines of a cell"
    return dict(re.findall(r"^#\|\s*([\w-]+):?\s*(.*)$", source, re.M))


def cuda_tests(path: Path) -> dict[str, str]:
    "The notebook's `cuda` cells: from id to a name, which is the cell's first line after its directives"
    cells = {id: source for id, source in code_cells(path) if "cuda" in directives(source)}
    lines = {id: [line for line in s.splitlines() if not line.startswith("#|")] for id, s in cells.items()}
    return {id: f"{path.stem} {id}: {text[0].lstrip('# ')}" for id, text in lines.items()}


def ordinary_name(path: Path) -> str: return f"{path.stem}: its ordinary cells"


def notebooks() -> list[Path]: return [p for p in sorted(NBS.glob("[0-9]*.ipynb")) if cuda_tests(p)]


def measuring_cells() -> list[tuple[str, str]]:
    "The cells marked `#| gpu`: they define `step_rate`, `phases`, `rungs` and `miniature`"
    found = [cell for p in sorted(NBS.glob("[0-9]*.ipynb")) for cell in code_cells(p)]
    return [(id, source) for id, source in found if "gpu" in directives(source)]


def code_hash() -> str:
    "Changes with any code that a result depends on, committed or not"
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted((ROOT/"gpt2_nb").glob("*.py")): digest.update(path.read_bytes())
    for path in notebooks(): digest.update(json.dumps(code_cells(path)).encode())
    return digest.hexdigest()[:12]


def record(out: str, **line):
    "Append one result, and see to it that it is on the disk before anything else begins"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with open(out, "a", encoding="utf-8") as f:
        f.write(json.dumps(dict(line, date=now)) + "\n")
        f.flush()
        os.fsync(f.fileno())


def lines_of(file) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines() if Path(file).exists() else []


def results(files: list, stamp: dict) -> dict[str, dict]:
    "From names to the newest result of this card, this torch and this code"
    found = {}
    for file in files:
        for line in lines_of(file):
            try: result = json.loads(line)
            except ValueError: continue # a line that a kill cut off
            same = all(result.get(key) == stamp[key] for key in ("card", "torch", "code"))
            if same: found[result["name"]] = result
    return found


def settled(result: dict | None) -> bool:
    "Whether to leave it at that: right or wrong, the same code would give the same again"
    return result is not None and not result.get("no_result", False)


def wrong(result: dict | None) -> bool:
    "Whether it is a failure; a memory that is too small is none"
    return result is not None and result["ok"] is False and not result.get("out_of_memory", False)


def in_words(error: BaseException) -> str:
    "One line without the paths of this machine"
    text = f"{type(error).__name__}: {error}".replace(str(ROOT), ".").strip()
    return re.sub(r"(/[\w.+-]+){3,}", "PATH", text.splitlines()[0])[:300]


# --- in a child process ---------------------------------------------------------------------------

def describe(commit: str) -> dict:
    "Card, driver and versions; the program ends with one line if something that it needs is missing"
    try:
        import fastcore.test, matplotlib, torch
        from gpt2_nb import train
        from gpt2_nb.bpe import load_tokenizer
        from gpt2_nb.documents import documents
        documents("shakespeare"), load_tokenizer("gpt2")
    except ImportError as e:
        sys.exit(f"make gpu needs the module {e.name}, and this Python {platform.python_version()} has none ({e}); "
                 "put it on PYTHONPATH, or name another Python: make gpu PYTHON=...")
    except ValueError as e: sys.exit(f"make gpu: {e}")
    card = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if card else None
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    has_driver = card and shutil.which(driver[0])
    version = subprocess.run(driver, capture_output=True, text=True).stdout.split() if has_driver else []
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return dict(
        card=properties.name if card else None,
        capability=f"{properties.major}.{properties.minor}" if card else None,
        memory_bytes=properties.total_memory if card else None,
        driver=version[0] if version else None,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if card else None,
        torch=torch.__version__,
        python=platform.python_version(),
        git_commit=commit or head or None,
        code=code_hash())


def stand_in_for_ipython():
    "Where IPython is missing, what the notebooks import of it shows nothing"
    try:
        import IPython
        return
    except ImportError: pass
    display = types.ModuleType("IPython.display") # and no IPython, which matplotlib would ask for its version
    display.display = lambda *args, **kw: None
    sys.modules["IPython.display"] = display


def pretend(source: str) -> str:
    "A `cuda` cell rewritten for the CPU, to find slips before a GPU is there; it proves nothing about a GPU"
    source = source.replace('"cuda"', '"cpu"').replace("torch.cuda.is_available()", "True")
    return re.sub(r"torch\.cuda\.(synchronize|set_sync_debug_mode|reset_peak_memory_stats)", "bool", source)


class TooLong(Exception): pass # not TimeoutError, which libraries catch


def run_cell(source: str, name: str, namespace: dict, limit: int):
    "Run a cell as Jupyter would, without showing its last value; SIGALRM ends it after `limit` seconds"
    linecache.cache[name] = len(source), None, source.splitlines(True), name # for inspect and tracebacks

    def too_long(number, frame): raise TooLong(f"no result within {limit} s")

    code = compile(source, name, "exec")
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(limit)
    try: exec(code, namespace)
    finally:
        if hasattr(signal, "SIGALRM"): signal.alarm(0)


def run_notebook(path: Path, job: dict):
    "Run all cells in one namespace; record `cuda` cells, ordinary ones that fail, and how many passed"
    stand_in_for_ipython()
    os.chdir(NBS)
    sys.argv = ["notebook"]
    main = types.ModuleType("__main__")
    job["replaced"], sys.modules["__main__"] = sys.modules["__main__"], main
    names, passed, failed, begin = cuda_tests(path), 0, 0, time.time()
    for id, source in code_cells(path):
        d = directives(source)
        on_gpu = "cuda" in d
        if d.get("eval") == "false" or "slow" in d or "notest" in d: continue
        name = names.get(id, f"{path.stem} {id}")
        test = dict(kind="test", name=job["prefix"] + name, cell=id)
        if on_gpu and not job["cuda"]:
            if not job["pretend"]:
                record(job["out"], **test, ok=None, not_run="no CUDA", **job["stamp"])
                print(f"  not run  {name} (no CUDA)", flush=True)
                continue
            source = pretend(source)
        Path(job["progress"]).write_text(name, encoding="utf-8")
        said, start, error = io.StringIO(), time.time(), None
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                run_cell(source, f"<{name}>", main.__dict__, CUDA_CELL_S if on_gpu else CELL_S)
        except BaseException as e: # SystemExit, and an interrupt that a cell sent itself, are failures, too
            error = e
            print(*said.getvalue().splitlines()[-20:], sep="\n")
            traceback.print_exc(file=sys.stdout)
        passed, failed = passed + (not error and not on_gpu), failed + (bool(error) and not on_gpu)
        if not on_gpu and not error: continue
        outcome = dict(ok=error is None, seconds=round(time.time() - start, 2))
        if error: outcome["error"] = in_words(error)
        elif said.getvalue().strip(): outcome["printed"] = said.getvalue().strip().splitlines()[-20:]
        record(job["out"], **test, notebook=path.stem, ordinary=not on_gpu, **outcome, **job["stamp"])
        print(f"  {'FAILED ' if error else 'ok     '}  {name} ({outcome['seconds']:.1f} s)", flush=True)
        print(*[f"             {line}" for line in outcome.get("printed", [])], sep="\n", flush=True)
    count = dict(ok=not failed, passed=passed, failed=failed, seconds=round(time.time() - begin, 2))
    record(job["out"], kind="test", name=job["prefix"] + ordinary_name(path), **count, **job["stamp"])
    word = "FAILED " if failed else "ok     "
    print(f"  {word}  {ordinary_name(path)}: {passed} passed, {failed} failed", flush=True)


def measuring() -> dict:
    "`step_rate`, `phases`, `rungs` and `miniature`, as the notebook defines them on top of the trainer"
    from gpt2_nb import train
    namespace = dict(vars(train), __name__="measuring")
    for id, source in measuring_cells(): exec(compile(source, f"<cell {id}>", "exec"), namespace)
    return namespace


def clocks() -> dict:
    "The card's clock, power and temperature right now"
    wanted = dict(sm_mhz="clocks.sm", power_w="power.draw", celsius="temperature.gpu")
    words = ["nvidia-smi", f"--query-gpu={','.join(wanted.values())}", "--format=csv,noheader,nounits"]
    if not shutil.which(words[0]): return {}
    values = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()[0].split(",")
    return dict(zip(wanted, (float(v) for v in values)))


def run_rate(name: str, job: dict):
    "Measure one rung and record it; a memory that is too small is a result as well"
    import torch
    defined = measuring()
    rung = dict(defined["rungs"][name])
    measure, cfg = rung.pop("measure", "step_rate"), rung.pop("cfg")
    if not job["cuda"]:
        cfg = defined["miniature"](cfg)
        rung |= dict(val_tokens=160) if measure == "phases" else dict(warm_up=1, seconds=0.2)
    start = time.time()
    try: found = defined[measure](cfg, "cuda" if job["cuda"] else "cpu", **rung)
    except torch.OutOfMemoryError as e: found = dict(ok=False, out_of_memory=True, error=in_words(e))
    except Exception as e:
        traceback.print_exc(file=sys.stdout)
        found = dict(ok=False, error=in_words(e))
    else: found = dict(ok=math.isfinite(found["loss"]), **found)
    sizes, choices = "n_layer n_head n_embd block_size batch_size padded_vocab_size", "dtype compile attention"
    names = f"{sizes} {choices} grad_checkpoint bf16_residual".split()
    shape = {key: getattr(cfg, key) for key in names}
    if job["cuda"]: found |= clocks()
    record(job["out"], kind="rate", name=job["prefix"] + name, **found, seconds=round(time.time() - start, 2),
           config=shape, **job["stamp"])


def child(job: dict):
    sys.path[0] = str(ROOT) # in place of this file's folder
    what, name = job["what"], job["name"]
    if what == "describe": Path(job["answer"]).write_text(json.dumps(describe(job["commit"])), encoding="utf-8")
    elif what == "rungs": Path(job["answer"]).write_text(json.dumps(list(measuring()["rungs"])), encoding="utf-8")
    elif what == "notebook": run_notebook(NBS/name, job)
    else: run_rate(name, job)


# --- in the parent --------------------------------------------------------------------------------

def start(job: dict, limit: float) -> tuple[int | None, str]:
    "Run a child; its exit code, or None if it was stopped after `limit` seconds, and what it wrote on stderr"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile("w+") as errors:
        environ = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
        compiled = Path(tempfile.gettempdir())/"gpt2_nb_compiled" # stays, so that nothing is compiled twice
        environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        if job.get("jobs", 1) > 1: # else every notebook takes all cores, and all of them crawl
            environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job["jobs"])))
        if job["what"] == "notebook": environ["TMPDIR"] = folder # what its cells leave there goes with it
        words = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
        apart = os.name == "posix" # in a group of its own, which can be stopped as a whole
        process = subprocess.Popen(words, env=environ, cwd=ROOT, stderr=errors, start_new_session=apart)
        code = None
        try: code = process.wait(timeout=max(limit, 1))
        except subprocess.TimeoutExpired: pass
        finally:
            if process.poll() is None: # with the processes that its cells have started
                if apart: os.killpg(process.pid, signal.SIGKILL)
                else: process.kill()
                process.wait()
                shutil.rmtree(compiled, ignore_errors=True) # a half-written file there would fail all that follow
        errors.seek(0)
        return code, errors.read().strip()


def ask(job: dict):
    "The answer of a child that needs torch, which this process never imports, so as to leave the GPU alone"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder)/"answer.json"
        code, errors = start(dict(job, answer=str(answer)), 120)
        if code or not answer.exists(): sys.exit(errors or f"{job['what']} has given no answer")
        return json.loads(answer.read_text(encoding="utf-8"))


def figures(result: dict) -> str:
    if result["kind"] == "test":
        counts = f"{result['passed']} passed, {result['failed']} failed" if "passed" in result else ""
        return result.get("error") or result.get("not_run") or counts
    if result.get("out_of_memory"): return "out of memory"
    if not result["ok"]: return result.get("error", "loss not finite")
    if "phases" in result:
        spent = {line["kind"]: line.get("seconds") for line in result["phases"]}
        return ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent.items() if seconds)
    mfu = f", MFU {result['mfu']:.1%}" if result.get("mfu") else ""
    peak = f", {result['peak_bytes'] / 2**30:.1f} GiB" if result.get("peak_bytes") else ""
    return f"{result['tokens_per_s']:,.0f} tokens/s{mfu}{peak}, loss {result['loss']:.3f}"


def summary(found: dict, names: list[str]):
    word = {True: "ok", False: "FAILED", None: "not run"}
    for name in names:
        result = found.get(name)
        state = "skipped" if result is None else word[result["ok"]]
        if result and result.get("out_of_memory"): state = "no room"
        rate = result and result["kind"] == "rate"
        print(state.ljust(8), figures(result).ljust(54) + name if rate else name)
        if result and not rate and figures(result): print(" " * 8, figures(result))


def do_notebook(path: Path, job: dict, tests: list[str], limit: float):
    "Run a notebook in a child, and record that there is no result for the tests that it did not reach"
    old = len(lines_of(job["out"]))
    print(f"{path.name} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder)/"cell"
        code, errors = start(dict(job, what="notebook", name=path.name, progress=str(progress)), limit)
        cell = progress.read_text(encoding="utf-8") if progress.exists() else "its beginning"
    missing = set(tests) - {json.loads(line)["name"] for line in lines_of(job["out"])[old:]}
    if not missing: return
    ended = f"stopped after {limit:.0f} s" if code is None else f"ended with code {code}"
    print(f"  {path.name} {ended} in {cell}", *errors.splitlines()[-8:], sep="\n", flush=True)
    if code is None and limit < NOTEBOOK_S: return # the budget ended it
    line = dict(kind="test", ok=False, no_result=True, error=f"no result: {ended} in {cell}", **job["stamp"])
    for name in [name for name in tests if name in missing]: record(job["out"], name=name, **line)


def do_rate(name: str, job: dict, limit: float) -> bool: # whether there is a result
    "Measure in a child, and record it if the child could not; when the budget ends it, nothing is recorded"
    old = len(lines_of(job["out"]))
    code, errors = start(dict(job, what="rate", name=name), limit)
    if len(lines_of(job["out"])) > old: return True # however it ended after that
    if code is None and limit < RATE_S: return False
    line = dict(kind="rate", name=job["prefix"] + name, ok=False, no_result=True, **job["stamp"])
    if code is None: record(job["out"], **line, error=f"no result in {limit:.0f} s")
    elif code:
        last = errors.splitlines()[-1] if errors else "no message"
        record(job["out"], **line, error=in_words(RuntimeError(f"ended with code {code}: {last}")))
    return True


def name_of(task: Path | str) -> str: return getattr(task, "name", task)


def plan(flags) -> dict:
    "What all children are told: the machine, where results go, and how they are named"
    stamp = ask(dict(what="describe", name="", commit=flags.commit))
    cuda = stamp["card"] is not None
    if not cuda: stamp["rehearsal"] = True
    out = Path(flags.out).resolve() if flags.out and cuda else RESULTS if cuda else REHEARSAL
    prefix = PREFIX + ("cells rewritten for the CPU: " if flags.pretend else "")
    return dict(out=str(out), stamp=stamp, cuda=cuda, pretend=flags.pretend, prefix="" if cuda else prefix)


def parent(flags) -> int:
    begin = time.time()
    left = lambda: flags.budget_s - (time.time() - begin)
    job = plan(flags)
    out, stamp, prefix = job["out"], job["stamp"], job["prefix"]
    where = stamp["card"] or "no GPU: a rehearsal in miniature on the CPU, whose figures are not those of a GPU"
    print(f"{where}; torch {stamp['torch']}; {flags.budget_s:.0f} s at most", flush=True)
    files = [RESULTS, out] if job["cuda"] else [out]
    before = {} if flags.again else results(files, stamp)

    tests = {p: [prefix + name for name in [*cuda_tests(p).values(), ordinary_name(p)]] for p in notebooks()}
    rates = [] if flags.tests_only else ask(dict(what="rungs", name=""))
    tasks = tests | {name: [prefix + name] for name in rates} # right or wrong comes first
    tasks = {task: names for task, names in tasks.items() if flags.only in name_of(task)}
    names = [name for task in tasks.values() for name in task]
    to_do = [task for task in tasks if not all(settled(before.get(name)) for name in tasks[task])]
    to_do.sort(key=lambda task: any(name in before for name in tasks[task])) # what has failed to end, last

    def do_test(path):
        if left() < WORTH_S: print(f"  skipped, the budget is used up: {path.name}", flush=True)
        else: do_notebook(path, job | dict(jobs=flags.jobs), tests[path], min(NOTEBOOK_S, left()))

    with ThreadPoolExecutor(flags.jobs) as pool: list(pool.map(do_test, [t for t in to_do if t in tests]))
    for task in [task for task in to_do if task not in tests]:
        if left() < WORTH_S: print(f"  skipped, the budget is used up: {task}", flush=True)
        elif do_rate(task, job, min(RATE_S, left())):
            print(f"  {figures(results([out], stamp)[prefix + task]):54}{prefix + task}", flush=True)
        else: print(f"  stopped at the end of the budget: {task}", flush=True)
    made = {name for task in to_do for name in tasks[task]}

    found = results(files, stamp)
    failing = {path.stem for path in tests if path in tasks and wrong(found.get(tests[path][-1]))}
    print()
    summary(found, names + [name for name, r in found.items() if r.get("ordinary") and r["notebook"] in failing])
    there = len([name for name in names if name in before and name not in made])
    if there: print(f"{there} results were there before and were not made again; ARGS=--again makes all")
    print(f"{time.time() - begin:.0f} s; results are in {os.path.relpath(out, ROOT)}")
    return 1 if any(wrong(found.get(name)) for name in names) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gpu.py", description="Run the cuda cells and measure training speed.")
    parser.add_argument("--budget_s", type=float, default=330, help="seconds after which nothing goes on (330)")
    parser.add_argument("--out", default="", help="where results of a GPU go; nbs/runs/gpu.jsonl if not given")
    parser.add_argument("--commit", default="", help="the commit to note, where there is no git")
    parser.add_argument("--again", action="store_true", help="repeat what has a result for this card, torch and code")
    parser.add_argument("--tests_only", action="store_true", help="measure nothing")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks to test at a time (1); measuring is never shared")
    parser.add_argument("--only", default="", help="only notebooks and measurements with this text in their name")
    parser.add_argument("--pretend", action="store_true", help="without a GPU: rewrite cuda cells for the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child: child(json.loads(flags.child))
    else: sys.exit(parent(flags))
