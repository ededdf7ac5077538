"""NOSA in NumPy: the definition that every backend of Nosara is compared with.

Written for reading, not for speed, in float32 with the same rounding points as the C++ and CUDA
backends: rd(x) rounds to the model's dtype (nearest, ties to even; nothing to do for float32
models) and everything between two rd is float32.

Dimension letters: T tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv query heads per KV head,
D head dimension, L layers, P tokens per block, N blocks, W compressed windows, V vocabulary.

One forward pass exists in two shapes that share no attention code:
  * `prefill`: many tokens at once, in one pass or in chunks; selections and masked attention are
    computed for tiles of queries with arrays.
  * `decode_step`: one token; selection with plain sorting, attention block by block, the partial
    results merged by their log-sum-exp.
"""

import dataclasses
import json
import os

import numpy as np

import safetensors_io

F32 = np.float32
_QUERY_TILE = 64  # queries whose attention is computed together; bounds memory only


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class NosaConfig:
    """The numbers of the selection. The defaults are those of the released models."""
    block_size: int = 64       # P, tokens per block
    kernel_size: int = 32      # tokens per compressed window
    kernel_stride: int = 16    # tokens between the starts of two windows
    init_blocks: int = 1       # always selected, from block 0
    window_blocks: int = 16    # blocks b - window_blocks .. b are always selected
    topk_q_blocks: int = 16    # query part: init + window + topk_q blocks, forced ones included
    topk_blocks: int = 64      # all selected blocks

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("init_blocks", "window_blocks") else 1
            if value < least:
                raise ValueError(f"nosa.{field.name} is {value}; allowed: >= {least}")
        if self.topk_blocks < self.query_blocks:
            raise ValueError(f"nosa.topk_blocks is {self.topk_blocks}; allowed: >= init_blocks + "
                             f"window_blocks + topk_q_blocks = {self.query_blocks}")

    @property
    def query_blocks(self):
        """Size of the query-aware part, forced blocks included."""
        return self.init_blocks + self.window_blocks + self.topk_q_blocks

    def num_windows(self, tokens):
        """Complete windows among the first `tokens` tokens."""
        if tokens < self.kernel_size:
            return 0
        return (tokens - self.kernel_size) // self.kernel_stride + 1

    def num_blocks(self, tokens):
        return -(-tokens // self.block_size)

    def windows_of_block(self, n):
        """First and last window that overlap block n (4n-1 .. 4n+3 with the defaults).

        May name windows before 0 or not complete yet; the caller clips.
        """
        first_token = n * self.block_size
        last_token = first_token + self.block_size - 1
        # Smallest w whose end stride * w + size - 1 reaches first_token.
        first = -((self.kernel_size - 1 - first_token) // self.kernel_stride)
        return first, last_token // self.kernel_stride


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `config.json` says about a Llama-like decoder."""
    hidden: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rms_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    attention_bias: bool
    nosa: NosaConfig

    @staticmethod
    def from_json(data):
        scaling = data.get("rope_scaling")
        if scaling is not None:
            raise ValueError(f"rope_scaling is {scaling}; allowed: null")
        hidden = data["hidden_size"]
        query_heads = data["num_attention_heads"]
        kv_heads = data.get("num_key_value_heads") or query_heads
        if query_heads % kv_heads:
            raise ValueError(f"num_attention_heads {query_heads} is no multiple of "
                             f"num_key_value_heads {kv_heads}")
        return ModelConfig(
            hidden=hidden, layers=data["num_hidden_layers"], query_heads=query_heads,
            kv_heads=kv_heads, head_dim=data.get("head_dim") or hidden // query_heads,
            intermediate=data["intermediate_size"], vocab=data["vocab_size"],
            rms_eps=data["rms_norm_eps"], rope_theta=float(data.get("rope_theta", 10000.0)),
            max_positions=data["max_position_embeddings"],
            tied=data.get("tie_word_embeddings", False),
            attention_bias=data.get("attention_bias", False),
            nosa=NosaConfig(**data.get("nosa", {})))


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a loaded checkpoint attends: kind is "nosa", "infllmv2" or "full"."""
    kind: str
    bias: bool  # add c to the attention logits


def make_policy(kind, model, bias=None):
    """The policy `kind` on `model`; `bias` is for "full" alone (None: on if there is a head)."""
    if kind == "nosa":
        if not model.has_eviction_head:
            raise ValueError("policy nosa needs a checkpoint with an eviction head (A and delta)")
        return Policy("nosa", True)
    if kind == "infllmv2":
        return Policy("infllmv2", False)
    if kind == "full":
        if bias is None:
            bias = model.has_eviction_head
        if bias and not model.has_eviction_head:
            raise ValueError("the attention bias needs a checkpoint with an eviction head")
        return Policy("full", bias)
    raise ValueError(f"policy is {kind}; allowed: nosa, infllmv2, full")


# ---------------------------------------------------------------------------------------------
# Small maths
# ---------------------------------------------------------------------------------------------

def softplus(x):
    """log(1 + exp(x)) without overflow."""
    return np.maximum(x, F32(0)) + np.log1p(np.exp(-np.abs(x)))


def silu(x):
    return x / (F32(1) + np.exp(-np.clip(x, -80, None)))


def rms_norm(h, weight, eps):
    mean_square = np.mean(h * h, axis=-1, keepdims=True, dtype=F32)
    return h / np.sqrt(mean_square + F32(eps)) * weight


def softmax(logits):
    """Over the last axis, float32; -inf entries get probability 0."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True, dtype=F32)


def rope_tables(positions, head_dim, theta):
    """cos, sin [T, D/2]: float32 values of float64 angles."""
    inv_freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.asarray(positions, dtype=np.float64)[:, None] * inv_freq[None, :]
    return np.cos(angles).astype(F32), np.sin(angles).astype(F32)


def apply_rope(x, cos, sin):
    """NeoX form: dimension i is paired with i + D/2. x [T, H, D]."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


# ---------------------------------------------------------------------------------------------
# Checkpoint
# ---------------------------------------------------------------------------------------------

class Model:
    """Weights as float32 arrays that hold values of the model's dtype."""

    def __init__(self, config, tensors, dtype, accumulate=F32):
        """dtype: "F32" or "BF16"; accumulate: type of the sums inside matrix products.

        accumulate=float64 is for measuring how far float32 sums in another order may move the
        results; golden vectors use float32.
        """
        self.config = config
        self.tensors = tensors
        self.dtype = dtype
        self.accumulate = accumulate
        self.has_eviction_head = "model.layers.0.self_attn.A" in tensors

    @staticmethod
    def load(directory, accumulate=F32):
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            config = ModelConfig.from_json(json.load(file))
        tensors, dtypes = safetensors_io.read_checkpoint(directory)
        dtype = dtypes["model.embed_tokens.weight"]
        if dtype not in ("F32", "BF16"):
            raise ValueError(f"weights are {dtype}; allowed: F32, BF16")
        return Model(config, tensors, dtype, accumulate)

    def rd(self, x):
        """Rounds to the model's dtype."""
        if self.dtype == "BF16":
            return safetensors_io.to_bfloat16(x)
        return np.asarray(x, dtype=F32)

    def matmul(self, a, b):
        if self.accumulate is F32:
            return a @ b
        return (a.astype(self.accumulate) @ b.astype(self.accumulate)).astype(F32)

    def layer(self, index, name):
        return self.tensors[f"model.layers.{index}.{name}"]

    def linear(self, x, index, name):
        """x @ W^T (+ bias where the checkpoint has one), float32."""
        out = self.matmul(x, self.layer(index, f"{name}.weight").T)
        if self.config.attention_bias and name.startswith("self_attn."):
            out = out + self.layer(index, f"{name}.bias")
        return out

    def lm_head(self):
        name = "model.embed_tokens.weight" if self.config.tied else "lm_head.weight"
        return self.tensors[name]


# ---------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------

class _Rows:
    """A float32 array that grows along its first axis."""

    def __init__(self, *shape):
        self._data = np.zeros((256, *shape), dtype=F32)
        self._size = 0

    def append(self, rows):
        need = self._size + len(rows)
        if need > len(self._data):
            grown = np.zeros((max(need, 2 * len(self._data)), *self._data.shape[1:]), dtype=F32)
            grown[:self._size] = self._data[:self._size]
            self._data = grown
        self._data[self._size:need] = rows
        self._size = need

    @property
    def view(self):
        return self._data[:self._size]


class LayerCache:
    """Everything one layer keeps of the tokens seen.

    k, v [T, Hkv, D] rounded, k after RoPE; c [T, Hkv] query-agnostic scores (0 without an eviction
    head); kc [W, Hkv, D] rounded; e [W, Hkv] float32.
    """

    def __init__(self, config):
        self._config = config
        heads, dim = config.kv_heads, config.head_dim
        self._k, self._v, self._c = _Rows(heads, dim), _Rows(heads, dim), _Rows(heads)
        self._kc, self._e = _Rows(heads, dim), _Rows(heads)

    k = property(lambda self: self._k.view)
    v = property(lambda self: self._v.view)
    c = property(lambda self: self._c.view)
    kc = property(lambda self: self._kc.view)
    e = property(lambda self: self._e.view)

    def append(self, k, v, c, rd):
        """Adds tokens (k, v already rounded) and the windows that they complete."""
        self._k.append(k)
        self._v.append(v)
        self._c.append(c)
        nosa = self._config.nosa
        for w in range(len(self.kc), nosa.num_windows(len(self.k))):
            span = slice(w * nosa.kernel_stride, w * nosa.kernel_stride + nosa.kernel_size)
            self._kc.append(rd(self.k[span].mean(axis=0, dtype=F32))[None])
            self._e.append(self.c[span].mean(axis=0, dtype=F32)[None])


class Cache:
    """The state of one sequence: one LayerCache per layer."""

    def __init__(self, config):
        self.layers = [LayerCache(config) for _ in range(config.layers)]

    @property
    def tokens(self):
        return len(self.layers[0].k)


# ---------------------------------------------------------------------------------------------
# Scores and selection, one query
# ---------------------------------------------------------------------------------------------

def window_scores(q, kc):
    """s[w] = sum over the group's heads of softmax_w(q_g . kc[w] / sqrt(D)).

    q [G, D]; kc [W, D], the visible windows only. Returns [W] (empty without windows).
    """
    if len(kc) == 0:
        return np.zeros(0, dtype=F32)
    scale = F32(1.0 / np.sqrt(q.shape[-1]))
    return softmax((q @ kc.T) * scale).sum(axis=0, dtype=F32)


def pool_to_blocks(values, blocks, nosa):
    """Per block the largest value among the windows that overlap it; -inf where there is none.

    values [..., W], visible windows only. Returns [..., blocks].
    """
    windows = values.shape[-1]
    out = np.full((*values.shape[:-1], blocks), -np.inf, dtype=F32)
    for n in range(blocks):
        first, last = nosa.windows_of_block(n)
        first, last = max(first, 0), min(last, windows - 1)
        if first <= last:
            out[..., n] = values[..., first:last + 1].max(axis=-1)
    return out


def is_forced(n, b, nosa):
    """Whether block n is selected whatever its score, for a query in block b."""
    return n < nosa.init_blocks or b - nosa.window_blocks <= n <= b


@dataclasses.dataclass
class Selection:
    """One selected set; margins and scores are filled in where a Trace records it."""
    blocks: list                  # ascending
    query_blocks: list            # ascending, the query-aware part (all of `blocks` for infllmv2)
    margin_s: float = np.inf      # see `fill_margins`
    margin_e: float = np.inf
    s: np.ndarray = None          # [b + 1] block scores before forcing
    e: np.ndarray = None          # [b + 1] block importances


def _top(scores, candidates, count):
    """The `count` best candidates; equal scores in order of their index."""
    return sorted(candidates, key=lambda n: (-scores[n], n))[:count]


def select_blocks(s, e, t, nosa, kind):
    """The blocks that the query at position t attends, for one KV head.

    s, e: block scores and importances of the blocks 0 .. b with b = t // P (more are ignored).
    """
    b = t // nosa.block_size
    everything = list(range(b + 1))
    if kind == "full":
        return Selection(everything, everything)
    forced_s = [np.inf if is_forced(n, b, nosa) else float(s[n]) for n in everything]
    total = min(nosa.topk_blocks, b + 1)
    if kind == "infllmv2":
        chosen = sorted(_top(forced_s, everything, total))
        return Selection(chosen, chosen)
    query_part = _top(forced_s, everything, min(nosa.query_blocks, b + 1))
    rest = sorted(set(everything) - set(query_part))
    filled = _top([float(x) for x in e[:b + 1]], rest, total - len(query_part))
    return Selection(sorted(query_part + filled), sorted(query_part))


def _cut_margin(windows, taken, left, nosa):
    """How safely `taken` beats `left`: the smallest relative gap over all pairs of blocks.

    The gap of two scores is their difference over the larger magnitude. Neighbouring blocks share a
    window; where it gives both of them their score they tie exactly, in every implementation, and
    the smaller index wins. Such a pair is judged by the best window that only the loser has.
    windows [W]: visible ones, others -inf. Returns inf if nothing was left out.
    """
    def span(n):
        first, last = nosa.windows_of_block(n)
        return range(max(first, 0), min(last, len(windows) - 1) + 1)

    def best(indices):
        return max((float(windows[w]) for w in indices), default=-np.inf)

    margin = np.inf
    for i in taken:
        winner = best(span(i))
        for j in left:
            loser = best(span(j))
            shared = set(span(i)) & set(span(j))
            if winner == loser and shared and best(shared) == winner:
                loser = best(set(span(j)) - shared)
            if loser == -np.inf:
                continue
            largest = max(abs(winner), abs(loser))
            margin = min(margin, (winner - loser) / largest if largest > 0 else 0.0)
    return margin


def fill_margins(selection, s_windows, e_windows, t, nosa, kind):
    """Sets margin_s (the cut of the query part) and margin_e (the cut of the part filled by E).

    inf: no score decided anything, because all is selected or because only forced blocks are.
    """
    b = t // nosa.block_size
    everything = set(range(b + 1))
    if kind == "full" or b + 1 <= nosa.topk_blocks:
        return
    query_part = set(selection.query_blocks)
    chosen = [n for n in query_part if not is_forced(n, b, nosa)]
    selection.margin_s = _cut_margin(s_windows, chosen, everything - query_part, nosa)
    if kind == "nosa":
        selection.margin_e = _cut_margin(e_windows, set(selection.blocks) - query_part,
                                         everything - set(selection.blocks), nosa)


# ---------------------------------------------------------------------------------------------
# The same for a tile of queries, with arrays
# ---------------------------------------------------------------------------------------------

def window_scores_tile(model, q, kc, positions):
    """s [tq, W] for q [tq, G, D], kc [W, D]; windows not visible to a query hold -inf."""
    nosa = model.config.nosa
    tile, group, dim = q.shape
    if len(kc) == 0:
        return np.zeros((tile, 0), dtype=F32)
    logits = model.matmul(q.reshape(tile * group, dim), kc.T) * F32(1.0 / np.sqrt(dim))
    ends = np.arange(len(kc)) * nosa.kernel_stride + nosa.kernel_size - 1
    visible = ends[None, :] <= positions[:, None]                       # [tq, W]
    logits = np.where(visible[:, None, :], logits.reshape(tile, group, -1), F32(-np.inf))
    some = visible.any(axis=1)
    s = np.full((tile, len(kc)), -np.inf, dtype=F32)
    s[some] = softmax(logits[some]).sum(axis=1, dtype=F32)
    s[~visible] = -np.inf
    return s


def _top_mask(scores, counts):
    """Marks per row the counts[i] largest; equal scores in order of their index."""
    order = np.argsort(-scores, axis=1, kind="stable")
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, order, np.arange(scores.shape[1])[None, :] < counts[:, None], axis=1)
    return mask


def select_blocks_tile(s, e, positions, nosa, kind):
    """Boolean [tq, N] of selected blocks; s, e [tq, N] as `pool_to_blocks` gives them."""
    b = positions[:, None] // nosa.block_size
    n = np.arange(s.shape[1])[None, :]
    exists = n <= b
    if kind == "full":
        return exists
    # Blocks after b are -inf. They have the largest indices, so they lose every tie and are never
    # among the first b + 1 of a row.
    forced = (n < nosa.init_blocks) | (n >= b - nosa.window_blocks)
    s = np.where(exists, np.where(forced, F32(np.inf), s), F32(-np.inf))
    total = np.minimum(nosa.topk_blocks, b[:, 0] + 1)
    if kind == "infllmv2":
        return _top_mask(s, total)
    query_part = _top_mask(s, np.minimum(nosa.query_blocks, b[:, 0] + 1))
    e = np.where(query_part, F32(np.inf), np.where(exists, e, F32(-np.inf)))
    return _top_mask(e, total)


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------

def attention_partial(q, k, v, bias):
    """Attention of q [G, D] over the tokens k, v [T, D], bias [T]: (output [G, D], lse [G])."""
    logits = (q @ k.T) * F32(1.0 / np.sqrt(q.shape[-1])) + bias[None, :]
    largest = logits.max(axis=-1)
    weights = np.exp(logits - largest[:, None])
    total = weights.sum(axis=-1, dtype=F32)
    return (weights @ v) / total[:, None], largest + np.log(total)


def merge_partials(partials):
    """Attention over the union of disjoint token sets from the (output, lse) of each."""
    lse = np.stack([part[1] for part in partials])                       # [parts, G]
    largest = lse.max(axis=0)
    weights = np.exp(lse - largest)
    total = weights.sum(axis=0, dtype=F32)
    output = sum(part[0] * weight[:, None] for part, weight in zip(partials, weights))
    return output / total[:, None], largest + np.log(total)


def attend_tile(model, q, k, v, bias, selected, positions):
    """Masked attention of q [tq, G, D] over one KV head's k, v [T, D], bias [T]: [tq, G, D]."""
    tile, group, dim = q.shape
    size = model.config.nosa.block_size
    used = np.flatnonzero(selected.any(axis=0))  # blocks that no query of the tile wants are out
    tokens = (used[:, None] * size + np.arange(size)[None, :]).reshape(-1)
    allowed = np.repeat(selected[:, used], size, axis=1) & (tokens[None, :] <= positions[:, None])
    inside = tokens < len(k)  # the last block may be partial
    tokens, allowed = tokens[inside], allowed[:, inside]
    logits = model.matmul(q.reshape(tile * group, dim), k[tokens].T) * F32(1.0 / np.sqrt(dim))
    logits = logits.reshape(tile, group, -1) + bias[tokens]
    logits[~np.broadcast_to(allowed[:, None, :], logits.shape)] = -np.inf
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, dtype=F32)
    output = model.matmul(weights.reshape(tile * group, -1), v[tokens]).reshape(tile, group, dim)
    return output / total[..., None]


