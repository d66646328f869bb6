"""Networks that judge, of the real kinds, tiny and random; their tokenizers and processors."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [
    "<pad>", "<unk>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "yes", "no", "is", "there", "a", "photo",
    "of", "an", "object", "?", ".", "user", "assistant", "red", "blue", "Answer", "with", "or",
]  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ part.text }} {% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def tokenizer(**options) -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([word for word in WORDS if word.startswith("<")])
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", bos_token="<bos>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special, **options)


def mask2former(num_labels: int = 80) -> transformers.Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, num_labels=num_labels, feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
        dim_feedforward=16, num_attention_heads=2, num_queries=5,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def clip() -> transformers.CLIPModel:
    torch.manual_seed(1)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(vocab_size=len(WORDS), bos_token_id=2, eos_token_id=3, pad_token_id=0)
    config = transformers.CLIPConfig(
        text_config=size | tokens, vision_config=size | dict(image_size=16, patch_size=8),
        projection_dim=8,
    )  # fmt: skip
    return transformers.CLIPModel(config).eval()


def spread(model: torch.nn.Module) -> None:
    """Answers then hang on the picture."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)


def save_mask2former(folder: Path, **options) -> Path:
    mask2former(**options).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    clip().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    torch.manual_seed(2)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(
        vocab_size=len(WORDS), bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0,
        encoder_hidden_size=16, projection_dim=8,
    )  # fmt: skip
    config = transformers.BlipConfig(
        text_config=size | tokens, vision_config=size | dict(image_size=16, patch_size=8),
        projection_dim=8, image_text_hidden_size=8,
    )  # fmt: skip
    model = transformers.BlipForQuestionAnswering(config)
    spread(model)
    model.save_pretrained(folder)
    transformers.BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[5:]]
    (folder / "vocab.txt").write_text("\n".join(words))  # as the released ones come
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def save_qwen(folder: Path) -> Path:
    torch.manual_seed(3)
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, bos_token_id=2, eos_token_id=5,
            pad_token_id=0, rope_parameters=dict(
                rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]
            ),
            rope_scaling=dict(rope_type="default", mrope_section=[1, 1, 2]),
        ),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16,
            patch_size=4, spatial_merge_size=2, window_size=16, fullatt_block_indexes=[1],
        ),
        image_token_id=8, video_token_id=9, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    spread(model)
    model.save_pretrained(folder)
    words = tokenizer(chat_template=QWEN_TEMPLATE)
    words.save_pretrained(folder)
    sides = dict(patch_size=4, merge_size=2, min_pixels=64, max_pixels=32 * 32)
    transformers.Qwen2VLImageProcessor(**sides).save_pretrained(folder)
    return folder
