"""Writes nbs/one_file/gpt2.py, a GPT-2 in one file for one device, from the definitions of the package.

What is cut, by rules: calls of `check_*`, `if` statements that raise an `InputError`, and comments
of parameters but for shapes, so that a signature fits on one line. Then EDITS takes out what serves
several devices, padding, masks, or the loss in chunks. An edit of code must fit as often as it says, so
that a change of the package is noticed here; all else is the exported code. Only the data, the loop
and the flags at the end of the file are written here.
"""
import argparse
import ast
import importlib.util
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_FILE = ROOT/"nbs"/"one_file"/"gpt2.py"

# module -> names, in the order in which the file has them; a title stands before each group
GROUPS = [
    ("The model", [("attention", "KVCache"), ("attention", "CausalSelfAttention"), ("model", "GPTConfig"),
                   ("model", "MLP"), ("model", "Block"), ("model", "mean_loss"), ("model", "init_weights"),
                   ("model", "Transformer"), ("model", "GPT")]),
    ("The optimizer", [("optim", "param_groups"), ("optim", "make_optimizer"),
                       ("optim", "SCHEDULES"), ("optim", "lr_at")]),
    ("A step", [("step", "target_shares"), ("step", "train_step"), ("step", "bits_per_byte")]),
    ("The next token", [("generate", "candidates"), ("generate", "draw"), ("generate", "next_ids")]),
    ("Batches", [("loader", "shuffled"), ("loader", "cut_windows"), ("loader", "val_windows")]),
]

# name -> (pattern, replacement, how often it fits); WORDS: in comments and docstrings, which may change
WORDS = -1
MASK = r"^ +mask: torch\.Tensor.*\n"
POS = r"^ +pos: torch\.Tensor.*\n"
EDITS = {
    "KVCache": [(r"^        B, H, room, D = self\.k\.shape\n", "", 1),
                (r"^        T = k\.shape\[2\]\n", "", 1),
                (r"self\.length \+ T$", "self.length + k.shape[2]", 1)],
    "CausalSelfAttention": [(MASK, "", 1),
                            (r"^        if mask is None and T > 1 and past:", "        mask = None\n"
                             "        if T > 1 and past:", 1),
                            (r"^        if mask is None: # one new.*\n((?:.*\n){3})(?=\n)",
                             "        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, "
                             "T > 1 and not past)\n", 1),
                            (r", or to what the mask allows", "", WORDS)],
    "Block": [(MASK, "", 1), (r", cache, mask\)", ", cache)", 1)],
    "GPTConfig": [(r"^    padded_vocab_size: int.*\n", "", 1), (r"^    @property\n(.*\n)+", "", 1)],
    "init_weights": [(r"^        elif \"wte\" in name:.*\n", "", 1)],
    "Transformer": [(r"^        self\.stream_dtype = .*\n", "", 1), (r"^        if self\.stream_dtype.*\n.*\n", "", 1),
                    (r"^    def run_block\(.*\n.*\n.*\n\n", "", 1),
                    (r"self\.run_block\(block, x, cache, mask\)", "block(x, cache)", 1),
                    (MASK, "", 1), (POS, "", 1), (r"if pos is None: pos = ", "pos = ", 1)],
    "GPT": [(r"^        if cfg\.padded_vocab_size:.*\n(            .*\n)+\n?", "", 1),
            (MASK, "", 2), (POS, "", 2), (r", caches, pos, mask\)", ", caches)", 2),
            (r"^ +\*,\n", "", 1), (r"^ +loss: Callable.*\n", "", 1),
            (r"^        if targets is not None and loss is not None:\n.*\n\n?", "", 1),
            (r"\[\.\.\., :self\.cfg\.vocab_size\]", "", 1), (r"(?<=V\)), without the padding", "", WORDS)],
    "target_shares": [(r"^ +dist: Dist.*\n", "", 1), (r"all_sum\((.*), dist\)", r"\1", 1),
                      (r" \* dist\.world_size / total.*", " / total", 1),
                      (r"(?<=\"Each micro-batch's share of the step's targets),[^\"]*", "", WORDS)],
    "train_step": [(r"^ +dist: Dist.*\n", "", 1), (r"^ +extra: Callable.*\n", "", 1),
                   (r"target_shares\(batches, dist\)", "target_shares(batches)", 1),
                   (r"^        more = extra.*\n", "", 1),
                   (r"\(x, y, \*rest\)", "(x, y)", 1), (r", and what else `extra` uses", "", WORDS),
                   (r"^        with grad_sync.*\n((?:            .*\n)+)",
                    lambda m: re.sub(r"^    ", "", m[1], flags=re.M), 1),
                   (r", loss=loss_fn, \*\*more", "", 1), (r"^ +loss_fn: Callable.*\n", "", 1),
                   (r"^    total = all_sum.*\n", "", 1),
                   (r"clip_grad_norm\(model\.parameters\(\), grad_clip\)",
                    'nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))', 1),
                   (r"accumulate, average, clip", "accumulate, clip", WORDS)],
    "candidates": [(r"^ +first: int.*\n", "", 1), (r"top_k or first", "top_k or 256", 1)],
    "draw": [(r"^ +darts: torch\.Tensor.*\n", "", 1),
             (r"    if darts is None:\n    (    darts = )", r"\1", 1)],
    "next_ids": [(r",\n +darts: torch\.Tensor \| None = None", "", 1), (r", darts\)", ")", 2),
                 (r"^    # with `darts`.*\n", "", WORDS), (r"^    first = .*\n", "", 1), (r", first\)", ")", 1)],
    "cut_windows": [(r"\n    # .*\n(?=    ids = np)", "", WORDS)],
}