# ---------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------

class Trace:
    """Records selections at chosen positions: `found[(position, layer, kv_head)]`."""

    def __init__(self, positions=()):
        self.positions = set(positions)
        self.found = {}

    def record(self, t, layer, head, selection, s_windows, e_windows, nosa, kind):
        """Keeps one selection with its margins and the block scores behind it."""
        blocks = t // nosa.block_size + 1
        selection.s = pool_to_blocks(s_windows, blocks, nosa)
        selection.e = pool_to_blocks(e_windows, blocks, nosa)
        fill_margins(selection, s_windows, e_windows, t, nosa, kind)
        self.found[(t, layer, head)] = selection


def _bias_of(cache, head, policy):
    return cache.c[:, head] if policy.bias else np.zeros(len(cache.k), dtype=F32)


def _query_and_append(model, index, h, positions, cache):
    """The first half of a layer: norms, projections, RoPE, cache. Returns rounded q [T, Hq, D]."""
    config = model.config
    tokens, dim = len(h), config.head_dim
    x = model.rd(rms_norm(h, model.layer(index, "input_layernorm.weight"), config.rms_eps))
    q = model.linear(x, index, "self_attn.q_proj").reshape(tokens, config.query_heads, dim)
    k = model.linear(x, index, "self_attn.k_proj").reshape(tokens, config.kv_heads, dim)
    v = model.linear(x, index, "self_attn.v_proj")
    if model.has_eviction_head:
        # From v before rounding, over all KV heads.
        drive = model.matmul(v, model.layer(index, "self_attn.delta.weight").T)
        c = model.layer(index, "self_attn.A")[None, :] * softplus(drive)
    else:
        c = np.zeros((tokens, config.kv_heads), dtype=F32)
    cos, sin = rope_tables(positions, dim, config.rope_theta)
    q = model.rd(apply_rope(q, cos, sin))
    k = model.rd(apply_rope(k, cos, sin))
    cache.append(k, model.rd(v).reshape(tokens, config.kv_heads, dim), c, model.rd)
    return q


