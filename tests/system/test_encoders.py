"""Autoencoders and text features as the released networks were trained on them."""

import json
import threading

import diffusers
import pytest
import torch
import transformers
from golden_files import GOLDEN, relative_error
from safetensors.torch import load_file
from small_pipelines import dc_ae, gemma, sd_vae, tokenizer

from tim.captions import escaped
from tim.encoders import Autoencoder, TextEncoder

FOLDER = GOLDEN / "training"
FACTS = json.loads((FOLDER / "facts.json").read_text())
CLASSES = {"kl": diffusers.AutoencoderKL, "dc": diffusers.AutoencoderDC}


@pytest.fixture(scope="module")
def autoencoders():
    return load_file(FOLDER / "autoencoders.safetensors")


@pytest.fixture
def folder(kind, autoencoders, tmp_path):
    """As `save_pretrained` leaves it."""
    model = CLASSES[kind](**FACTS["autoencoders"][kind])
    prefix = f"{kind}.weights."
    state = {k.removeprefix(prefix): v for k, v in autoencoders.items() if k.startswith(prefix)}
    model.load_state_dict(state)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", CLASSES)
def test_latents_and_pictures(kind, folder, autoencoders):
    """The scaling of the config, which the published code lost with newer diffusers."""
    autoencoder = Autoencoder.load(folder)
    scaling, channels = {"kl": (0.18215, 4), "dc": (0.41407, 8)}[kind]
    assert (autoencoder.scaling_factor, autoencoder.factor) == (scaling, 2)
    assert autoencoder.channels == channels
    torch.manual_seed(31)
    z = autoencoder.encode(autoencoders["images"])
    assert relative_error(z, autoencoders[f"{kind}.latents"]) < 2e-6
    images = autoencoder.decode(z)
    assert relative_error(images, autoencoders[f"{kind}.decoded"]) < 2e-6
    assert not z.requires_grad and not images.requires_grad


@pytest.mark.parametrize("kind", CLASSES)
def test_autocast_does_not_reach_the_autoencoder(kind, folder, autoencoders):
    autoencoder = Autoencoder.load(folder)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(31)
        z = autoencoder.encode(autoencoders["images"].bfloat16().float())
        torch.manual_seed(31)
        low = autoencoder.encode(autoencoders["images"].bfloat16())
        images = autoencoder.decode(z)
    assert z.dtype == images.dtype == torch.float32 and torch.equal(low, z)
    assert torch.equal(images, autoencoder.decode(z))


def test_a_posterior_s_generator(autoencoders):
    autoencoder, images = Autoencoder(sd_vae()), autoencoders["images"]
    one, same, other = (
        autoencoder.encode(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("kind", CLASSES)
def test_large_pictures_go_in_tiles_without_overlap(kind, folder):
    whole, tiled = Autoencoder.load(folder), Autoencoder.load(folder, tile=16)
    images = torch.rand(2, 3, 16, 40) * 2 - 1
    z = whole.decode(torch.zeros(1, whole.channels, 8, 8))  # no larger than a tile
    assert torch.equal(tiled.decode(torch.zeros(1, whole.channels, 8, 8)), z)

    def encode(autoencoder, images):  # without the posterior's noise
        encoded = autoencoder.model.encode(images)
        return encoded.latent if kind == "dc" else encoded.latent_dist.mean

    with torch.no_grad():
        parts = [encode(whole, part) for part in images.split(16, dim=3)]
        torch.testing.assert_close(encode(tiled, images), torch.cat(parts, dim=3))
        assert not torch.allclose(encode(whole, images), torch.cat(parts, dim=3))
    z = tiled.encode(images)
    parts = torch.cat([whole.decode(part) for part in z.split(8, dim=3)], dim=3)
    torch.testing.assert_close(tiled.decode(z), parts)
    with pytest.raises(ValueError, match="tile must be a multiple of 2, got 15"):
        Autoencoder.load(folder, tile=15)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 8, 10)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match="images must be .* multiples of 4; got"):
        Autoencoder(dc_ae()).encode(torch.zeros(shape))


def test_another_autoencoder():
    with pytest.raises(ValueError, match="an AutoencoderKL or AutoencoderDC is needed, got Linear"):
        Autoencoder(torch.nn.Linear(1, 1))
    shifted = diffusers.AutoencoderKL(block_out_channels=(32,), shift_factor=0.1)
    with pytest.raises(ValueError, match="must scale by scaling_factor alone, got shift_factor"):
        Autoencoder(shifted)


# Text


@pytest.fixture(scope="module")
def features():
    return load_file(FOLDER / "text_features.safetensors")


def golden_encoder(implementation="sdpa", **options) -> TextEncoder:
    encoder = TextEncoder.load(FOLDER / "text", dtype=torch.float32, max_seq_length=24, **options)
    encoder.model.set_attn_implementation(implementation)
    return encoder


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", ["last", "second_last"])
def test_padding_is_as_flash_attention_leaves_it(features, layer, implementation):
    """With any attention, at every position: real, padded, and of the empty text."""
    encode = golden_encoder(implementation, use_last_hidden_state=layer == "last")
    y = encode(FACTS["text"]["prompts"])
    nothing = encode.nothing[:, : y.shape[1]]
    assert relative_error(y, features[f"unpadded.{layer}"]) < 1e-5
    assert relative_error(nothing, features[f"unpadded.{layer}.null"]) < 1e-5
    assert relative_error(y, features[f"sdpa.{layer}"]) > 0.1
    assert relative_error(nothing, features[f"sdpa.{layer}.null"]) > 0.1


