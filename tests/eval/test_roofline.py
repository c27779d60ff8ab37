"""The estimate obeys both bounds, and gives the published turning points and latencies."""

from __future__ import annotations

import pytest

from compress.eval.roofline import Device, Matrix, Profile, devices, estimate, forward_work, linear_work, peak

A100_40 = Device(name="A100 40 GB", bandwidth=1555e9, half=312e12, int8=624e12, memory=40e9, source="datasheet")


def llama_7b(bits: float, cache_bits: int = 16, is_integer: bool = False) -> Profile:
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    matrices = [Matrix(i, o, i * o, i * o * bits / 8) for _ in range(32) for i, o in shapes]
    matrices.append(Matrix(4096, 32000, 4096 * 32000, 4096 * 32000 * 2))
    weight_bytes = int(sum(matrix.nbytes for matrix in matrices))
    return Profile(tuple(matrices), weight_bytes, 4096, 2 * 4096 * cache_bits / 8, (None,) * 32, is_integer)


def test_an_fp16_layer_turns_at_the_published_batch() -> None:
    layer = Matrix(4096, 4096, 4096**2, 2 * 4096**2)
    one = linear_work(layer, 1)
    assert one.operations / one.nbytes == pytest.approx(0.9995, abs=1e-4)
    packed = layer._replace(nbytes=4096**2 / 2)

    def turns(matrix: Matrix) -> int:
        works = ((n, linear_work(matrix, n)) for n in range(1, 1000))
        return next(n for n, work in works if work.operations / A100_40.half >= work.nbytes / A100_40.bandwidth)

    assert turns(layer) == pytest.approx(222, abs=3)
    assert turns(packed) == pytest.approx(56, abs=2)


def test_a_7b_model_decodes_at_the_speed_of_its_bytes() -> None:
    whole, packed = estimate(llama_7b(16), A100_40), estimate(llama_7b(4.15), A100_40)
    assert 1000 / whole.decode_tokens_per_second == pytest.approx(8.7, rel=0.05)  # milliseconds
    assert 1000 / packed.decode_tokens_per_second == pytest.approx(2.4, rel=0.15)
    assert (whole.bound, whole.fits) == ("memory", True)
    assert not estimate(llama_7b(16), devices()[-1]).fits  # a phone
    # Bits change bytes only: a long prompt takes as long.
    long = [estimate(llama_7b(bits), A100_40, prompt=4096).prefill_tokens_per_second for bits in (16, 4)]
    assert long[0] == pytest.approx(long[1], rel=1e-6)
    assert estimate(llama_7b(8, 8, True), A100_40, prompt=4096).prefill_tokens_per_second > 1.8 * long[0]


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_no_time_is_below_either_bound(device: Device) -> None:
    profile = llama_7b(4)
    for n_new in (1, 512):
        for work in forward_work(profile, n_new, 512):
            assert work.seconds(device) >= work.operations / peak(device, False)
            assert work.seconds(device) >= work.nbytes / device.bandwidth
    assert device.source and device.int8 >= device.half


def test_decoding_takes_two_operations_a_weight_and_the_attention() -> None:
    profile = llama_7b(16)
    operations = sum(work.operations for work in forward_work(profile, 1, 100))
    weights = sum(matrix.n_weights for matrix in profile.matrices)
    assert operations == 2 * weights + 32 * 4 * 100 * 4096


def test_a_window_bounds_the_cache() -> None:
    sliding = llama_7b(16)._replace(windows=(None, 256) * 16)
    assert llama_7b(16).kv_cache_bytes(1000) == 32 * 1000 * 16384
    assert sliding.kv_cache_bytes(1000) == 16 * (1000 + 256) * 16384
