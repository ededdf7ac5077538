"""Writes the golden vectors of tests/testdata/golden (README.md here describes the files).

    python3 tests/reference/make_golden.py                           # the tiny test models
    python3 tests/reference/make_golden.py --model models/nosa-tiny  # a real model

Everything comes from seeds and from the checkpoints; running it again on the same machine writes
the same bytes, on another one float32 sums may differ in their last bits.
"""

import argparse
import hashlib
import json
import os
import time

import numpy as np

import nosa_reference as ref
import safetensors_io

_HERE = os.path.dirname(os.path.abspath(__file__))
_TESTDATA = os.path.join(_HERE, "..", "testdata")
_GREEDY_TOKENS = 40
_LOGITS_EVERY = 8     # of the greedy steps, how often all logits are kept
_SPREAD = 12          # recorded positions of a long prompt besides the last one

# Lengths around every edge of the tiny models: window (32, 48), block (64), the first position at
# which a selection of 8 blocks leaves one out (513), and lengths with many blocks.
_LENGTHS = [1, 2, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 6100]
# With the default 64 blocks of the plain Llama the same edge lies at 4097.
_LLAMA_LENGTHS = [1, 33, 64, 65, 1000, 4096, 4097, 6100]
_BIAS_LENGTHS = [1, 33, 65, 300]
_GREEDY_LENGTHS = [33, 63, 511, 1000, 6100]
_TINY_VOCAB = 416
# A real model (--model): policy -> prompt lengths; each is also continued greedily.
_MODEL_RUNS = {"nosa": [1, 63, 64, 65, 1000, 4500, 6100], "infllmv2": [65, 4500],
               "full": [65, 4500]}
_MODEL_GREEDY_TOKENS = 64
_TOP_LOGITS = 32
# Seeds of the prompts (else the length): with these three, the 40 greedy tokens under policy nosa
# are varied and no step is a close call for tiny-bf16 (best logit ahead by more than 0.09).
_PROMPT_SEEDS = {33: 2830033, 63: 690063, 511: 280511}

# (model, policy, bias, prompt lengths, greedy lengths)
_TINY_RUNS = [
    (model, policy, bias, _LENGTHS, _GREEDY_LENGTHS if policy == "nosa" else [63, 511])
    for model in ("tiny-bf16", "tiny-f32")
    for policy, bias in (("nosa", None), ("infllmv2", None), ("full", True), ("full", False))
] + [
    ("tiny-llama", "full", None, _LLAMA_LENGTHS, [33]),
    ("tiny-llama", "infllmv2", None, _LLAMA_LENGTHS, [4096]),
    ("tiny-llama-bias", "full", None, _BIAS_LENGTHS, [33]),
]


# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------

def topic_walk(length, vocab, seed):
    """Token ids in stretches of 20 to 90 tokens, each stretch from 12 ids of its own.

    Blocks of such a prompt differ from one another; uniformly random ids would make all of them,
    and so all their scores, alike.
    """
    rng = np.random.default_rng(seed)
    ids = []
    while len(ids) < length:
        topic = rng.integers(0, vocab, 12)
        ids += rng.choice(topic, rng.integers(20, 91)).tolist()
    return ids[:length]


def tiny_prompts():
    prompts = {f"len-{n}": topic_walk(n, _TINY_VOCAB, seed=_PROMPT_SEEDS.get(n, n))
               for n in sorted(set(_LENGTHS + _LLAMA_LENGTHS + _BIAS_LENGTHS))}
    prompts["repeat-1000"] = [7] * 1000  # one token over and over: c and v are alike everywhere
    return prompts


def recorded_positions(length):
    """The last position and, of long prompts, a dozen spread ones."""
    if length <= 129:
        return [length - 1]
    return sorted({int(p) for p in np.linspace(0, length - 1, _SPREAD + 1)})


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

def _number(value):
    """A float for JSON, 9 digits (enough for float32); null where it is infinite."""
    return float(f"{value:.9g}") if np.isfinite(value) else None


def selections_json(found):
    return [{"position": t, "layer": layer, "kv_head": head,
             "blocks": s.blocks, "query_blocks": s.query_blocks,
             "margin_s": _number(s.margin_s), "margin_e": _number(s.margin_e)}
            for (t, layer, head), s in sorted(found.items())]


