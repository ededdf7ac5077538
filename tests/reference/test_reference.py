"""Tests of the NumPy reference: hand-computed cases, properties, and the committed test data.

    python3 -m unittest discover -s tests/reference
"""

import filecmp
import json
import math
import os
import tempfile
import unittest

import numpy as np

import make_golden
import make_tiny_model
import nosa_reference as ref
import safetensors_io

F32 = np.float32
INF = math.inf
_TESTDATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "testdata")
# 4 blocks of which 1 depends on the query: selection leaves blocks out from token 257 on.
_SMALL_NOSA = dict(block_size=64, kernel_size=32, kernel_stride=16, init_blocks=1, window_blocks=1,
                   topk_q_blocks=1, topk_blocks=4)
_TINY = ref.NosaConfig(64, 32, 16, init_blocks=1, window_blocks=2, topk_q_blocks=2, topk_blocks=8)


def small_model(dtype="F32", eviction_head=True, seed=3, nosa=None):
    """A random model with 4 query and 2 KV heads of 16, 2 layers."""
    config = make_tiny_model.llama_config(
        hidden=32, query_heads=4, kv_heads=2, head_dim=16, intermediate=48, dtype=dtype, tied=True,
        nosa=nosa or _SMALL_NOSA)
    tensors = make_tiny_model.random_tensors(config, dtype, eviction_head, seed)
    return ref.Model(ref.ModelConfig.from_json(config), tensors, dtype)


def prompt(length, seed=11):
    return make_golden.topic_walk(length, 416, seed)


class SafetensorsTest(unittest.TestCase):

    def test_bfloat16_rounds_to_nearest_even(self):
        step = 2.0 ** -7  # between bfloat16 values from 1 on
        cases = [(1.0, 1.0), (1 + step / 2, 1.0), (1 + 1.5 * step, 1 + 2 * step),
                 (1 + 0.51 * step, 1 + step), (1 + 0.49 * step, 1.0), (-1 - step / 2, -1.0),
                 (0.0, 0.0), (3.4e38, INF), (-INF, -INF), (2.0 ** -133, 2.0 ** -133)]
        for value, expected in cases:
            self.assertEqual(float(safetensors_io.to_bfloat16(np.array([value], F32))[0]), expected)
        self.assertTrue(np.isnan(safetensors_io.to_bfloat16(np.array([np.nan], F32))[0]))

    def test_round_trip(self):
        tensors = {"a": np.arange(6, dtype=F32).reshape(2, 3), "b": np.array([1, -2], np.int32),
                   "scalar": np.array(2.5, F32), "empty": np.zeros((0, 4), F32)}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.safetensors")
            safetensors_io.write(path, tensors, {"a": "BF16"})
            found, dtypes = safetensors_io.read(path)
            self.assertEqual(safetensors_io.read_header(path)["a"]["data_offsets"], [0, 12])
        self.assertEqual(dtypes, {"a": "BF16", "b": "I32", "scalar": "F32", "empty": "F32"})
        for name, array in tensors.items():
            np.testing.assert_array_equal(found[name], array)
            self.assertEqual(found[name].shape, array.shape)

    def test_values_that_bfloat16_cannot_hold_are_refused(self):
        with tempfile.TemporaryDirectory() as folder, self.assertRaises(ValueError):
            safetensors_io.write(os.path.join(folder, "x"), {"a": np.array([1.001], F32)},
                                 {"a": "BF16"})