def _finish_layer(model, index, h, output):
    """The second half of a layer: output projection and feed-forward. output [T, Hq * D]."""
    h = h + model.linear(model.rd(output), index, "self_attn.o_proj")
    x = model.rd(rms_norm(h, model.layer(index, "post_attention_layernorm.weight"),
                          model.config.rms_eps))
    gate = model.linear(x, index, "mlp.gate_proj")
    up = model.linear(x, index, "mlp.up_proj")
    return h + model.linear(model.rd(silu(gate) * up), index, "mlp.down_proj")


def _logits(model, h):
    x = model.rd(rms_norm(h, model.tensors["model.norm.weight"], model.config.rms_eps))
    return model.matmul(x, model.lm_head().T)


def _check_tokens(model, cache, ids):
    config = model.config
    if len(ids) == 0:
        raise ValueError("the prompt is empty")
    if min(ids) < 0 or max(ids) >= config.vocab:
        raise ValueError(f"token ids must be in [0, {config.vocab})")
    if cache.tokens + len(ids) > config.max_positions:
        raise ValueError(f"{cache.tokens + len(ids)} tokens; allowed: {config.max_positions}")


def _prefill_layer(model, index, h, positions, cache, policy, trace):
    config, nosa = model.config, model.config.nosa
    q = _query_and_append(model, index, h, positions, cache)
    tokens, dim = len(h), config.head_dim
    group = config.query_heads // config.kv_heads
    blocks = nosa.num_blocks(len(cache.k))
    output = np.zeros((tokens, config.query_heads, dim), dtype=F32)
    for begin in range(0, tokens, _QUERY_TILE):
        rows = slice(begin, min(begin + _QUERY_TILE, tokens))
        at = positions[rows]
        for head in range(config.kv_heads):
            q_tile = q[rows, head * group:(head + 1) * group]
            s_windows = window_scores_tile(model, q_tile, cache.kc[:, head], at)
            # Like S, E counts only the windows that the query sees.
            e_windows = np.where(s_windows > -np.inf, cache.e[:, head], F32(-np.inf))
            s = pool_to_blocks(s_windows, blocks, nosa)
            e = pool_to_blocks(e_windows, blocks, nosa)
            selected = select_blocks_tile(s, e, at, nosa, policy.kind)
            for row in np.flatnonzero(np.isin(at, list(trace.positions))):
                t = int(at[row])
                selection = select_blocks(s[row], e[row], t, nosa, policy.kind)
                assert selection.blocks == np.flatnonzero(selected[row]).tolist()
                trace.record(t, index, head, selection, s_windows[row], e_windows[row], nosa,
                             policy.kind)
            output[rows, head * group:(head + 1) * group] = attend_tile(
                model, q_tile, cache.k[:, head], cache.v[:, head], _bias_of(cache, head, policy),
                selected, at)
    return _finish_layer(model, index, h, output.reshape(tokens, -1))


