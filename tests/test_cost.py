"""Tests of the measured cost: what counts, by which module, and that measuring leaves the net as it was."""

from __future__ import annotations

import pytest
import torch
from raised import fails
from torch import nn

from pipeline import cost
from pipeline.blocks import conv_bn
from pipeline.errors import ContractError


def small() -> nn.Sequential:
    return nn.Sequential(*conv_bn(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def test_convolutions_and_matrix_products_count_and_nothing_else_does() -> None:
    found = cost.measure(small(), torch.rand(1, 3, 8, 8))
    convolution, linear = 4 * 4 * 4 * 3 * 3 * 3, 4 * 10  # 4x4 outputs of 4 channels, each 27 products
    assert found.macs == convolution + linear
    assert found.by_module["0"] == convolution
    assert found.by_module["5"] == linear
    assert {name for name, macs in found.by_module.items() if macs} - {""} == {"0", "5"}


def test_macs_are_those_of_all_images_and_follow_the_resolution() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    one = cost.measure(net, torch.rand(1, 3, 8, 8)).macs
    assert cost.measure(net, torch.rand(5, 3, 8, 8)).macs == 5 * one
    assert cost.measure(net, torch.rand(1, 3, 16, 24)).macs == one * 2 * 3


def test_nested_modules_carry_their_dotted_names() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)), nn.Linear(5, 7))
    found = cost.measure(net, torch.rand(1, 2)).by_module
    assert (found["0"], found["0.0"], found["0.1"], found["1"]) == (6 + 15, 6, 15, 35)


def test_the_net_is_measured_in_eval_mode_and_not_changed() -> None:
    net = small()
    net.train()
    net[1].eval()  # one module frozen, as in fine-tuning
    seen: list[bool] = []
    net[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    cost.measure(net, torch.rand(4, 3, 8, 8))
    assert seen == [False]
    assert [module.training for module in net] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_both_products_of_an_attention_count() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    found = cost.measure(Attending(attention), torch.rand(1, 5, 8)).macs
    assert found == 5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8  # the three inputs, both products of both heads, the output
    assert torch.backends.mha.get_fastpath_enabled()


class Attending(nn.Module):
    """Self-attention alone."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return found


def test_modes_are_restored_when_the_forward_fails() -> None:
    net = small().train()
    with pytest.raises(RuntimeError):
        cost.measure(net, torch.rand(1, 2, 8, 8))
    assert all(module.training for module in net.modules())


def test_a_forward_that_costs_nothing_is_refused() -> None:
    with fails(ContractError, "forward", "ReLU"):
        cost.measure(nn.ReLU(), torch.rand(1, 3))
