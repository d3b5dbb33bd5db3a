"""Writes nbs/one_file/gpt2.py: the model, generation, a loader and one training loop from the package, in one file.

`make one-file` is this. Definitions are taken from the exported modules. Three things are cut: checks of the input,
the comments of parameters, and what only other chapters need. The script at the end of the file is written here.
"""
import ast
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB, FILE = ROOT/"gpt2_nb", ROOT/"nbs"/"one_file"/"gpt2.py"
COLUMNS = 100

# What is taken, in the order of the file
PARTS = {
    "The model": {"attention": ["KVCache", "CausalSelfAttention"],
                  "model": ["GPTConfig", "MLP", "Block", "mean_loss", "init_weights", "Transformer", "GPT"]},
    "Generation": {"generate": ["candidates", "draw", "next_ids"]},
    "Data": {"loader": ["shuffled", "cut_windows"]},
    "Optimisation": {"optim": ["param_groups", "make_optimizer", "SCHEDULES", "lr_at"]},
}
CUT = {"GPTConfig": ["n_params"], "GPT": ["num_params"]} # methods that the file does not need

HEAD = '''"""GPT-2 in one file: `python gpt2.py input.txt` trains a small one on the bytes of a text and lets it write.

Made by `make one-file` from the chapters of gpt2_nb, where each definition is explained and tested. Do not edit it.
"""
import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
'''

GENERATE = '''
@torch.no_grad()
def generate(model: GPT, idx: torch.Tensor, max_new_tokens: int, **sampling) -> torch.Tensor: # (B, T + new)
    "Continue each row of ids (B, T); a window that is full begins again with its second half"
    size, caches = model.cfg.block_size, None
    for _ in range(max_new_tokens):
        if caches is None or caches[0].length == size:
            caches = model.new_caches(len(idx))
            new = idx if idx.shape[1] <= size else idx[:, -(size // 2):]
        logits = model.head(model.hidden(new, caches)[:, -1]) # (B, V)
        new = next_ids(logits, **sampling)[:, None]
        idx = torch.cat([idx, new], 1)
    return idx
'''

BATCHES = '''
def batches(ids: np.ndarray, batch_size: int, block_size: int, seed: int): # yields x, y of (B, T)
    "Windows that do not overlap, each once in an epoch, in an order that depends on the seed"
    n = (len(ids) - 1) // block_size
    for epoch in range(10**9):
        order = shuffled(n, seed, epoch)
        for i in range(0, n - batch_size + 1, batch_size):
            at = order[i:i + batch_size] * block_size
            yield cut_windows([ids], np.zeros_like(at), at, block_size)
'''

SCRIPT = '''
@torch.no_grad()
def evaluate(model: GPT, ids: np.ndarray, device: torch.device) -> float: # nats per token
    "Mean loss over all windows of the held-out part"
    T = model.cfg.block_size
    at = np.arange(0, len(ids) - T, T)
    model.eval()
    losses = []
    for some in np.array_split(at, max(1, len(at) // 16)):
        x, y = cut_windows([ids], np.zeros_like(some), some, T)
        losses.append((len(some), model(x.to(device), y.to(device))[1].item()))
    model.train()
    return sum(n * loss for n, loss in losses) / len(at)


def train(model: GPT, stream, args, held_out: np.ndarray, device: torch.device):
    "The training loop: the learning rate of the step, forward, backward, clip, update"
    optimizer = make_optimizer(model, args.learning_rate)
    start = time.time()
    for step in range(args.max_iters + 1):
        if step % args.eval_interval == 0 or step == args.max_iters:
            loss = evaluate(model, held_out, device)
            print(f"step {step:5}  held out {loss:.4f} nats per byte = {loss / math.log(2):.4f} bits per byte"
                  f"  {time.time() - start:.0f} s")
        if step == args.max_iters: break

        x, y = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.max_iters, args.learning_rate, args.max_iters // 16)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main():
    parser = argparse.ArgumentParser(description="Train a GPT-2 on the bytes of a text")
    parser.add_argument("text", help="a text file, such as input.txt")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences in a step")
    parser.add_argument("--block_size", type=int, default=128, help="bytes of context")
    parser.add_argument("--n_layer", type=int, default=2)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="the peak")
    parser.add_argument("--max_iters", type=int, default=1000, help="steps")
    parser.add_argument("--eval_interval", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    ids = np.frombuffer(Path(args.text).read_bytes(), dtype=np.uint8).astype(np.uint16)
    parts = ids[:len(ids) * 9 // 10], ids[len(ids) * 9 // 10:] # training, held out
    if min(map(len, parts)) <= args.block_size: parser.error("the text is too short for this block_size")

    cfg = GPTConfig(256, args.block_size, args.n_layer, args.n_head, args.n_embd)
    model = GPT(cfg).to(device)
    stream = batches(parts[0], args.batch_size, args.block_size, args.seed)
    train(model, stream, args, parts[1], device)
    start = torch.tensor([[ord("\\n")]], device=device)
    written = generate(model.eval(), start, 300, temperature=0.8, top_k=50)[0].tolist()
    print(bytes(written).decode(errors="replace"))


if __name__ == "__main__": main()
'''
WRITTEN_HERE = {"Generation": GENERATE, "Data": BATCHES}