class NumbersTest(unittest.TestCase):

    def test_complete_windows(self):
        expected = {0: 0, 31: 0, 32: 1, 47: 1, 48: 2, 63: 2, 64: 3, 79: 3, 80: 4, 128: 7}
        for tokens, windows in expected.items():
            self.assertEqual(_TINY.num_windows(tokens), windows, tokens)

    def test_windows_of_a_block_are_those_that_overlap_it(self):
        for n in range(20):
            self.assertEqual(_TINY.windows_of_block(n), (4 * n - 1, 4 * n + 3))
        odd = ref.NosaConfig(block_size=24, kernel_size=20, kernel_stride=7)
        for n in range(20):
            overlapping = [w for w in range(-10, 200)
                           if 7 * w <= 24 * n + 23 and 7 * w + 19 >= 24 * n]
            self.assertEqual(odd.windows_of_block(n), (overlapping[0], overlapping[-1]))

    def test_defaults_are_those_of_the_released_models(self):
        self.assertEqual(ref.NosaConfig().query_blocks, 33)
        self.assertEqual(ref.NosaConfig().topk_blocks, 64)

    def test_numbers_that_cannot_work_are_refused(self):
        for wrong in (dict(topk_blocks=32), dict(topk_q_blocks=0), dict(block_size=0),
                      dict(window_blocks=-1)):
            with self.assertRaises(ValueError):
                ref.NosaConfig(**wrong)


class SmallMathsTest(unittest.TestCase):

    def test_softplus(self):
        found = ref.softplus(np.array([-1000, -30, 0, 1, 30, 1000], F32))
        expected = [0, math.exp(-30), math.log(2), math.log(1 + math.e), 30, 1000]
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_rms_norm(self):
        found = ref.rms_norm(np.array([[3, 4]], F32), np.array([1, 2], F32), 0.0)
        np.testing.assert_allclose(found, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=1e-6)

    def test_rope_rotates_dimension_i_with_i_plus_half(self):
        cos, sin = ref.rope_tables([0, 3], 4, 100.0)  # frequencies 1 and 0.1
        x = np.tile(np.array([1, 2, 0, 0], F32), (2, 1, 1))
        found = ref.apply_rope(x, cos, sin)
        np.testing.assert_array_equal(found[0, 0], [1, 2, 0, 0])
        np.testing.assert_allclose(
            found[1, 0], [math.cos(3), 2 * math.cos(.3), math.sin(3), 2 * math.sin(.3)], rtol=1e-6)

    def test_rope_scores_depend_on_the_distance_only(self):
        rng = np.random.default_rng(1)
        q, k = rng.standard_normal((2, 1, 1, 16)).astype(F32)
        dots = []
        for position in (0, 100, 5000):
            rotated_q = ref.apply_rope(q, *ref.rope_tables([position + 9], 16, 10000.0))
            rotated_k = ref.apply_rope(k, *ref.rope_tables([position], 16, 10000.0))
            dots.append(float((rotated_q * rotated_k).sum()))
        np.testing.assert_allclose(dots, dots[0], atol=1e-5)


class ScoresTest(unittest.TestCase):

    def test_window_scores_by_hand(self):
        # D = 4: the scale is 1/2. Head 0 gives logits 0 and ln 3, head 1 gives equal ones.
        q = np.array([[2, 0, 0, 0], [0, 0, 0, 5]], F32)
        kc = np.array([[0, 1, 1, 0], [math.log(3), 1, 1, 0]], F32)
        np.testing.assert_allclose(ref.window_scores(q, kc), [0.25 + 0.5, 0.75 + 0.5], rtol=1e-6)

    def test_no_window_no_score(self):
        self.assertEqual(ref.window_scores(np.ones((2, 4), F32), np.zeros((0, 4), F32)).size, 0)
        np.testing.assert_array_equal(ref.pool_to_blocks(np.zeros(0, F32), 2, _TINY), [-INF, -INF])

    def test_pooling_by_hand(self):
        # Block 0 sees windows 0..3, block 1 sees 3..7, block 2 sees 7 and 8 (later ones hidden),
        # block 3 none.
        values = np.array([.1, .2, .1, .7, .3, .9, .1, .5, .6], F32)
        np.testing.assert_array_equal(ref.pool_to_blocks(values, 4, _TINY),
                                      np.array([.7, .9, .6, -INF], F32))

    def test_a_window_becomes_visible_with_its_last_token(self):
        model = small_model()
        q = np.ones((3, 2, 16), F32)
        kc = np.ones((2, 16), F32)
        s = ref.window_scores_tile(model, q, kc, np.array([30, 31, 47]))
        np.testing.assert_allclose(s, [[-INF, -INF], [2, -INF], [1, 1]])