HEAD = '''"""GPT-2 in one file: the model, the optimizer, a training loop and sampling, for one device.

Generated by `make one-file` from the exported cells of the notebooks {chapters}
of gpt2_nb, which explain and test each definition. Left out are checks of the input, what several
devices need, padding, masks, and the loss in chunks. Change the notebooks, and not this file.

    python gpt2.py input.txt
"""
import argparse
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F'''

TAIL = '''


# --- Training -----------------------------------------------------------------------------------

def train_batches(
    ids: np.ndarray, # (n,) the ids of the training text
    batch_size: int, # B
    block_size: int, # T
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: # (B, T) int64 each
    "Endless batches; every epoch shuffles all windows of the text anew"
    n, epoch = (len(ids) - 1) // block_size, 0
    while True:
        starts = shuffled(n, seed, epoch) * block_size
        for i in range(0, n - batch_size + 1, batch_size):
            at = starts[i:i + batch_size]
            yield cut_windows([ids], np.zeros_like(at), at, block_size)
        epoch += 1


@torch.no_grad()
def evaluate(model: GPT, ids: np.ndarray, batch_size: int, device) -> float: # nats per token
    "Mean loss over every id of a text but the first"
    model.eval()
    total = count = 0
    for x, y in val_windows(ids, model.cfg.block_size, batch_size):
        n = (y != -1).sum().item()
        _, loss = model(x.to(device), y.to(device))
        total, count = total + loss.item() * n, count + n
    model.train()
    return total / count


@torch.no_grad()
def generate(model: GPT, idx: torch.Tensor, max_new_tokens: int, **sampling) -> torch.Tensor:
    "Continue the prompts `idx`, (B, T), token by token; `sampling` goes to `next_ids`"
    model.eval()
    size = model.cfg.block_size
    new, caches = idx[:, -size:], model.new_caches(len(idx))
    for _ in range(max_new_tokens):
        if caches[0].length + new.shape[1] > size: # full: begin again with the last half
            new, caches = idx[:, -(size // 2 + 1):], model.new_caches(len(idx))
        x = model.hidden(new, caches)
        new = next_ids(model.head(x[:, -1]), **sampling)[:, None] # (B, 1)
        idx = torch.cat([idx, new], dim=1)
    return idx


def read_ids(path: str, tokenizer: str) -> tuple: # ids, number of ids, bytes of the text, decode
    "A text as token ids: its bytes, or GPT-2's tokens if tiktoken is installed"
    data = Path(path).read_bytes()
    if tokenizer == "bytes":
        return np.frombuffer(data, dtype=np.uint8), 256, len(data), bytes

    import tiktoken
    gpt2 = tiktoken.get_encoding("gpt2")
    ids = gpt2.encode_ordinary(data.decode("utf-8"))
    return np.array(ids, dtype=np.uint16), gpt2.n_vocab, len(data), gpt2.decode_bytes


def flags() -> argparse.Namespace:
    "What the command line sets; the defaults take a few minutes on a CPU"
    parser = argparse.ArgumentParser(description="Train a GPT-2 on a text and let it write.")
    parser.add_argument("text", help="a text file")
    parser.add_argument("--tokenizer", choices=["bytes", "gpt2"], default="bytes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    whole = dict(batch_size=16, accumulate=1, block_size=128, n_layer=4, n_head=4, n_embd=128,
                 max_iters=2000, warmup_iters=100, eval_interval=250, sample_tokens=500, seed=1337)
    for name, default in whole.items(): parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main():
    args = flags()
    torch.manual_seed(args.seed)
    ids, n_vocab, n_bytes, decode = read_ids(args.text, args.tokenizer)
    split = len(ids) * 9 // 10
    train_ids, val_ids = ids[:split], ids[split:]
    if (len(train_ids) - 1) // args.block_size < args.batch_size or len(val_ids) < 2:
        raise SystemExit(f"{args.text} is too short: {len(ids):,} tokens don't fill a batch")

    cfg = GPTConfig(n_vocab, args.block_size, args.n_layer, args.n_head, args.n_embd, args.dropout)
    model = GPT(cfg).to(args.device)
    optimizer = make_optimizer(model, args.learning_rate)
    bf16 = args.device.startswith("cuda") and torch.cuda.is_bf16_supported()
    def autocast(): return torch.autocast("cuda", torch.bfloat16) if bf16 else nullcontext()

    print(f"{model.num_params():,} parameters, {len(train_ids):,} tokens to train on")
    batches = train_batches(train_ids, args.batch_size, args.block_size, args.seed)
    begin = time.time()
    for step in range(args.max_iters + 1):
        if step % args.eval_interval == 0 or step == args.max_iters:
            val = evaluate(model, val_ids, args.batch_size, args.device)
            bits = bits_per_byte(val, len(ids), n_bytes)
            seconds = time.time() - begin
            print(f"step {step:5d}  val {val:.4f}, {bits:.3f} bits per byte, {seconds:.0f} s")
        if step == args.max_iters: break

        lr = lr_at(step, args.max_iters, args.learning_rate, args.warmup_iters)
        micro = [next(batches) for _ in range(args.accumulate)]
        micro = [(x.to(args.device), y.to(args.device)) for x, y in micro]
        loss, _, _ = train_step(model, optimizer, micro, lr, autocast=autocast)
        if step % 50 == 0: print(f"step {step:5d}  loss {loss.item():.4f}")

    prompt = torch.tensor([[int(val_ids[0])]], device=args.device)
    sample = generate(model, prompt, args.sample_tokens, temperature=0.8, top_k=50)[0].tolist()
    print(decode(sample).decode("utf-8", errors="replace"))


if __name__ == "__main__": main()
'''