def refuses(node: ast.AST) -> bool:
    "Whether a statement only checks the input: a call of `check_...`, or an `if` that raises `InputError`"
    if isinstance(node, ast.If): # one that raises, or whose body is a check
        raises = any(isinstance(n, ast.Raise) and "InputError" in ast.unparse(n) for n in ast.walk(node))
        return raises or (not node.orelse and all(map(refuses, node.body)))
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).startswith("check_")


def parameters(node: ast.FunctionDef) -> list[str]:
    "Each parameter with its annotation and default"
    a = node.args
    defaults = [None] * (len(a.args) - len(a.defaults)) + a.defaults

    def write(arg, default):
        text = ast.unparse(arg)
        if default is None: return text
        return text + (" = " if arg.annotation else "=") + ast.unparse(default)

    only = [write(*pair) for pair in zip(a.kwonlyargs, a.kw_defaults)]
    return [write(*pair) for pair in zip(a.args, defaults)] + (["*", *only] if only else [])


def signature(node: ast.FunctionDef, indent: int, last: str) -> str:
    "`def` with its parameters on as few lines as there can be; `last`, the comment of the result, if it fits"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    head = " " * indent + f"def {node.name}("
    words = parameters(node)
    ends = [", "] * (len(words) - 1) + [f"){returns}:"]
    lines = [head]
    for word, end in zip(words, ends):
        if len(lines[-1] + word + end) > COLUMNS and lines[-1].strip(): lines.append(" " * len(head))
        lines[-1] += word + end
    if last and len(lines[-1] + last) < COLUMNS: lines[-1] += f" {last}"
    return "\n".join(line.rstrip() for line in lines)


def shorten(source: str, cut: list[str]) -> str:
    "A definition without checks, without comments of parameters, and without the methods in `cut`"
    tree, lines = ast.parse(source), source.split("\n")
    gone, new = set(), {} # line numbers; the line number of a `def` -> its signature
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef)
            body = [n for n in getattr(child, "body", [])] if is_function else []
            drop = isinstance(child, ast.stmt) and refuses(child)
            drop = drop or is_function and (child.name in cut or all(map(refuses, body)))
            if drop:
                first = min([child.lineno, *(d.lineno for d in getattr(child, "decorator_list", []))])
                gone |= set(range(first, child.end_lineno + 1))
            elif is_function and child.body[0].lineno > child.lineno:
                before_body = range(child.lineno, child.body[0].lineno)
                closing = lines[child.body[0].lineno - 2]
                last = re.search(r"# \([^#]*$", closing) # a shape
                new[child.lineno] = signature(child, child.col_offset, last[0] if last else "")
                gone |= set(before_body)

    kept = [new.get(i, line) for i, line in enumerate(lines, 1) if i not in gone or i in new]
    text = re.sub(r"\n\s*\n(\s*\n)+", "\n\n", "\n".join(kept))
    text = re.sub(r"(:\n)\n", r"\1", text)
    return re.sub(r"; `InputError`[^\"\n]*|,? else `InputError`", "", text).rstrip()


def unused(source: str) -> list[str]:
    "Lines that assign to names that nothing reads any more"
    found = []
    for function in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)):
        read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        for node in function.body:
            if not isinstance(node, ast.Assign): continue
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            plain = all(isinstance(t, ast.Name | ast.Tuple) for t in node.targets)
            if plain and not read & set(names): found.append(ast.get_source_segment(source, node))
    return found


