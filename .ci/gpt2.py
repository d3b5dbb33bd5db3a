"""Runs our GPT-2 with OpenAI's 124M weights: the chain of proof, greedy text, HellaSwag. `make gpt2` is this.

The weights cannot be reached from every machine, so no chapter depends on them. This script writes a
notebook that does, runs it, and saves it with its outputs as runs/gpt2.ipynb, whether or not all of its
tests pass. The functions of the chain of proof are copied from the cells of chapter 05 when the notebook is
written, and so they are those that the chapter explains.

With --model FOLDER it takes another GPT-2 in a Hugging Face folder, and with --limit N only the first N
examples of HellaSwag. The published scores are asserted only for gpt2 and all 10,042 examples.
"""
import argparse
import ast
import os
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT/"nbs"/"05_pretrained.ipynb"
BOOK = "https://github.com/gpt2-nb/gpt2_nb/blob/main/nbs"

# The notebook's cells. A `chapter` cell is the one of chapter 05 that defines the named function.

PARTS = [
    ("markdown", """
# GPT-2 with OpenAI's weights

This notebook is written and run by `make gpt2`. It loads {model}, compares our model with
[transformers](https://github.com/huggingface/transformers) link by link, lets it write, and evaluates it on
[HellaSwag](https://github.com/rowanz/hellaswag). The chapter [05_pretrained]({book}/05_pretrained.ipynb)
explains the chain of proof, and [15_hellaswag]({book}/15_hellaswag.ipynb) explains the two styles of scoring.
"""),
    ("code", """
import platform
import time
import warnings
from pathlib import Path
from unittest import mock

import torch

warnings.filterwarnings("ignore", message="IProgress") # a progress bar that we do not use
import transformers
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from gpt2_nb.core import sha256
from gpt2_nb.documents import documents
from gpt2_nb.folders import load_model
from gpt2_nb.generate import generate_text
from gpt2_nb.hellaswag import evaluate, load_examples
from gpt2_nb.pretrained import find_pretrained, transpose_conv1d
from gpt2_nb.runlog import git_commit

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
NAME, LIMIT = {model!r}, {limit} # the model, and how many examples of HellaSwag; 0 for all
print(f"commit {{git_commit()}}, Python {{platform.python_version()}}, torch {{torch.__version__}}, "
      f"transformers {{transformers.__version__}}, {{torch.get_num_threads()}} threads")
"""),
    ("markdown", """
## The weights
"""),
    ("code", """
folder = find_pretrained(NAME)
model, tokenizer = load_model(NAME, "cpu")
hf = GPT2LMHeadModel.from_pretrained(folder).float().eval()
if NAME == "gpt2": assert model.num_params() == 124_439_808
for file in sorted(Path(folder).glob("*.safetensors")): print(file.name, "SHA-256", sha256(file))
print(f"{{model.num_params():,}} parameters, {{model.cfg.n_layer}} layers, {{model.cfg.n_embd}} wide")
"""),
    ("markdown", """
## The chain of proof

The first link is the token ids. Our tokenizer and the one in the model's folder, read by the library
[tokenizers](https://github.com/huggingface/tokenizers), must agree on a play and on text that is hard to
split.
"""),
    ("code", r"""
theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder/"tokenizer.json"))
hard = "  naïve — 1,234.5 'tis\t\n\n   don’t \u2028 日本語 🙂👩‍👩‍👧 e\u0301 \u0000 \r\n" * 3
play = documents("shakespeare")[0][:100_000]
for text in (play, hard): assert tokenizer.encode_ordinary(text) == theirs.encode(text)
print(f"{{len(tokenizer.encode_ordinary(play)):,}} ids of the play are equal, and those of the hard text")
"""),
    ("markdown", """
The second link is the output of every module. We compare it with the output of the same module in
`transformers`, relative to its largest number, and allow a difference of 1e-4. As controls we make two
mistakes on purpose: GELU with erf instead of tanh, and a LayerNorm with an ε of 1e-3. Each must cause a
difference at least ten times as large as ours, or the comparison would prove nothing.
"""),
    ("chapter", "activations"),
    ("code", """
def relative_gap(a, b):
    "The largest difference of an output that both have, relative to the largest number in it"
    both = [name for name in a if name in b]
    gaps = {{name: (a[name] - b[name].view_as(a[name])).abs().max() / b[name].abs().max() for name in both}}
    return max(gap.item() for gap in gaps.values()), len(both)

T = min(128, model.cfg.block_size)
idx = torch.tensor([tokenizer.encode_ordinary(play)[:T]]) # (1, T)
reference = activations(hf, idx)
gap, compared = relative_gap(activations(model, idx), reference)
print(f"outputs of {{compared}} modules: largest relative difference {{gap:.1e}}")
assert gap < 1e-4
"""),
    ("code", """
gelu = F.gelu
with mock.patch.object(F, "gelu", lambda x, approximate: gelu(x)):
    with_erf, _ = relative_gap(activations(model, idx), reference)

norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
for norm in norms: norm.eps = 1e-3
large_eps, _ = relative_gap(activations(model, idx), reference)
for norm in norms: norm.eps = 1e-5

print(f"GELU with erf: {{with_erf:.1e}}; LayerNorm with ε = 1e-3: {{large_eps:.1e}}")
assert gap < min(with_erf, large_eps) / 10
"""),
    ("markdown", """
The third link is the logits and the loss of the same text.
"""),
    ("code", """
with torch.no_grad():
    logits, right = model(idx)[0], hf(idx).logits # (1, T, V)
    loss, right_loss = model(idx[:, :-1], idx[:, 1:])[1], hf(idx, labels=idx).loss
gap = ((logits - right).abs().max() / right.abs().max()).item()
print(f"logits: largest relative difference {{gap:.1e}}")
print(f"loss {{loss:.6f}}, by transformers {{right_loss:.6f}}")
assert gap < 1e-4 and (loss - right_loss).abs() < 1e-4
"""),
    ("markdown", """
The last links are the gradients and ten optimizer steps. The gradient of a parameter may differ by 1e-3 of
its norm, and the losses over ten steps by 1e-3 nats. This is more than chapter 05 allows, because it has
small models with random weights.
"""),
    ("chapter", "gradient_gap"),
    ("chapter", "ten_steps"),
    ("code", """
gradients, _ = gradient_gap(model, hf, idx)
losses = ten_steps(model, hf, idx)
steps = (losses[:, 0] - losses[:, 1]).abs().max().item()
print(f"gradients: largest relative difference {{gradients:.1e}}; ten steps: losses differ by {{steps:.1e}}")
print("losses:", *(f"{{loss:.4f}}" for loss in losses[:, 0].tolist()))
assert gradients < 1e-3 and steps < 1e-3
"""),
    ("markdown", """
## Greedy text

The ten steps have changed the weights, so both models are loaded again. Their greedy texts must be the same.
"""),
    ("code", """
model, tokenizer = load_model(NAME, "cpu")
hf = GPT2LMHeadModel.from_pretrained(folder).float().eval()
for prompt in ("Hello, I'm a language model,", "The meaning of life is", "In a shocking finding, scientists"):
    text, = generate_text(model, tokenizer, prompt, 40, greedy=True)
    ids = torch.tensor([tokenizer.encode_ordinary(prompt)])
    row = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40,
                      eos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot)[0].tolist()
    assert text == tokenizer.decode([i for i in row if i != tokenizer.eot])
    print(text + "\\n" + "-" * 60)
"""),
    ("markdown", """
## HellaSwag

We score {examples} in both styles. The expected accuracies of the 124M model are those of
[lm-eval](https://github.com/EleutherAI/lm-evaluation-harness) (harness) and of
[build-nanogpt](https://github.com/karpathy/build-nanogpt)'s way of scoring (completion). We allow a
difference of 0.05 percentage points, which is 5 of the 10,042 examples: where the two best endings are
almost equally likely, rounding decides, and rounding differs between machines.
"""),
    ("code", """
start = time.time()
examples = load_examples(limit=LIMIT)
accuracies = evaluate(model, examples, tokenizer).accuracies()
expected = dict(completion_acc=28.59, completion_acc_norm=29.45, harness_acc=28.92, harness_acc_norm=31.14)
asserted = NAME == "gpt2" and len(examples) == 10_042
for name, accuracy in accuracies.items():
    note = f"expected {{expected[name]:.2f}}" if asserted else ""
    print(f"{{name:20}} {{100 * accuracy.mean:6.2f}} ± {{100 * accuracy.stderr:.2f}} {{note}}")
print(f"{{len(examples):,}} examples in {{time.time() - start:.0f}} s")
"""),
    ("code", """
if asserted:
    for name, accuracy in accuracies.items(): assert abs(100 * accuracy.mean - expected[name]) <= 0.05, name
print("all scores are as expected" if asserted else "no scores are expected of this model or so few examples")
"""),
]


