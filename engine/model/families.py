"""The model families that run. Each is LLaMA's architecture, but for what its row of the table says.

A family is a row: a model that needs more than the row can say is another architecture. Defaults are those of the
family's config class in transformers 5, for configs that leave a field out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.model.fields import Fields


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        model_type: its name in a config.json.
        head_model: its model with a language-model head, in lower case; `base_model` is the one without.
        kv_heads: KV heads of a config that does not name them; None: as many as heads.
        positions: `max_position_embeddings` of such a config.
        window: reads the sliding window, in tokens; None: every token attends to all before it.
        has_qkv_bias: whether q, k and v always have biases.
        reads_biases: whether the config's `attention_bias` and `mlp_bias` say where biases are.
        gguf_interleaves: whether GGUF files of this architecture have the halves of each head of q and k interleaved;
            None: GGUF has no such architecture.
    """

    model_type: str
    head_model: str
    kv_heads: int | None
    positions: int
    window: Callable[[Fields], int | None]
    has_qkv_bias: bool = False
    reads_biases: bool = False
    gguf_interleaves: bool | None = None

    @property
    def base_model(self) -> str:
        """The model without a head, in lower case."""
        return self.head_model.replace("forcausallm", "model")


def _no_window(fields: Fields) -> None:
    if fields.get("sliding_window") is not None:
        raise fields.refusal("sliding_window", "LLaMA has none")


def _mistral_window(fields: Fields) -> int | None:
    if "sliding_window" not in fields.values:
        return 4096
    return None if fields.get("sliding_window") is None else fields.count("sliding_window")


def _qwen2_window(fields: Fields) -> int | None:
    """Layers from `max_window_layers` on have a window, unless `layer_types` lists the layers one by one."""
    if not fields.flag("use_sliding_window"):
        return None
    window = _mistral_window(fields)
    kinds = fields.texts("layer_types")
    full = 0 if fields.get("max_window_layers") == 0 else fields.count("max_window_layers", default=28)
    slides = "sliding_attention" in kinds if kinds else full < fields.count("num_hidden_layers")
    return window if slides else None


_ALL = (
    Family("llama", "llamaforcausallm", None, 2048, _no_window, reads_biases=True, gguf_interleaves=True),
    Family("mistral", "mistralforcausallm", 8, 131072, _mistral_window),
    Family("qwen2", "qwen2forcausallm", 32, 32768, _qwen2_window, has_qkv_bias=True, gguf_interleaves=False),
)
FAMILIES = {family.model_type: family for family in _ALL}


def family_of(fields: Fields) -> Family:
    """The family of a config, by `model_type`, or by `architectures` if it names no type; the case does not matter.

    Raises:
        TandemError: it is none of `FAMILIES`, has no language-model head, or the two contradict each other.
    """
    names = [name.lower() for name in fields.texts("architectures")]
    kind = fields.text("model_type")
    if kind is None and not names:
        raise fields.fault("model_type", f"must be {', '.join(FAMILIES)}", None)
    found = [each for each in _ALL if (kind.lower() == each.model_type if kind else names[0] in _models(each))]
    if not found:
        wrong = "architectures" if kind is None else "model_type"
        raise fields.refusal(wrong, f"Tandem runs models of {', '.join(FAMILIES)} only")
    if not set(names) <= set(_models(found[0])):
        raise fields.refusal("architectures", f"of {found[0].model_type}, Tandem runs the language model only")
    return found[0]


def _models(family: Family) -> tuple[str, str]:
    return family.head_model, family.base_model