def prefill(model, ids, policy, cache=None, chunk=None, trace=None):
    """Runs the tokens `ids` after those in `cache`; returns (cache, logits [V] of the last one).

    chunk: tokens per pass (None: all in one).
    """
    cache = cache or Cache(model.config)
    trace = trace or Trace()
    ids = [int(token) for token in ids]
    _check_tokens(model, cache, ids)
    chunk = chunk or len(ids)
    logits = None
    for begin in range(0, len(ids), chunk):
        part = ids[begin:begin + chunk]
        positions = np.arange(cache.tokens, cache.tokens + len(part))
        h = model.tensors["model.embed_tokens.weight"][part].astype(F32)
        for index in range(model.config.layers):
            h = _prefill_layer(model, index, h, positions, cache.layers[index], policy, trace)
        logits = _logits(model, h[-1])
    return cache, logits


def _decode_attention(model, q, t, index, cache, head, policy, trace):
    """Selection and attention of one query group q [G, D] at position t: [G, D]."""
    nosa = model.config.nosa
    blocks = t // nosa.block_size + 1
    visible = nosa.num_windows(t + 1)
    s_windows = window_scores(q, cache.kc[:visible, head])
    e_windows = cache.e[:visible, head]
    selection = select_blocks(pool_to_blocks(s_windows, blocks, nosa),
                              pool_to_blocks(e_windows, blocks, nosa), t, nosa, policy.kind)
    if trace is not None and t in trace.positions:
        trace.record(t, index, head, selection, s_windows, e_windows, nosa, policy.kind)
    bias = _bias_of(cache, head, policy)
    partials = []
    for n in selection.blocks:
        span = slice(n * nosa.block_size, min((n + 1) * nosa.block_size, t + 1))
        partials.append(attention_partial(q, cache.k[span, head], cache.v[span, head], bias[span]))
    return merge_partials(partials)[0]


