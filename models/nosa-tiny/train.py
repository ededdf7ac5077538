#!/usr/bin/env python3
"""The training recipe of nosa-tiny, in one file: prepare, train, eval, export, sample."""
import argparse
import json
import math
import os
import random
import re
import sys
import time

import numpy as np

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:      # without a GPU the plain functions do
    triton = None

HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, "config.json")) as _f:
    CONFIG = json.load(_f)
NOSA = CONFIG["nosa"]
BLOCK, SIZE, STRIDE = NOSA["block_size"], NOSA["kernel_size"], NOSA["kernel_stride"]
PER = BLOCK // STRIDE                      # windows that start in a block
HEAD_DIM, EPS = CONFIG["head_dim"], CONFIG["rms_norm_eps"]
DTYPE = torch.bfloat16
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TUNE = {  # launch parameters of the kernels, the best of a few measured on an H100
    "forward": dict(num_warps=4, num_stages=2),
    "backward_q": dict(num_warps=8, num_stages=2),
    "backward_kv": dict(num_warps=8, num_stages=3),
    "score": dict(num_warps=8, num_stages=2),
}


# ----------------------------------------------------------------------------------------------
# Data: whole books in, one stream of tokens out.
# ----------------------------------------------------------------------------------------------
DATA_REPOSITORY = "https://github.com/mlschmitt/classic-books-markdown"
DATA_COMMIT = "944882722e9a96fa6cf2739dc2ea757e101f412f"
LAST_YEAR = 1929  # books whose front matter names a later year, or no four-digit year, are left out
LEFT_OUT = {"Samuel Richardson/Clarissa.md", "Various/King James Bible.md"}
HELD_OUT = [
    "Arthur Conan Doyle/The Lost World.md",
    "Charles Dickens/Hard Times.md",
    "Edith Wharton/Summer.md",
    "Fyodor Dostoyevsky/The Gambler.md",
    "H.G. Wells/The Invisible Man.md",
    "Jane Austen/Persuasion.md",
    "John Stuart Mill/On Liberty.md",
    "Joseph Conrad/Victory.md",
    "L. Frank Baum/Ozma of Oz.md",
    "Mary Kingsley/Travels in West Africa.md",
    "Nathaniel Hawthorne/The House of the Seven Gables.md",
    "Robert Louis Stevenson/Kidnapped.md",
]
VOCAB_SIZE = 8192
UNK, BOS, EOS = 0, 1, 2
FOLD = str.maketrans({
    "\ufeff": "", "\u200b": "", "\u200a": " ", "\u2009": " ", "\u00a0": " ", "\u00ad": "",
    "\u2014": "--", "\u2013": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u2026": "...", "\r": "", "\t": " ",
})


