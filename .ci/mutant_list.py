"""The mistakes that `make mutants` makes, by chapter.

Of each: a name, what is wrong in plain words, and texts in pairs, code and what replaces it.
"""

MUTANTS = {
    "00_core": [
        (
            "same-temporary",
            "two processes that write one file use the same temporary name",
            'os.urandom(4).hex()}.tmp"',
            '00000000.tmp"',
        ),
        (
            "dtype-ignored",
            "`test_tensor` does not compare dtypes",
            'assert a.dtype == b.dtype, f"dtypes differ: {a.dtype} and {b.dtype}"',
            "pass",
        ),
        (
            "numpy-unseeded",
            "NumPy's generator is not seeded",
            "    np.random.seed(seed)\n",
            "    pass\n",
        ),
        (
            "debris",
            "a failed write leaves its temporary file behind",
            "finally: temporary.unlink(missing_ok=True)",
            "finally: pass",
        ),
        (
            "open-limit",
            "a limit that excludes its bound allows it",
            '("above", gt, self.above)',
            '("above", ge, self.above)',
        ),
    ],
    "01_bpe": [
        (
            "heap-order",
            "the queue of merges is not sorted, so the last pair comes first",
            "heap = [r * n + i for i, r in enumerate(rank) if r is not None]\n    heapify(heap)",
            "heap = [r * n + i for i, r in enumerate(rank) if r is not None]\n    heap.reverse()",
        ),
        (
            "stale-count",
            "a pair is merged although its count has changed",
            "if self.counts[pair] == -count: return pair",
            "return pair",
        ),
        (
            "documents-joined",
            "words are counted across the ends of documents",
            "for document in text.split(EOT) for word",
            "for document in [text] for word",
        ),
        (
            "vocab-size",
            "the number of ids leaves out `<|endoftext|>`",
            "self.n_vocab = self.eot + 1",
            "self.n_vocab = self.eot",
        ),
    ],
    "02_attention": [
        (
            "no-root",
            "scores are divided by the head's width, not by its root",
            "scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=T > 1)",
            "scaled_dot_product_attention(q, k, v, None, dropout_p, T > 1, scale=1 / q.shape[-1])",
        ),
        (
            "mask-off-by-one",
            "with a cache, each position sees one position of its future",
            ".tril(past)",
            ".tril(past + 1)",
        ),
        (
            "cudnn-with-mask",
            "cuDNN may compute attention with a mask, although its gradients can be NaN",
            "SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]",
            "SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]",
        ),
        (
            "documents-not-causal",
            "within a document, a token sees those after it",
            "None, dropout_p, is_causal=True)",
            "None, dropout_p, is_causal=False)",
        ),
        (
            "heads-mixed",
            "heads are cut across positions instead of channels",
            "(t.view(B, T, self.n_head, -1).transpose(1, 2) for t in parts)",
            "(t.reshape(B, self.n_head, T, -1) for t in parts)",
        ),
        (
            "cache-position",
            "the cache counts one position per call",
            "self.length = end",
            "self.length = start + 1",
        ),
        (
            "dropout-in-eval",
            "attention drops weights outside training too",
            "self.dropout if self.training else 0.0",
            "self.dropout",
        ),
    ],
    "03_model": [
        (
            "exact-gelu",
            "the exact GELU replaces GPT-2's approximation with tanh",
            'approximate="tanh"',
            'approximate="none"',
        ),
        (
            "untied",
            "the head's weights are a copy of the embedding",
            "self.lm_head.weight = self.transformer.wte.weight",
            "self.lm_head.weight = nn.Parameter(self.transformer.wte.weight.detach().clone())",
        ),
        (
            "residual-scale",
            "residual projections are scaled by the layers, not by twice as many",
            "std=std / (2 * cfg.n_layer)**0.5",
            "std=std / cfg.n_layer**0.5",
        ),
        (
            "post-norm",
            "LayerNorm comes after attention, as in GPT-1",
            "x = x + self.attn(self.ln_1(x), cache, mask)",
            "x = self.ln_1(x + self.attn(x, cache, mask))",
        ),
        (
            "positions-from-0",
            "positions start at 0 behind a cache",
            "torch.arange(past, past + idx.shape[1]",
            "torch.arange(0, idx.shape[1]",
        ),
        (
            "ignored-counted",
            "targets that are ignored count in the mean",
            "(targets != ignore_index).sum().clamp(min=1)",
            "targets.numel()",
        ),
    ],
    "04_memory": [
        (
            "overflow",
            "exponentials are taken without subtracting the maximum",
            "    p -= p.amax(-1, keepdim=True)",
            "    pass",
        ),
        (
            "padding-scored",
            "the padding of the vocabulary takes part in the softmax",
            'cut[vocab_size:] = float("-inf")',
            "cut[vocab_size:] = 0.0",
        ),
        (
            "last-chunk",
            "the gradient of the head is that of the last chunk alone",
            "if wanted[1]: grad_w += p.t() @ a",
            "if wanted[1]: grad_w = p.t() @ a",
        ),
    ],
    "05_pretrained": [
        (
            "square-matrix",
            "the square matrix `attn.c_proj` is not transposed",
            '"attn.c_attn.weight", "attn.c_proj.weight", "mlp',
            '"attn.c_attn.weight", "mlp',
        ),
        (
            "bias-as-mask",
            "the bias of `c_attn` is taken for a mask and left out",
            'MASKS = ".attn.bias", ',
            'MASKS = "attn.bias", "attn.c_attn.bias", ',
        ),
    ],
    "06_folders": [
        ("adapter-scale", "adapters are merged without their scale", "+ scale * B @ A", "+ B @ A"),
        (
            "hash-unchecked",
            "the hashes of a checkpoint are not compared",
            "if sha256(checkpoint/native_path(name)) != digest:",
            "if not sha256(checkpoint/native_path(name)):",
        ),
        (
            "oldest-first",
            "the oldest checkpoint is tried first",
            "sorted(steps, reverse=True)",
            "sorted(steps)",
        ),
    ],
    "07_generate": [
        (
            "top-p-one-few",
            "top-p leaves out the token that reaches the threshold",
            "best.cumsum(-1) - best >= top_p * total",
            "best.cumsum(-1) >= top_p * total",
        ),
        (
            "temperature",
            "logits are multiplied by the temperature",
            "logits = logits / temperature",
            "logits = logits * temperature",
        ),
        (
            "stale-cache",
            "the cache is kept when the window moves",
            "for cache in self.caches or []: cache.length = 0",
            "self.seen = n - 1 if self.caches else self.seen",
        ),
        (
            "eval-mode",
            "all parts of a model are in training mode after generation",
            "for m in training: m.training = True",
            "model.train()",
        ),
        (
            "future-places",
            "a step of fixed shape sees one place that is not filled yet",
            "(self.places <= self.place) # (B, S)",
            "(self.places <= self.place + 1) # (B, S)",
        ),
        (
            "lot-positions",
            "a step of fixed shape counts positions from the first column, also after padding",
            "pos = self.place - self.begin # (B, 1)",
            "pos = self.place - 0 * self.begin # (B, 1)",
        ),
        (
            "late-columns",
            "`on_token` is called with columns after the end of all rows",
            "end = int(rows.ends.max()) if stopped else column",
            "end = column",
        ),
    ],
    "08_shards": [
        (
            "byte-order",
            "ids are written with the high byte first",
            'ids.astype("<u2", copy=False)',
            'ids.astype(">u2", copy=False)',
        ),
        (
            "bytes-counted",
            "the header counts bytes instead of tokens",
            "header[:3] = MAGIC, VERSION, len(ids)",
            "header[:3] = MAGIC, VERSION, ids.nbytes",
        ),
        (
            "half-a-digest",
            "the quick hash of a shard leaves out its end",
            "f.seek(max(0, n - size))",
            "f.seek(0)",
        ),
        (
            "unchecked-download",
            "a shard from a store is kept whatever its hash",
            "if digest and found.hexdigest() != digest:",
            "if digest and not found.hexdigest():",
        ),
    ],
    "09_documents": [
        (
            "byte-order-mark",
            "a byte order mark is read as text",
            'codecs.getincrementaldecoder("utf-8-sig")()',
            'codecs.getincrementaldecoder("utf-8")()',
        ),
        (
            "cut-marker",
            "a separator that lies across two reads is missed",
            "text.find(EOT, max(0, old - len(EOT)))",
            "text.find(EOT, old)",
        ),
        (
            "resume-skips-one",
            "reading goes on one document too late",
            "islice(read(self.file), self.at[1], None)",
            "islice(read(self.file), self.at[1] + bool(self.at[1]), None)",
        ),
    ],
    "10_fineweb": [
        (
            "written-twice",
            "after a kill, ids that are in a shard are written again",
            'at = position.get("skip", 0)',
            "at = 0",
        ),
        (
            "empty-documents",
            "empty documents get a separator",
            "kept = [item for item in batch if not blank(item)]",
            "kept = batch",
        ),
        (
            "wrong-split",
            "validation tokens are not cut off the training part",
            "left = (limit or sys.maxsize) - begun",
            "left = sys.maxsize - begun",
        ),
        (
            "uncounted-parts",
            "each part takes its first character for that of the whole text",
            'part["seen"] = seen',
            'part["seen"] = 0',
        ),
    ],
    "11_loader": [
        (
            "same-windows",
            "all ranks read the windows of the first",
            "[rank * batch_size:(rank + 1) * batch_size]",
            "[:batch_size]",
        ),
        (
            "last-window",
            "the last window is dropped where it fits exactly",
            "np.maximum(lengths - 1 - self.offsets, 0)",
            "np.maximum(lengths - 2 - self.offsets, 0)",
        ),
        (
            "unshifted",
            "the targets are the inputs",
            "ids[:, 1:].astype(np.int64)",
            "ids[:, :-1].astype(np.int64)",
        ),
        (
            "one-order",
            "each epoch has the same order",
            "np.random.PCG64([seed, epoch, 1])",
            "np.random.PCG64([seed, 1])",
        ),
        (
            "last-state",
            "the state of the loader stays where it began",
            'self.epoch, self.position = state["epoch"], state["position"]\n    return batch',
            "return batch",
        ),
    ],
    "12_optim": [
        (
            "biases-decay",
            "biases and norms decay",
            "decay if p.ndim >= 2 and p not in embeddings else rest",
            "decay if p not in embeddings else rest",
        ),
        ("embeddings-decay", "embeddings decay", "p.ndim >= 2 and p not in embeddings", "p.ndim >= 2"),
        (
            "warm-up",
            "the first step of the warm-up has a learning rate of 0",
            "learning_rate * (step + 1) / warmup_iters",
            "learning_rate * step / warmup_iters",
        ),
        (
            "floor",
            "the schedule ends at 0 instead of `min_lr`",
            "return min_lr + (learning_rate - min_lr) * left",
            "return learning_rate * left",
        ),
    ],
    "13_distributed": [
        (
            "everybody-reports",
            "each rank that fails reports its error, and not only the first",
            "if first and isinstance(e, Exception):",
            "if isinstance(e, Exception):",
        ),
        (
            "same-question",
            "a delayed poll answers with what it has just asked",
            "before, self.pending = self.pending, self.ask(flag)",
            "before = self.pending = self.ask(flag)",
        ),
        (
            "no-all-reduce",
            "the sum over ranks is this rank's own",
            "    torch_dist.all_reduce(x)\n",
            "    pass\n",
        ),
        (
            "sync-inverted",
            "gradients are averaged in each micro-batch but the last",
            "isinstance(inner, DistributedDataParallel) and not on",
            "isinstance(inner, DistributedDataParallel) and on",
        ),
        ("no-limit", "a limit of 0 scales all gradients to 0", 'max_norm or float("inf")', "max_norm"),
    ],
    "14_step": [
        (
            "undivided",
            "micro-batches are added up without their shares",
            "loss = loss * shares[i]",
            "loss = loss * 1.0",
        ),
        (
            "equal-shares",
            "each micro-batch has the same share, however many targets it has",
            "return counts * dist.world_size / total",
            "return torch.ones_like(total) / len(batches) * (counts > -1)",
        ),
        (
            "no-zero-grad",
            "gradients are not set to zero after a step",
            "    optimizer.zero_grad(set_to_none=True)\n",
            "    pass\n",
        ),
        (
            "clip-after-step",
            "gradients are clipped after the step",
            "norm = clip_grad_norm(model.parameters(), grad_clip)",
            "norm = clip_grad_norm(model.parameters(), 0)",
            "    optimizer.zero_grad(set_to_none=True)\n",
            "    clip_grad_norm(model.parameters(), grad_clip)\n    optimizer.zero_grad(set_to_none=True)\n",
        ),
        (
            "bits-per-token",
            "the loss in bits is divided by tokens instead of bytes",
            "/ math.log(2) / n_bytes",
            "/ math.log(2) / n_tokens",
        ),
        (
            "mean-of-means",
            "the validation loss is the mean over batches, however long they are",
            "(means @ torch.tensor(counts, dtype=torch.float64)).item() / n, n",
            "means.mean().item(), n",
        ),
    ],
    "15_hellaswag": [
        (
            "per-token",
            "`acc_norm` in the harness's style divides by tokens instead of characters",
            "[gap + ending for ending in endings], [len(ending) for ending in endings]",
            "[gap + ending for ending in endings], None",
        ),
        ("branches-mixed", "an ending sees the endings before it", "causal & (trunk | same)", "causal"),
        (
            "branch-positions",
            "positions count on from one ending to the next",
            "np.arange(Tc, Tc + n), np.full(n, branch)",
            "np.arange(end, end + n), np.full(n, branch)",
        ),
        (
            "stale-batches",
            "the kept batches are used again for another rank or budget",
            "key = device, model.cfg.block_size, budget, rank, world_size",
            "key = device, model.cfg.block_size",
        ),
    ],
    "16_checkpoint": [
        (
            "own-names",
            "each rank draws a temporary name of its own",
            "broadcast_object(drawn, dist, group)",
            "temporary_name(final)",
        ),
        (
            "no-generators",
            "a checkpoint leaves out the random generators",
            "training = moments | random_state(self.dist)",
            "training = moments",
        ),
        (
            "no-moments",
            "a checkpoint leaves out the optimizer's state",
            "training = moments | random_state(self.dist)",
            "training = random_state(self.dist)",
        ),
        (
            "data-from-start",
            "a resumed run reads its data from the start",
            '    loader.load_state_dict(state["loader"])\n',
            "    pass\n",
        ),
        (
            "no-copy",
            "the thread writes the weights themselves, which the next step changes",
            "result[name] = copies[name].copy_(mine, non_blocking=mine.is_cuda)",
            "result[name] = mine",
        ),
        (
            "best-before-complete",
            "what needs a complete checkpoint is done while it is being written",
            "if self.writing: self.later.append(f)",
            "if not self.writing: self.later.append(f)",
        ),
        (
            "copy-overwritten",
            "the next state is copied over one that is still being written",
            "        self.wait()\n        waited_s",
            "        waited_s",
        ),
        (
            "best-removed",
            "the best checkpoint is removed with the old ones",
            "if s < kept[0] and s != best:",
            "if s < kept[0]:",
        ),
    ],
    "17_runlog": [
        (
            "one-line-more",
            "a resumed run keeps the line after its checkpoint",
            'line.get("step", 0) <= step and not',
            'line.get("step", 0) <= step + 1 and not',
        ),
        ("unflushed", "a line of the log stays in memory", "        self.file.flush()", "        pass"),
        (
            "skips-add-up",
            "skipped steps are counted although others came between them",
            "self.streak = self.streak + 1 if skipped else 0",
            "self.streak += bool(skipped)",
        ),
    ],
    "18_recipe": [
        (
            "too-many-sequences",
            "each rank takes the sequences of all ranks",
            "sequences = tokens // (T * world_size)",
            "sequences = tokens // T",
        ),
        (
            "val-one-few",
            "validation leaves out its last target",
            "ids[:cfg.val_tokens + 1]",
            "ids[:cfg.val_tokens]",
        ),
        (
            "warm-up-too-long",
            "a warm-up that is longer than the run is accepted",
            "cfg.warmup_iters > cfg.max_iters and not cfg.resume",
            "cfg.warmup_iters > 2 * cfg.max_iters and not cfg.resume",
        ),
    ],
    "19_train": [
        (
            "schedule-restarts",
            "the schedule starts again when a run resumes",
            "lr = lr_at(run.step, ",
            "lr = lr_at(run.step - first, ",
        ),
        (
            "resume-off-by-one",
            "a resumed run counts one step too many",
            "step = load_checkpoint(*found, model, optimizer, loader, dist) if found else 0",
            "step = load_checkpoint(*found, model, optimizer, loader, dist) + 1 if found else 0",
        ),
        (
            "stopped-unsaved",
            "a run that is told to stop does not save its last step",
            "(stopped or late or due(cfg.save_interval))",
            "due(cfg.save_interval)",
        ),
    ],
    "20_lora": [
        (
            "alpha-only",
            "the correction is scaled by alpha alone",
            "self.scale = alpha / r",
            "self.scale = alpha",
        ),
        (
            "b-drawn",
            "both matrices of an adapter are drawn, so that it changes the model at once",
            "B = torch.zeros(linear.out_features, r, **like)",
            "B = torch.empty(linear.out_features, r, **like).normal_(std=0.02)",
        ),
        (
            "unfrozen",
            "the weights of the model are trained with the adapters",
            "    model.requires_grad_(False)\n",
            "    pass\n",
        ),
    ],
    "21_finetune": [
        (
            "prompt-learnt",
            "the loss counts the prompt",
            "y = [-1] * len(request) + [*answer, tokenizer.eot]",
            "y = [*request, *answer, tokenizer.eot]",
        ),
        (
            "end-unlearnt",
            "the end of an answer is not learnt",
            "[*answer, tokenizer.eot]",
            "[*answer, -1]",
        ),
        (
            "room-lost",
            "packing takes one place too much for each example",
            "room[free - n].append(window)",
            "room[max(free - n - 1, 0)].append(window)",
        ),
    ],
<<<<<<< /tmp/tmpw0g_kgae/a
<<<<<<< /tmp/tmp0w0q57_g/a
    "23_ladder": [
        (
            "other-tokens",
            "each rung draws tokens of its own, so that losses cannot be compared",
            "generator=torch.Generator().manual_seed(cfg.seed)",
            "generator=torch.Generator().manual_seed(torch.seed() % 2**31)",
        ),
        (
            "last-first",
            "allocations and releases are added up in the wrong order",
            'events.sort(key=lambda e: e["ts"])',
            'events.sort(key=lambda e: -e["ts"])',
        ),
        (
            "upside-down",
            "a ratio is the time of a version divided by that of the reference",
            "ratio=spread([a / b for a, b in zip(first, mine)])",
            "ratio=spread([b / a for a, b in zip(first, mine)])",
        ),
        (
            "built-upon",
            "the rungs above checkpointing keep it",
            'if "ratio" in done[rung.name] and rung.kept: below = rung',
            'if "ratio" in done[rung.name]: below = rung',
        ),
        (
            "nan-agrees",
            "a loss that is not a number agrees with any other",
            "return abs(loss - below) <= TOLERANCE[dtype] * abs(below)",
            "return not abs(loss - below) > TOLERANCE[dtype] * abs(below)",
        ),
        (
            "measured-again",
            "a ladder that was killed begins again at its lowest rung",
            'done = {line["name"]: line for line in before if line["kind"] == "rung"}',
            "done = {}",
=======
    "24_doctor": [
        (
            "first-line-counts",
            "of two lines with the same step, the earlier one counts",
            "for line in lines if line[\"kind\"] == kind}",
            "for line in reversed(lines) if line[\"kind\"] == kind}",
        ),
        (
            "old-init",
            "every run is expected to have begun with a standard deviation of 0.02",
            "(std or 0.02 * math.sqrt(768 / width)) ** 2",
            "0.02 ** 2",
        ),
        (
            "busy-machine",
            "one slow moment of a machine counts as slow steps",
            "if lost <= LOST or tenths <= 5:",
            "if lost <= LOST:",
        ),
        (
            "unordered-hash",
            "windows with the same ids in another order have the same hash",
            "x[:-k] * np.uint64(power) + x[k:]",
            "x[:-k] + x[k:]",
>>>>>>> /tmp/tmp0w0q57_g/c
=======
    "22_plan": [
        (
            "attention-uncounted",
            "the products of queries and keys are left out",
            "attention=12 * L * C * T,",
            "attention=0,",
        ),
        (
            "moments-once",
            "only one of AdamW's two moments is counted",
            "optimizer=8 * P // shards)",
            "optimizer=4 * P // shards)",
        ),
        (
            "mask-free",
            "the memory of a mask for documents is left out",
            "    if cfg.document_mask and device != \"cuda\":",
            "    if False:",
        ),
        (
            "ring-halved",
            "an all-reduce passes the gradients only once",
            "busy, hidden = 2 * once,",
            "busy, hidden = once,",
        ),
        (
            "update-repeated",
            "the update is counted once for each micro-batch",
            "whole_s = accumulate * max(step_s - update_s, 0.1 * step_s) / part + update_s",
            "whole_s = accumulate * step_s / part",
        ),
        (
            "hours-ignored",
            "--fit does not look at the hours",
            '["cost"]["hours"] <= 0.95 * cfg.hours',
            '["cost"]["hours"] <= 95 * cfg.hours',
>>>>>>> /tmp/tmpw0g_kgae/c
        ),
    ],
}
