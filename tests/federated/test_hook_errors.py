"""Errors for authors of methods: method, hook and name are said."""

from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.federated.contract.hook_errors import check_state, check_tensors
from rankfleet.federated.errors import HookError

LIKE = {"w": np.zeros((2, 3)), "b": np.zeros(3)}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "a NoneType, which is no dictionary"),
        ({"w": torch.zeros(2, 3)}, "`w` as a torch Tensor, not as a NumPy array"),
        ({"w": [1.0]}, "`w` as a list"),
        ({"w": np.array(["x"])}, "`w` in dtype"),
        ({"v": np.zeros(2)}, "`v`, which is not asked for"),
        ({"w": np.zeros((3, 2))}, r"`w` of shape \(3, 2\) instead of \(2, 3\)"),
        ({"w": np.zeros((2, 3))}, "leaves out `b`"),
    ],
)
def test_wrong_results_are_named(result: Any, words: str) -> None:
    with pytest.raises(HookError, match=f"method `mine`, hook `send`: .*{words}"):
        check_tensors("mine", "send", result, LIKE, whole=True)


def test_right_results_pass() -> None:
    check_tensors("mine", "send", {"w": np.zeros((2, 3)), "b": np.zeros(3)}, LIKE, whole=True)
    check_tensors("mine", "grad", {"w": torch.zeros(2, 3)}, LIKE, torch=True)
    check_tensors("mine", "send", {"anything": np.zeros(1, np.uint8)})


def test_a_torch_tensor_in_the_state_is_named_with_its_place() -> None:
    check_state("mine", "train", {"a": {"b": [np.zeros(2), 1, "x", None, np.float32(1)]}})
    with pytest.raises(
        HookError, match=r"method `mine`, hook `train`: leaves a torch Tensor in `ctx.state` as `a.b\[1\]`"
    ):
        check_state("mine", "train", {"a": {"b": [1, torch.zeros(2)]}})
