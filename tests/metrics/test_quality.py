"""PSNR and SSIM against closed forms, a slow loop, and scikit-image where it is installed."""

import math

import numpy as np
import pytest
from PIL import Image

from attn_control.errors import AttnControlError
from attn_control.metrics import psnr, ssim


def pictures(shape=(32, 40, 3), noise=20, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 256, size=shape).astype(np.uint8)
    change = rng.integers(-noise, noise + 1, size=shape)
    return first, np.clip(first.astype(int) + change, 0, 255).astype(np.uint8)


def slow_ssim(a, b, scale):
    """The paper's formula, one window after another."""
    x = np.arange(11) - 5
    line = np.exp(-(x**2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * scale) ** 2, (0.03 * scale) ** 2
    values = []
    for channel in range(a.shape[2]):
        for row in range(a.shape[0] - 10):
            for column in range(a.shape[1] - 10):
                p = a[row : row + 11, column : column + 11, channel].astype(float)
                q = b[row : row + 11, column : column + 11, channel].astype(float)
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
                cov = (weight * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
                )
    return float(np.mean(values))


def test_psnr_of_a_constant_error_has_a_closed_form():
    first = np.full((16, 16, 3), 100, np.uint8)
    second = np.full((16, 16, 3), 110, np.uint8)
    assert psnr(first, second) == pytest.approx(20 * math.log10(255 / 10))
    # Unsigned bytes must not wrap around: 100 - 110 is -10, not 246.
    assert psnr(second, first) == psnr(first, second)
    assert psnr(first, first) == math.inf
    assert psnr(first / 255, second / 255, data_range=1.0) == pytest.approx(psnr(first, second))


def test_ssim_of_two_flat_pictures_has_a_closed_form():
    a, b = 100.0, 140.0
    c1 = (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    found = ssim(np.full((20, 20), 100, np.uint8), np.full((20, 20), 140, np.uint8))
    assert found == pytest.approx(expected, abs=1e-6)


def test_ssim_equals_the_formula_written_as_a_loop():
    first, second = pictures((24, 27, 3), noise=60)
    assert ssim(first, second) == pytest.approx(slow_ssim(first, second, 255), abs=1e-9)
    assert ssim(first, first) == pytest.approx(1.0)
    assert ssim(first, second) == pytest.approx(ssim(second, first))


def test_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    first, second = pictures((64, 48, 3))
    theirs = metrics.structural_similarity(
        first, second, channel_axis=2, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=255,
    )  # fmt: skip
    assert ssim(first, second) == pytest.approx(theirs, abs=1e-7)
    assert psnr(first, second) == pytest.approx(
        metrics.peak_signal_noise_ratio(first, second, data_range=255)
    )


def test_pil_images_are_welcome():
    first, second = pictures()
    assert ssim(Image.fromarray(first), Image.fromarray(second)) == ssim(first, second)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda a: psnr(a, a[:-1]), "one shape"),
        (lambda a: ssim(a[:8], a[:8]), "smaller than the window of 11"),
        (lambda a: ssim(a / 255, a / 255), "data_range is needed"),
        (lambda a: psnr(a, a / 255), "one type of number"),
        (lambda a: psnr(a * np.nan, a * np.nan, data_range=1.0), "not finite"),
        (lambda a: ssim(a, a, window=4), "window=4"),
        (lambda a: psnr(a, a, data_range=0.0), "data_range must be positive"),
    ],
)
def test_refusals_name_the_value(call, words):
    with pytest.raises(AttnControlError, match=words):
        call(pictures()[0])