def dump_json(path, value):
    """Readable JSON: one line per list of plain values or small object."""
    def render(item, depth):
        flat = json.dumps(item, separators=(", ", ": "))
        children = item.values() if isinstance(item, dict) else item
        nested = isinstance(item, (dict, list)) and any(
            isinstance(x, (dict, list)) for x in children)
        small = not nested or (isinstance(item, dict) and depth > 1 and len(flat) < 400)
        if small or depth > 5:
            return flat
        pad = " " * (depth + 1)
        if isinstance(item, dict):
            rows = [f"{pad}{json.dumps(key)}: {render(x, depth + 1)}" for key, x in item.items()]
            return "{\n" + ",\n".join(rows) + "\n" + " " * depth + "}"
        rows = [pad + render(x, depth + 1) for x in item]
        return "[\n" + ",\n".join(rows) + "\n" + " " * depth + "]"
    with open(path, "w", encoding="utf-8") as file:
        file.write(render(value, 0) + "\n")


def fingerprint(directory):
    """SHA-256 over config.json and the weights, to notice goldens of an older checkpoint."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(directory)):
        if name == "config.json" or name.endswith(".safetensors"):
            with open(os.path.join(directory, name), "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()


def cache_blocks(cache, nosa, layer, block, prefix):
    """K, V, c of one block and kc, e of the windows that end in it, as tensors for the file."""
    c = cache.layers[layer]
    tokens = slice(block * nosa.block_size, (block + 1) * nosa.block_size)
    ends = np.arange(len(c.kc)) * nosa.kernel_stride + nosa.kernel_size - 1
    windows = np.flatnonzero(ends // nosa.block_size == block)

    def head_major(x):
        return np.ascontiguousarray(np.swapaxes(x, 0, 1))
    tensors = {f"{prefix}.k": head_major(c.k[tokens]), f"{prefix}.v": head_major(c.v[tokens]),
               f"{prefix}.c": head_major(c.c[tokens]), f"{prefix}.kc": head_major(c.kc[windows]),
               f"{prefix}.e": head_major(c.e[windows])}
    return tensors, [int(w) for w in windows]


def run_model(model, policy, prompts, lengths, greedy_lengths, with_cache):
    """Runs the prompts of one model and policy: (JSON part, tensors)."""
    cases, greedy_cases, cache_cases, tensors = [], [], [], {}
    for name in [f"len-{n}" for n in lengths] + (["repeat-1000"] if with_cache else []):
        ids = prompts[name]
        trace = ref.Trace(recorded_positions(len(ids)))
        cache, logits = ref.prefill(model, ids, policy, trace=trace)
        tensors[f"{name}.logits"] = logits
        case = {"prompt": name, "tokens": len(ids), "logits": f"{name}.logits"}
        if policy.kind != "full":
            case["selections"] = selections_json(trace.found)
            for (t, layer, head), found in trace.found.items():
                if t == len(ids) - 1 and len(ids) > 512:
                    tensors[f"{name}.s.layer{layer}.head{head}"] = found.s
                    tensors[f"{name}.e.layer{layer}.head{head}"] = found.e
        cases.append(case)
        if with_cache and name == "len-1000":
            for layer, block in ((0, 0), (0, 3), (1, 3), (1, 15)):
                prefix = f"{name}.cache.layer{layer}.block{block}"
                found, windows = cache_blocks(cache, model.config.nosa, layer, block, prefix)
                tensors.update(found)
                cache_cases.append({"prompt": name, "layer": layer, "block": block,
                                    "windows": windows, "tensors": prefix})
        if len(ids) in greedy_lengths and name.startswith("len-"):
            case, found = run_greedy(model, policy, name, cache, logits, _GREEDY_TOKENS)
            greedy_cases.append(case)
            tensors.update(found)
    return {"cases": cases, "greedy": greedy_cases, "cache": cache_cases}, tensors


def run_greedy(model, policy, name, cache, logits, count):
    """Greedy continuation with its gaps, the selections on the way and some full logits."""
    start = cache.tokens
    trace = ref.Trace(range(start, start + count - 1))
    tokens, gaps, all_logits = ref.greedy(model, policy, cache, logits, count, trace)
    kept = list(range(0, count, _LOGITS_EVERY))
    case = {"prompt": name, "tokens": tokens, "gaps": [_number(g) for g in gaps],
            "smallest_gap": _number(min(gaps)), "logits": f"{name}.greedy.logits",
            "logits_steps": kept}
    if policy.kind != "full":
        case["selections"] = selections_json(
            {key: found for key, found in trace.found.items() if (key[0] - start) % 4 == 0})
    return case, {f"{name}.greedy.logits": np.stack([all_logits[i] for i in kept])}


# ---------------------------------------------------------------------------------------------
# Cases of the selection alone
# ---------------------------------------------------------------------------------------------

def selection_cases():
    """S, E -> selected blocks, with ties, -inf, few blocks and b + 1 around topk_blocks."""
    tiny = dict(block_size=64, kernel_size=32, kernel_stride=16, init_blocks=1, window_blocks=2,
                topk_q_blocks=2, topk_blocks=8)
    wide = dict(tiny, init_blocks=2, window_blocks=1, topk_q_blocks=3, topk_blocks=12)
    bare = dict(tiny, init_blocks=0, window_blocks=0, topk_q_blocks=1, topk_blocks=2)
    default = {}
    inf = float("inf")
    cases = []

    def add(name, numbers, t, s, e):
        for kind in ("nosa", "infllmv2", "full"):
            nosa = ref.NosaConfig(**numbers)
            found = ref.select_blocks(np.array(s, np.float32), np.array(e, np.float32), t, nosa,
                                      kind)
            cases.append({"name": name, "policy": kind, "nosa": vars(nosa), "position": t,
                          "s": [_number(x) for x in s], "e": [_number(x) for x in e],
                          "query_blocks": found.query_blocks, "blocks": found.blocks})

    add("first token", tiny, 0, [-inf], [-inf])
    add("end of block 0", tiny, 63, [0.5], [0.25])
    add("two blocks, the second without a window", tiny, 64, [0.5, -inf], [0.25, -inf])
    ten = [0.5, 0.125, 0.75, 0.25, 0.875, 0.375, 0.625, 0.1875, 0.0625, 0.03125]
    back = [-x for x in ten]
    for blocks in (4, 5, 6, 7, 8, 9, 10):
        add(f"{blocks} blocks, distinct scores", tiny, 64 * blocks - 1, ten[:blocks], back[:blocks])
        add(f"{blocks} blocks, first token of the last", tiny, 64 * (blocks - 1),
            ten[:blocks - 1] + [-inf], back[:blocks - 1] + [-inf])
    add("all scores equal", tiny, 64 * 20 - 1, [0.25] * 20, [-0.5] * 20)
    add("all scores zero of both signs", tiny, 64 * 12 - 1, [0.0, -0.0] * 6, [-0.0, 0.0] * 6)
    add("all scores -inf", tiny, 64 * 12 - 1, [-inf] * 12, [-inf] * 12)
    add("tie at the cut of S", tiny, 64 * 12 - 1, [0, .1, .9, .9, .9, .2, .9, 0, 0, 0, 0, 0],
        [0, .1, .2, .3, .4, .5, .6, .7, .8, 0, 0, 0])
    add("tie at the cut of E", tiny, 64 * 12 - 1, [0, .1, .2, .3, .4, .5, .6, .7, .8, 0, 0, 0],
        [0, .3, .3, .5, .3, .3, .3, .3, .9, 0, 0, 0])
    add("ties in both, neighbours share a score", tiny, 64 * 14 - 1,
        [.1, .6, .6, .2, .2, .9, .9, .3, .3, .4, .4, .1, .1, .1],
        [.7, .5, .5, .8, .8, .1, .1, .6, .6, .6, .2, .2, .2, .2])
    add("-inf among the candidates of E", tiny, 64 * 12 - 1, [.5] * 12, [-inf, -3, -inf] * 4)
    add("forced blocks with the worst scores", tiny, 64 * 12 - 1,
        [-inf] + [.5 + .01 * i for i in range(8)] + [-inf] * 3, [0] * 9 + [-inf] * 3)
    add("best by S are best by E too", tiny, 64 * 12 - 1,
        [0, .9, .8, .7, .6, .5, .4, .3, .2, 0, 0, 0], [0, .9, .8, .7, .6, .5, .4, .3, .2, 0, 0, 0])
    add("scores one float32 step apart", tiny, 64 * 11 - 1,
        [0.5, float(np.nextafter(np.float32(.3), np.float32(1))), float(np.float32(.3))] +
        [0.1] * 8, [0.1] * 4 + [float(np.float32(.2)), float(np.nextafter(np.float32(.2),
                                                                        np.float32(0)))] * 3 + [0])
    rng = np.random.default_rng(77)
    for label, numbers, blocks in (("tiny", tiny, 40), ("wide", wide, 30), ("bare", bare, 9),
                                   ("default", default, 63), ("default", default, 64),
                                   ("default", default, 65), ("default", default, 66),
                                   ("default", default, 130)):
        t = 64 * blocks - int(rng.integers(1, 65))
        # Multiples of 1/8: exact in float32, with many ties.
        s = (rng.integers(0, 24, blocks) / 8).tolist()
        e = (rng.integers(-16, 4, blocks) / 8).tolist()
        add(f"random with ties, {label} numbers, {blocks} blocks", numbers, t, s, e)
        s = [float(x) for x in rng.random(blocks, dtype=np.float32)]
        e = [float(x) for x in rng.standard_normal(blocks, dtype=np.float32)]
        add(f"random, {label} numbers, {blocks} blocks", numbers, t, s, e)
    return cases


# ---------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------

def make_tiny(testdata, out):
    prompts = tiny_prompts()
    dump_json(os.path.join(out, "tiny-prompts.json"), prompts)
    dump_json(os.path.join(out, "selection.json"), {"cases": selection_cases()})
    for name, kind, bias, lengths, greedy_lengths in _TINY_RUNS:
        began = time.time()
        directory = os.path.join(testdata, name)
        model = ref.Model.load(directory)
        policy = ref.make_policy(kind, model, bias)
        label = f"{name}.{kind}" + ("-nobias" if bias is False else "")
        part, tensors = run_model(model, policy, prompts, lengths, greedy_lengths,
                                  with_cache=(kind == "nosa"))
        safetensors_io.write(os.path.join(out, f"{label}.safetensors"), tensors)
        dump_json(os.path.join(out, f"{label}.json"), {
            "model": name, "model_sha256": fingerprint(directory), "policy": kind,
            "bias": policy.bias, "prompts": "tiny-prompts.json",
            "tensors": f"{label}.safetensors", **part})
        print(f"{label}: {len(part['cases'])} prompts, {len(part['greedy'])} continued, "
              f"smallest gaps {[g['smallest_gap'] for g in part['greedy']]}, "
              f"{time.time() - began:.0f} s", flush=True)


def model_prompts(directory, vocab):
    """Prompts cut from the model's story.txt if it is there, BOS first; else a seeded walk."""
    lengths = sorted({n for lengths in _MODEL_RUNS.values() for n in lengths})
    story = os.path.join(directory, "story.txt")
    if not os.path.exists(story):
        return "seeded walk", {f"len-{n}": topic_walk(n, vocab, seed=n) for n in lengths}
    import sentencepiece  # only here: the tiny models have no text
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=os.path.join(directory, "tokenizer.model"))
    with open(story, encoding="utf-8") as file:
        ids = pieces.encode(file.read())
    while len(ids) < lengths[-1]:
        ids = ids + ids
    return "story.txt", {f"len-{n}": [pieces.bos_id()] + ids[:n - 1] for n in lengths}


