"""The rule of the loss scale alone (smp-api section 7)."""

from __future__ import annotations

import pytest

from modelparallel.errors import SMPConfigError
from modelparallel.precision import LossScaler


def scales(scaler: LossScaler, overflows: str) -> list[float]:
    """The scale after each update; ``x`` is one with an overflow."""
    found = []
    for letter in overflows:
        scaler.update_scale(letter == "x")
        found.append(scaler.loss_scale)
    return found


def test_c058_the_defaults_of_a_dynamic_scale():
    scaler = LossScaler(None, {})
    assert scaler.loss_scale == 2.0**32 and scaler.min_scale == 1 and scaler.scale_window == 1000
    assert scaler.scale_factor == 2 and scaler.delayed_shift == 1 and not scaler.consecutive_hysteresis


def test_c059_overflows_lower_the_scale_and_clean_windows_raise_it():
    scaler = LossScaler(None, {"init_scale": 8, "scale_window": 3, "min_scale": 2})
    assert scales(scaler, "xxx") == [4, 2, 2]
    assert scales(scaler, "...") == [2, 2, 4]
    assert scales(scaler, "......") == [4, 4, 8, 8, 8, 16]
    assert scales(scaler, "..x...") == [16, 16, 8, 8, 8, 16]


def test_some_overflows_are_forgiven():
    scaler = LossScaler(None, {"init_scale": 8, "scale_window": 4, "delayed_shift": 3})
    assert scales(scaler, "xx") == [8, 8] and scales(scaler, "x") == [4]
    assert scales(scaler, "x") == [2]  # used up until a window is full
    assert scales(scaler, "....") == [2, 2, 2, 4]
    assert scales(scaler, "xxx") == [4, 4, 2]
    each = LossScaler(None, {"init_scale": 8, "delayed_shift": 2, "consecutive_hysteresis": True})
    assert scales(each, "x.x.x.xx") == [8, 8, 8, 8, 8, 8, 8, 4]


def test_a_static_scale_stays():
    scaler = LossScaler(128.0, None)
    assert scales(scaler, "x...x") == [128] * 5 and not scaler.is_dynamic
    assert LossScaler(None, None).loss_scale == 1.0


def test_the_state_goes_on_where_it_was():
    first, second = (LossScaler(None, {"init_scale": 64, "scale_window": 3, "delayed_shift": 2}) for _ in range(2))
    scales(first, "x.x..")
    second.load_state_dict(first.state_dict())
    assert scales(first, "..x...x.") == scales(second, "..x...x.")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"init_scale": 0}, "init_scale"),
        ({"scale_factor": 1.0}, "scale_factor"),
        ({"scale_window": 0}, "scale_window"),
        ({"delayed_shift": 0}, "delayed_shift"),
        ({"scale_windows": 3}, "scale_windows"),
    ],
)
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(SMPConfigError, match=word):
        LossScaler(None, arguments)
