import pathlib

import numpy as np
import pytest

from jax_sft.hf.peft import read_adapter
from tests.hf.family_cases import tokens_of
from tests.hf.peft_cases import CASES, base_config, our_logits, peft_logits, save_peft, write


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """No logit is off by more than 1e-4 of the largest."""
    off = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print("OFF", off)
    assert off <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_same_logits_and_comes_back_as_the_same_file(case: str, tmp_path: pathlib.Path):
    pytest.importorskip("peft")
    theirs = save_peft(case, tmp_path / "theirs")
    config = base_config(case)
    adapter = read_adapter(tmp_path / "theirs", config)
    assert_close(our_logits(config, adapter, tokens_of(config)), theirs)
    write(tmp_path / "ours", case, adapter)
    file = "adapter_model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    np.testing.assert_array_equal(peft_logits(case, tmp_path / "ours"), theirs)