class SelectionTest(unittest.TestCase):
    """Expected sets below are worked out by hand; b is the last block in most of them."""

    def check(self, t, s, e, query_blocks, blocks, nosa=_TINY, kind="nosa"):
        s, e = np.array(s, F32), np.array(e, F32)
        found = ref.select_blocks(s, e, t, nosa, kind)
        self.assertEqual(found.query_blocks, query_blocks)
        self.assertEqual(found.blocks, blocks)
        mask = ref.select_blocks_tile(s[None], e[None], np.array([t]), nosa, kind)
        self.assertEqual(np.flatnonzero(mask[0]).tolist(), blocks)

    def test_few_blocks_are_all_selected(self):
        self.check(0, [-INF], [-INF], [0], [0])
        self.check(64, [.5, -INF], [.5, -INF], [0, 1], [0, 1])
        # Eight blocks: five in the query part (0, 5, 6, 7 forced, 2 the best), all selected.
        self.check(511, [0, .1, .9, .2, .3, 0, 0, 0], [0] * 8, [0, 2, 5, 6, 7], list(range(8)))

    def test_first_position_that_leaves_a_block_out(self):
        # b = 8: forced 0, 6, 7, 8; best by S 3; by E 5, 2, 1: block 4 is left out.
        s = [0, .1, .2, .9, .3, .4, 0, 0, -INF]
        e = [0, -1, -.5, 9, -2, .5, 0, 0, -INF]
        self.check(512, s, e, [0, 3, 6, 7, 8], [0, 1, 2, 3, 5, 6, 7, 8])

    def test_all_equal_takes_the_smallest_indices(self):
        # b = 11: forced 0, 9, 10, 11; then 1 by S; then 2, 3, 4 by E.
        self.check(767, [.5] * 12, [.5] * 12, [0, 1, 9, 10, 11], [0, 1, 2, 3, 4, 9, 10, 11])
        self.check(767, [0.0, -0.0] * 6, [-0.0, 0.0] * 6, [0, 1, 9, 10, 11],
                   [0, 1, 2, 3, 4, 9, 10, 11])
        self.check(767, [-INF] * 12, [-INF] * 12, [0, 1, 9, 10, 11], [0, 1, 2, 3, 4, 9, 10, 11])

    def test_tie_at_each_cut(self):
        s = [0, .1, .9, .1, .9, .9, 0, 0, 0, 0, 0, 0]           # 2, 4, 5 tie: 2
        e = [0, .2, .2, .7, .2, .2, .2, .2, .2, 0, 0, 0]        # 3, then 1 and 4 of the tie
        self.check(767, s, e, [0, 2, 9, 10, 11], [0, 1, 2, 3, 4, 9, 10, 11])

    def test_a_block_best_by_both_scores_counts_once(self):
        e = [0, .1, .9, .8, .7, .6, 0, 0, 0, 0, 0, 0]
        self.check(767, e, e, [0, 2, 9, 10, 11], [0, 2, 3, 4, 5, 9, 10, 11])

    def test_blocks_after_the_query_do_not_exist(self):
        s = [0] * 9 + [100] * 4
        self.check(575, s, s, [0, 1, 6, 7, 8], [0, 1, 2, 3, 4, 6, 7, 8])

    def test_infllmv2_takes_all_by_s(self):
        s = [0, .1, .5, .2, .6, .3, .7, .4, .8, 0, 0, 0]
        chosen = sorted([0, 9, 10, 11] + [8, 6, 4, 2])
        self.check(767, s, [-x for x in s], chosen, chosen, kind="infllmv2")

    def test_full_takes_everything(self):
        self.check(767, [0] * 12, [0] * 12, list(range(12)), list(range(12)), kind="full")

    def test_default_numbers(self):
        # 65 blocks, b = 64: forced 0 and 48..64; 15 by S (1..15 by ties), then 31 by E: 16..46.
        s = e = [0] * 65
        query = list(range(16)) + list(range(48, 65))
        self.check(64 * 65 - 1, s, e, query, sorted(query + list(range(16, 47))),
                   nosa=ref.NosaConfig())

    def test_against_the_definition_with_many_ties(self):
        rng = np.random.default_rng(21)
        for _ in range(300):
            init, window = int(rng.integers(0, 3)), int(rng.integers(0, 4))
            topk_q = int(rng.integers(1, 4))
            nosa = ref.NosaConfig(init_blocks=init, window_blocks=window, topk_q_blocks=topk_q,
                                  topk_blocks=init + window + topk_q + int(rng.integers(0, 6)))
            blocks = int(rng.integers(1, 25))
            t = 64 * blocks - int(rng.integers(1, 65))
            s = rng.integers(0, 5, blocks).astype(F32)
            e = rng.integers(0, 5, blocks).astype(F32)
            b = blocks - 1

            def beats(x, y, score):
                return score(x) > score(y) or (score(x) == score(y) and x < y)

            def forced_s(n):
                return INF if n < init or b - window <= n <= b else s[n]
            everything = range(blocks)
            part = {n for n in everything
                    if sum(beats(m, n, forced_s) for m in everything) < nosa.query_blocks}
            rest = set(everything) - part
            more = {n for n in rest
                    if sum(beats(m, n, lambda i: e[i]) for m in rest)
                    < nosa.topk_blocks - len(part)}
            self.check(t, s, e, sorted(part), sorted(part | more), nosa=nosa)

    def test_the_query_agnostic_part_hardly_moves(self):
        """Locality: while no E changes, consecutive sets share topk - (init + window + topk_q)."""
        rng = np.random.default_rng(22)
        for nosa in (_TINY, ref.NosaConfig(), ref.NosaConfig(init_blocks=2, window_blocks=4,
                                                             topk_q_blocks=4, topk_blocks=16)):
            agnostic = nosa.topk_blocks - nosa.query_blocks
            blocks = 2 * nosa.topk_blocks + 5
            e = rng.standard_normal(blocks).astype(F32)
            best_by_e = set(sorted(range(blocks), key=lambda n: (-e[n], n))[:agnostic])
            sets = []
            for _ in range(40):
                s = rng.random(blocks).astype(F32)
                sets.append(set(ref.select_blocks(s, e, 64 * blocks - 1, nosa, "nosa").blocks))
                self.assertEqual(len(sets[-1]), nosa.topk_blocks)
                self.assertLessEqual(best_by_e, sets[-1])
            for one, two in zip(sets, sets[1:]):
                self.assertGreaterEqual(len(one & two), agnostic)


