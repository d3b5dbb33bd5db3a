"""Follows plans to the end: `gpt2_plan` predicts a run on this machine, `gpt2_train` makes it, and both are
compared. The runs are the default one and the answer to `gpt2_plan --fit` for ten minutes. `make plan-fit`
is this. It takes about a quarter of an hour and appends a line for each run to nbs/runs/plan_fit.jsonl.

Everything uses one thread, so that CPU seconds can be compared even if other programs share the machine. The
CPU seconds are predicted by the same calibration with a clock that counts CPU time.
"""
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt2_nb.plan import measured_speed, step_seconds
from gpt2_nb.recipe import TrainConfig, model_config
from gpt2_nb.runlog import read_log

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def run(words: list, folder: Path) -> str:
    "The output of a command of this package"
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=ENV, capture_output=True,
                          encoding="utf-8")
    if done.returncode: sys.exit(f"{' '.join(words)}: {done.stderr.strip()[-800:]}")
    return done.stdout


def cpu_prediction(plan: dict) -> float:
    "CPU seconds of a plan's steps and validations: the calibration with a clock of CPU time"
    import torch
    torch.set_num_threads(1)
    cfg = TrainConfig(**plan["config"])
    shape = model_config(cfg, cfg.vocab_size)
    with patch("time.perf_counter", time.process_time):
        speed = measured_speed(cfg, shape, torch.device("cpu"))
    return plan["steps"] * step_seconds(cfg, shape, speed, 0, 1)["step_s"] * (
        1 + plan["cost"]["val_s"] / plan["cost"]["train_s"])


def log_seconds(log: list, step_tokens: int) -> float:
    "What a log's steps and validations took on the clock"
    lines = [line for line in log if line["kind"] == "train"]
    since = [line["step"] - before["step"] for before, line in zip([{"step": 0}, *lines], lines)]
    steps = sum(n * step_tokens / line["tokens_per_s"] for n, line in zip(since, lines))
    return steps + sum(line["seconds"] for line in log if line["kind"] == "val")


def follow(name: str, flags: list, folder: Path) -> dict:
    "Plan a run, make it, and return what was predicted and what was measured"
    load = os.getloadavg()[0]
    plan = json.loads(run(["gpt2_nb.plan", *flags, "--json"], folder))
    cpu = cpu_prediction(plan)
    words = plan.get("command", "gpt2_train").split()[1:]
    print(f"{name}: {plan.get('command', 'gpt2_train')}", flush=True)

    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gpt2_nb.train", *words, "--out", name], cwd=folder,
                               env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0) # what this child alone has used
    wall = time.perf_counter() - begin
    if status: sys.exit(f"{name}: {error.decode()[-800:]}")

    log = read_log(folder/name/"log.jsonl")
    val = [line for line in log if line["kind"] == "val"][-1]
    return dict(
        name=name, command=plan.get("command", "gpt2_train"), parameters=plan["parameters"],
        tokens=plan["tokens"], steps=plan["steps"],
        predicted=dict(seconds=round(plan["cost"]["train_s"] + plan["cost"]["val_s"], 1),
                       cpu_seconds=round(cpu, 1), rss_bytes=plan["memory"]["process"]),
        measured=dict(seconds=round(log_seconds(log, plan["config"]["total_batch_size"]), 1),
                      wall_seconds=round(wall, 1), cpu_seconds=round(used.ru_utime + used.ru_stime, 1),
                      rss_bytes=used.ru_maxrss * 1024),
        bits_per_byte=val["bits_per_byte"], load=[round(load, 2), round(os.getloadavg()[0], 2)],
        **{key: log[0][key] for key in ("python", "versions", "hardware", "cpus", "threads")},
        date=time.strftime("%Y-%m-%d"))


def main():
    parser = argparse.ArgumentParser(prog="plan_fit.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--hours", type=float, default=0.1667, help="time that --fit is given")
    parser.add_argument("--out", default="nbs/runs/plan_fit.jsonl", help="file of the records")
    args = parser.parse_args()

    folder, results = ROOT/"runs"/"plan_fit", ROOT/args.out
    if folder.exists(): shutil.rmtree(folder) # runs of this script only
    folder.mkdir(parents=True)
    records = []
    for name, flags in (("default", []), ("fit", ["--fit", "--hours", str(args.hours)])):
        records.append(follow(name, flags, folder))
        print(json.dumps(records[-1]), flush=True)
    results.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


if __name__ == "__main__": main()
