"""Keyed noise: a function of the key alone, independent between keys, and normal."""

import cProfile
import hashlib
import itertools
import math
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from zoo import F64

from funcbayes import _masks
from funcbayes._global_random import forked, watched
from funcbayes._hashing import hash_op
from funcbayes._masks import Place, dropout_mask, dropout_masks
from funcbayes._random import (
    fold,
    keys_by_name,
    normal,
    permutation,
    resolve_seed,
    uniform,
)
from funcbayes.posteriors._allocation import allocate

SHAPES = [(), (1,), (3,), (15,), (16,), (17,), (2, 3), (5, 4, 3), (100,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def masks(key, shape, *, dtype):
    return dropout_mask(key, Place(5, shape, 0.3, 1.25, dtype))


each_kind = pytest.mark.parametrize("draw", [normal, uniform, masks])
MASK = (1 << 64) - 1


def split_mix(state):
    """SplitMix64's output function, Steele, Lea & Flood (2014), figure 16."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@each_kind
def test_noise_of_a_key_does_not_depend_on_the_keys_beside_it(draw, shape, dtype):
    keys = fold(torch.arange(12), "x")
    together = draw(keys, shape, dtype=dtype)
    assert together.shape == (12, *shape)
    assert together.dtype == dtype
    for i in range(12):
        assert torch.equal(draw(keys[i], shape, dtype=dtype), together[i])
    assert torch.equal(draw(keys.flip(0), shape, dtype=dtype), together.flip(0))
    assert torch.equal(draw(keys.reshape(3, 4), shape, dtype=dtype), together.reshape(3, 4, *shape))


@pytest.mark.parametrize("shape", SHAPES)
@each_kind
def test_mapped_noise_equals_a_loop_at_any_depth_and_chunk_size(draw, shape):
    keys = fold(torch.arange(12), "x").reshape(4, 3)
    expected = draw(keys, shape, dtype=F64)
    for chunk_size in (None, 1, 3):
        one_deep = vmap(lambda k: draw(k, shape, dtype=F64), chunk_size=chunk_size)(keys)
        assert torch.equal(one_deep, expected)
    two_deep = vmap(vmap(lambda k: draw(k, shape, dtype=F64)), in_dims=1, out_dims=1)(keys)
    assert torch.equal(two_deep, expected)


def test_large_noise_filled_by_several_threads_equals_that_of_one(monkeypatch):
    keys, shape = fold(torch.arange(6), "x"), (400_000,)
    expected = torch.stack([normal(k, shape) for k in keys])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert torch.equal(normal(keys, shape), expected)


def test_no_keys_or_no_numbers_give_empty_noise():
    assert normal(torch.empty(0, dtype=torch.int64), (3,)).shape == (0, 3)
    assert normal(torch.arange(2), (0, 3)).shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals_have_mean_0_variance_1_and_the_tails_of_a_normal(dtype):
    z = normal(fold(torch.arange(400), "x"), (500,), dtype=dtype).double().flatten()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(z.pow(3).mean()) < 4 * math.sqrt(15 / n)
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Distribution function: Kolmogorov's 0.1% point is 1.95 / sqrt(n); bfloat16 is a step function.
    ordered = torch.special.ndtr(z.sort().values)
    distance = (ordered - torch.arange(1, n + 1, dtype=F64) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n) + (2**-8 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniforms_are_uniform_on_the_half_open_interval(dtype):
    u = uniform(fold(torch.arange(400), "x"), (500,), dtype=dtype).flatten()
    assert (u >= 0).all()
    assert (u < 1).all()
    n = u.numel()
    distance = (u.double().sort().values - torch.arange(1, n + 1, dtype=F64) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (7, 1200)])
def test_masks_compare_halves_of_hashed_counters_with_the_rate(shape):
    rate, site, key = 0.3, 4, fold(9, "key")
    stream = int.from_bytes(hashlib.blake2b(b"mask", digest_size=8).digest(), "little", signed=True) + site
    start, halves = (key + split_mix(stream & MASK)) & MASK, []
    for step in range((math.prod(shape) + 1) // 2):
        hashed = split_mix((start + step * 0x9E3779B97F4A7C15) & MASK)
        halves += [hashed & 0xFFFFFFFF, hashed >> 32]
    halves = [h - (1 << 32) if h >> 31 else h for h in halves][: math.prod(shape)]
    expected = [1.25 if h >= round(rate * 2**32) - 2**31 else 0.0 for h in halves]
    found = dropout_mask(torch.tensor(key), Place(site, shape, rate, 1.25))
    assert_close(found, torch.tensor(expected).reshape(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [3, 70])  # by NumPy, and by torch
def test_masks_as_an_operator_are_masks(count, dtype):
    keys, place = fold(3, torch.arange(count)), Place(2, (1000,), 0.4, 1.5, dtype)
    along = _masks._along((place,))[:3]
    torch.library.opcheck(_masks.masks_op(), (keys, *along), test_utils="test_schema")
    assert torch.equal(_masks.masks_op()(keys, *along), dropout_mask(keys, place))
    assert torch.equal(dropout_mask(keys, place), torch.stack([dropout_mask(int(k), place) for k in keys]))


def test_of_infinite_scales_nothing_is_left_where_units_are_dropped():
    mask = dropout_mask(1, Place(0, (400,), 0.999, 1e5, torch.float16))
    assert not mask.isnan().any()


def test_masks_made_inside_a_transform_serve_outside():
    _masks._along.cache_clear()
    keys, place = fold(1, torch.arange(3)), Place(0, (7,), 0.4)

    def product(x):
        return (x * _masks.dropout_masks(keys, (place,))[0]).sum()

    inside = torch.func.grad(product)(torch.ones(()))
    assert_close(inside, dropout_mask(keys, place).sum())
    assert_close(vmap(torch.func.grad(product))(torch.ones(2)), inside.expand(2))


@pytest.mark.parametrize("shape", [(5,), (8, 1024)])
def test_halves_of_mapped_hashes_are_those_of_plain_ones(shape):
    keys = fold(1, torch.arange(4))
    nested = vmap(vmap(lambda key: dropout_mask(key, Place(1, shape, 0.3))))(keys.reshape(2, 2))
    assert torch.equal(nested.flatten(0, 1), dropout_mask(keys, Place(1, shape, 0.3)))


def test_a_profiler_goes_on_while_masks_are_made_for_the_first_time():
    _masks._along.cache_clear()
    with cProfile.Profile() as profile:
        dropout_mask(torch.arange(3), Place(0, (5,), 0.4))
        math.factorial(10)
    assert any("factorial" in str(entry.code) for entry in profile.getstats())


@pytest.mark.parametrize("width", [40, 400, 9000])  # together with others, by NumPy or by torch, and alone
def test_masks_drop_at_their_rate_and_those_of_other_keys_and_sites_are_independent(width):
    keys, sites = [fold(0, "x"), fold(0, "y")], [0, 1, 2]
    found = torch.stack(
        [
            dropout_mask(fold(key, torch.arange(500)), Place(site, (width,), 0.3, 2.0, F64))
            for key in keys
            for site in sites
        ]
    ).reshape(6, -1)
    n = found.shape[1]
    assert set(found.flatten().tolist()) == {0.0, 2.0}
    dropped = (found == 0).double()
    assert ((dropped.mean(1) - 0.3).abs() < 4 * math.sqrt(0.3 * 0.7 / n)).all()
    correlations = torch.corrcoef(dropped) - torch.eye(6, dtype=F64)
    assert correlations.abs().max() < 4.5 / math.sqrt(n)
    neighbours = torch.corrcoef(torch.stack([dropped[0, :-1], dropped[0, 1:]]))[0, 1]
    assert abs(float(neighbours)) < 4.5 / math.sqrt(n)


def test_masks_of_narrow_keys_are_the_same_under_vmap():
    keys = torch.arange(5, dtype=torch.int32)
    for width in (40, 400):
        mapped = vmap(lambda key, width=width: dropout_mask(key, Place(1, (width,), 0.3)))(keys)
        assert torch.equal(mapped, torch.stack([dropout_mask(int(k), Place(1, (width,), 0.3)) for k in keys]))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_masks_that_are_made_together_are_those_made_alone(dtype):
    shapes = (2, 20), (), (0, 3), (192,), (1, 4, 1, 1)
    places = tuple(
        Place(site, shape, 0.2 * site, 1 + site / 7, dtype) for site, shape in enumerate(shapes, start=1)
    )
    keys = fold(3, torch.arange(6))
    for place, together in zip(places, dropout_masks(keys, places), strict=True):
        assert torch.equal(together, dropout_mask(keys, place))


def test_masks_at_the_ends_of_the_rates():
    for width in (40, 400):
        assert not dropout_mask(3, Place(0, (width,), 1.0)).any()
        assert (dropout_mask(3, Place(0, (width,), 0.0)) == 1).all()


def test_masks_are_the_same_in_every_dtype_and_for_a_plain_key():
    for width in (40, 400):
        one = dropout_mask(torch.tensor(7), Place(2, (width,), 0.4, dtype=F64))
        assert torch.equal(
            dropout_mask(torch.tensor(7), Place(2, (width,), 0.4, dtype=torch.bfloat16)).double(), one
        )
        assert torch.equal(dropout_mask(7, Place(2, (width,), 0.4, dtype=F64)), one)


@pytest.mark.parametrize("data", [3, "head.weight"])
def test_keys_fold_inside_transforms_as_outside(data):
    keys = torch.arange(12).reshape(4, 3) - 5
    expected = fold(keys, data)
    assert torch.equal(vmap(lambda key: fold(key, data))(keys), expected)
    assert torch.equal(vmap(vmap(lambda key: fold(key, data)), in_dims=1, out_dims=1)(keys), expected)
    steps = torch.arange(4)
    assert torch.equal(vmap(lambda step: fold(9, step))(steps), fold(9, steps))


def test_noise_of_different_seeds_draws_and_leaves_is_uncorrelated():
    axes = [range(4), range(6), ["w", "b", "head.weight", "head.bias"]]
    noise = torch.stack(
        [
            normal(fold(fold(torch.tensor(seed), draw), leaf), (2000,), dtype=F64)
            for seed, draw, leaf in itertools.product(*axes)
        ]
    )
    correlation = torch.corrcoef(noise)
    pairs = correlation[torch.triu_indices(len(noise), len(noise), 1).unbind()]
    z = pairs * math.sqrt(2000)
    assert z.abs().max() < 5  # 4560 pairs
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / len(z))
    # Neighbouring numbers, and the same numbers one place later.
    lagged = (noise[:, 1:] * noise[:, :-1]).mean(1) * math.sqrt(1999)
    assert lagged.abs().max() < 5
    crossed = (noise[1:, 1:] * noise[:-1, :-1]).mean(1) * math.sqrt(1999)
    assert crossed.abs().max() < 5


def test_no_two_draws_or_leaves_begin_with_the_same_noise():
    keys = keys_by_name(fold(7, torch.arange(500)), [f"layer.{i}.weight" for i in range(10)])
    starts = torch.cat([normal(k, (3,)) for k in keys.values()])
    assert len(set(map(tuple, starts.tolist()))) == len(starts)


def test_keys_of_small_seeds_draws_and_paths_are_all_different():
    keys = [
        fold(fold(fold(seed, draw), leaf), "z") for seed in range(30) for draw in range(30) for leaf in "abc"
    ]
    assert len(set(keys)) == len(keys)
    # Argument order counts: seed 1 of draw 2 is not seed 2 of draw 1, nor their sum.
    assert (
        len({fold(fold(0, 1), 2), fold(fold(0, 2), 1), fold(0, 3), fold(fold(1, 0), 2), fold(fold(0, 3), 0)})
        == 5
    )


@pytest.mark.parametrize("key", [0, 1, -1, 12345, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("data", [0, 1, -1, 31, 2**62, -(2**63)])
def test_hashing_ints_and_tensors_agree_with_the_published_mixer(key, data):
    expected = split_mix((key + data * 0x9E3779B97F4A7C15) & MASK)
    expected -= (expected >> 63) << 64
    assert fold(key, data) == expected
    assert fold(torch.tensor(key), data).item() == expected
    assert fold(key, torch.tensor(data)).item() == expected
    assert fold(torch.tensor([key]), torch.tensor([[data], [data]])).tolist() == [[expected], [expected]]
    for count in (3, 40000):  # by NumPy, and by torch
        many = [fold(key, data) if i == 1 else fold(i, data) for i in range(count)]
        assert fold(torch.tensor([key if i == 1 else i for i in range(count)]), data).tolist() == many
        many = [fold(key, data) if i == 1 else fold(key, i) for i in range(count)]
        assert fold(key, torch.tensor([data if i == 1 else i for i in range(count)])).tolist() == many


def test_few_keys_stay_where_they_are_and_can_be_traced():
    keys, expected = torch.arange(3, dtype=torch.int32), [fold(i, 5) for i in range(3)]
    with torch.device("meta"):
        assert fold(keys, 5).tolist() == expected
    program = make_fx(lambda keys: fold(keys, 5))(keys)
    assert program(keys + 1).tolist() == [fold(i + 1, 5) for i in range(3)]
    with FakeTensorMode() as mode:
        assert fold(mode.from_tensor(keys), 5).shape == (3,)


@pytest.mark.parametrize("keys", [torch.arange(12).reshape(3, 4), torch.arange(12).reshape(4, 3).T])
def test_hashing_as_an_operator_is_hashing_under_every_transform(keys):
    hashed = hash_op()
    for number in (None, torch.tensor(7), torch.arange(4), torch.arange(3)[:, None]):
        torch.library.opcheck(hashed, (keys, number, True))
        assert_close(hashed(keys, number, True), fold(keys, 0 if number is None else number))
    numbers = torch.arange(4)
    expected = fold(keys, numbers)
    by_row = vmap(lambda row, number: hashed(row, number, True), (0, None))(keys, numbers)
    by_column = vmap(lambda column, number: hashed(column, number, True), (1, 0), 1)(keys, numbers)
    assert_close(by_row, expected)
    assert_close(by_column, expected)


def test_strings_and_many_names_at_once_hash_alike():
    keys = keys_by_name(torch.arange(3), ["a", "b.c"])
    for name, value in keys.items():
        assert torch.equal(value, fold(torch.arange(3), name))
        assert value.tolist() == [fold(i, name) for i in range(3)]
    assert keys_by_name(torch.arange(3), []) == {}


def test_each_bit_of_a_seed_changes_about_half_of_the_bits_of_a_key():
    seeds = fold(torch.arange(200), "seeds")
    for bit in range(63):
        changed = fold(seeds, 0) ^ fold(seeds ^ (1 << bit), 0)
        ones = sum(bin(k & MASK).count("1") for k in changed.tolist())
        assert abs(ones - 32 * 200) < 5 * math.sqrt(64 * 200 / 4)


def test_a_seed_is_taken_from_the_global_state_only_if_none_is_given():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        assert resolve_seed(5) == 5
        assert torch.equal(torch.get_rng_state(), before)
        first = resolve_seed(None)
        torch.manual_seed(0)
        assert resolve_seed(None) == first
        assert resolve_seed(None) != first


def test_forking_the_global_state_leaves_devices_that_are_not_in_use_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    with forked(3):
        first = torch.rand(2)
    with forked(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


def test_generators_of_devices_in_use_are_watched_seeded_and_put_back(monkeypatch):
    of_device = torch.Generator().manual_seed(1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (of_device,))
    before = of_device.get_state()
    with forked(3):
        first = torch.rand(2, generator=of_device)
        assert torch.equal(torch.rand(2), first)  # one key for all
    assert torch.equal(of_device.get_state(), before)
    assert watched(lambda: torch.rand(2, generator=of_device))[1]
    assert watched(lambda: torch.rand(2))[1]
    assert not watched(lambda: torch.ones(2))[1]


def test_a_permutation_is_one_and_a_function_of_its_key():
    for key in range(-3, 4):
        assert sorted(permutation(key, 9).tolist()) == list(range(9))
        assert torch.equal(permutation(key, 9), permutation(key, 9))
    assert len({tuple(permutation(fold(k, "p"), 9).tolist()) for k in range(50)}) == 50


def test_noise_is_the_same_from_every_thread():
    keys, found = fold(torch.arange(4), "x"), []
    threads = [threading.Thread(target=lambda: found.append(normal(keys, (7,)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(z, normal(keys, (7,))) for z in found)


FIRST_USE = """
import threading, torch
from funcbayes._random import normal
barrier, found = threading.Barrier(8), []
def work():
    barrier.wait()
    found.append(normal(torch.arange(3), (2,)))
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(found) == 8, f"only {len(found)} of 8 threads got their noise"
"""


def test_the_first_noise_of_a_process_may_be_asked_for_by_several_threads():
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Allocation of draws to alternatives.


@pytest.mark.parametrize("num_choices", [1, 2, 5, 7])
def test_equal_weights_take_every_choice_once_in_every_block(num_choices):
    chosen = allocate(torch.arange(20 * num_choices), None, num_choices, 3)
    blocks = chosen.reshape(20, num_choices)
    assert torch.equal(blocks.sort(1).values, torch.arange(num_choices).expand(20, -1))
    if num_choices == 5:  # each block has an order of its own
        assert len(set(map(tuple, blocks.tolist()))) > 10


WEIGHTS = {
    "halves": [0.5, 0.5],
    "uneven": [0.1, 0.3, 0.05, 0.5, 0.05],
    "rare": [0.99, 0.01],
    "zeros": [0.0, 0.4, 0.0, 0.6, 0.0],
    "many": [i / 55 for i in range(1, 11)],
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_every_prefix_is_close_to_proportional_to_the_weights(weights):
    p, n = torch.tensor(weights, dtype=F64), 1000
    for site in range(20):
        chosen = allocate(torch.arange(n), p, len(p), fold(site, "site"))
        counts = torch.nn.functional.one_hot(chosen, len(p)).cumsum(0)
        expected = torch.arange(1, n + 1)[:, None] * p
        # Independent choices would be off by some sqrt(n p (1 - p)), up to 16 here.
        assert (counts - expected).abs().max() < 6
        assert not counts[-1][p == 0].any()


def test_choices_do_not_depend_on_which_others_are_asked_for():
    p = torch.tensor(WEIGHTS["uneven"], dtype=F64)
    for weights in (None, p):
        all_of_them = allocate(torch.arange(50), weights, 5, 9)
        some = torch.tensor([41, 3, 3, 17, 0])
        assert torch.equal(allocate(some, weights, 5, 9), all_of_them[some])


def test_choices_of_different_sites_are_independent():
    p = torch.tensor(WEIGHTS["uneven"], dtype=F64)
    for weights in (None, p):
        # Over sites the choice of one draw has the distribution of the weights.
        num_sites = 2000
        for draw in (0, 1, 7):
            first = [int(allocate(torch.tensor([draw]), weights, 5, fold(s, "a"))) for s in range(num_sites)]
            share = torch.bincount(torch.tensor(first), minlength=5) / num_sites
            q = torch.full((5,), 0.2, dtype=F64) if weights is None else p
            assert ((share - q).abs() < 5 * (q * (1 - q) / num_sites).sqrt()).all()
