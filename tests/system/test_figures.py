"""What a line of the log says: the loss by how far its samples step."""

import pytest
import torch

from tim.training import figures


def test_the_loss_by_distance():
    t = torch.tensor([0.5, 0.6, 0.9, 1.0, 1.0])
    r = torch.tensor([0.5, 0.4, 0.4, 0.0, 0.1])
    sums = figures.by_distance(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), t, r, 1.0)
    assert sums.tolist() == [1, 2, 4, 24, 1, 1, 1, 2]
    assert figures.means_by_distance(sums.tolist()) == dict(instant=1, short=2, middle=4, long=12)


def test_no_mean_of_no_samples():
    t = torch.ones(3)
    sums = figures.by_distance(torch.ones(3), t, t, 1.0).tolist()
    assert figures.means_by_distance(sums) == {"instant": 1}


@pytest.mark.parametrize("time", [1.0, 1.57, 79.99])
def test_of_all_the_time_there_is(time):
    t = torch.rand(100) * time
    sums = figures.by_distance(torch.ones(100), t, torch.zeros(100), time)
    assert sums[4:].sum() == 100
