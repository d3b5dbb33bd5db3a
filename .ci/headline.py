"""Compares our default recipe with the CPU quick start of nanoGPT, on the same text. `make headline` is this.

The default reads more text than nanoGPT's quick start, and its tokens are longer, so that the same number
of positions covers more bytes of context. One figure beside another would hide that. This script therefore
trains several rows: the quick start's settings, our default, and our default cut to the quick start's amount
of text, to its context, to both, and to its computing time.

All rows use our trainer and our model. The quick start's row has its tokenizer (one token per byte, which in
this text is one per character), its sizes and its optimizer settings. Two details stay ours: the biases,
which nanoGPT leaves out, and the tanh form of GELU. Every row runs `gpt2_train` with public flags on one
thread, so that CPU seconds can be compared even if other programs share the machine.

Each row appends its result to nbs/runs/headline.jsonl and leaves its log in nbs/runs/headline/.
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt2_nb.core import cache_dir
from gpt2_nb.runlog import read_log

TEXT = "tinyshakespeare.txt"
WHERE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
PUBLISHED = 1.88 # nats per character, https://github.com/karpathy/nanoGPT#quick-start

# The flags of https://github.com/karpathy/nanoGPT#quick-start for a computer without a GPU, on top of
# config/train_shakespeare_char.py and of the defaults of train.py.
QUICK_START = dict(
    vocab_size=257, # no merges: one token per byte, and the end of text
    batch_size=12, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0,
    learning_rate=1e-3, min_lr=1e-4, schedule="cosine", warmup_iters=100, max_iters=2000,
    init_std=0.02, weight_decay=0.1, beta2=0.99, grad_clip=1.0)

# Flags of every row. They change what is reported, and leave the training as it is.
REPORT = dict(val_tokens=0, log_interval=50)


@dataclass
class Row:
    "One training run and what it cost"
    name: str
    title: str
    flags: dict = field(default_factory=dict) # of gpt2_train, on top of its defaults
    result: dict = field(default_factory=dict) # see `measure`


def find_text(given: str) -> Path:
    "The text to train on; the program ends with one line if it is missing"
    file = Path(given) if given else cache_dir()/TEXT
    if file.is_file(): return file
    what = f"{file} is missing" if given else f"{TEXT} is not in {file.parent}"
    sys.exit(f"make headline: {what}; download {WHERE} to it, or name the text with ARGS=\"--data FILE\"")


def cpu_seconds() -> float:
    "CPU seconds of the child processes that have ended"
    times = os.times()
    return times.children_user + times.children_system


def measure(row: Row, folder: Path, seed: int):
    "Train a row in `folder`, which has the text, and note what it read, what it cost and how good it is"
    flags = dict(data=TEXT, out=row.name, seed=seed) | REPORT | row.flags
    words = [sys.executable, "-m", "gpt2_nb.train"]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    wall, cpu = time.perf_counter(), cpu_seconds()
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, encoding="utf-8")
    if done.returncode: sys.exit(f"{row.name}: {done.stderr.strip()[-800:]}")
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu

    log = read_log(folder/row.name/"log.jsonl")
    config, val = log[0]["config"], [line for line in log if line["kind"] == "val"][-1]
    manifest = json.loads((folder/row.name/"data"/"manifest.json").read_text(encoding="utf-8"))
    bytes_per_token = {name: part["bytes"] / part["tokens"] for name, part in manifest["splits"].items()}
    tokens = val["step"] * config["total_batch_size"]
    row.result = dict(
        steps=val["step"],
        tokens=tokens,
        bytes_read=round(tokens * bytes_per_token["train"]),
        context_bytes=round(config["block_size"] * bytes_per_token["val"], 1), # of held-out text, at most
        wall_seconds=round(wall, 1),
        cpu_seconds=round(cpu, 1), # one thread, from the start of the program to its end
        load_before=load and round(load, 2),
        bits_per_byte=val["bits_per_byte"],
        val_tokens=val["tokens"])


def save(row: Row, folder: Path, results: Path):
    "Append a row's record, and copy its log"
    first = read_log(folder/row.name/"log.jsonl")[0]
    names = ("git_commit", "python", "versions", "hardware", "cpus", "threads")
    record = dict(name=row.name, title=row.title, flags=row.flags, seed=first["config"]["seed"])
    record |= row.result | {name: first[name] for name in names}
    record |= dict(changed=uncommitted(), date=time.strftime("%Y-%m-%d"))

    logs = results.with_suffix("")
    logs.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder/row.name/"log.jsonl", logs/f"{row.name}.jsonl")
    with open(results, "a", encoding="utf-8") as f: f.write(json.dumps(record) + "\n")


def uncommitted() -> bool | None:
    "Whether the package differs from its last commit; None if there is no git"
    if not shutil.which("git"): return None
    command = ["git", "status", "--porcelain", "gpt2_nb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode else bool(done.stdout.strip())


def rows(run, scale: float) -> list[Row]:
    "Train all rows with `run`; those that are cut depend on what the first ones have measured"
    def steps(n): return max(2, round(n * scale))

    base = Row("baseline", "nanoGPT's CPU quick start, by our trainer",
               QUICK_START | dict(max_iters=steps(2000), warmup_iters=min(100, steps(2000) - 1)))
    ours = Row("default", "our default", dict(max_iters=steps(1600)) if scale != 1 else {})
    for row in (base, ours): run(row)

    # tokens in a step, bytes in a token, and the block size with the quick start's bytes of context
    step = ours.result["tokens"] / ours.result["steps"]
    per_token = ours.result["bytes_read"] / ours.result["tokens"]
    block = round(64 * base.result["context_bytes"] / ours.result["context_bytes"])
    short = dict(block_size=block, batch_size=round(step / block))

    def same_text(tokens): return dict(max_iters=round(base.result["bytes_read"] / per_token / tokens))

    text = Row("equal-text", "our default, equal text", same_text(step))
    context = Row("equal-context", "our default, equal context", ours.flags | short)
    both = Row("equal-text-and-context", "our default, equal text and context",
               short | same_text(block * short["batch_size"]))
    for row in (text, context, both): run(row)

    # `default` and `equal-text` differ only in their steps, and so tell what a step costs
    extra = ours.result["cpu_seconds"] - text.result["cpu_seconds"]
    a_step = max(extra / (ours.result["steps"] - text.result["steps"]), 1e-4)
    more = (base.result["cpu_seconds"] - ours.result["cpu_seconds"]) / a_step
    time_ = Row("equal-seconds", "our default, equal CPU seconds",
                dict(max_iters=max(2, ours.result["steps"] + round(more))))
    run(time_)
    return [base, ours, text, context, both, time_]


def table(done: list[Row]) -> str:
    "The rows as a Markdown table"
    lines = ["| run | steps | tokens | text read, MB | context, bytes | CPU s | bits per byte |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for row in done:
        r = row.result
        lines.append(f"| {row.title} | {r['steps']:,} | {r['tokens']:,} | {r['bytes_read'] / 1e6:.2f} | "
                     f"{r['context_bytes']:.0f} | {r['cpu_seconds']:.0f} | {r['bits_per_byte']:.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="headline.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help=f"the text; if not given, {TEXT} in the data folder")
    parser.add_argument("--seed", type=int, default=1337, help="of weights and batches, in all rows")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="share of the steps, to try the script; below 1 the results go to runs/")
    args = parser.parse_args()
    if not 0 < args.scale <= 1: parser.error(f"--scale {args.scale:g} is not above 0 and at most 1")

    text, results = find_text(args.data), ROOT/"nbs"/"runs"/"headline.jsonl"
    folder = ROOT/"runs"/"headline"
    if args.scale < 1: results = folder/"trial.jsonl"
    elif results.exists(): results.unlink() # a new table replaces the old one
    if folder.exists(): shutil.rmtree(folder) # runs of this script only
    folder.mkdir(parents=True)
    shutil.copy(text, folder/TEXT) # so that the logs name no folder of this machine

    def run(row):
        print(f"{row.title} ...", end=" ", flush=True)
        measure(row, folder, args.seed)
        save(row, folder, results)
        r = row.result
        print(f"{r['bits_per_byte']:.3f} bits per byte, {r['cpu_seconds']:.0f} CPU s, "
              f"{r['wall_seconds']:.0f} s on the clock", flush=True)

    done = rows(run, args.scale)
    print(f"\n{table(done)}\n\nnanoGPT's README reports {PUBLISHED} nats per character, which are "
          f"{PUBLISHED / math.log(2):.2f} bits per byte. The records are in {results.relative_to(ROOT)}.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace") # a console that is not UTF-8
    main()