def clean_book(text):
    """Returns (year or None, plain text): front matter, emphasis, rules and heading marks go."""
    head = re.search(r"^## Year:(.*)$", text[:2000], re.M)
    years = re.findall(r"\b(\d{4})\b", head.group(1)) if head else []
    year = max(map(int, years)) if years else None
    body = re.split(r"^-{5,}\s*$", text, maxsplit=1, flags=re.M)
    text = (body[1] if len(body) == 2 else text).translate(FOLD)
    text = re.sub(r"<[^<>\n]{1,80}>", "", text)                          # stray HTML tags
    text = re.sub(r"!?\[([^\[\]\n]*)\]\([^()\n]*\)", r"\1", text)        # links, images
    text = re.sub(r"^[ ]*([-*_][ ]*){3,}$", "", text, flags=re.M)        # horizontal rules
    text = re.sub(r"^#{1,6}[ ]*", "", text, flags=re.M)                  # heading marks
    text = re.sub(r"\\([*_#\[\]\-.>`])", r"\1", text)                    # markdown escapes
    text = re.sub(r"\*{1,3}([^*\n]+?)\*{1,3}", r"\1", text)              # *emphasis*
    text = re.sub(r"(?<![A-Za-z0-9])_{1,2}([^_\n]+?)_{1,2}(?![A-Za-z0-9])", r"\1", text)
    text = re.sub(r"[ ]+$", "", text, flags=re.M)
    text = re.sub(r"[ ]{2,}", " ", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return year, text.strip() + "\n"


def read_books(folder):
    """Yields (path, text) of every usable book, in path order."""
    paths = sorted(os.path.relpath(os.path.join(root, name), folder)
                   for root, _, files in os.walk(folder) for name in files
                   if name.endswith(".md") and name != "README.md")
    for path in paths:
        if path in LEFT_OUT:
            continue
        with open(os.path.join(folder, path), encoding="utf-8", errors="replace") as f:
            year, text = clean_book(f.read())
        if year is not None and year <= LAST_YEAR:
            yield path, text


def train_tokenizer(books, out, sample_bytes=64_000_000, seed=1):
    """A SentencePiece BPE model of VOCAB_SIZE pieces from a random sample of paragraphs."""
    import sentencepiece as spm
    rng = random.Random(seed)
    total = sum(len(text) for path, text in books if path not in HELD_OUT)
    share = min(1.0, sample_bytes / total)
    sample = out + ".sample.txt"
    with open(sample, "w", encoding="utf-8") as f:
        for path, text in books:
            if path in HELD_OUT:
                continue
            for line in text.split("\n"):
                if line and rng.random() < share:
                    f.write(line[:8000] + "\n")
    spm.SentencePieceTrainer.train(
        input=sample, model_prefix=out, model_type="bpe", vocab_size=VOCAB_SIZE,
        byte_fallback=True, character_coverage=0.9999, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=-1, max_sentence_length=16384,
        user_defined_symbols=["<|im_start|>", "<|im_end|>", "\n", "\n\n"],
        num_threads=2, train_extremely_large_corpus=False)
    os.remove(sample)

# ----------------------------------------------------------------------------------------------
# Kernels (Triton). One tile is BQ query tokens times the G query heads of one KV head, which all
# share one selection. Layouts: q, o [B, T, Hkv*G, D]; k, v [B, T, Hkv, D]; c [B, Hkv, T];
# selected [B, Hkv, T, N] bytes. T is a multiple of BLOCK, N a power of two.
# ----------------------------------------------------------------------------------------------
BQ = 8  # query tokens per tile

if triton is not None:

    @triton.jit
    def _forward_kernel(Q, K, V, C, O, LSE, TILES, COUNT, SELECTED, T, N, scale,
                        HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr,
                        BLOCK: tl.constexpr, SPARSE: tl.constexpr):
        """o = sum_j softmax_j(q.k[j] * scale + c[j]) v[j] over the blocks of the tile's list."""
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        bh = tl.program_id(1)
        b, h = bh // HKV, bh % HKV
        rows = tl.arange(0, BQ * G)
        t = tile * BQ + rows // G
        d = tl.arange(0, D)
        row = (b * T + t) * (HKV * G) + h * G + rows % G
        q = tl.load(Q + row[:, None] * D + d[None, :])
        best = tl.full([BQ * G], float("-inf"), tl.float32)
        total = tl.zeros([BQ * G], tl.float32)
        acc = tl.zeros([BQ * G, D], tl.float32)
        slot = bh * tl.num_programs(0) + tile
        count = tl.load(COUNT + slot) if SPARSE else (tile * BQ) // BLOCK + 1
        for i in range(count):
            n = tl.load(TILES + slot * N + i) if SPARSE else i
            j = n * BLOCK + tl.arange(0, BLOCK)
            kv = ((b * T + j) * HKV + h) * D
            k = tl.load(K + kv[None, :] + d[:, None])
            s = tl.dot(q, k) * (scale * 1.4426950408889634)
            s += tl.load(C + bh * T + j)[None, :] * 1.4426950408889634
            keep = j[None, :] <= t[:, None]
            if SPARSE:
                chosen = tl.load(SELECTED + (bh * T + t) * N + n)
                keep = keep & (chosen != 0)[:, None]
            s = tl.where(keep, s, float("-inf"))
            new = tl.maximum(best, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - base[:, None])
            decay = tl.exp2(best - base)
            total = total * decay + tl.sum(p, 1)
            v = tl.load(V + kv[:, None] + d[None, :])
            acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v)
            best = new
        tl.store(O + row[:, None] * D + d[None, :], (acc / total[:, None]).to(O.dtype.element_ty))
        tl.store(LSE + row, best + tl.log2(total))

    @triton.jit
    def _backward_q_kernel(Q, K, V, C, DO, LSE, DOT, DQ, TILES, COUNT, SELECTED, T, N, scale,
                           HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr,
                           BLOCK: tl.constexpr, SPARSE: tl.constexpr):
        """dq = scale * sum_j ds[j] k[j], ds = p * (do.v - DOT), over the tile's list."""
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        bh = tl.program_id(1)
        b, h = bh // HKV, bh % HKV
        rows = tl.arange(0, BQ * G)
        t = tile * BQ + rows // G
        d = tl.arange(0, D)
        row = (b * T + t) * (HKV * G) + h * G + rows % G
        q = tl.load(Q + row[:, None] * D + d[None, :])
        do = tl.load(DO + row[:, None] * D + d[None, :])
        lse = tl.load(LSE + row)
        dot = tl.load(DOT + row)
        acc = tl.zeros([BQ * G, D], tl.float32)
        slot = bh * tl.num_programs(0) + tile
        count = tl.load(COUNT + slot) if SPARSE else (tile * BQ) // BLOCK + 1
        for i in range(count):
            n = tl.load(TILES + slot * N + i) if SPARSE else i
            j = n * BLOCK + tl.arange(0, BLOCK)
            kv = ((b * T + j) * HKV + h) * D
            k = tl.load(K + kv[:, None] + d[None, :])
            v = tl.load(V + kv[:, None] + d[None, :])
            s = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
            s += tl.load(C + bh * T + j)[None, :] * 1.4426950408889634
            keep = j[None, :] <= t[:, None]
            if SPARSE:
                chosen = tl.load(SELECTED + (bh * T + t) * N + n)
                keep = keep & (chosen != 0)[:, None]
            p = tl.where(keep, tl.exp2(s - lse[:, None]), 0.0)
            ds = p * (tl.dot(do, tl.trans(v)) - dot[:, None])
            acc += tl.dot(ds.to(k.dtype), k)
        tl.store(DQ + row[:, None] * D + d[None, :], (acc * scale).to(DQ.dtype.element_ty))

    @triton.jit
    def _backward_kv_kernel(Q, K, V, C, DO, LSE, DOT, DK, DV, DC, BLOCKS, COUNT, SELECTED, T, N,
                            scale, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                            BQ: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr):
        """dk, dv and dc (the sum of ds over queries and heads) of one block of one KV head."""
        bh = tl.program_id(0)
        n = tl.program_id(1)
        b, h = bh // HKV, bh % HKV
        j = n * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, D)
        rows = tl.arange(0, BQ * G)
        kv = ((b * T + j) * HKV + h) * D
        k = tl.load(K + kv[:, None] + d[None, :])
        v = tl.load(V + kv[:, None] + d[None, :])
        c = tl.load(C + bh * T + j) * 1.4426950408889634
        dk = tl.zeros([BLOCK, D], tl.float32)
        dv = tl.zeros([BLOCK, D], tl.float32)
        dc = tl.zeros([BLOCK], tl.float32)
        num_tiles = T // BQ
        first = (n * BLOCK) // BQ
        count = tl.load(COUNT + bh * N + n) if SPARSE else num_tiles - first
        for i in range(count):
            tile = tl.load(BLOCKS + (bh * N + n) * num_tiles + i) if SPARSE else first + i
            t = tile * BQ + rows // G
            row = (b * T + t) * (HKV * G) + h * G + rows % G
            q = tl.load(Q + row[:, None] * D + d[None, :])
            do = tl.load(DO + row[:, None] * D + d[None, :])
            lse = tl.load(LSE + row)
            dot = tl.load(DOT + row)
            s = tl.dot(k, tl.trans(q)) * (scale * 1.4426950408889634) + c[:, None]
            keep = j[:, None] <= t[None, :]
            if SPARSE:
                chosen = tl.load(SELECTED + (bh * T + t) * N + n)
                keep = keep & (chosen != 0)[None, :]
            p = tl.where(keep, tl.exp2(s - lse[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do)
            ds = p * (tl.dot(v, tl.trans(do)) - dot[None, :])
            dk += tl.dot(ds.to(q.dtype), q)
            dc += tl.sum(ds, 1)
        tl.store(DK + kv[:, None] + d[None, :], (dk * scale).to(DK.dtype.element_ty))
        tl.store(DV + kv[:, None] + d[None, :], dv.to(DV.dtype.element_ty))
        tl.store(DC + bh * T + j, dc)

    @triton.jit
    def _score_kernel(Q, KC, S, T, scale, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                      BQ: tl.constexpr, WC: tl.constexpr, SIZE: tl.constexpr,
                      STRIDE: tl.constexpr):
        """S[t, w] = sum_g softmax_w(q_g . kc[w] * scale) over the windows t sees, else -inf."""
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        bh = tl.program_id(1)
        b, h = bh // HKV, bh % HKV
        rows = tl.arange(0, BQ * G)
        t = tile * BQ + rows // G
        d = tl.arange(0, D)
        row = (b * T + t) * (HKV * G) + h * G + rows % G
        q = tl.load(Q + row[:, None] * D + d[None, :])
        windows = T // STRIDE
        last = tile * BQ + BQ - 1
        chunks = (tl.maximum(last - SIZE + 1 + STRIDE, 0) // STRIDE + WC - 1) // WC
        best = tl.full([BQ * G], float("-inf"), tl.float32)
        total = tl.zeros([BQ * G], tl.float32)
        for i in range(chunks):
            w = i * WC + tl.arange(0, WC)
            kc = tl.load(KC + ((b * windows + w) * HKV + h)[None, :] * D + d[:, None])
            s = tl.dot(q, kc) * (scale * 1.4426950408889634)
            s = tl.where((w * STRIDE + SIZE - 1)[None, :] <= t[:, None], s, float("-inf"))
            new = tl.maximum(best, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(best - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
            best = new
        base = tl.where(best == float("-inf"), 0.0, best)
        total = tl.where(total > 0, total, 1.0)
        tq = tile * BQ + tl.arange(0, BQ)
        for i in range(windows // WC):
            w = i * WC + tl.arange(0, WC)
            out = S + (bh * T + tq)[:, None] * windows + w[None, :]
            if i < chunks:
                kc = tl.load(KC + ((b * windows + w) * HKV + h)[None, :] * D + d[:, None])
                s = tl.dot(q, kc) * (scale * 1.4426950408889634)
                p = tl.exp2(s - base[:, None]) / total[:, None]
                p = tl.sum(tl.reshape(p, (BQ, G, WC)), 1)
                p = tl.where((w * STRIDE + SIZE - 1)[None, :] <= tq[:, None], p, float("-inf"))
                tl.store(out, p)
            else:
                tl.store(out, tl.full([BQ, WC], float("-inf"), tl.float32))

    @triton.jit
    def _choose_kernel(S, E, SELECTED, T, N: tl.constexpr, INIT: tl.constexpr,
                       WINDOW: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr, by_query,
                       total):
        """Steps 3 and 5 to 8 of the selection for one query token: ranks by counting."""
        t = tl.program_id(0)
        bh = tl.program_id(1)
        n = tl.arange(0, N)
        own = t // BLOCK
        base = S + (bh * T + t).to(tl.int64) * (N * PER) + n * PER
        score = tl.load(base - 1, mask=n > 0, other=float("-inf"))
        for i in tl.static_range(PER):
            score = tl.maximum(score, tl.load(base + i))
        forced = (n < INIT) | (n >= own - WINDOW)
        score = tl.where(forced, float("inf"), score)
        score = tl.where(n <= own, score, float("-inf"))
        earlier = n[:, None] < n[None, :]
        ahead = (score[:, None] > score[None, :]) | ((score[:, None] == score[None, :]) & earlier)
        rank = tl.sum(ahead.to(tl.int32), 0)
        chosen = rank < tl.minimum(by_query, own + 1)
        e = tl.load(E + bh * N + n)
        e = tl.where(chosen, float("inf"), tl.where(n <= own, e, float("-inf")))
        ahead = (e[:, None] > e[None, :]) | ((e[:, None] == e[None, :]) & earlier)
        rank = tl.sum(ahead.to(tl.int32), 0)
        chosen = rank < tl.minimum(total, own + 1)
        tl.store(SELECTED + (bh * T + t).to(tl.int64) * N + n, chosen.to(tl.uint8))


def _tile_lists(selected):
    """Per tile the blocks that any of its queries selects; per block the tiles that list it."""
    B, H, T, N = selected.shape
    used = selected.view(B * H, T // BQ, BQ, N).amax(2)
    by_tile = torch.sort(used, dim=2, descending=True, stable=True)[1].int()
    by_block = torch.sort(used.transpose(1, 2).contiguous(), dim=2, descending=True,
                          stable=True)[1].int()
    return by_tile, used.sum(2, dtype=torch.int32), by_block, used.sum(1, dtype=torch.int32)


class Attend(torch.autograd.Function):
    """Attention with the bias c, over all causal blocks (selected None) or the selected ones."""

    @staticmethod
    def forward(ctx, q, k, v, c, selected):
        B, T, H, D = k.shape
        G, N = q.shape[2] // H, T // BLOCK
        sparse = selected is not None
        lists = _tile_lists(selected) if sparse else (q,) * 4
        o = torch.empty_like(q)
        lse = torch.empty(B, T, H * G, device=q.device, dtype=torch.float32)
        scale = D ** -0.5
        _forward_kernel[(T // BQ, B * H)](
            q, k, v, c, o, lse, lists[0], lists[1], selected if sparse else q, T, N, scale,
            HKV=H, G=G, D=D, BQ=BQ, BLOCK=BLOCK, SPARSE=sparse, **TUNE["forward"])
        ctx.save_for_backward(q, k, v, c, o, lse, selected, *lists)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, c, o, lse, selected, *lists = ctx.saved_tensors
        B, T, H, D = k.shape
        G, N = q.shape[2] // H, T // BLOCK
        sparse = selected is not None
        do = do.contiguous()
        dot = _row_dot(do, o)
        dq, dk, dv, dc = map(torch.empty_like, (q, k, v, c))
        shape = dict(HKV=H, G=G, D=D, BQ=BQ, BLOCK=BLOCK, SPARSE=sparse)
        chosen = selected if sparse else q
        _backward_kv_kernel[(B * H, N)](
            q, k, v, c, do, lse, dot, dk, dv, dc, lists[2], lists[3], chosen, T, N, D ** -0.5,
            **shape, **TUNE["backward_kv"])
        _backward_q_kernel[(T // BQ, B * H)](
            q, k, v, c, do, lse, dot, dq, lists[0], lists[1], chosen, T, N, D ** -0.5,
            **shape, **TUNE["backward_q"])
        return dq, dk, dv, dc, None


def attend_plainly(q, k, v, c, selected):
    """The same by full matrices, for machines without a GPU and as the kernels' reference."""
    B, T, H, D = k.shape
    G = q.shape[2] // H
    qh = q.float().view(B, T, H, G, D).permute(0, 2, 3, 1, 4)
    kh, vh = (x.float().permute(0, 2, 1, 3).unsqueeze(2) for x in (k, v))
    s = qh @ kh.transpose(-1, -2) * D ** -0.5 + c[:, :, None, None, :]
    t = torch.arange(T, device=q.device)
    keep = (t[None, :] <= t[:, None]).expand(B, H, T, T)
    if selected is not None:
        keep = keep & selected.bool().repeat_interleave(BLOCK, 3)
    p = s.masked_fill(~keep[:, :, None], float("-inf")).softmax(-1)
    return (p @ vh).permute(0, 3, 1, 2, 4).reshape(B, T, H * G, D).to(q.dtype)


# ----------------------------------------------------------------------------------------------
# Selection: which blocks each query token attends to, per KV head. Never differentiated.
# ----------------------------------------------------------------------------------------------
def pool_windows(x):
    """Means of SIZE tokens every STRIDE (dim 1); the last, incomplete window is zero."""
    B, T = x.shape[:2]
    half = x.float().view(B, T // STRIDE, STRIDE, *x.shape[2:]).sum(2)
    return torch.cat([(half[:, :-1] + half[:, 1:]) / SIZE, torch.zeros_like(half[:, :1])], 1)


def block_importance(c):
    """E[b, h, n]: the largest mean of c over the windows that overlap block n."""
    e = pool_windows(c.transpose(1, 2)).transpose(1, 2)            # [B, H, W]
    B, H, W = e.shape
    e[:, :, -1] = float("-inf")
    own = e.view(B, H, W // PER, PER).amax(3)
    before = torch.full_like(own, float("-inf"))
    before[:, :, 1:] = e.view(B, H, W // PER, PER)[:, :, :-1, -1]
    return torch.maximum(own, before)


@torch.no_grad()
def choose_blocks(q, k, c, policy):
    """selected[b, h, t, n] (uint8), by the policy "nosa" or "infllmv2"; None for "full"."""
    if policy.startswith("full"):
        return None
    B, T, H, D = k.shape
    by_query = NOSA["init_blocks"] + NOSA["window_blocks"] + NOSA["topk_q_blocks"]
    total = NOSA["topk_blocks"]
    if policy == "infllmv2":
        by_query = total
    kc = pool_windows(k).to(k.dtype)
    e = block_importance(c)
    if not q.is_cuda and not INTERPRET:
        return choose_blocks_plainly(q, kc, e, by_query, total)
    G, N = q.shape[2] // H, T // BLOCK
    s = torch.empty(B, H, T, T // STRIDE, device=q.device, dtype=torch.float32)
    _score_kernel[(T // BQ, B * H)](q, kc, s, T, D ** -0.5, HKV=H, G=G, D=D, BQ=BQ,
                                    WC=min(64, T // STRIDE), SIZE=SIZE, STRIDE=STRIDE,
                                    **TUNE["score"])
    selected = torch.empty(B, H, T, N, device=q.device, dtype=torch.uint8)
    _choose_kernel[(T, B * H)](s, e.contiguous(), selected, T, N=N, INIT=NOSA["init_blocks"],
                               WINDOW=NOSA["window_blocks"], BLOCK=BLOCK, PER=PER,
                               by_query=by_query, total=total, num_warps=4)
    return selected


def choose_blocks_plainly(q, kc, e, by_query, total):
    """The same by full matrices and stable sorts."""
    B, W, H, D = kc.shape
    T, G = q.shape[1], q.shape[2] // H
    N = T // BLOCK
    t = torch.arange(T, device=q.device)
    seen = STRIDE * torch.arange(W, device=q.device)[None, :] + SIZE - 1 <= t[:, None]   # [T, W]
    qh = q.float().view(B, T, H, G, D).permute(0, 2, 3, 1, 4)
    s = qh @ kc.float().permute(0, 2, 3, 1).unsqueeze(2) * D ** -0.5
    s = s.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0).sum(2)           # [B,H,T,W]
    s = s.masked_fill(~seen, float("-inf"))
    s = torch.nn.functional.pad(s, (1, 0), value=float("-inf"))
    score = torch.stack([s[..., i:i + W:PER] for i in range(PER + 1)]).amax(0)           # [B,H,T,N]
    n, own = torch.arange(N, device=q.device)[None, :], (t // BLOCK)[:, None]
    forced = (n < NOSA["init_blocks"]) | (n >= own - NOSA["window_blocks"])
    score = score.masked_fill(forced, float("inf")).masked_fill(n > own, float("-inf"))

    def top(x, count):
        order = torch.argsort(x, dim=-1, descending=True, stable=True)
        rank = torch.argsort(order, dim=-1)
        return rank < torch.minimum(torch.tensor(count, device=x.device), own + 1)
    chosen = top(score, by_query)
    fill = e[:, :, None, :].expand(B, H, T, N).masked_fill(n > own, float("-inf"))
    return top(fill.masked_fill(chosen, float("inf")), total).to(torch.uint8)


# ----------------------------------------------------------------------------------------------
# The model. Master weights are f32; products run in bf16, residual stream and norms in f32.
# ----------------------------------------------------------------------------------------------
def rms_norm(x, weight):
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight).to(DTYPE)


def linear(x, weight):
    return F.linear(x, weight.to(x.dtype))


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(DTYPE)


def before_attention(x, norm, wq, wk, wv, A, delta, cos, sin):
    """x [B, T, hidden] -> q, k (rotated), v, c [B, Hkv, T] in f32."""
    B, T, _ = x.shape
    h = rms_norm(x, norm)
    q = rotate(linear(h, wq).view(B, T, -1, HEAD_DIM), cos, sin)
    k = rotate(linear(h, wk).view(B, T, -1, HEAD_DIM), cos, sin)
    v = linear(h, wv)
    raw = (v.float()[:, :, None, :] * delta).sum(-1)
    c = (A * F.softplus(raw)).transpose(1, 2).contiguous()
    return q, k, v.view(B, T, -1, HEAD_DIM), c


def after_attention(x, o, wo, norm, wg, wu, wd):
    B, T, _ = x.shape
    x = x + linear(o.reshape(B, T, -1), wo).float()
    h = rms_norm(x, norm)
    h = (F.silu(linear(h, wg).float()) * linear(h, wu).float()).to(DTYPE)
    return x + linear(h, wd).float()


def token_losses(x, norm, embed, targets):
    """Cross-entropy in nats of every position, [B*T]."""
    logits = linear(rms_norm(x, norm), embed).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), reduction="none")


def mean_loss(x, norm, embed, targets):
    return token_losses(x, norm, embed, targets).mean()


def row_dot(a, b):
    return (a.float() * b.float()).sum(-1)


_before, _after, _mean_loss, _token_losses, _row_dot = (
    before_attention, after_attention, mean_loss, token_losses, row_dot)


def compile_pieces():
    global _before, _after, _mean_loss, _row_dot, _token_losses
    torch._dynamo.config.cache_size_limit = 64
    _before, _after, _mean_loss, _row_dot, _token_losses = (
        torch.compile(f, dynamic=False)
        for f in (before_attention, after_attention, mean_loss, row_dot, token_losses))


def weight_shapes():
    c = CONFIG
    hidden, mid, heads, kv = (c["hidden_size"], c["intermediate_size"],
                              c["num_attention_heads"], c["num_key_value_heads"])
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (hidden,),
            p + "self_attn.q_proj.weight": (heads * HEAD_DIM, hidden),
            p + "self_attn.k_proj.weight": (kv * HEAD_DIM, hidden),
            p + "self_attn.v_proj.weight": (kv * HEAD_DIM, hidden),
            p + "self_attn.o_proj.weight": (hidden, heads * HEAD_DIM),
            p + "self_attn.A": (kv,),
            p + "self_attn.delta.weight": (kv, kv * HEAD_DIM),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "mlp.gate_proj.weight": (mid, hidden),
            p + "mlp.up_proj.weight": (mid, hidden),
            p + "mlp.down_proj.weight": (hidden, mid),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def initial_weights(device, seed=7):
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes().items():
        if name.endswith("norm.weight"):
            w = torch.ones(shape)
        elif name.endswith("self_attn.A"):
            w = torch.full(shape, 0.25)  # from 0, some heads' bias never left it
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            w = torch.zeros(shape)
        elif "embed" in name:
            w = torch.randn(shape, generator=g) * 0.02
        else:
            w = torch.randn(shape, generator=g) * (0.6 if "delta" not in name else 1.0)
            w *= shape[1] ** -0.5
        weights[name] = w.to(device).requires_grad_(True)
    return weights


def rope_tables(T, device):
    inv = CONFIG["rope_theta"] ** (-torch.arange(0, HEAD_DIM, 2, device=device).double() / HEAD_DIM)
    angle = torch.arange(T, device=device).double()[:, None] * inv
    return angle.cos().float()[None, :, None, :], angle.sin().float()[None, :, None, :]


def run_layers(weights, ids, policy, spy=None):
    """ids [B, T] -> residual stream [B, T, hidden]. policy: nosa, infllmv2, full, full_no_bias.

    spy, if given, is called with (layer, q, k, c, selected) of each layer.
    """
    x = F.embedding(ids, weights["model.embed_tokens.weight"]).float()
    cos, sin = rope_tables(ids.shape[1], ids.device)
    attend = Attend.apply if ids.is_cuda or INTERPRET else attend_plainly
    for i in range(CONFIG["num_hidden_layers"]):
        w = lambda name: weights[f"model.layers.{i}.{name}"]
        q, k, v, c = _before(x, w("input_layernorm.weight"), w("self_attn.q_proj.weight"),
                             w("self_attn.k_proj.weight"), w("self_attn.v_proj.weight"),
                             w("self_attn.A"), w("self_attn.delta.weight"), cos, sin)
        selected = choose_blocks(q, k, c, policy)
        if spy:
            spy(i, q, k, c, selected)
        bias = torch.zeros_like(c) if policy in ("infllmv2", "full_no_bias") else c
        o = attend(q, k, v, bias, selected)
        x = _after(x, o, w("self_attn.o_proj.weight"), w("post_attention_layernorm.weight"),
                   w("mlp.gate_proj.weight"), w("mlp.up_proj.weight"), w("mlp.down_proj.weight"))
    return x


# ----------------------------------------------------------------------------------------------
# Optimizer: Muon for the layers' matrices, Adam for embedding, norms and the eviction head.
# ----------------------------------------------------------------------------------------------
def orthogonalize(g):
    """Newton-Schulz iteration on a stack of matrices [n, rows <= cols]."""
    x = g.to(DTYPE)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(DTYPE)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x


class Optimizer:
    def __init__(self, weights, muon_lr, adam_lr, decay):
        self.decay = decay
        groups, rest = {}, []
        for name, w in weights.items():
            if w.ndim == 2 and "layers" in name and "delta" not in name:
                groups.setdefault(tuple(sorted(w.shape)), []).append(w)
            else:
                rest.append((name, w))
        self.groups = [(ws, torch.zeros(len(ws), *shape, device=ws[0].device))
                       for shape, ws in groups.items()]
        self.muon_lr = muon_lr
        self.adam = torch.optim.AdamW(
            [{"params": [w for n, w in rest if "embed" in n], "lr": adam_lr},
             {"params": [w for n, w in rest if "norm" in n], "lr": adam_lr},
             {"params": [w for n, w in rest if "self_attn" in n], "lr": adam_lr}],
            betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=rest[0][1].is_cuda)
        for group in self.adam.param_groups:
            group["base"] = group["lr"]

    @torch.no_grad()
    def step(self, scale, momentum=0.95):
        for ws, buffer in self.groups:
            wide = [w.shape[0] <= w.shape[1] for w in ws]
            g = torch.stack([w.grad if k else w.grad.mT for w, k in zip(ws, wide)])
            buffer.lerp_(g, 1 - momentum)
            update = orthogonalize(g.lerp(buffer, momentum))
            lr = self.muon_lr * scale
            for w, k, u in zip(ws, wide, update):
                w.mul_(1 - lr * self.decay)
                stretch = max(1.0, w.shape[0] / w.shape[1]) ** 0.5
                w.add_((u if k else u.mT).float(), alpha=-lr * stretch)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * scale
        self.adam.step()
        for ws, _ in self.groups:
            for w in ws:
                w.grad = None
        self.adam.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------
class Windows:
    """Sequences of T tokens: <s>, then T-1 of the stream; targets are the T stream tokens.

    An epoch cuts each shard from a random offset into consecutive windows, shuffled. Shards are
    looked for again at the start of each epoch, so that a run can start before all have arrived.
    """

    def __init__(self, folder, seed):
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.shards, self.order, self.epochs = {}, [], 0.0

    def _start_epoch(self, T):
        for name in sorted(os.listdir(self.folder)):
            if re.fullmatch(r"train_\d+\.bin", name) and name not in self.shards:
                self.shards[name] = np.fromfile(os.path.join(self.folder, name), np.uint16)
        windows = []
        for name, tokens in self.shards.items():
            first = int(self.rng.integers(0, T))
            windows += [(name, s) for s in range(first, len(tokens) - T, T)]
        self.order = [windows[i] for i in self.rng.permutation(len(windows))]
        self.size = len(self.order)

    def batch(self, count, T, device):
        if getattr(self, "T", None) != T or len(self.order) < count:
            self.T = T
            self._start_epoch(T)
        picks = [self.order.pop() for _ in range(count)]
        self.epochs += count / self.size
        rows = np.stack([self.shards[name][s:s + T] for name, s in picks]).astype(np.int64)
        ids = np.concatenate([np.full((count, 1), BOS), rows[:, :-1]], 1)
        to = lambda a: torch.from_numpy(a).pin_memory().to(device, non_blocking=True) \
            if device == "cuda" else torch.from_numpy(a)
        return to(ids), to(rows)


def rate(progress):
    """Learning-rate factor: 1.5 % warm-up, constant to 35 %, then linear to zero."""
    return min(1.0, progress / 0.015 + 0.01, max(0.0, (1 - progress) / 0.65))


def train(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        compile_pieces()
    os.makedirs(args.out, exist_ok=True)
    weights = initial_weights(device, args.seed)
    optimizer = Optimizer(weights, args.muon_lr, args.adam_lr, args.decay)
    windows = Windows(args.data, args.seed)
    held = HeldOut(args.data).windows(args.long, args.val_windows) if args.val_windows else None
    phases = [("full", args.short, args.tokens // args.short),
              ("nosa", args.long, args.tokens // args.long)]
    log = open(os.path.join(args.out, "log.csv"), "w")
    print("step,seconds,tokens,epochs,context,rate,loss,val_bits_per_byte,overlap,c_std_min,"
          "c_std_max", file=log, flush=True)
    for policy, T, count in reversed(phases):  # compile both shapes before the clock starts
        ids, targets = windows.batch(count, T, device)
        x = run_layers(weights, ids, policy)
        _mean_loss(x, weights["model.norm.weight"], weights["model.embed_tokens.weight"],
                   targets).backward()
        if held and policy == "nosa":
            validate(weights, held, device)
        for w in weights.values():
            w.grad = None
    windows = Windows(args.data, args.seed + 1)
    if device == "cuda":
        torch.cuda.synchronize()
        print(f"warm; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    start, tokens, step, losses = time.time(), 0, 0, []
    next_check = args.every
    while True:
        progress = (time.time() - start) / (60 * args.minutes)
        if progress >= 1 or (args.steps and step >= args.steps):
            break
        policy, T, count = phases[progress >= args.switch]
        ids, targets = windows.batch(count, T, device)
        x = run_layers(weights, ids, policy)
        loss = _mean_loss(x, weights["model.norm.weight"], weights["model.embed_tokens.weight"],
                          targets)
        loss.backward()
        optimizer.step(rate(progress))
        losses.append(loss.detach())
        step, tokens = step + 1, tokens + ids.numel()
        if step % args.log_every == 0:
            mean, losses = torch.stack(losses).mean().item(), []
            seconds, checks = time.time() - start, ",,,"
            if seconds > next_check:
                next_check += args.every
                save(weights, os.path.join(args.out, "last"))
                if held:
                    checks = ",".join(f"{x:.4f}" for x in validate(weights, held, device))
            line = (f"{step},{seconds:.1f},{tokens},{windows.epochs:.2f},{T},"
                    f"{rate(progress):.3f},{mean:.4f},{checks}")
            print(line, file=log, flush=True)
            print(line, f"{tokens / seconds / 1e3:.0f}k/s", flush=True)
    save(weights, args.out)
    final = ",".join(f"{x:.4f}" for x in validate(weights, held, device)) if held else ",,,"
    print(f"{step},{time.time() - start:.1f},{tokens},{windows.epochs:.2f},{T},0,,{final}",
          file=log, flush=True)
    print(f"done: {step} steps, {tokens} tokens, {time.time() - start:.0f} s; {final}", flush=True)
    open(os.path.join(args.out, "done"), "w").close()


def save(weights, folder):
    """Writes model.safetensors in bf16, and moves it into place."""
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.safetensors")
    save_file({n: w.detach().to(torch.bfloat16).cpu().contiguous() for n, w in weights.items()},
              path + ".part", metadata={"format": "pt"})
    os.chmod(path + ".part", 0o644)
    os.replace(path + ".part", path)


def load(folder, device):
    from safetensors.torch import load_file
    weights = load_file(os.path.join(folder, "model.safetensors"))
    assert {n: tuple(w.shape) for n, w in weights.items()} == weight_shapes()
    return {n: w.to(device).float() for n, w in weights.items()}


# ----------------------------------------------------------------------------------------------
# Evaluation, on whole held-out books
# ----------------------------------------------------------------------------------------------
class HeldOut:
    def __init__(self, folder):
        with open(os.path.join(folder, "heldout.json")) as f:
            info = json.load(f)
        self.books = info["books"]                                   # [{path, tokens, bytes}]
        self.tokens = np.fromfile(os.path.join(folder, "heldout.bin"), np.uint16).astype(np.int64)
        self.bytes_of = np.array(info["bytes_of_piece"])

    def windows(self, T, limit=None):
        """(ids [n, T], targets [n, T], bytes [n, T]): consecutive windows of each book."""
        rows, at = [], 0
        for book in self.books:
            for s in range(at, at + book["tokens"] - T, T):
                rows.append(self.tokens[s:s + T])
            at += book["tokens"]
        if limit:
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        targets = np.stack(rows)
        ids = np.concatenate([np.full((len(rows), 1), BOS), targets[:, :-1]], 1)
        return torch.from_numpy(ids), torch.from_numpy(targets), self.bytes_of[targets]


@torch.no_grad()
def losses_of(weights, ids, targets, policy, device, batch, spy=None):
    """Nats of each target, [n, T] on the host."""
    out = []
    for i in range(0, len(ids), batch):
        rows = torch.arange(i, i + batch).clamp(max=len(ids) - 1)  # always whole batches
        x = run_layers(weights, ids[rows].to(device), policy, spy)
        out.append(_token_losses(x, weights["model.norm.weight"],
                                 weights["model.embed_tokens.weight"],
                                 targets[rows].to(device)).view(x.shape[:2]).cpu())
    return torch.cat(out)[:len(ids)].double().numpy()


def validate(weights, held, device):
    """(bits per byte, overlap of consecutive selections, least and largest std of c of a head)"""
    ids, targets, sizes = held
    shared, stds, first = [], [], BLOCK * NOSA["topk_blocks"]

    def spy(i, q, k, c, selected):
        stds.append(c.std(dim=2).mean(0))
        if selected.shape[2] > first:
            now, before = selected[:, :, first:], selected[:, :, first - 1:-1]
            shared.append((now & before).sum() / now.sum())
    nats = losses_of(weights, ids, targets, "nosa", device, min(4, len(ids)), spy)
    stds = torch.cat(stds)
    return (nats.sum() / math.log(2) / sizes.sum(),
            torch.stack(shared).mean().item() if shared else 0.0,
            stds.min().item(), stds.max().item())


def overlap_and_hits(selected, first, slots):
    """selected [M, T, N] of M (window, layer, head) streams; steps first..T-1 only.

    Overlap: share of the blocks selected at t that were selected at t-1. Hit rate: share of the
    selected blocks other than the query's own that an LRU cache of that many blocks still holds.
    """
    M, T, N = selected.shape
    both = (selected[:, first:] & selected[:, first - 1:-1]).sum().item()
    overlap = both / selected[:, first:].sum().item()
    n = torch.arange(N, device=selected.device)
    used = torch.full((M, N), -1, device=selected.device, dtype=torch.long)
    hits, wanted = {s: 0 for s in slots}, 0
    for t in range(T):
        now = selected[:, t]
        if t >= first:
            other = now & (n != t // BLOCK)
            wanted += other.sum()
            order = used.sort(dim=1, descending=True)[0]
            for s in slots:
                hits[s] += (other & (used >= order[:, s - 1:s]) & (used >= 0)).sum()
        used = torch.where(now, t * N + n, used)
    return overlap, {s: (hits[s] / wanted).item() for s in slots}


def export(args):
    """Checks a run's weights and puts them, in bf16, beside this file."""
    weights = load(args.run, "cpu")
    bad = [n for n, w in weights.items() if not torch.isfinite(w).all()]
    if bad:
        sys.exit(f"not finite: {bad}")
    save(weights, HERE)
    print(f"{sum(w.numel() for w in weights.values())} parameters, "
          f"{os.path.getsize(os.path.join(HERE, 'model.safetensors'))} bytes")


def evaluate(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        compile_pieces()
    T = args.long
    weights = load(args.weights, device)
    held = HeldOut(args.data)
    ids, targets, sizes = held.windows(T, args.limit)
    spans = {str(p): (p - 256 if p < 8192 else p - 512, p)
             for p in (1024, 4096, 8192) if p <= T}
    result = {"bits_per_byte": {}, "bits_per_byte_all_positions": {}, "nats_per_token": {}}
    for policy in ("nosa", "infllmv2", "full", "full_no_bias"):
        nats = losses_of(weights, ids, targets, policy, device, args.batch)
        bits = nats / math.log(2)
        result["bits_per_byte"][policy] = {
            name: round(bits[:, a:b].sum() / sizes[:, a:b].sum(), 4)
            for name, (a, b) in spans.items()}
        result["bits_per_byte_all_positions"][policy] = round(bits.sum() / sizes.sum(), 4)
        result["nats_per_token"][policy] = round(nats.mean(), 4)
        print(policy, result["bits_per_byte"][policy],
              result["bits_per_byte_all_positions"][policy], flush=True)
    result["positions"] = {n: f"mean over target positions {a} to {b - 1} of each window"
                           for n, (a, b) in spans.items()}
    result["window_tokens"], result["windows"] = T, len(ids)
    result["held_out_books"] = [b["path"] for b in held.books]
    result["tokens"] = int(targets.numel())
    result["bytes_per_token"] = round(float(sizes.mean()), 4)
    if T > BLOCK * NOSA["topk_blocks"]:
        few = held.windows(T, args.streams)
        rows, spread = [], []

        def spy(i, q, k, c, selected):
            rows.append(selected.bool().flatten(0, 1))
            spread.append([i, c.std(dim=(0, 2)).tolist()])
        losses_of(weights, few[0], few[1], "nosa", device, min(args.batch, args.streams), spy)
        first = BLOCK * NOSA["topk_blocks"]
        overlap, hits = overlap_and_hits(torch.cat(rows), first, (16, 24, 32))
        result["overlap"] = round(overlap, 4)
        result["hit_rate"] = {str(s): round(h, 4) for s, h in hits.items()}
        result["overlap_and_hit_rate"] = (
            f"NOSA selection, {args.streams} windows, every layer and KV head, tokens {first} to "
            f"{T - 1} one by one; hit rate of an LRU cache of that many blocks, the query's own "
            "block not counted")
        result["std_of_c"] = {str(i): [round(float(x), 4) for x in np.mean(
            [s for layer, s in spread if layer == i], axis=0)]
            for i in range(CONFIG["num_hidden_layers"])}
    result["gpu"] = torch.cuda.get_device_name() if device == "cuda" else "none"
    with open(args.report, "w") as f:
        json.dump(result, f, indent=2)
        f.write("\n")
    print(json.dumps(result["bits_per_byte"]), result.get("overlap"), result.get("hit_rate"))


@torch.no_grad()
def sample(args):
    """Prints a continuation of each prompt; the whole context is run again for every token."""
    import sentencepiece as spm
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = load(args.weights, device)
    tokenizer = spm.SentencePieceProcessor(model_file=os.path.join(HERE, "tokenizer.model"))
    g = torch.Generator().manual_seed(args.seed)
    for prompt in args.prompt:
        if os.path.exists(prompt):
            prompt = open(prompt, encoding="utf-8").read()
        ids = [BOS] + tokenizer.encode(prompt)
        start = len(ids)
        while len(ids) < start + args.count:
            T = max(256, 1 << (len(ids) - 1).bit_length())
            row = torch.tensor([ids + [EOS] * (T - len(ids))], device=device)
            x = run_layers(weights, row, args.policy)[:, len(ids) - 1]
            logits = linear(rms_norm(x, weights["model.norm.weight"]),
                            weights["model.embed_tokens.weight"])[0].float().cpu()
            if args.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / args.temperature).softmax(0), 1,
                                              generator=g))
            ids.append(token)
            if token == EOS:
                break
        print(f"--- temperature {args.temperature}\n{prompt[-300:]}>>>"
              f"{tokenizer.decode(ids[start:])}\n", flush=True)


# ----------------------------------------------------------------------------------------------
# Preparing the data
# ----------------------------------------------------------------------------------------------
def _encode(job):
    import sentencepiece as spm
    path, text, model = job
    tokenizer = spm.SentencePieceProcessor(model_file=model)
    return path, len(text.encode()), np.array(tokenizer.encode(text) + [EOS], dtype=np.uint16)


def bytes_of_pieces(model):
    """UTF-8 bytes that each piece stands for; control pieces stand for none."""
    import sentencepiece as spm
    p = spm.SentencePieceProcessor(model_file=model)
    return [0 if p.is_control(i) or p.is_unknown(i) else 1 if p.is_byte(i)
            else len(p.id_to_piece(i).replace("\u2581", " ").encode())
            for i in range(p.vocab_size())]


def prepare(args):
    """Books -> tokenizer.model (if absent), train_N.bin, heldout.bin and heldout.json."""
    import multiprocessing
    os.makedirs(args.data, exist_ok=True)
    books = list(read_books(args.books))
    missing = set(HELD_OUT) - {path for path, _ in books}
    if missing:
        sys.exit(f"held-out books not found in {args.books}: {sorted(missing)}")
    model = os.path.join(HERE, "tokenizer.model")
    if not os.path.exists(model):
        train_tokenizer(books, os.path.join(HERE, "tokenizer"))
    with multiprocessing.Pool() as pool:
        encoded = pool.map(_encode, [(p, t, model) for p, t in books], chunksize=4)
    held = [e for e in encoded if e[0] in HELD_OUT]
    rest = [e for e in encoded if e[0] not in HELD_OUT]
    random.Random(3).shuffle(rest)
    size = sum(len(tokens) for _, _, tokens in rest)
    shards, filled = [[] for _ in range(args.shards)], 0
    for _, _, tokens in rest:
        shards[min(args.shards - 1, filled * args.shards // size)].append(tokens)
        filled += len(tokens)
    for i, shard in enumerate(shards):
        np.concatenate(shard).tofile(os.path.join(args.data, f"train_{i}.bin"))
    np.concatenate([t for _, _, t in held]).tofile(os.path.join(args.data, "heldout.bin"))
    with open(os.path.join(args.data, "heldout.json"), "w") as f:
        json.dump({"books": [{"path": p, "bytes": n, "tokens": len(t)} for p, n, t in held],
                   "bytes_of_piece": bytes_of_pieces(model)}, f)
    print(f"{len(rest)} training books, {size} tokens; {len(held)} held out, "
          f"{sum(len(t) for _, _, t in held)} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="clean and tokenize the books")
    p.add_argument("--books", required=True, help="a checkout of the books' repository")
    p.add_argument("--data", required=True)
    p.add_argument("--shards", type=int, default=2)
    p = commands.add_parser("train", help="train; writes model.safetensors and log.csv to --out")
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--minutes", type=float, default=22.5, help="the schedule's length")
    p.add_argument("--steps", type=int, default=0, help="stop early, for trials")
    p.add_argument("--tokens", type=int, default=131072, help="per step")
    p.add_argument("--short", type=int, default=1024, help="context of phase 1, full attention")
    p.add_argument("--long", type=int, default=8192, help="context of phase 2, NOSA selection")
    p.add_argument("--switch", type=float, default=0.6, help="share of the time in phase 1")
    p.add_argument("--muon-lr", type=float, default=0.03)
    p.add_argument("--adam-lr", type=float, default=0.003)
    p.add_argument("--decay", type=float, default=0.03)
    p.add_argument("--val-windows", type=int, default=16)
    p.add_argument("--log-every", type=int, default=20)
    p.add_argument("--every", type=float, default=60, help="seconds between validations, saves")
    p.add_argument("--seed", type=int, default=7)
    p = commands.add_parser("eval", help="bits per byte on the held-out books")
    p.add_argument("--data", required=True)
    p.add_argument("--weights", default=HERE)
    p.add_argument("--report", required=True)
    p.add_argument("--long", type=int, default=8192)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--limit", type=int, default=None, help="windows, all by default")
    p.add_argument("--streams", type=int, default=8, help="windows of the cache simulation")
    p = commands.add_parser("export", help="install a run's weights beside this file")
    p.add_argument("--run", required=True)
    p = commands.add_parser("sample", help="continue prompts")
    p.add_argument("prompt", nargs="+", help="text or a file's name")
    p.add_argument("--weights", default=HERE)
    p.add_argument("--policy", default="nosa")
    p.add_argument("--count", type=int, default=220)
    p.add_argument("--temperature", type=float, default=0.8)
    p.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    {"prepare": prepare, "train": train, "eval": evaluate, "export": export,
     "sample": sample}[args.command](args)


if __name__ == "__main__":
    main()