class MarginTest(unittest.TestCase):

    def fill(self, s_windows, e_windows, t):
        blocks = t // 64 + 1
        s = ref.pool_to_blocks(np.array(s_windows, F32), blocks, _TINY)
        e = ref.pool_to_blocks(np.array(e_windows, F32), blocks, _TINY)
        selection = ref.select_blocks(s, e, t, _TINY, "nosa")
        ref.fill_margins(selection, np.array(s_windows, F32), np.array(e_windows, F32), t, _TINY,
                         "nosa")
        return selection

    def windows(self, per_block):
        """Windows that give block n the score per_block[n]; the shared ones are low."""
        return [x for score in per_block for x in (score, 0, 0, 0)][:4 * len(per_block) - 1]

    def test_gap_at_both_cuts(self):
        s = self.windows([1, .1, .8, .2, .6, .1, .1, .1, .1, 1, 1, 1])   # 2 before 4
        e = self.windows([1, .5, 1, .4, .3, .24, .1, .1, .1, 1, 1, 1])  # 1, 3, 4 before 5
        found = self.fill(s, e, 767)
        self.assertEqual(found.blocks, [0, 1, 2, 3, 4, 9, 10, 11])
        self.assertAlmostEqual(found.margin_s, .25, places=6)
        self.assertAlmostEqual(found.margin_e, .2, places=6)

    def test_a_tie_by_a_shared_window_is_safe(self):
        s = self.windows([1, .1, .5, .2, .25, .1, .1, .1, .1, 1, 1, 1])
        s[4 * 2 + 3] = .9   # window 11 lies in blocks 2 and 3
        found = self.fill(s, s, 767)
        self.assertEqual(found.query_blocks, [0, 2, 9, 10, 11])
        # Block 3 alone has .2; the runner-up outside the pair is 4 with .25.
        self.assertAlmostEqual(found.margin_s, (.9 - .25) / .9, places=6)

    def test_an_accidental_tie_is_not(self):
        s = self.windows([1, .1, .5, .2, .5, .1, .1, .1, .1, 1, 1, 1])
        self.assertEqual(self.fill(s, s, 767).margin_s, 0.0)

    def test_nothing_left_out(self):
        found = self.fill([.5] * 31, [.5] * 31, 511)
        self.assertEqual((found.margin_s, found.margin_e), (INF, INF))