def refuses(node: ast.stmt) -> bool:
    "Whether a statement only checks the input"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return getattr(node.value.func, "id", "").startswith("check_")
    if not isinstance(node, ast.If): return False
    if isinstance(node.body[0], ast.Expr) and refuses(node.body[0]): return True
    raised = [n for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc]
    return any("InputError" in ast.unparse(n.exc) for n in raised)


def without_checks(source: str) -> str:
    "A definition without the statements that `refuses` finds, nor a method that is then empty"
    lines, drop = source.split("\n"), set()

    def visit(node):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else []:
            empty = isinstance(child, ast.FunctionDef) and all(refuses(n) for n in child.body)
            if refuses(child) or empty: drop.update(range(child.lineno, child.end_lineno + 1))
            else: visit(child)

    visit(ast.parse(source))
    kept = [line for n, line in enumerate(lines, 1) if n not in drop]
    return "\n".join(kept)


def shape(comment: str) -> str: # the shape that a comment begins with, or nothing
    found = re.match(r"\([^()]*\)", comment)
    return found[0] if found else ""


def signature(match: re.Match) -> str:
    "A signature of one parameter per line, on one line or a few, with the shapes of its comments"
    indent, name, body, returns, after = match.groups()
    parameters, shapes = [], []
    for line in body.splitlines():
        code, _, comment = line.strip().partition(" # ")
        parameters.append(code.rstrip(","))
        if shape(comment): shapes.append(shape(comment))
    comment = " -> ".join(filter(None, [", ".join(shapes), after or ""]))

    start, lines = f"{indent}def {name}(", []
    for n, parameter in enumerate(parameters):
        piece = parameter + (f"){returns}:" if n == len(parameters) - 1 else ",")
        if lines and len(lines[-1]) + 1 + len(piece) <= 100: lines[-1] += " " + piece
        elif lines: lines.append(" " * len(start) + piece)
        else: lines.append(start + piece)
    if len(lines[-1]) > 100: # the type of the result goes to a line of its own
        lines[-1] = lines[-1].removesuffix(f"){returns}:")
        lines.append(f"{indent}){returns}:")
    for words in (comment, after or ""):
        if words and len(lines[-1]) + 3 + len(words) <= 100:
            lines[-1] += f" # {words}"
            break
    return "\n".join(lines) + "\n"


