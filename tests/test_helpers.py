import gc
import time

import pytest

from tests.helpers import FOREVER, press_ctrl_c


def test_a_ctrl_c_that_python_drops_is_pressed_again():
    presses = []

    def press_once(phase, info):
        if not presses:
            presses.append(phase)
            press_ctrl_c()
            # Here the signal's handler runs
            time.sleep(0.01)

    gc.callbacks.append(press_once)
    try:
        with pytest.raises(KeyboardInterrupt):
            gc.collect()
            time.sleep(FOREVER)
    finally:
        gc.callbacks.remove(press_once)
    assert presses == ["start"]
