"""Measures how far rounding alone may move the results: float32 against float64 sums.

    python3 tests/reference/measure_tolerance.py [MODEL_DIR ...]
    python3 tests/reference/measure_tolerance.py --noise

Runs the golden prompts (of a model that is named: its own) under policy nosa twice, with matrix products summed in float32 and in
float64, and prints the largest differences and the selections that changed, with their margins.
The tolerances in README.md come from this.

--noise: the tiny models, prompts up to 513 tokens, float32 sums against 40 runs in which every sum
has a random error of the size that another order gives it. One other order meets the rounding
boundaries of bfloat16 by chance; 40 show what there is to meet.
"""

import os
import sys

import numpy as np

import make_golden
import nosa_reference as ref


def relative_error(a, b):
    finite = np.isfinite(a)
    if not finite.any():
        return 0.0
    return float((np.abs(a[finite] - b[finite]) / np.maximum(np.abs(a[finite]), 1e-30)).max())


def measure(directory, prompts):
    models = [ref.Model.load(directory, accumulate) for accumulate in (ref.F32, np.float64)]
    policy = ref.make_policy("nosa", models[0])
    worst = {"logits": 0.0, "k": 0.0, "c": 0.0, "S": 0.0, "E": 0.0}
    sets, changed = 0, []
    for ids in prompts.values():
        traces = [ref.Trace(range(len(ids) - 1, -1, -37)) for _ in models]
        caches, logits = zip(*[ref.prefill(model, ids, policy, trace=trace)
                               for model, trace in zip(models, traces)])
        worst["logits"] = max(worst["logits"], float(np.abs(logits[0] - logits[1]).max()))
        for one, two in zip(caches[0].layers, caches[1].layers):
            worst["k"] = max(worst["k"], float(np.abs(one.k - two.k).max()))
            worst["c"] = max(worst["c"], float(np.abs(one.c - two.c).max()))
        for key, one in traces[0].found.items():
            two = traces[1].found[key]
            worst["S"] = max(worst["S"], relative_error(one.s, two.s))
            worst["E"] = max(worst["E"], relative_error(one.e, two.e))
            if np.isfinite(one.margin_s):
                sets += 1
                if one.blocks != two.blocks:
                    changed.append((one.margin_s, one.margin_e))
    print(os.path.basename(directory.rstrip("/")),
          ", ".join(f"{name} {value:.2g}" for name, value in worst.items()),
          f"(S, E relative); {len(changed)} of {sets} sets that leave blocks out changed; the",
          "largest smaller margin of a changed one is",
          f"{max((min(margins) for margins in changed), default=0):.2g}", flush=True)


class NoisyModel(ref.Model):
    """Its matrix products err at random, up to EPSILON of the largest value of a row."""

    EPSILON = 1.2e-7  # largest error seen in a sum of the CPU backend, over the row's maximum
    random = None     # None: no error

    def matmul(self, a, b):
        exact = super().matmul(a, b)
        if self.random is None:
            return exact
        error = self.random.uniform(-1, 1, exact.shape) * self.EPSILON
        return (exact + error * np.abs(exact).max(axis=-1, keepdims=True)).astype(ref.F32)


def measure_noise(directory, prompts, runs=40):
    plain = ref.Model.load(directory)
    model = NoisyModel(plain.config, plain.tensors, plain.dtype)
    policy = ref.make_policy("nosa", model)
    relative = 1 / 128 if plain.dtype == "BF16" else 1e-4
    for prompt, ids in prompts.items():
        if len(ids) > 513:
            continue
        model.random = None
        cache, logits = ref.prefill(model, ids, policy)
        differences, beyond = [], dict.fromkeys(("k", "v", "c", "kc", "e"), 0.0)
        for seed in range(runs):
            model.random = np.random.default_rng(seed)
            noisy_cache, noisy_logits = ref.prefill(model, ids, policy)
            differences.append(float(np.abs(noisy_logits - logits).max()))
            for one, two in zip(cache.layers, noisy_cache.layers):
                for name in beyond:
                    a, b = getattr(one, name), getattr(two, name)
                    if a.size:
                        excess = float((np.abs(a - b) - relative * np.abs(a)).max())
                        beyond[name] = max(beyond[name], excess)
        print(os.path.basename(directory), prompt, f"logits: worst {max(differences):.2g}, median",
              f"{np.median(differences):.2g}; cache beyond {relative:.2g} relative:",
              ", ".join(f"{name} {value:.2g}" for name, value in beyond.items()), flush=True)


def main():
    if sys.argv[1:] == ["--noise"]:
        testdata = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "testdata")
        prompts = make_golden.tiny_prompts()
        prompts.pop("repeat-1000")
        for name in ("tiny-bf16", "tiny-f32"):
            measure_noise(os.path.join(testdata, name), prompts)
        return
    for directory in sys.argv[1:]:
        config = ref.Model.load(directory).config
        measure(directory, make_golden.model_prompts(directory, config.vocab)[1])
    if sys.argv[1:]:
        return
    testdata = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "testdata")
    prompts = make_golden.tiny_prompts()
    prompts.pop("repeat-1000")  # all its scores by E are equal: nothing to measure
    for name in ("tiny-bf16", "tiny-f32"):
        measure(os.path.join(testdata, name), prompts)


if __name__ == "__main__":
    main()