def chapter_cells(name: str) -> list[str]:
    "The sources of the cells of chapter 05 that define a function"
    def defines(source):
        try: body = ast.parse(source).body
        except SyntaxError: return False
        return any(isinstance(node, ast.FunctionDef) and node.name == name for node in body)

    cells = nbformat.read(CHAPTER, as_version=4).cells
    return [c.source for c in cells if c.cell_type == "code" and defines(c.source)]


def complaints() -> list[str]:
    "Functions that chapter 05 should define in one cell, and does not; `make test` prints them"
    counts = {name: len(chapter_cells(name)) for kind, name in PARTS if kind == "chapter"}
    return [f"{CHAPTER.name} has {n} cells that define {name}, and make gpt2 takes that cell from it"
            for name, n in counts.items() if n != 1]


def assemble(model: str, limit: int):
    "The notebook, without outputs"
    examples = f"the first {limit:,} examples" if limit else "all examples of its validation part"
    known = "OpenAI's 124M weights, `gpt2`" if model == "gpt2" else f"the model in `{Path(model).name}`"
    kernel = dict(name="python3", display_name="Python 3", language="python")
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=kernel))
    for kind, text in PARTS:
        text = text.strip()
        if kind == "markdown":
            cell = nbformat.v4.new_markdown_cell(text.format(model=known, examples=examples, book=BOOK))
        elif kind == "chapter": cell = nbformat.v4.new_code_cell(chapter_cells(text)[0])
        else: cell = nbformat.v4.new_code_cell(text.format(model=model, limit=limit))
        nb.cells.append(cell)
    return nb


