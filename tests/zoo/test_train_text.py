"""The words on disk and in the weights: one number a word, the same in every process."""

import hashlib
import json
import os
import subprocess
import sys

import torch
from transformers import CLIPTokenizer

from attn_control.zoo.train import flux, latents, text, wan

# Some of the numbers that trained weights were trained with: they may never move.
PLAIN = {"a": 320, "red": 591, "circle": 532}


def test_every_word_is_one_token_and_captions_fit():
    tokenizer = text.build_tokenizer()
    for word in text.words():
        assert len(tokenizer(word).input_ids) == 3, word
    longest = "a purple triangle right of a yellow triangle on a white background"
    assert text.tokenize(tokenizer, [longest]).shape == (1, text.LENGTH)
    ids = text.tokenize(tokenizer, [longest])[0].tolist()
    assert ids.index(tokenizer.eos_token_id) < text.LENGTH - 1
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def _shared():
    """Digests of all that one process writes to disk and another reads: words, scenes, videos."""
    tokenizers = {
        "plain": text.build_tokenizer(),
        "flux": text.build_tokenizer(flux.vocabulary(), flux.LENGTH),
        "flux t5": text.build_t5_tokenizer(flux.vocabulary(), flux.LENGTH),
        "wan": text.build_t5_tokenizer(wan.vocabulary(), wan.LENGTH),
    }
    found = {name: sorted(t.get_vocab().items()) for name, t in tokenizers.items()}
    for name, source in (("plain", latents.plain), ("flux", flux.SOURCE), ("wan", wan.SOURCE)):
        caption, pictures = source(5)
        found[f"{name} scene"] = [caption, *(p.tobytes().hex() for p in pictures)]
    return {k: hashlib.sha256(json.dumps(v).encode()).hexdigest() for k, v in found.items()}


def test_every_process_numbers_the_words_and_draws_the_scenes_alike(tmp_path):
    """Data of one process must fit weights of another."""
    here = _shared()
    script = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import json, test_train_text as t\nprint(json.dumps(t._shared()))"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
        )
        assert json.loads(out.stdout.splitlines()[-1]) == here
    text.build_tokenizer().save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for word in text.words():
        assert again(word).input_ids == text.build_tokenizer()(word).input_ids, word


def test_the_encoders_pool_at_the_first_end_token():
    tokenizer = text.build_tokenizer()
    encoder = text.build_encoder(tokenizer).eval()
    a, b = text.tokenize(tokenizer, ["a red circle", "a blue circle"])
    with torch.no_grad():
        pooled = [encoder(x[None]).text_embeds[0] for x in (a, b)]
        tail = a.clone()
        tail[6:] = a[1]  # after the first end token nothing may matter
        again = encoder(tail[None]).text_embeds[0]
    assert not torch.allclose(*pooled)
    torch.testing.assert_close(pooled[0], again)


def test_flux_s_two_tokenizers_know_every_word_and_fit_every_caption():
    words = flux.vocabulary()
    clip = text.build_tokenizer(words, flux.LENGTH)
    t5 = text.build_t5_tokenizer(words, flux.LENGTH)
    longest = (
        "a purple triangle right of a yellow triangle with the texture of the reference "
        "on a white background"
    )
    for tokenizer, marks in ((clip, 2), (t5, 1)):
        ids = text.tokenize(tokenizer, [longest, longest.upper()])
        assert ids.shape == (2, flux.LENGTH) and torch.equal(ids[0], ids[1])
        assert len(tokenizer(longest).input_ids) == len(longest.split()) + marks <= flux.LENGTH
        assert len({tokenizer(word).input_ids[-2] for word in words}) == len(words)
    for tokenizer in (clip, t5):
        assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert t5(longest).input_ids[-1] == t5.eos_token_id == 1
    # Its words do not move those of the plain scenes, whose numbers are in shipped weights.
    assert text.build_tokenizer()("a red circle").input_ids[1:-1] == [PLAIN[w] for w in PLAIN]
