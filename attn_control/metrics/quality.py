"""How alike two pictures are: PSNR, and SSIM as its paper defines it.

Both take arrays (height, width) or (height, width, channels), or PIL images, of one shape. Integer
pictures have a range of 255; for floats the caller must say it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attn_control.errors import AttnControlError


def psnr(first: Any, second: Any, *, data_range: float | None = None) -> float:
    """Peak signal to noise ratio in dB; infinite for equal pictures.

    >>> import numpy as np
    >>> round(psnr(np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)), 6)
    0.0
    """
    a, b, scale = _pair("psnr", first, second, data_range)
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(scale * scale / error)


def ssim(
    first: Any,
    second: Any,
    *,
    data_range: float | None = None,
    sigma: float = 1.5,
    window: int = 11,
) -> float:
    """Mean structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004): 1 for equal pictures.

    Gaussian window of 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, weighted (not sample)
    moments, and only windows that lie wholly inside the picture. Colour: mean over the channels.
    """
    a, b, scale = _pair("ssim", first, second, data_range)
    if window < 3 or window % 2 == 0 or not sigma > 0:
        raise AttnControlError(
            f"ssim: expected an odd window of at least 3 and sigma > 0, got {window=}, {sigma=}"
        )
    if min(a.shape[:2]) < window:
        raise AttnControlError(
            f"ssim: a picture of {a.shape[0]} x {a.shape[1]} is smaller than the window of {window}"
        )
    c1, c2 = (0.01 * scale) ** 2, (0.03 * scale) ** 2
    mean_a, mean_b = _blur(a, window, sigma), _blur(b, window, sigma)
    var_a = _blur(a * a, window, sigma) - mean_a**2
    var_b = _blur(b * b, window, sigma) - mean_b**2
    covariance = _blur(a * b, window, sigma) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return float(np.mean(top / bottom))


def _blur(image: np.ndarray[Any, Any], window: int, sigma: float) -> np.ndarray[Any, Any]:
    """Gaussian filter, cut to the places where the window fits."""
    import cv2

    half = window // 2
    blurred = cv2.GaussianBlur(
        image, (window, window), sigmaX=sigma, sigmaY=sigma, borderType=cv2.BORDER_REFLECT
    )
    return np.asarray(blurred)[half : image.shape[0] - half, half : image.shape[1] - half]


def _pair(
    name: str, first: Any, second: Any, data_range: float | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim not in (2, 3) or a.size == 0:
        raise AttnControlError(
            f"{name}: expected two pictures of one shape, got {a.shape} and {b.shape}"
        )
    if a.dtype != b.dtype:
        raise AttnControlError(f"{name}: expected one type of number, got {a.dtype} and {b.dtype}")
    if data_range is None:
        if not np.issubdtype(a.dtype, np.integer):
            raise AttnControlError(
                f"{name}: data_range is needed for {a.dtype} pictures: 1.0 for values in [0, 1]"
            )
        data_range = float(np.iinfo(a.dtype).max)
    if not (math.isfinite(data_range) and data_range > 0):
        raise AttnControlError(f"{name}: data_range must be positive, got {data_range}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise AttnControlError(f"{name}: a picture holds values that are not finite")
    return a, b, data_range
