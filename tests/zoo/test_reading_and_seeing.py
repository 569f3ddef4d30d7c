"""What encoders and denoisers are asked to tell while they learn: the truth, and it is learnt."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_lessons import TINY, examples

from attn_control.zoo.scenes import BACKGROUNDS, COLOURS, SHAPES
from attn_control.zoo.train import flux, reading, seeing, text, wan
from attn_control.zoo.train.__main__ import module

TEXTURED = "a striped red circle above a blue ring on a gray background"
MOVING = "a red circle moves right in front of a blue square"


def told(reading_, row):
    """Word by word, the names of the classes that are told."""
    return [
        {k: names[c] for (k, names), c in zip(reading_.kinds.items(), word, strict=True) if c >= 0}
        for word in reading_.classes[row].tolist()
    ]


def test_words_are_told_what_their_object_is():
    captions = [TEXTURED, "a green cross with the texture of the reference"]
    got = reading.read(captions, reading.textured_facts, reading.TEXTURED, 16)
    ground = {"ground": "gray"}
    first = {"colour": "red", "shape": "circle", "texture": "striped", "place": "above"} | ground
    second = {"colour": "blue", "shape": "ring", "texture": "plain", "place": "below"} | ground
    assert told(got, 0) == [first] * 4 + [ground] + [second] * 3 + [ground] * 4 + [{}] * 4
    alone = {"colour": "green", "shape": "cross", "texture": "reference", "place": "alone"}
    unsaid = {"ground": "unsaid"}
    assert told(got, 1) == [alone | unsaid] * 3 + [unsaid] * 6 + [{}] * 7


def test_words_of_a_moving_scene():
    got = reading.read([MOVING], reading.moving_facts, reading.MOVING, 12)
    unsaid = {"ground": "unsaid"}
    mover = {"colour": "red", "shape": "circle", "motion": "right", "place": "in front of"}
    still = {"colour": "blue", "shape": "square", "motion": "still", "place": "behind"}
    want = [mover | unsaid] * 3 + [unsaid] * 5 + [still | unsaid] * 3 + [{}]
    assert told(got, 0) == want


def test_a_batch_of_dropped_captions_asks_nothing():
    torch.manual_seed(0)
    reader, states = reading.Reader(reading.MOVING, 8), torch.randn(2, 5, 8)
    asked = torch.full((2, 5, len(reading.MOVING)), -1)
    assert float(reader.loss(states, asked)) == 0
    asked[0, 1] = 0
    scores = reader.head(states)[0, 1].split(reader.sizes)
    by_hand = sum(s.logsumexp(0) - s[0] for s in scores) / len(scores)
    torch.testing.assert_close(reader.loss(states, asked), by_hand)


@pytest.mark.slow
def test_an_encoder_learns_to_read_relations():
    """Captions that differ in nothing but the order of their words: a bag of words cannot."""
    torch.manual_seed(0)
    captions = [
        f"a {a} {s} {r} a {b} {t}"
        for a, b in (("red", "blue"), ("blue", "red"), ("green", "cyan"))
        for s, t in (("circle", "ring"), ("cross", "square"))
        for r in ("left of", "right of", "above", "below")
    ]
    tokenizer = text.build_t5_tokenizer(flux.vocabulary(), 16)
    encoder, reader = flux.build_t5(len(tokenizer)), reading.Reader(reading.TEXTURED, text.WIDTH)
    ids = text.tokenize(tokenizer, captions)
    truth = reading.read(captions, reading.textured_facts, reading.TEXTURED, 16)

    def encode(ids):
        return encoder(ids)[0]

    before = reader.share_right(encode(ids), truth.classes)
    params = list(encoder.parameters())
    after = reading.learn(encode, reader, params, ids, truth, steps=150, batch=24)
    assert before < 0.5 and after > 0.98
    kind = list(reading.TEXTURED).index("place")
    scores = reader.head(encode(ids)).split(reader.sizes, -1)[kind].argmax(-1)
    known = truth.classes[..., kind] >= 0
    assert (scores == truth.classes[..., kind])[known].float().mean() > 0.95


def test_cells_are_what_a_drawing_shows():
    """Against the drawn picture itself: the palette colour of each cell's middle."""
    palette = np.array([*BACKGROUNDS.values(), *COLOURS.values()], float)
    for seed in range(1, 30, 3):
        (caption, pictures), told_ = flux.SOURCE(seed), flux.LABELS(seed)
        cells, things = told_["cells"], told_["things"]
        for k, picture in enumerate(pictures):
            middle = picture[2::4, 2::4].astype(float)
            colour = things[k][cells[k], 0]
            plain = things[k][cells[k], 2] <= 1  # patterns are of a darker tone
            nearest = np.linalg.norm(middle[:, :, None] - palette, axis=-1).argmin(-1)
            assert (nearest == colour)[plain].mean() > 0.97, (seed, k, caption)


