"""What PEFT calls the parts of an adapter, and how they lie in its file.

In: a model. Out: a `Site` for each kind of module that can have an adapter, with our weights in it: one, or several
where the file fuses them (phi3's qkv_proj). Our factors and PEFT's are transposes of each other, letter groups flat:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [R, D]       blocks.q_LDNH/a_LDR    of layer 3
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [(N H), R]   blocks.q_LDNH/b_LRNH

L layers, E experts, D model width, N query heads, H head width, V vocabulary, R rank.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jax_sft.hf import names
from jax_sft.model.config import ModelConfig
from jax_sft.model.lora import Letters, letters

PREFIX = "base_model.model."
EMBED, HEAD = "model.embed_tokens", "lm_head"
MAGNITUDE = ".lora_magnitude_vector"
BASE_LAYER = ".base_layer.weight"  # the base's own matrix, which PEFT saves beside an adapter of embedding or head


class Factors(NamedTuple):
    """The adapter of one module as the file has it, float32."""

    a: np.ndarray  # [R, inputs]
    b: np.ndarray  # [outputs, R]
    magnitude: np.ndarray | None  # [outputs]


@dataclasses.dataclass(frozen=True)
class Site:
    """One kind of module, of all layers (and experts)."""

    module: str  # with `{layer}` and `{expert}`
    rules: tuple[names.Rule, ...]  # our weights in it, in the file's order

    @functools.cached_property
    def modules(self) -> dict[names.Shape, str]:
        """Names of the modules, by their place in the stack."""
        return {at: name.removesuffix(".weight") for at, name in self.rules[0].names.items()}

    @property
    def inputs(self) -> int:
        """Width of what goes in."""
        return self._size(self.letters(0).inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Widths of what comes out: of each of our weights in it."""
        return tuple(self._size(self.letters(i).outputs) for i in range(len(self.rules)))

    def letters(self, part: int) -> Letters:
        """The letters of one of our weights in it."""
        return letters(self.rules[part].path)

    def to_ours(self, theirs: Factors, part: int) -> dict[str, np.ndarray]:
        """Our factors of one weight and layer: "a", "b" and with DoRA "magnitude"."""
        of = self.letters(part)
        start = sum(self.outputs[:part])
        rows = slice(start, start + self.outputs[part])
        outputs = [self.rules[part].sizes[x] for x in of.outputs]
        ours = {
            "a": theirs.a.T.reshape(*[self.rules[part].sizes[x] for x in of.inputs], -1),
            "b": theirs.b[rows].T.reshape(-1, *outputs),
        }
        return ours if theirs.magnitude is None else ours | {"magnitude": theirs.magnitude[rows].reshape(outputs)}

    def to_theirs(self, ours: Mapping[str, np.ndarray], part: int) -> Factors:
        """What `to_ours` was made of, of one part."""
        magnitude = ours.get("magnitude")
        return Factors(
            ours["a"].reshape(self.inputs, -1).T,
            ours["b"].reshape(-1, self.outputs[part]).T,
            None if magnitude is None else magnitude.reshape(-1),
        )

    def _size(self, group: str) -> int:
        return math.prod(self.rules[0].sizes[x] for x in group)


def sites(config: ModelConfig) -> list[Site]:
    """Every kind of module that can have an adapter; a tied head too."""
    held: dict[str, list[names.Rule]] = {}
    for rule in untied_rules(config).values():
        # Experts that lie in one tensor are no modules; everything else that is adapted is a Linear or an Embedding.
        if _is_adaptable(rule.path) and rule.hf.endswith(".weight"):
            held.setdefault(rule.hf.removesuffix(".weight"), []).append(rule)
    return [Site(module, tuple(sorted(rules, key=lambda r: r.row.part))) for module, rules in held.items()]


def untied_rules(config: ModelConfig) -> dict[str, names.Rule]:
    """`names.rules`, with one for the head even if it is tied."""
    return names.rules(dataclasses.replace(config, tied_head=False))


def _is_adaptable(path: str) -> bool:
    try:
        letters(path)
    except KeyError:
        return False
    return True