def test_the_model_is_left_as_it_was(features):
    encode = golden_encoder()
    encode(["a red fox"])
    ids, mask = features["input_ids"], features["mask"]
    with torch.no_grad():
        plain = encode.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert relative_error(plain[:, :15], features["sdpa.last"]) < 1e-5


def test_lengths_and_width(features):
    encode = golden_encoder()
    whole, longest = encode.encode(FACTS["text"]["prompts"])
    assert whole.shape == (5, 24, 32) and longest == FACTS["text"]["cropped_to"]
    assert encode.nothing.shape == (1, 24, 32) and encode.width == 32
    assert encode.nothing is encode.nothing and not whole.requires_grad


def test_captions_are_escaped_where_asked(features):
    """By the golden ones, whose escapes are written out."""
    texts = ["a red fox", "", FACTS["text"]["prompts"][2], "two\nlines", "café"]
    y = golden_encoder(escape_captions=True)(texts)
    assert relative_error(y, features["unpadded.last"]) < 1e-5
    assert relative_error(golden_encoder()(texts)[4, :2], y[4, :2]) > 0.01


@pytest.mark.parametrize(
    "text, expected",
    [
        ('a red fox, 50% - "it\'s"', 'a red fox, 50% - "it\'s"'),
        ("café", "caf\\xe9"),
        ("two\nlines\t", "two\\nlines\\t"),
        ("\\", "\\\\"),
        ("猫", "\\u732b"),
        ("😀", "\\U0001f600"),
        ("", ""),
    ],
)
def test_escaped(text, expected):
    assert escaped(text) == expected


def test_an_encoder_that_was_compiled():
    """After its first plain call its graph runs without hooks: refused, not wrong."""
    texts = ["a red cat", "a dog"]
    ids, mask = (
        torch.tensor([[2, 3, 4, 0], [2, 5, 0, 0]]),
        torch.tensor([[1] * 3 + [0], [1, 1, 0, 0]]),
    )
    expected = TextEncoder(gemma(), tokenizer(), 4)(texts)
    compiled = torch.compile(gemma(), backend="eager")
    torch.testing.assert_close(TextEncoder(compiled, tokenizer(), 4)(texts), expected)
    torch.compiler.reset()
    compiled = torch.compile(gemma(), backend="eager")
    with torch.no_grad():
        compiled(input_ids=ids, attention_mask=mask, output_hidden_states=False)
    with pytest.raises(ValueError, match="3 of 3 layers of the text encoder run without hooks"):
        TextEncoder(compiled, tokenizer(), 4)(texts)


def test_two_threads_share_an_encoder():
    """Each zeroes its own padding."""
    model, words = gemma(), ["a", "a red", "a red cat", "a red cat a"]
    expected = [TextEncoder(model, tokenizer(), 8).encode([text])[0] for text in words]
    wrong = []

    def run(text, right):
        encode = TextEncoder(model, tokenizer(), 8)
        for _ in range(10):
            if not torch.equal(encode.encode([text])[0], right):
                wrong.append(text)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(words, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_t5_is_its_encoder_alone(tmp_path):
    """Without an output projection that flash attention would feed zeros to."""
    config = transformers.T5Config(
        vocab_size=6, d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0
    )
    torch.manual_seed(3)
    whole = transformers.T5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    encode = TextEncoder.load(tmp_path, dtype=torch.float32, max_seq_length=4)
    assert type(encode.model) is transformers.T5EncoderModel and encode.width == 24
    ids, mask = torch.tensor([[2, 3, 4, 0]]), torch.tensor([[1, 1, 1, 0]])
    with torch.no_grad():
        expected = whole.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encode.encode(["a red cat"])[0], expected)
    encode.model.save_pretrained(tmp_path / "encoder")  # as diffusers' folders have it
    tokenizer().save_pretrained(tmp_path / "encoder")
    again = TextEncoder.load(tmp_path / "encoder", dtype=torch.float32, max_seq_length=4)
    torch.testing.assert_close(again.encode(["a red cat"])[0], expected)


def test_padded_on_the_right_in_the_model_s_dtype(tmp_path):
    gemma().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    encode = TextEncoder.load(tmp_path, max_seq_length=8)
    assert encode.tokenizer.padding_side == "left"
    y, longest = encode.encode(["a dog"])
    assert y.dtype == torch.bfloat16 and longest == 2
    assert torch.equal(y[0, 2:], y[0, 2].expand(6, -1))  # one vector at all padding


def test_no_text_at_all_and_no_token():
    encode = TextEncoder(gemma(), tokenizer(), 8)
    assert encode([""]).shape == (1, 1, 24) and encode.nothing.isfinite().all()
    with pytest.raises(ValueError, match="max_seq_length must be at least 1, got 0"):
        TextEncoder(gemma(), tokenizer(), 0)
    with pytest.raises(ValueError, match="escape_captions must be true or false, got 'no'"):
        TextEncoder(gemma(), tokenizer(), escape_captions="no")


@pytest.mark.parametrize("texts", ["a red cat", [], ["a", None]])
def test_what_are_no_texts(texts):
    with pytest.raises(ValueError, match="texts must be a list of texts, got"):
        TextEncoder(gemma(), tokenizer(), 8)(texts)