def definition(module: str, name: str) -> str:
    "The source of an exported function, class or constant, shortened"
    source = (LIB/f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        names = [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", [])]
        if name not in names: continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        lines = source.split("\n")[first - 1:node.end_lineno]
        text = shorten("\n".join(lines), CUT.get(name, []))
        for line in unused(text): text = re.sub(rf"^ *{re.escape(line)}.*\n", "", text, flags=re.M)
        return text
    sys.exit(f"{module}.py has no {name}")


def make() -> str:
    "The text of the file"
    sections = []
    for title, modules in PARTS.items():
        parts = [definition(module, name) for module, names in modules.items() for name in names]
        parts += [WRITTEN_HERE[title].strip()] if title in WRITTEN_HERE else []
        sections.append(f"# --- {title} ".ljust(COLUMNS, "-") + "\n\n" + "\n\n\n".join(parts))
    sections.append("# --- Training ".ljust(COLUMNS, "-") + "\n" + SCRIPT.rstrip())
    return HEAD + "\n" + "\n\n\n".join(sections) + "\n"


def load(path: Path):
    "The file as a module"
    spec = importlib.util.spec_from_file_location("gpt2_one_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module # for its dataclass
    spec.loader.exec_module(module)
    return module


def differences(one) -> list[str]:
    "What the file computes differently from the package: logits, text, the losses of ten steps"
    import numpy as np
    import torch
    sys.path.insert(0, str(ROOT))
    from gpt2_nb.generate import generate
    from gpt2_nb.memory import linear_cross_entropy # noqa: F401, the package's step uses it
    from gpt2_nb.model import GPT, GPTConfig
    from gpt2_nb.optim import lr_at, make_optimizer
    from gpt2_nb.step import train_step

    shape = dict(vocab_size=256, block_size=32, n_layer=2, n_head=4, n_embd=64)
    torch.manual_seed(0)
    package = GPT(GPTConfig(**shape))
    torch.manual_seed(0)
    single = one.GPT(one.GPTConfig(**shape))
    ids = np.random.default_rng(0).integers(97, 105, 4000).astype(np.uint16)
    stream = one.batches(ids, 4, 32, seed=1)
    idx, found = next(stream)[0], []
    if not torch.equal(package(idx)[0], single(idx)[0]): found.append("logits differ")

    prompt = idx[:1, :5]
    text = generate(package.eval(), prompt, 20, temperature=0), one.generate(single.eval(), prompt, 20, temperature=0)
    if text[0][0].tolist() != text[1][0].tolist(): found.append("generated ids differ")

    ours, theirs = make_optimizer(package.train(), 1e-2), one.make_optimizer(single.train(), 1e-2)
    for step in range(10):
        x, y = next(stream)
        lr = lr_at(step, 10, 1e-2, 2)
        expected, _, _ = train_step(package, ours, [(x, y)], lr)
        for group in theirs.param_groups: group["lr"] = one.lr_at(step, 10, 1e-2, 2)
        _, loss = single(x, y)
        loss.backward()
        one.nn.utils.clip_grad_norm_(single.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad(set_to_none=True)
        gap = abs(loss.item() - expected.item()) / expected.item()
        if gap > 1e-5: found.append(f"the loss of step {step + 1} differs by {gap:.0e}")
    return found


def complaints() -> list[str]:
    "Whether the committed file is the one that the package gives, and computes the same"
    if not FILE.exists() or FILE.read_text(encoding="utf-8") != make():
        return [f"{FILE.relative_to(ROOT)} is old; make one-file"]
    found = differences(load(FILE))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder)/"input.txt"
        text.write_text("to be, or not to be: that is the question\n" * 60, encoding="utf-8")
        words = [sys.executable, str(FILE), str(text), "--max_iters", "2", "--n_embd", "32", "--block_size", "32"]
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode: found.append(f"the script fails: {done.stderr[-300:]}")
    return found


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(make(), encoding="utf-8")
    found = complaints()
    print(f"{FILE.relative_to(ROOT)}: {len(make().splitlines())} lines", *found, sep="\n")
    sys.exit(bool(found))