SIGNATURE = re.compile(r"^( *)def (\w+)\(\n((?: +[*\w].*\n)+?) *\)((?: -> [^:#]+)?):(?: # (.*))?\n", re.M)


def tidy(source: str) -> str:
    "Without the blank lines that cutting leaves, and without words about `InputError`"
    source = re.sub(r"[;,] (?:else )?`InputError`[^\"\n]*", "", source)
    source = re.sub(r"\n\n\n+", "\n\n", source)
    source = re.sub(r"(:|\"\"\"|\")\n\n(?=        )", r"\1\n", source) # after a def line or its docstring
    return source.strip("\n")


def definition(module: str, name: str) -> str:
    "The source of a definition of the package, cut by the rules"
    text = (ROOT/"gpt2_nb"/f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign): names = [getattr(t, "id", "") for t in node.targets]
        if name not in names: continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        source = "\n".join(text.split("\n")[first - 1:node.end_lineno])
        source = without_checks(source) + "\n"
        for pattern, new, times in EDITS.get(name, []):
            source, n = re.subn(pattern, new, source, flags=re.M)
            if n != times != WORDS:
                raise ValueError(f"{name} has changed: the edit {pattern!r} of .ci/one_file.py fits it {n} times, "
                                 f"expected {times}")
        return tidy(SIGNATURE.sub(signature, source))
    raise ValueError(f".ci/one_file.py wants {name}, and gpt2_nb/{module}.py defines no such name")


def source() -> str:
    "What the file should hold"
    numbers = {p.stem[3:]: p.stem for p in (ROOT/"nbs").glob("[0-9][0-9]_*.ipynb")}
    chapters = sorted({numbers[module][:2] for _, names in GROUPS for module, _ in names})
    parts = [HEAD.format(chapters=", ".join(chapters))]
    for title, names in GROUPS:
        parts.append(f"\n\n\n# --- {title} {'-' * (91 - len(title))}\n\n")
        parts.append("\n\n\n".join(definition(module, name) for module, name in names))
    return "".join(parts) + TAIL