def test_tones_are_what_a_drawing_shows():
    """Against the drawn picture itself: how much darker than its palette colour a cell is."""
    palette = np.array([*BACKGROUNDS.values(), *COLOURS.values()], float)
    compared = 0
    for seed in range(60):
        pictures, told_ = flux.SOURCE(seed)[1], flux.LABELS(seed)
        parts = zip(pictures, told_["cells"], told_["things"], told_["tones"], strict=True)
        for picture, cells, things, tones in parts:
            assert not tones[cells == 0].any()
            means = picture.reshape(32, 4, 32, 4, 3).mean((1, 3)).sum(-1)
            for number in (1, 2):
                within = np.pad(cells == number, 1)
                shifts = [np.roll(within, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                inner = np.all(shifts, 0)[1:-1, 1:-1]  # no edge of the shape runs through
                full = palette[things[number, 0]].sum()
                share = 2 * (1 - means[inner] / full)  # the darker tone is half as bright
                # An edge of a pattern may pass up to half a pixel from where pixels say it does.
                np.testing.assert_allclose(tones[inner] / 255, share, atol=0.26)
                compared += inner.sum() if share.any() else 0
    assert compared > 1000


def test_tones_stay_with_their_token_and_leave_background_out():
    cells = torch.ones(1, 2, 4, 4, dtype=torch.uint8)
    cells[0, 1, 0, 0] = 0
    tones = torch.arange(32, dtype=torch.uint8).view(1, 2, 4, 4) * 8
    seen = seeing.Seen(cells, torch.zeros(1, 2, 3, 3, dtype=torch.int8), tones)
    got = seen.dark_shares(torch.tensor([0]), 2, torch.tensor([0, 1]))
    first = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    want = torch.tensor(first + [[n + 16 for n in token] for token in first]) * 8 / 255
    want[4, 0] = -1
    torch.testing.assert_close(got[0], want)


def test_the_loss_of_tones_by_hand():
    seer = seeing.Seer((2, 2), 4, toned=2)
    torch.nn.init.zeros_(seer.tone_head.weight)
    with torch.no_grad():
        seer.tone_head.bias.copy_(torch.tensor([0.0, 2.0]))
    shares = torch.tensor([[[0.5, 0.25], [-1.0, 1.0], [-1.0, -1.0]]])
    loss = seer.tone_loss(torch.randn(1, 3, 4), shares).item()
    dark, light = np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))
    assert abs(loss - (np.log(2) + 0.25 * dark + 0.75 * light + dark) / 3) < 1e-6
    assert seer.tone_loss(torch.randn(1, 3, 4), torch.full((1, 3, 2), -1.0)).item() == 0


