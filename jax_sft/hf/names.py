"""One table: what a tensor is called and how it lies in a Hugging Face file, in a GGUF file, and in our tree.

In: an axis string such as "(N H) D" for the file and the suffix of our name, "q_LDNH". Out: every reshape, transpose
and slice between the two; nothing is written per tensor. Our layers are stacked (L in front), theirs are one tensor
each (`{layer}` in the name).

Letters: L layers, D model width, F MLP width, N query heads, K key/value heads, H head width, V vocabulary.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter: its path in our tree, its names in the two kinds of file, its axes there ("(N H) D")."""

    path: str
    hf: str
    gguf: str
    axes: str

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """Letters of each axis in the file: "(N H) D" -> ("NH", "D")."""
        return tuple(re.sub(r"[() ]", "", group) for group in re.findall(r"\([^)]*\)|[A-Z]", self.axes))

    @functools.cached_property
    def stacked(self) -> bool:
        """Whether ours holds all layers, with L in front."""
        return "{layer}" in self.hf

    @functools.cached_property
    def letters(self) -> str:
        """Letters of ours, of one layer: "blocks.q_LDNH" -> "DNH"."""
        return self.path.rsplit("_", 1)[-1].removeprefix("L" if self.stacked else "")

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """The file's names of a parameter of our `shape`: one a layer, or one."""
        return [self.hf.format(layer=i) for i in range(shape[0])] if self.stacked else [self.hf]

    def layer_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Our `shape`, or slices of it, without L."""
        return shape[1:] if self.stacked else shape

    def file_shape(self, layer_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of one layer of ours: D N H = 8 2 4 -> (N H) D = 8 8."""
        size = dict(zip(self.letters, layer_shape, strict=True))
        return tuple(math.prod(size[letter] for letter in group) for group in self.groups)

    def file_slices(self, slices: Slices, layer_shape: tuple[int, ...]) -> Slices:
        """Where a part of one layer of ours lies in the file's tensor; of a group, only the first letter may be cut."""
        part = dict(zip(self.letters, (s.indices(n) for s, n in zip(slices, layer_shape, strict=True)), strict=True))
        size = dict(zip(self.letters, layer_shape, strict=True))
        found = []
        for first, *inner in self.groups:
            if any(part[letter] != (0, size[letter], 1) for letter in inner):
                raise ValueError(f"{self.path}: axis {''.join(inner)} is inside an axis of {self.hf} and cannot be cut")
            width = math.prod(size[letter] for letter in inner)
            found.append(slice(part[first][0] * width, part[first][1] * width))
        return tuple(found)

    def to_file(self, x: np.ndarray) -> np.ndarray:
        """One layer of ours as the file lays it out, contiguous."""
        order = [self.letters.index(letter) for letter in "".join(self.groups)]
        # A view of another order would be written to a file as its memory lies, which is not what it says.
        return np.ascontiguousarray(x.transpose(order)).reshape(self.file_shape(x.shape))

    def from_file(self, x: np.ndarray, layer_shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of the file as one layer of ours, of `layer_shape`; a view."""
        order = "".join(self.groups)
        size = dict(zip(self.letters, layer_shape, strict=True))
        return x.reshape([size[letter] for letter in order]).transpose([order.index(letter) for letter in self.letters])


_HF = "model.layers.{layer}."
_GGUF = "blk.{layer}."

TABLE: tuple[Rule, ...] = (
    Rule("embed_VD", "model.embed_tokens.weight", "token_embd.weight", "V D"),
    Rule("blocks.attn_norm_LD", _HF + "input_layernorm.weight", _GGUF + "attn_norm.weight", "D"),
    Rule("blocks.q_LDNH", _HF + "self_attn.q_proj.weight", _GGUF + "attn_q.weight", "(N H) D"),
    Rule("blocks.k_LDKH", _HF + "self_attn.k_proj.weight", _GGUF + "attn_k.weight", "(K H) D"),
    Rule("blocks.v_LDKH", _HF + "self_attn.v_proj.weight", _GGUF + "attn_v.weight", "(K H) D"),
    Rule("blocks.o_LNHD", _HF + "self_attn.o_proj.weight", _GGUF + "attn_output.weight", "D (N H)"),
    Rule("blocks.q_bias_LNH", _HF + "self_attn.q_proj.bias", _GGUF + "attn_q.bias", "(N H)"),
    Rule("blocks.k_bias_LKH", _HF + "self_attn.k_proj.bias", _GGUF + "attn_k.bias", "(K H)"),
    Rule("blocks.v_bias_LKH", _HF + "self_attn.v_proj.bias", _GGUF + "attn_v.bias", "(K H)"),
    Rule("blocks.o_bias_LD", _HF + "self_attn.o_proj.bias", _GGUF + "attn_output.bias", "D"),
    Rule("blocks.mlp_norm_LD", _HF + "post_attention_layernorm.weight", _GGUF + "ffn_norm.weight", "D"),
    Rule("blocks.gate_LDF", _HF + "mlp.gate_proj.weight", _GGUF + "ffn_gate.weight", "F D"),
    Rule("blocks.up_LDF", _HF + "mlp.up_proj.weight", _GGUF + "ffn_up.weight", "F D"),
    Rule("blocks.down_LFD", _HF + "mlp.down_proj.weight", _GGUF + "ffn_down.weight", "D F"),
    Rule("blocks.gate_bias_LF", _HF + "mlp.gate_proj.bias", _GGUF + "ffn_gate.bias", "F"),
    Rule("blocks.up_bias_LF", _HF + "mlp.up_proj.bias", _GGUF + "ffn_up.bias", "F"),
    Rule("blocks.down_bias_LD", _HF + "mlp.down_proj.bias", _GGUF + "ffn_down.bias", "D"),
    Rule("final_norm_D", "model.norm.weight", "output_norm.weight", "D"),
    Rule("head_VD", "lm_head.weight", "output.weight", "V D"),
)

EMBED = TABLE[0]
HEAD = TABLE[-1]
NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$")  # old files carry them; they follow from the config


def leaves(params: Mapping[str, Any]) -> Iterator[tuple[Rule, Any]]:
    """Each parameter of a tree with its rule, in the order of the table.

    Raises:
        KeyError: the tree holds a parameter that the table does not know (a fault of ours, not of a user).
    """
    found = dict(_paths(params, ""))
    for rule in TABLE:
        if rule.path in found:
            yield rule, found.pop(rule.path)
    if found:
        raise KeyError(f"jax_sft.hf.names.TABLE has no row for {', '.join(sorted(found))}")


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `value` at a dotted path of nested dicts."""
    *parents, leaf = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def folded(names: list[str]) -> list[str]:
    """Names with their layers drawn together: "model.layers.{0-2,5}.mlp.up_proj.weight"."""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if match is None else f"{name[: match.start()]}\0{name[match.end() :]}"
        layers.setdefault(pattern, []).extend([int(match.group())] if match else [])
    return [p.replace("\0", str(n[0]) if len(n) == 1 else f"{{{_ranges(n)}}}") if n else p for p, n in layers.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _paths(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
