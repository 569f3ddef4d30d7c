"""A small suite of sparse attention whose densities are reckoned by hand."""

# 4 x 8 x 8 tokens in tiles of 4 x 4 x 4: four of them, and a query of the mask reads its own, a
# quarter of the keys. Four levels: dense, refresh, and two that are sparse.
SUITE = """\
question: Are masks better than nothing?
measurements:
  few:
    baseline: dense
    planted: {variant: dense, share: 0.9}
    rounds: 1
    sparse:
      tokens: 256
      density: 0.7
      psnr: 1.0
      gain: 0.001
      closer: {variant: tile, share: 0.5}
    job:
      model: shapes-wan
      prompts: {zoo: shapes-wan, spread: 2}
      seeds: 0-2
      sampler: {num_inference_steps: 4, guidance_scale: 1.0, height: 64, width: 64, num_frames: 7}
      variants:
        dense: {}
        share:
          controls:
            - TileAttention: {tiles: 1, correction: share, policy: &once {first: 1, refresh: 8}}
        tile:
          controls:
            - TileAttention: {tiles: 1, tile: [4, 4, 4], correction: none, policy: *once}
        tile + lse:
          controls:
            - TileAttention: {tiles: 1, tile: [4, 4, 4], correction: lse, policy: *once}
        chosen:
          controls:
            - SelectedAttention: {keep: 0.5, block: 32, correction: none, policy: *once}
"""
