"""Numbers about pictures, and how sure one may be of them."""

from attn_control.metrics.intervals import Interval, bootstrap_mean, bootstrap_paired, wilson
from attn_control.metrics.quality import psnr, ssim

__all__ = ["Interval", "bootstrap_mean", "bootstrap_paired", "psnr", "ssim", "wilson"]