def test_fine_steps_ask_for_tones_and_coarse_ones_do_not():
    seen = seeing.Seen(
        torch.ones(16, 2, 32, 32, dtype=torch.uint8),
        torch.ones(16, 2, 3, 3, dtype=torch.int8),
        torch.zeros(16, 2, 32, 32, dtype=torch.uint8),
    )
    for fine_from in (0.0, 1.0):
        s = dataclasses.replace(TINY["shapes-flux"], fine_from=fine_from, fine_every=10**6)
        lesson = flux.Lesson(s, examples("shapes-flux"), seen)
        step = int(fine_from == 1.0)
        assert lesson.is_fine(step) == (fine_from == 0.0)
        batch = lesson.batch(step)
        assert ("shares" in batch) == (fine_from == 0.0)
        if fine_from == 0.0:  # another answer to where tones lie is another loss
            assert batch["shares"].shape[1:] == (batch["seen"].shape[1], 4)
            other = dataclasses.replace(seen, tones=seen.tones + 255)
            dark = flux.Lesson(s, examples("shapes-flux"), other).loss(step)[0]["see"]
            assert dark != lesson.loss(step)[0]["see"]


def test_the_mover_is_told_from_what_stands_still():
    names = ["", "still", "right", "left", "down", "up"]
    for seed in range(40):
        caption, _ = wan.SOURCE(seed)
        words = caption.split()
        cells, things = wan.LABELS(seed)["cells"], wan.LABELS(seed)["things"]
        for number in (1, 2):
            where = [np.argwhere(c == number).mean(0) for c in cells if (c == number).any()]
            if not where:
                continue
            kind = names[things[0][number, 2]]
            down, right = where[-1] - where[0]
            if kind == "still":
                assert max(abs(down), abs(right)) < 6  # only what is in front cuts its middle
            else:
                assert kind == words[4]
                way = {"right": right, "left": -right, "down": down, "up": -down}[kind]
                assert way > 10


def test_tokens_of_one_object_are_told_and_edges_are_not():
    cells = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    cells[0, 1, :4, :4], cells[0, 1, 4:, 4:7] = 1, 2
    things = torch.tensor([[[3, 0, 0], [5, 1, 2], [-1, -1, -1]], [[3, 0, 0], [6, 2, 1], [7, 3, 4]]])
    seen = seeing.Seen(cells, things[None].to(torch.int8))
    got = seen.classes(torch.tensor([0]), 4, torch.tensor([0, 1]))
    ground, first, second = [3, 0, 0], [6, 2, 1], [7, 3, 4]
    assert got.tolist() == [[ground] * 4 + [first, ground, ground, second]]
    cells[0, 1, 4:, 5:7] = 0  # a quarter of the token is left: too little to tell
    got = seen.classes(torch.tensor([0]), 4, torch.tensor([1]))
    assert got.tolist() == [[first, ground, ground, [-1, -1, -1]]]


def test_objects_weigh_as_much_as_all_background():
    seer = seeing.Seer((2, 2), 4)
    torch.nn.init.zeros_(seer.head.weight)
    classes = torch.zeros(1, 10, 2, dtype=torch.long)
    classes[0, 0] = 1
    classes[0, 1] = -1
    with torch.no_grad():
        seer.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 3.0]))
    right, wrong = np.log1p(np.exp(-3.0)), np.log1p(np.exp(3.0))
    want = 0.5 * (0.5 * (np.log(2) + right) + 0.5 * (np.log(2) + wrong))
    assert abs(seer.loss(torch.randn(1, 10, 4), classes).item() - want) < 1e-6


@pytest.mark.parametrize("name", ["shapes-flux", "shapes-wan"])
def test_weights_of_what_is_told(name):
    """`see` and `read` scale their parts of the loss; figures are logged each by its name."""
    data = examples(name)
    side, pictures = data.targets.shape[-1], 3 if name == "shapes-wan" else 2
    count = len(data.targets)
    g = torch.Generator().manual_seed(0)
    seen = seeing.Seen(
        torch.randint(0, 2, (count, pictures, side, side), generator=g, dtype=torch.uint8),
        torch.ones(count, pictures, 3, 3, dtype=torch.int8),
        torch.zeros(count, pictures, side, side, dtype=torch.uint8),
    )

    def loss(**changes):
        s = dataclasses.replace(TINY[name], drop=0.0, **changes)
        return module(name).Lesson(s, data, seen).loss(0)

    figures, plain = loss(see=0.0, read=0.0)
    assert figures.keys() > {"see", "read"} and len(figures) == 3
    (kind,) = figures.keys() - {"see", "read"}
    assert torch.equal(plain, figures[kind])
    torch.testing.assert_close(loss(see=0.5, read=0.0)[1], plain + 0.5 * figures["see"])
    torch.testing.assert_close(loss(see=0.0, read=2.0)[1], plain + 2.0 * figures["read"])
    assert "see" not in module(name).Lesson(TINY[name], data).loss(0)[0]