def load(text: str):
    "The generated file as a module"
    spec = importlib.util.spec_from_loader("one_file_gpt2", loader=None)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module # dataclasses look it up
    exec(compile(text, str(ONE_FILE), "exec"), module.__dict__)
    return module


def check_equal(text: str) -> list[str]:
    "The file's model and step against the package's: the same logits, and the same ten losses"
    import torch
    sys.path.insert(0, str(ROOT))
    from gpt2_nb.model import GPT, GPTConfig, mean_loss
    from gpt2_nb.optim import lr_at, make_optimizer
    from gpt2_nb.step import train_step
    mine, shape, bad = load(text), (96, 32, 2, 4, 64), []

    def losses(GPT, GPTConfig, make_optimizer, lr_at, train_step):
        torch.manual_seed(0)
        model = GPT(GPTConfig(*shape))
        data = torch.Generator().manual_seed(1)
        ids = torch.randint(96, (10, 2, 4, 33), generator=data)
        with torch.no_grad(): logits, _ = model(ids[0, 0, :, :-1])
        optimizer, found = make_optimizer(model, 1e-3), []
        for step, batches in enumerate(ids):
            micro = [(part[:, :-1], part[:, 1:].contiguous()) for part in batches]
            found.append(train_step(model, optimizer, micro, lr_at(step, 10, 1e-3, 2))[0].item())
        return logits, torch.tensor(found)

    def in_one_piece(x, weight, targets, V): return mean_loss(x @ weight.T, targets)

    theirs = losses(GPT, GPTConfig, make_optimizer, lr_at, train_step)
    whole_step = partial(train_step, loss_fn=in_one_piece)
    unchunked = losses(GPT, GPTConfig, make_optimizer, lr_at, whole_step)
    ours = losses(*(getattr(mine, n) for n in "GPT GPTConfig make_optimizer lr_at train_step".split()))
    if not torch.equal(ours[0], theirs[0]): bad.append("gpt2.py: its logits are not the package's")
    if not torch.equal(ours[1], unchunked[1]): bad.append("gpt2.py: ten losses are not the package's")

    # with the package's own loss, in chunks, rounding differs: the losses, near 4.6, by up to 4 ulps
    off = (ours[1] - theirs[1]).abs().max().item()
    if not off < 2e-6: bad.append(f"gpt2.py: ten losses differ from the package's by up to {off:.1e}")
    return bad


def check_one_file() -> list[str]:
    "The committed file is what the package gives, imports nothing of it, and computes the same"
    try: text = source()
    except ValueError as e: return [str(e)]
    there = ONE_FILE.read_text(encoding="utf-8") if ONE_FILE.exists() else ""
    bad = [] if text == there else ["nbs/one_file/gpt2.py is not what the package gives: make one-file"]
    if re.search(r"^\s*(from|import) +\.?gpt2_nb", text, re.M): bad.append("gpt2.py imports the package")
    long = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    if long: bad.append(f"gpt2.py: lines over 100 columns: {long}")
    ruff = ["ruff", "check", "--no-cache", "--output-format", "concise", "--select", "F,E9,W",
            "--stdin-filename", "gpt2.py", "-"]
    done = subprocess.run(ruff, input=text, capture_output=True, encoding="utf-8")
    bad += [line for line in done.stdout.splitlines() if re.match(r"\S+:\d+", line)]
    return bad + check_equal(text)


def main():
    argparse.ArgumentParser(prog="one_file.py", description=__doc__.splitlines()[0]).parse_args()
    begin = time.time()
    try: text = source()
    except ValueError as e: sys.exit(str(e))
    ONE_FILE.parent.mkdir(exist_ok=True)
    ONE_FILE.write_text(text, encoding="utf-8")
    print(f"wrote {ONE_FILE.relative_to(ROOT)}: {len(text.splitlines())} lines")
    if found := check_one_file(): sys.exit("\n".join(found))
    print(f"it computes what the package computes; checked in {time.time() - begin:.0f} s")


if __name__ == "__main__": main()
