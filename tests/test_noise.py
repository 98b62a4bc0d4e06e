"""The NumPy noise reference: known answers, moments, and independence of place."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff.engine import noise, selfcheck


@pytest.mark.parametrize(("counter", "key", "answer"), selfcheck.KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    assert tuple(noise.philox_block(np.array(counter), np.array(key))) == answer


def test_counter_layout_is_quad_id_stream() -> None:
    seed, quad, noise_id, stream = 0x0123456789ABCDEF, (7 << 32) + 5, 42, 1
    words = noise.philox(seed, quad, noise_id, stream)
    direct = noise.philox_block(np.array([5, 7, 42, 1]), np.array([0x89ABCDEF, 0x01234567]))
    assert np.array_equal(words, direct)


def test_negative_seed_is_its_64_bits() -> None:
    assert np.array_equal(noise.normal(-1, 9, 0, 0), noise.normal(2**64 - 1, 9, 0, 0))


def test_normals_match_box_muller_in_float64() -> None:
    words = noise.philox(5, np.arange(1 << 16), 3, 1).reshape(-1, 2)
    uniform = (words[:, 0].astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(uniform)), np.pi * words[:, 1].astype(np.uint32).view(np.int32) / 2**31
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    got = noise.box_muller(words[:, 0].copy(), words[:, 1].copy())
    # against exact arithmetic: 3 ulp at the radius' own scale, never finer than that of 1
    scale = 2.0 ** np.floor(np.log2(np.maximum(radius, 1.0)))[:, None]
    assert np.max(np.abs(got - exact) / scale) <= 3 * 2.0**-23


def test_moments_and_tail() -> None:
    z = noise.normal(11, 1 << 20, 0, 1).astype(np.float64)
    error = 1 / np.sqrt(z.size)  # standard error of the mean
    assert abs(z.mean()) < 4 * error
    assert abs(z.var() - 1) < 4 * np.sqrt(2) * error
    assert abs((z**3).mean()) < 4 * np.sqrt(15) * error
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96) * error
    assert 4.5 < np.abs(z).max() < 6.8


def test_every_corner_word_gives_a_finite_normal() -> None:
    edge = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], dtype=np.uint32)
    radius, angle = np.meshgrid(edge, edge)
    got = noise.box_muller(radius.ravel(), angle.ravel())
    assert np.isfinite(got).all()
    assert np.abs(got).max() == pytest.approx(np.sqrt(2 * 33 * np.log(2)), rel=1e-6)  # u = 2^-33, the smallest


def test_streams_ids_seeds_and_elements_are_uncorrelated() -> None:
    count = 1 << 16
    draws = [
        noise.normal(seed, count, noise_id, stream)
        for seed in (1, 2, 1 << 32)
        for noise_id in (0, 1)
        for stream in (0, 1)
    ]
    correlation = np.corrcoef(np.stack(draws)) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(count)
    lagged = [np.corrcoef(draws[0][:-lag], draws[0][lag:])[0, 1] for lag in (1, 2, 3, 4, 5)]
    assert np.abs(lagged).max() < 5 / np.sqrt(count)


def test_a_prefix_does_not_depend_on_the_length() -> None:
    long = noise.normal(3, 101, 2, 1)
    assert all(np.array_equal(noise.normal(3, n, 2, 1), long[:n]) for n in (1, 2, 3, 4, 5, 99))