def test_scenes_with_checks_are_drawn_as_often_as_asked():
    data = examples("shapes-flux")
    things = torch.zeros(16, 2, 3, 3, dtype=torch.int8)
    third = 1 + ("plain", "striped", "barred", "checked").index("checked")
    things[1, 0, 1, 2] = things[9, 0, 2, 2] = third  # the first object, and a second one
    things[2, 1, 1, 2] = third  # the reference alone does not count
    blank = torch.zeros(16, 2, 32, 32, dtype=torch.uint8)
    seen = seeing.Seen(blank, things, blank)
    s = dataclasses.replace(TINY["shapes-flux"], single=1.0, hard=1.0, checked=4.0)
    named, pointing = flux.Lesson(s, data, seen).chances
    want = torch.ones(8, dtype=torch.float64)
    want[1] = 4
    torch.testing.assert_close(named, want.cumsum(0) / 11)
    torch.testing.assert_close(pointing, want.cumsum(0) / 11)


def test_a_dropped_caption_tells_nothing():
    s = dataclasses.replace(TINY["shapes-flux"], drop=1.0)
    assert (flux.Lesson(s, examples("shapes-flux")).batch(0)["read"] == -1).all()


@pytest.mark.parametrize("name", ["shapes-flux", "shapes-wan"])
def test_what_is_seen_belongs_to_what_is_shown(name, tmp_path):
    """Through a lesson's batch: classes are those of the example and of its frames."""
    if name == "shapes-flux":
        rows = range(6)
        captions = [flux.SOURCE(seed)[0] for seed in rows]
        targets = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 4, 32, 32).half()
    else:
        rows = range(3)
        captions = [wan.SOURCE(seed)[0] for seed in rows]
        targets = 10 * torch.arange(3.0).view(3, 1, 1, 1, 1) + torch.arange(9.0).view(1, 1, 9, 1, 1)
        targets = targets.expand(3, 4, 9, 32, 32).half()
    model = module(name)
    seen = seeing.gather(model.LABELS, len(rows), tmp_path / "seen.npz")
    asked = []
    again = seeing.gather(
        lambda seed: asked.append(seed) or model.LABELS(seed), len(rows), tmp_path / "seen.npz"
    )
    assert set(asked) <= {0}  # all else comes from the file
    parts = {k: v for k, v in vars(seen).items() if v is not None}
    assert len(parts) == (3 if name == "shapes-flux" else 2)
    assert all(torch.equal(part, getattr(again, k)) for k, part in parts.items())
    references = -1 - targets if name == "shapes-flux" else None
    data = dataclasses.replace(examples(name), targets=targets, captions=captions)
    data = dataclasses.replace(data, references=references)
    lesson = model.Lesson(TINY[name], data, seen)
    for step in range(6):
        b, patch = lesson.batch(step), 2 if lesson.is_fine(step) else 4
        for i, x0 in enumerate(b["x0"]):
            if name == "shapes-flux":
                at, pictures = int(x0[0, 0, 0]), [0, 1] if "reference" in b else [0]
            else:
                marks = x0[0, :, 0, 0].int()
                at, pictures = int(marks[0]) // 10, (marks % 10).tolist()
            want = seen.classes(torch.tensor([at]), patch, torch.tensor(pictures))[0]
            assert torch.equal(b["seen"][i], want)
            if "shares" in b:
                want = seen.dark_shares(torch.tensor([at]), patch, torch.tensor(pictures))[0]
                assert torch.equal(b["shares"][i], want)


assert set(SHAPES) >= set(reading.MOVING["shape"])
