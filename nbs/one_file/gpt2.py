"""GPT-2 in one file: `python gpt2.py input.txt` trains a small one on the bytes of a text and lets it write.

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

# --- The model ------------------------------------------------------------------------------------

class KVCache:
    "Keys and values of one layer, written in place; for use under `no_grad`"
    def __init__(self, batch_size: int, n_head: int, max_len: int, head_dim: int,
                 device: torch.device | None = None, dtype: torch.dtype | None = None):
        self.k = torch.zeros(batch_size, n_head, max_len, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = 0 # positions filled so far

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        "Store the next keys and values"
        T = k.shape[2]
        start, end = self.length, self.length + T

        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class CausalSelfAttention(nn.Module):
    "Multi-head causal self-attention under GPT-2's parameter names"
    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0):
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd) # queries, keys and values of all heads
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None,
                mask: torch.Tensor | None = None) -> torch.Tensor: # (B, T, C)
        "Attend from every position to itself and all before it, or to what the mask allows"
        B, T, C = x.shape
        past = cache.length if cache else 0
        S = past + T # positions that can be seen

        parts = self.c_attn(x).split(C, dim=2) # (B, T, 3C) -> three times (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in parts) # (B, H, T, D)
        if cache: k, v = cache.append(k, v) # (B, H, S, D)

        causal = mask is None and T > 1 # one new position may see everything
        if causal and past: # `is_causal` would align the triangle with the first key
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(past)
            causal = False
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal) # (B, H, T, D)

        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


@dataclass(frozen=True)
class GPTConfig:
    "The shape of a GPT-2, by default that of the 124M model"
    vocab_size: int = 50257 # V, number of token ids
    block_size: int = 1024 # longest context, in tokens
    n_layer: int = 12 # L, number of blocks
    n_head: int = 12 # H, attention heads in a block
    n_embd: int = 768 # C, width of the residual stream
    dropout: float = 0.0 # probability of dropping an activation in training
    padded_vocab_size: int = 0 # rows of the embedding, at least `vocab_size`; 0 for no padding

    @property
    def vocab_rows(self) -> int:
        "Rows of the token embedding, including the padding"
        return self.padded_vocab_size or self.vocab_size


class MLP(nn.Module):
    "Two linear layers around a GELU, four times as wide inside"
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor: # (..., C)
        "Transform every position independently of the others"
        x = F.gelu(self.c_fc(x), approximate="tanh") # (..., 4C)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    "Attention, then an MLP, each reading a normalised residual stream and adding to it (pre-LN)"
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = CausalSelfAttention(cfg.n_embd, cfg.n_head, cfg.dropout)

        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None,
                mask: torch.Tensor | None = None) -> torch.Tensor: # (B, T, C)
        "The residual stream after both branches have been added"
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


def mean_loss(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -1) -> torch.Tensor:
    "Mean cross-entropy of the targets that count"
    logits = logits.flatten(0, -2).float() # (N, V)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


@torch.no_grad()
def init_weights(model: nn.Module, cfg: GPTConfig):
    "Draw weights as GPT-2 does: std 0.02, or 0.02 / sqrt(2 n_layer) where a branch ends"
    for name, p in model.named_parameters():
        if name.endswith("bias"): p.zero_()
        elif "ln_" in name: p.fill_(1)
        elif name.endswith("c_proj.weight"): p.normal_(std=0.02 / (2 * cfg.n_layer)**0.5)
        elif "wte" in name: p.zero_()[:cfg.vocab_size].normal_(std=0.02) # the padding stays zero
        else: p.normal_(std=0.02)


class Transformer(nn.Module):
    "GPT-2 without its head: embeddings, blocks and the last LayerNorm"
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)

    def run_block(self, block, x, cache, mask): # (B, T, C) -> (B, T, C)
        "Run one block; assign a function to `run_block` to run the blocks in another way"
        return block(x, cache, mask)

    def forward(self, idx: torch.Tensor, caches: list[KVCache] | None = None,
                pos: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        "The residual stream as the head reads it"
        past = caches[0].length if caches else 0

        if pos is None: pos = torch.arange(past, past + idx.shape[1], device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos)) # (B, T, C)
        for block, cache in zip(self.h, caches or [None] * len(self.h)):
            x = self.run_block(block, x, cache, mask)
        return self.ln_f(x)


class GPT(nn.Module):
    "GPT-2 (Radford et al. 2019): `GPT(cfg)(idx, targets=None)` gives `(logits, loss)`"
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.transformer = Transformer(cfg)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

        if cfg.padded_vocab_size: # zeros, so that padding draws no random numbers
            self.transformer.wte.weight = nn.Parameter(torch.zeros(cfg.vocab_rows, cfg.n_embd))
            self.transformer.wte.num_embeddings = cfg.vocab_rows
            self.lm_head.out_features = cfg.vocab_rows

        self.lm_head.weight = self.transformer.wte.weight # tied
        init_weights(self, cfg)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                caches: list[KVCache] | None = None, pos: torch.Tensor | None = None,
                mask: torch.Tensor | None = None, *,
                loss: Callable | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        "Predict the token after every position"
        x = self.hidden(idx, caches, pos, mask) # (B, T, C)

        if targets is not None and loss is not None:
            return None, loss(x, self.lm_head.weight, targets, self.cfg.vocab_size)

        logits = self.head(x) # (B, T, V)
        return logits, None if targets is None else mean_loss(logits, targets)

    def hidden(self, idx: torch.Tensor, caches: list[KVCache] | None = None,
               pos: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        "The residual stream as the head reads it"
        return self.transformer(idx, caches, pos, mask)

    def head(self, x: torch.Tensor) -> torch.Tensor: # (..., V), without the padding
        "Logits of the given positions"
        return F.linear(x, self.lm_head.weight)[..., :self.cfg.vocab_size]

    def new_caches(self, batch_size: int, max_len: int | None = None) -> list[KVCache]:
        "Empty caches for generation"
        weight = self.lm_head.weight
        cfg = self.cfg
        shape = (batch_size, cfg.n_head, max_len or cfg.block_size, cfg.n_embd // cfg.n_head)
        where = dict(device=weight.device, dtype=weight.dtype)
        return [KVCache(*shape, **where) for _ in self.transformer.h]


# --- Generation -----------------------------------------------------------------------------------

def candidates(logits: torch.Tensor, top_k: int | None = None,
               top_p: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    "The tokens that may be drawn, likeliest first, at least one in each row"
    probs = logits.softmax(-1)
    V = logits.shape[-1]
    if top_p is None or top_p == 1: return probs.topk(min(top_k or V, V))

    K = min(top_k or 256, V)
    best, ids = probs.topk(K)
    while top_k is None and K < V and (best.sum(-1) < top_p).any():
        K = min(8 * K, V)
        best, ids = probs.topk(K)

    total = best.sum(-1, keepdim=True) if top_k else 1.0
    cut = best.cumsum(-1) - best >= top_p * total # the tokens before it are enough
    cut[:, 0] = False # even if fp32 rounds `top_p` to 0
    return best.masked_fill(cut, 0.0), ids


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor: # (B,)
    "Draw one id from each row of (B, V) probabilities, which need not sum to 1"
    # MPS has no float64
    exact = torch.float64 if probs.device.type in ("cpu", "cuda") else torch.float32
    ends = probs.to(exact).cumsum(-1) # (B, V)
    darts = torch.rand(len(probs), 1, device=probs.device, dtype=exact, generator=generator)
    # a dart exactly on an end belongs to the next segment, so one of length 0 is never hit
    ids = torch.searchsorted(ends, darts * ends[:, -1:], right=True)[:, 0]
    return ids.clamp(max=probs.shape[-1] - 1)


def next_ids(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
    "Choose the next token of each row, (B, V) to (B,); a temperature of 0 takes the likeliest"
    if temperature < 1e-6 or top_k == 1: return logits.argmax(-1) # dividing by less could overflow
    logits = logits / temperature
    if top_k is None and top_p is None: return draw(logits.softmax(-1), generator)
    probs, ids = candidates(logits, top_k, top_p) # (B, K)
    return ids.gather(-1, draw(probs, generator)[:, None])[:, 0]


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


# --- Data -----------------------------------------------------------------------------------------

def shuffled(n: int, seed: int, epoch: int) -> np.ndarray: # (n,) each number below n once
    "A permutation that depends on `seed` and `epoch` alone, in every version of NumPy"
    keys = np.random.PCG64([seed, epoch, 1]).random_raw(n)
    return np.argsort(keys, kind="stable")


def cut_windows(shards: list[np.ndarray], shard: np.ndarray, at: np.ndarray,
                block_size: int) -> tuple[torch.Tensor, torch.Tensor]: # (B, T) int64 each
    "Inputs and targets of the windows that begin at the given places"
    n = block_size + 1
    windows = [shards[s][a:a + n] for s, a in zip(shard.tolist(), at.tolist())]

    # NumPy copies without Python's lock: a thread that waits for the disk here blocks no other
    ids = np.concatenate(windows).reshape(len(windows), n) # (B, T + 1)
    x = torch.from_numpy(ids[:, :-1].astype(np.int64))
    y = torch.from_numpy(ids[:, 1:].astype(np.int64))
    return x, y


def batches(ids: np.ndarray, batch_size: int, block_size: int, seed: int): # yields x, y of (B, T)
    "Windows that do not overlap, each once in an epoch, in an order that depends on the seed"
    n = (len(ids) - 1) // block_size
    for epoch in range(10**9):
        order = shuffled(n, seed, epoch)
        for i in range(0, n - batch_size + 1, batch_size):
            at = order[i:i + batch_size] * block_size
            yield cut_windows([ids], np.zeros_like(at), at, block_size)


# --- Optimisation ---------------------------------------------------------------------------------

def param_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    "Weights of matrix products, which decay, and embeddings, biases and norms, which do not"
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decay = []
    rest = []

    for name, p in model.named_parameters(): # a tied weight comes once, named as the embedding
        if not p.requires_grad: continue
        group = decay if p.ndim >= 2 and p not in embeddings else rest
        group.append((name, p))

    groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    return [g for g in groups if g["params"]]


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float = 0.1,
                   betas: tuple[float, float] = (0.9, 0.95),
                   eps: float = 1e-08) -> torch.optim.AdamW:
    "AdamW (Loshchilov and Hutter 2017) with GPT-3's settings, fused on CUDA and CPU"
    groups = param_groups(model, weight_decay)

    # fused where we test it; elsewhere torch chooses
    fused = all(p.device.type in ("cuda", "cpu") for g in groups for _, p in g["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)


SCHEDULES = { # the share of the peak that is left when a share `done` of the decay is over
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "wsd": lambda done: 1 - done, # but its decay begins later
}


def lr_at(step: int, max_iters: int, learning_rate: float, warmup_iters: int = 0,
          min_lr: float = 0.0, schedule: str = 'cosine', decay_fraction: float = 0.2) -> float:
    "Learning rate of one step: linear warm-up, then `schedule` down to `min_lr`"
    if step < warmup_iters: return learning_rate * (step + 1) / warmup_iters

    start = warmup_iters
    if schedule == "wsd": start = max(start, round(max_iters * (1 - decay_fraction)))

    # a run that is all warm-up has no decay to divide by
    done = (step - start) / max(max_iters - start, 1)
    left = SCHEDULES[schedule](min(max(done, 0), 1.0))
    return min_lr + (learning_rate - min_lr) * left


# --- Training -------------------------------------------------------------------------------------

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
    start = torch.tensor([[ord("\n")]], device=device)
    written = generate(model.eval(), start, 300, temperature=0.8, top_k=50)[0].tolist()
    print(bytes(written).decode(errors="replace"))


if __name__ == "__main__": main()