class AttentionTest(unittest.TestCase):

    def test_by_hand(self):
        # D = 1: no scale. Weights e^0 * e^0 and e^1 * e^ln2.
        out, lse = ref.attention_partial(np.ones((1, 1), F32), np.array([[0], [1]], F32),
                                         np.array([[10], [20]], F32),
                                         np.array([0, math.log(2)], F32))
        weight = 2 * math.e
        np.testing.assert_allclose(out, [[(10 + 20 * weight) / (1 + weight)]], rtol=1e-6)
        np.testing.assert_allclose(lse, [math.log(1 + weight)], rtol=1e-6)

    def test_the_bias_is_not_scaled(self):
        # D = 4, q.k = 0: only the bias decides.
        out, _ = ref.attention_partial(np.zeros((1, 4), F32), np.ones((2, 4), F32),
                                       np.array([[0] * 4, [1] * 4], F32),
                                       np.array([0, math.log(3)], F32))
        np.testing.assert_allclose(out, [[.75] * 4], rtol=1e-6)

    def test_partials_merge_exactly(self):
        rng = np.random.default_rng(31)
        for spread in (1, 30):  # also where one part outweighs the others completely
            q = rng.standard_normal((4, 16)).astype(F32) * spread
            k, v = rng.standard_normal((2, 300, 16)).astype(F32)
            c = rng.standard_normal(300).astype(F32)
            whole, whole_lse = ref.attention_partial(q, k, v, c)
            cuts = [0, 1, 64, 130, 300]
            parts = [ref.attention_partial(q, k[i:j], v[i:j], c[i:j])
                     for i, j in zip(cuts, cuts[1:])]
            merged, lse = ref.merge_partials(parts[::-1])
            np.testing.assert_allclose(merged, whole, atol=2e-6)
            np.testing.assert_allclose(lse, whole_lse, rtol=1e-6)
            nested, _ = ref.merge_partials([ref.merge_partials(parts[:2]),
                                            ref.merge_partials(parts[2:])])
            np.testing.assert_allclose(nested, whole, atol=2e-6)


