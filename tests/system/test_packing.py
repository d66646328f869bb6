"""Packings, their parts, and texts of lengths of their own."""

import pytest
import torch
from golden_files import relative_error
from small_packs import SIZES, joined, problem

from tim.models import Packing, pack, unpack


def test_packing_and_its_parts():
    latents = [torch.arange(3.0 * h * w).view(3, h, w) + h for h, w in SIZES]
    tokens, packing = pack(latents, 2)
    assert packing.sizes == ((2, 3), (1, 1), (3, 2), (2, 5)) and packing.total == len(tokens) == 23
    assert all(map(torch.equal, unpack(tokens, packing), latents))
    assert torch.equal(tokens[1], latents[0][:, :2, 2:4])  # row-major
    rest = packing[2:]
    assert rest.sizes == packing.sizes[2:] and packing.tokens_of(2) == 7
    assert all(map(torch.equal, unpack(tokens[7:], rest), latents[2:]))
    assert (packing + rest).sizes == packing.sizes + rest.sizes and len(packing + rest) == 6
    rows = torch.arange(4.0)
    spread = packing.spread(rows)
    assert torch.equal(spread, torch.tensor([0.0] * 6 + [1.0] + [2.0] * 6 + [3.0] * 10))
    assert torch.equal(packing.means(torch.stack((spread, -spread))), torch.stack((rows, -rows)))
    spread[6] = float("nan")
    assert packing.means(spread).isnan().tolist() == [False, True, False, False]
    assert packing.to("meta").grids.is_meta and packing.to("meta").segments.lengths == (6, 1, 6, 10)
    batch = torch.randn(2, 3, 4, 4)
    assert torch.equal(torch.stack(unpack(*pack(batch, 2))), batch)


@pytest.mark.parametrize(
    "latents, message",
    [
        ([], "at least one picture, got none"),
        ([torch.zeros(3, 4, 5)], r"multiples of patch_size 2; got \(3, 4, 5\) at 0"),
        ([torch.zeros(3, 4)], r"must be \(channels, H, W\)"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 0, 4)], "at least one token, got 0×2"),
        ([torch.zeros(3, 4, 4), torch.zeros(4, 4, 4)], "one number of channels"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4).double()], "float64.* at 1"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, device="meta")], "'meta'.* at 1"),
    ],
)
def test_what_cannot_be_packed(latents, message):
    with pytest.raises(ValueError, match=message):
        pack(latents, 2)


def test_bad_input_is_refused():
    model, latents, t, r, y = problem()
    tokens, packing = pack(latents, 2)
    for size in ((2, 0), (2,), 3, (2, 1.5)):
        with pytest.raises(ValueError, match="token"):
            Packing.of([(1, 1), size])
    for wrong in (tokens[1:], tokens[..., :1]):
        with pytest.raises(ValueError, match=r"tokens must be \(23, channels, p, p\)"):
            unpack(wrong, packing)
    for size in (0, -2, 1.5):
        with pytest.raises(ValueError, match="patch_size must be a whole number of at least 1"):
            pack(latents, size)
    with pytest.raises(ValueError, match=r"values must be \(…, 23\), got \(2, 1\)"):
        packing.means(torch.ones(2, 1))
    for args, options, message in (
        ((tokens[1:], t, r, y), {}, r"sizes that sum to 23, got \(22, 3, 2, 2\)"),
        ((tokens.flatten(1), t, r, y), {}, r"x must be tokens \(23, 3, 2, 2\)"),
        ((tokens, t[:2], r, y), {}, r"t must be .* shape \(4,\)"),
        ((tokens, r, t, y), {}, "r must not be later than t"),
        ((tokens, t, r, y[:1]), {}, "one integer class label a sample"),
        ((tokens, t, r, y), dict(packing=packing.segments), "what `pack` gives, got a Segments"),
        ((tokens, t, r, y), dict(packing=packing.to("meta")), "must be on cpu like x, got meta"),
        ((tokens, t, r, y.to("meta")), {}, "y must be on cpu like x, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*args, **dict(packing=packing) | options)


def test_texts_of_their_own_lengths():
    """What lies beyond a text is not read: sample and gradients are those of the text alone; so
    they are of two packings together and of a part of one."""
    model, latents, t, r, y = problem(text=7, dtype=torch.float64)
    lengths = [2, 5, 1, 4]
    y.requires_grad_()
    tokens, packing = pack(latents, 2)
    packing = packing.reading(lengths, 5)
    ours = unpack(model(tokens, t, r, y, packing=packing), packing)
    expected = [
        model(x[None], t[i : i + 1], r[i : i + 1], y[i : i + 1, :length])[0]
        for i, (x, length) in enumerate(zip(latents, lengths, strict=True))
    ]
    assert relative_error(joined(ours), joined(expected)) < 1e-14
    gradients = [torch.autograd.grad(joined(x).square().sum(), y)[0] for x in (ours, expected)]
    assert relative_error(*gradients) < 1e-14
    assert not gradients[0][0, 2:].any() and gradients[0][1].any(-1).all()

    both = packing + packing
    doubled = (each.repeat(2, *[1] * (each.ndim - 1)) for each in (tokens, t, r, y))
    assert relative_error(joined(unpack(model(*doubled, packing=both), both)[4:]), joined(ours)) < (
        1e-14
    )
    last, first = packing[2:].to("cpu"), packing.tokens_of(2)
    part = model(tokens[first:], t[2:], r[2:], y[2:], packing=last)
    assert relative_error(joined(unpack(part, last)), joined(ours[2:])) < 1e-14


def test_lengths_of_texts_that_do_not_fit():
    model, latents, t, r, y = problem(text=7)
    tokens, packing = pack(latents, 2)
    for lengths in ([1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 6]):
        with pytest.raises(ValueError, match="lengths must be 4, of 1 to 5 tokens each"):
            packing.reading(lengths, 5)
    with pytest.raises(ValueError, match="texts must be of 4 tokens, .* got 5"):
        model(tokens, t, r, y, packing=packing.reading([1, 2, 3, 4], 4))
    with pytest.raises(ValueError, match="must be read alike"):
        packing + packing.reading([1, 2, 3, 4], 5)