def decode_step(model, token, policy, cache, trace=None):
    """Runs one token after those in `cache`; returns its logits [V]."""
    config = model.config
    _check_tokens(model, cache, [token])
    t = cache.tokens
    group = config.query_heads // config.kv_heads
    h = model.tensors["model.embed_tokens.weight"][[token]].astype(F32)
    for index, layer_cache in enumerate(cache.layers):
        q = _query_and_append(model, index, h, np.array([t]), layer_cache)[0]
        outputs = []
        for head in range(config.kv_heads):
            q_group = q[head * group:(head + 1) * group]
            outputs.append(_decode_attention(model, q_group, t, index, layer_cache, head, policy,
                                             trace))
        h = _finish_layer(model, index, h, np.concatenate(outputs).reshape(1, -1))
    return _logits(model, h[0])


def greedy(model, policy, cache, logits, count, trace=None):
    """Continues a prefilled sequence greedily; equal logits go to the smaller id.

    Returns (tokens, gaps, logits), `count` of each: the gap is that between the best and the
    second-best logit. The last token is not run through the model.
    """
    tokens, gaps, seen = [], [], []
    for step in range(count):
        best = int(np.argmax(logits))
        second = np.partition(logits, -2)[-2]
        tokens.append(best)
        gaps.append(float(logits[best] - second))
        seen.append(logits)
        if step + 1 < count:
            logits = decode_step(model, best, policy, cache, trace)
    return tokens, gaps, seen