class ForwardTest(unittest.TestCase):

    def assert_close(self, model, one, two):
        atol = 2e-4 if model.dtype == "F32" else 0.08
        np.testing.assert_allclose(one, two, atol=atol, rtol=0)

    def run_all(self, model, ids, policy, chunk=None, decode_from=None):
        """(cache, logits, selections), with the tokens from `decode_from` on fed one by one."""
        trace = ref.Trace(range(len(ids)))
        split = decode_from if decode_from is not None else len(ids)
        cache, logits = ref.prefill(model, ids[:split], policy, chunk=chunk, trace=trace)
        for token in ids[split:]:
            logits = ref.decode_step(model, token, policy, cache, trace)
        return cache, logits, trace.found

    def assert_same_run(self, model, one, two):
        self.assert_close(model, one[1], two[1])
        for a, b in zip(one[0].layers, two[0].layers):
            for name in ("k", "v", "c", "kc", "e"):
                self.assert_close(model, getattr(a, name), getattr(b, name))
        margin_s, margin_e = (1e-4, 1e-5) if model.dtype == "F32" else (0.03, 0.002)
        self.assertEqual(one[2].keys(), two[2].keys())
        compared = 0
        score_rtol = 1e-3 if model.dtype == "F32" else 0.1
        for key, a in one[2].items():
            # Scores, not only sets: a window seen a step late changes the softmax of all others.
            np.testing.assert_allclose(a.s, two[2][key].s, rtol=score_rtol, err_msg=str(key))
            if a.margin_s > margin_s and a.margin_e > margin_e:
                self.assertEqual(a.blocks, two[2][key].blocks, key)
                compared += 1
        self.assertGreater(compared, 0.8 * len(one[2]))

    def test_chunks_give_what_one_pass_gives(self):
        for dtype in ("F32", "BF16"):
            model = small_model(dtype)
            policy = ref.make_policy("nosa", model)
            ids = prompt(390)
            whole = self.run_all(model, ids, policy)
            for chunk in (1, 31, 64, 100, 257):
                self.assert_same_run(model, whole, self.run_all(model, ids, policy, chunk=chunk))

    def test_decode_gives_what_prefill_gives(self):
        for dtype in ("F32", "BF16"):
            model = small_model(dtype)
            ids = prompt(340)
            for kind in ("nosa", "infllmv2", "full"):
                policy = ref.make_policy(kind, model)
                whole = self.run_all(model, ids, policy)
                self.assert_same_run(model, whole, self.run_all(model, ids, policy, decode_from=1))
                self.assert_same_run(model, whole,
                                     self.run_all(model, ids, policy, chunk=77, decode_from=250))

    def test_c_comes_from_the_unrounded_values(self):
        model = small_model("BF16")
        cache, _ = ref.prefill(model, prompt(40), ref.make_policy("nosa", model))
        layer = cache.layers[0]
        delta, a = model.layer(0, "self_attn.delta.weight"), model.layer(0, "self_attn.A")
        rounded = a * ref.softplus(layer.v.reshape(40, -1) @ delta.T)
        np.testing.assert_allclose(layer.c, rounded, atol=0.05)
        self.assertFalse(np.array_equal(layer.c, rounded))
        self.assertTrue((layer.c[:, 0] * layer.c[:, 1] < 0).all())  # A alternates in sign

    def test_windows_are_means_of_rounded_keys_rounded_once(self):
        model = small_model("BF16")
        cache, _ = ref.prefill(model, prompt(100), ref.make_policy("nosa", model), chunk=17)
        for layer in cache.layers:
            self.assertEqual((len(layer.kc), len(layer.e)), (5, 5))
            for w in range(5):
                mean = layer.k[16 * w:16 * w + 32].astype(np.float64).mean(axis=0)
                np.testing.assert_allclose(layer.kc[w], mean, rtol=2.0 ** -8)
                np.testing.assert_array_equal(layer.kc[w], model.rd(layer.kc[w]))
                np.testing.assert_allclose(layer.e[w], layer.c[16 * w:16 * w + 32].mean(axis=0),
                                           rtol=1e-5)

    def test_dense_while_all_blocks_fit(self):
        model = small_model()
        ids = prompt(256)  # 4 blocks, topk_blocks 4
        for kind, bias in (("nosa", True), ("infllmv2", False)):
            _, sparse = ref.prefill(model, ids, ref.make_policy(kind, model))
            _, dense = ref.prefill(model, ids, ref.make_policy("full", model, bias))
            np.testing.assert_array_equal(sparse, dense)
            _, sparse = ref.prefill(model, prompt(400), ref.make_policy(kind, model))
            _, dense = ref.prefill(model, prompt(400), ref.make_policy("full", model, bias))
            self.assertGreater(np.abs(sparse - dense).max(), 1e-3)

    def test_the_bias_matters_and_can_be_turned_off(self):
        model = small_model()
        _, on = ref.prefill(model, prompt(50), ref.make_policy("full", model))
        _, off = ref.prefill(model, prompt(50), ref.make_policy("full", model, False))
        self.assertGreater(np.abs(on - off).max(), 1e-2)
        plain = small_model(eviction_head=False)
        np.testing.assert_array_equal(
            off, self.run_all(model, prompt(50), ref.Policy("infllmv2", False))[1])
        self.assertFalse(ref.make_policy("full", plain).bias)

    def test_locality_while_decoding(self):
        model = small_model()
        policy = ref.make_policy("nosa", model)
        cache, logits = ref.prefill(model, prompt(700), policy)
        trace = ref.Trace(range(700, 760))
        ref.greedy(model, policy, cache, logits, 61, trace)
        nosa = model.config.nosa
        held = 0
        for t in range(700, 759):
            for layer in range(2):
                for head in range(2):
                    one, two = trace.found[(t, layer, head)], trace.found[(t + 1, layer, head)]
                    if np.array_equal(one.e, two.e):
                        self.assertGreaterEqual(len(set(one.blocks) & set(two.blocks)),
                                                nosa.topk_blocks - nosa.query_blocks)
                        held += 1
        self.assertGreater(held, 200)  # E changes only with every 16th token

    def test_every_kept_block_is_attended_and_no_other(self):
        """Values of blocks that are not selected have no influence on the output."""
        model = small_model()
        policy = ref.make_policy("nosa", model)
        cache, _ = ref.prefill(model, prompt(500), policy)
        layer = cache.layers[0]
        q = np.random.default_rng(4).standard_normal((2, 16)).astype(F32)
        trace = ref.Trace([499])
        before = ref._decode_attention(model, q, 499, 0, layer, 0, policy, trace)
        chosen = trace.found[(499, 0, 0)].blocks
        for n in range(8):
            span = slice(64 * n, min(64 * n + 64, 500))
            saved = layer.v[span].copy()
            layer.v[span] += 1.0
            after = ref._decode_attention(model, q, 499, 0, layer, 0, policy, trace)
            layer.v[span] = saved
            self.assertEqual(n in chosen, bool(np.abs(after - before).max() > 0), n)

    def test_refusals(self):
        model, plain = small_model(), small_model(eviction_head=False)
        with self.assertRaises(ValueError):
            ref.make_policy("nosa", plain)
        with self.assertRaises(ValueError):
            ref.make_policy("full", plain, bias=True)
        with self.assertRaises(ValueError):
            ref.make_policy("sparse", model)
        policy = ref.make_policy("nosa", model)
        for ids in ([], [-1], [416], [1] * 8193):
            with self.assertRaises(ValueError):
                ref.prefill(model, ids, policy)


