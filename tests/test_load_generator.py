"""A load generator of others, unmodified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from served import serving, sim, tokenizer

GUIDELLM = Path(sys.executable).with_name("guidellm")


def test_guidellm_measures_every_request_and_token(tmp_path):
    with serving(*sim()) as server:
        command = [
            *(GUIDELLM, "run", "--backend", f"kind=openai_http,target={server.url}"),
            *("--profile", "kind=constant,rate=10", "--constraint", "kind=max_requests,count=20"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer()}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
            *("--output", f"kind=json,path={tmp_path / 'out.json'}"),
        ]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        status = server.status()
    assert status["outcomes"] == {"length": 20} and status["generated"] == 320
    (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert benchmark["metrics"]["output_token_count"]["successful"]["mean"] == 16
