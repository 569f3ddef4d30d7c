"""From what a denoiser is called with to the order of its tokens. Each function serves every family
that packs alike.

Signature: (site, arguments by name, model) -> Layout of the site's main softmax; or one Softmax
each, where a processor call makes several; or None where the rows of a batch have none in common.
"""

from attn_control.layouts.cross import (
    channels_last_video_and_text,
    frames_first_video_and_text,
    packed_video_and_text,
    reference_video_and_text,
    unet,
    video_and_nested_text,
    video_and_text,
    wan_video_and_text,
)
from attn_control.layouts.joint import (
    image_asks_text_and_image,
    image_then_text,
    padded_image_then_text,
    padded_rows,
    stretches_then_image,
    text_then_frames,
    text_then_image,
    text_then_image_or_cached,
    text_then_packed,
    text_then_packed_or_cached,
    text_then_shapes,
    valid_text_then_image,
    video_then_mixed_text,
    video_then_text,
    video_then_text_or_itself,
    video_then_valid_text_by_row,
)
from attn_control.layouts.parts import Arguments, LayoutOf
from attn_control.layouts.text import cache_facts, cached_then_canvas, prompt_then_response

__all__ = [
    "Arguments",
    "LayoutOf",
    "cache_facts",
    "cached_then_canvas",
    "channels_last_video_and_text",
    "frames_first_video_and_text",
    "image_asks_text_and_image",
    "image_then_text",
    "packed_video_and_text",
    "padded_image_then_text",
    "padded_rows",
    "prompt_then_response",
    "reference_video_and_text",
    "stretches_then_image",
    "text_then_frames",
    "text_then_image",
    "text_then_image_or_cached",
    "text_then_packed",
    "text_then_packed_or_cached",
    "text_then_shapes",
    "unet",
    "valid_text_then_image",
    "video_and_nested_text",
    "video_and_text",
    "video_then_mixed_text",
    "video_then_text",
    "video_then_text_or_itself",
    "video_then_valid_text_by_row",
    "wan_video_and_text",
]