def check_inputs(model: str, limit: int):
    "Raise an `InputError` of one line if the weights, the plays or HellaSwag's examples cannot be had"
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    from gpt2_nb.documents import open_source
    from gpt2_nb.hellaswag import load_examples
    from gpt2_nb.pretrained import find_pretrained
    hub_logging.set_verbosity_error() # its notes about retries; our message says what is missing
    disable_progress_bars()
    open_source("shakespeare")
    find_pretrained(model)
    load_examples(limit=limit)


def run(nb, out: Path) -> str:
    "Run the notebook and save it; what failed, or an empty string"
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    def report(cell, cell_index):
        first = next((line for line in cell.source.splitlines() if line.strip()), "")
        if cell.cell_type == "code": print(f"cell {cell_index}: {first}", flush=True)

    client = NotebookClient(nb, timeout=None, kernel_name="python3", on_cell_start=report,
                            resources={"metadata": {"path": str(ROOT)}})
    try: client.execute()
    except CellExecutionError as e: return f"{e.ename}: {e.evalue}".strip().splitlines()[0]
    finally:
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, out)
    return ""


def main():
    parser = argparse.ArgumentParser(prog="gpt2.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="gpt2, or a Hugging Face folder of a GPT-2")
    parser.add_argument("--limit", type=int, default=0, help="examples of HellaSwag; 0 for all")
    parser.add_argument("--out", default="runs/gpt2.ipynb", help="the notebook to write")
    args = parser.parse_args()
    from gpt2_nb.core import InputError

    if found := complaints(): sys.exit(f"make gpt2: {found[0]}")
    try: check_inputs(args.model, args.limit)
    except InputError as e: sys.exit(f"make gpt2: {e}")
    start, out = time.time(), ROOT/args.out
    model = args.model if args.model == "gpt2" else str(Path(args.model).resolve())
    failed = run(assemble(model, args.limit), out)
    if failed: sys.exit(f"make gpt2: a cell of {out.name} failed ({failed}); its output is in {out}")

    nb = nbformat.read(out, as_version=4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    texts = [o.text for o in outputs if o.get("name") == "stdout"]
    print("", *texts, f"{out.name}: every test passed, in {time.time() - start:.0f} s", sep="\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sys.stdout.reconfigure(errors="replace") # a console that is not UTF-8
    main()
