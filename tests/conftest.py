"""Where there is no GPU, has Triton's kernels run in its interpreter: a choice Triton reads once, when imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def let_kernels_loop() -> None:
    """Mend Triton 3.6's interpreter for NumPy 2.4: it makes an int of a one-element array at every loop's bounds."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    let_kernels_loop()


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, which all processes of these tests share, for profiles of this machine: see `reader.follow`."""
    mine = tmp_path_factory.getbasetemp()
    folder = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "measured"
    folder.mkdir(exist_ok=True)
    return folder