class CommittedDataTest(unittest.TestCase):

    def golden(self, name):
        with open(os.path.join(_TESTDATA, "golden", name), encoding="utf-8") as file:
            return json.load(file)

    def test_checkpoints_are_what_the_script_writes(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, checkpoint in make_tiny_model.CHECKPOINTS.items():
                made = os.path.join(folder, name)
                make_tiny_model.write_checkpoint(made, *checkpoint)
                committed = os.path.join(_TESTDATA, name)
                self.assertEqual(sorted(os.listdir(made)), sorted(os.listdir(committed)))
                _, mismatch, errors = filecmp.cmpfiles(made, committed, os.listdir(made), False)
                self.assertEqual((name, mismatch, errors), (name, [], []))

    def test_shards_hold_the_same_tensors(self):
        one = ref.Model.load(os.path.join(_TESTDATA, "tiny-f32")).tensors
        two = ref.Model.load(os.path.join(_TESTDATA, "tiny-f32-sharded")).tensors
        self.assertEqual(one.keys(), two.keys())
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])

    def test_selection_cases(self):
        cases = self.golden("selection.json")["cases"]
        for case in cases:
            s, e = ([-INF if x is None else x for x in case[key]] for key in ("s", "e"))
            mask = ref.select_blocks_tile(np.array(s, F32)[None], np.array(e, F32)[None],
                                          np.array([case["position"]]),
                                          ref.NosaConfig(**case["nosa"]), case["policy"])
            self.assertEqual(np.flatnonzero(mask[0]).tolist(), case["blocks"], case["name"])

    def test_tokenizer_golden_file_can_be_reproduced(self):
        try:
            import make_tokenizer
        except ImportError:
            self.skipTest("sentencepiece is not installed")
        folder = os.path.join(_TESTDATA, "tokenizer")
        with open(os.path.join(folder, "golden.json"), encoding="utf-8") as file:
            committed = json.load(file)
        self.assertEqual(json.loads(json.dumps(make_tokenizer.golden(
            make_tokenizer.Tokenizer(folder)))), committed)

    def test_golden_vectors_are_of_these_checkpoints(self):
        models = os.path.join(_TESTDATA, "..", "..", "models")
        seen = set()
        for name in sorted(os.listdir(os.path.join(_TESTDATA, "golden"))):
            if not name.endswith(".json") or name == "selection.json" or "-prompts" in name:
                continue
            golden = self.golden(name)
            parent = _TESTDATA if golden["model"].startswith("tiny-") else models
            directory = os.path.join(parent, golden["model"])
            self.assertEqual(golden["model_sha256"], make_golden.fingerprint(directory), name)
            seen.add(golden["model"])
        self.assertEqual(seen, {"tiny-bf16", "tiny-f32", "tiny-llama", "tiny-llama-bias",
                                "nosa-tiny"})

    def test_golden_vectors_can_be_reproduced(self):
        prompts = self.golden("tiny-prompts.json")
        self.assertEqual(prompts, make_golden.tiny_prompts())
        for name in ("tiny-bf16.nosa", "tiny-f32.nosa", "tiny-f32.full-nobias",
                     "tiny-bf16.infllmv2", "tiny-llama.full", "tiny-llama-bias.full"):
            golden = self.golden(f"{name}.json")
            tensors, _ = safetensors_io.read(
                os.path.join(_TESTDATA, "golden", golden["tensors"]))
            model = ref.Model.load(os.path.join(_TESTDATA, golden["model"]))
            policy = ref.make_policy(golden["policy"], model,
                                     golden["bias"] if golden["policy"] == "full" else None)
            atol = 1e-4 if model.dtype == "F32" else 0.08
            for case in golden["cases"]:
                if case["tokens"] > 600:
                    continue
                positions = {s["position"] for s in case.get("selections", [])}
                trace = ref.Trace(positions)
                _, logits = ref.prefill(model, prompts[case["prompt"]], policy, chunk=96,
                                        trace=trace)
                np.testing.assert_allclose(logits, tensors[case["logits"]], atol=atol, rtol=0)
                for entry in case.get("selections", []):
                    found = trace.found[(entry["position"], entry["layer"], entry["kv_head"])]
                    self.assertEqual(found.blocks, entry["blocks"])


if __name__ == "__main__":
    unittest.main()