def top_logits(logits):
    """The best ids and their logits, best first; equal logits in order of their ids."""
    order = np.argsort(-logits, kind="stable")[:_TOP_LOGITS]
    return {"ids": order.tolist(), "logits": [_number(x) for x in logits[order]]}


def make_model(directory, out):
    """Goldens of a real model, JSON only: its vocabulary is too large to keep all logits."""
    name = os.path.basename(os.path.abspath(directory))
    model = ref.Model.load(directory)
    source, prompts = model_prompts(directory, model.config.vocab)
    dump_json(os.path.join(out, f"{name}-prompts.json"), prompts)
    digest = fingerprint(directory)
    for kind, lengths in _MODEL_RUNS.items():
        policy = ref.make_policy(kind, model)
        cases = []
        for ids in (prompts[f"len-{n}"] for n in lengths):
            began = time.time()
            trace = ref.Trace(recorded_positions(len(ids)))
            cache, logits = ref.prefill(model, ids, policy, trace=trace)
            steps = ref.Trace(range(len(ids), len(ids) + _MODEL_GREEDY_TOKENS - 1, 16))
            tokens, gaps, _ = ref.greedy(model, policy, cache, logits, _MODEL_GREEDY_TOKENS, steps)
            case = {"prompt": f"len-{len(ids)}", "tokens": len(ids), "top": top_logits(logits),
                    "greedy": tokens, "gaps": [_number(g) for g in gaps],
                    "smallest_gap": _number(min(gaps))}
            if kind != "full":
                case["selections"] = selections_json({**trace.found, **steps.found})
            cases.append(case)
            print(f"{name}.{kind}: {len(ids)} tokens, smallest gap {case['smallest_gap']}, "
                  f"{time.time() - began:.0f} s", flush=True)
        dump_json(os.path.join(out, f"{name}.{kind}.json"), {
            "model": name, "model_sha256": digest, "policy": kind, "bias": policy.bias,
            "prompts": f"{name}-prompts.json", "prompt_source": source, "cases": cases})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testdata", default=_TESTDATA, help="folder with the tiny checkpoints")
    parser.add_argument("--out", default=os.path.join(_TESTDATA, "golden"))
    parser.add_argument("--model", help="a checkpoint folder: write the goldens of this model")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    if args.model:
        make_model(args.model, args.out)
    else:
        make_tiny(args.testdata, args.out)
    size = sum(os.path.getsize(os.path.join(args.out, f)) for f in os.listdir(args.out))
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
