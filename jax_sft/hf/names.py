"""One table: what a tensor is called and how it lies in a Hugging Face file, in a GGUF file, and in our tree.

In: an axis string such as "(N H) D" for the file and the suffix of our name, "q_LDNH". Out: every reshape, transpose
and slice between the two; nothing is written per tensor. Our layers are stacked (L in front), theirs are one tensor
each (`{layer}` in the name), and so are experts (`{expert}`, E) in most files. Some files hold several of ours in one
tensor, one after the other along its first axis, or taking turns along an axis like "(F 2)":

    gate  g0 g1 g2     up  u0 u1 u2     in the file  g0 u0 g1 u1 g2 u2

Letters: L layers, D model width, F MLP width, N query heads, K key/value heads, H head width, V vocabulary,
E experts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jax_sft.model.config import ModelConfig

Slices = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path in our tree, its names in the two kinds of file, its axes there ("(N H) D").

    A number at the end of an axis, "(F 2)": so many of ours take turns there.
    """

    path: str
    hf: str
    gguf: str
    axes: str
    parts: tuple[str, ...] = ()  # of a tensor that holds several of ours: letters of each one's share of the first axis
    part: int = 0  # which of those that share a tensor is this


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of the table for a model: with the size of each letter."""

    row: Row
    sizes: Mapping[str, int]

    @property
    def path(self) -> str:
        """Where it is in our tree, with dots."""
        return self.row.path

    @property
    def hf(self) -> str:
        """Its name in a Hugging Face file, with `{layer}` and `{expert}` where there is one for each."""
        return self.row.hf

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """Letters of each axis in the file: "(N H) D" -> ("NH", "D")."""
        return tuple(re.sub(r"[^A-Z]", "", axis) for axis in self._axes)

    @functools.cached_property
    def turns(self) -> tuple[int, ...]:
        """How many of ours take turns along each axis: "D (F 2)" -> (1, 2)."""
        return tuple(int(re.sub(r"\D", "", axis) or 1) for axis in self._axes)

    @functools.cached_property
    def stack(self) -> str:
        """Letters in front of ours, over which the file has one tensor each: "L", "LE", or none."""
        return "L" * ("{layer}" in self.hf) + "E" * ("{expert}" in self.hf)

    @functools.cached_property
    def letters(self) -> str:
        """Letters of ours, of one layer (and expert): "blocks.q_LDNH" -> "DNH"."""
        return self.path.rsplit("_", 1)[-1].removeprefix(self.stack)

    @property
    def layer_shape(self) -> Shape:
        """The shape of ours, of one layer (and expert)."""
        return tuple(self.sizes[letter] for letter in self.letters)

    @property
    def file_shape(self) -> Shape:
        """The shape of the file's tensor, with all that is in it: D N H = 8 2 4 -> (N H) D = 8 8."""
        own = [self._size(group) * turns for group, turns in zip(self.groups, self.turns, strict=True)]
        return (sum(map(self._size, self.row.parts)) or own[0], *own[1:])

    @property
    def names(self) -> dict[Shape, str]:
        """The file's names, by where that tensor lies in the stack: (layer,), (layer, expert) or ()."""
        places = np.ndindex(*(self.sizes[letter] for letter in self.stack))
        words = ["layer", "expert"][: len(self.stack)]
        return {place: self.hf.format(**dict(zip(words, place, strict=True))) for place in places}

    def file_slices(self, slices: Slices) -> Slices:
        """Where a part of one layer of ours lies in the file's tensor; of a group, only the first letter may be cut."""
        part = {x: s.indices(self.sizes[x]) for x, s in zip(self.letters, slices, strict=True)}
        found = []
        for (first, *inner), turns in zip(self.groups, self.turns, strict=True):
            if any(part[letter] != (0, self.sizes[letter], 1) for letter in inner):
                raise ValueError(f"{self.path}: axis {''.join(inner)} is inside an axis of {self.hf} and cannot be cut")
            width = self._size("".join(inner)) * turns
            own_turn = self.row.part if turns > 1 else 0
            found.append(slice(part[first][0] * width + own_turn, part[first][1] * width, turns))
        start = sum(map(self._size, self.row.parts[: self.row.part]))
        return (slice(start + found[0].start, start + found[0].stop, found[0].step), *found[1:])

    def to_file(self, x: np.ndarray) -> np.ndarray:
        """One layer of ours as the file lays it out, contiguous and without padding; of a shared tensor, our share."""
        x = x[tuple(slice(size) for size in self.layer_shape)]
        order = [self.letters.index(letter) for letter in "".join(self.groups)]
        # A view of another order would be written to a file as its memory lies, which is not what it says.
        return np.ascontiguousarray(x.transpose(order)).reshape([self._size(group) for group in self.groups])

    def from_file(self, x: np.ndarray, layer_shape: Shape) -> np.ndarray:
        """What `file_slices` cut out of the file's tensor as a part of one layer of ours, of `layer_shape`; a view."""
        order = "".join(self.groups)
        size = dict(zip(self.letters, layer_shape, strict=True))
        return x.reshape([size[letter] for letter in order]).transpose([order.index(letter) for letter in self.letters])

    @property
    def _axes(self) -> list[str]:
        return re.findall(r"\([^)]*\)|[A-Z]", self.row.axes)

    def _size(self, letters: str) -> int:
        return math.prod(self.sizes[letter] for letter in letters)


_HF = "model.layers.{layer}."
_GGUF = "blk.{layer}."
_EXPERT = _HF + "mlp.experts.{expert}."
_MIXTRAL = _HF + "block_sparse_moe."
_ALL_EXPERTS = _HF + "mlp.experts."
_QKV = _HF + "self_attn.qkv_proj.weight"
_GATE_UP = _HF + "mlp.gate_up_proj.weight"

_LLAMA: tuple[Row, ...] = (
    Row("embed_VD", "model.embed_tokens.weight", "token_embd.weight", "V D"),
    Row("blocks.attn_norm_LD", _HF + "input_layernorm.weight", _GGUF + "attn_norm.weight", "D"),
    Row("blocks.q_LDNH", _HF + "self_attn.q_proj.weight", _GGUF + "attn_q.weight", "(N H) D"),
    Row("blocks.k_LDKH", _HF + "self_attn.k_proj.weight", _GGUF + "attn_k.weight", "(K H) D"),
    Row("blocks.v_LDKH", _HF + "self_attn.v_proj.weight", _GGUF + "attn_v.weight", "(K H) D"),
    Row("blocks.o_LNHD", _HF + "self_attn.o_proj.weight", _GGUF + "attn_output.weight", "D (N H)"),
    Row("blocks.q_bias_LNH", _HF + "self_attn.q_proj.bias", _GGUF + "attn_q.bias", "(N H)"),
    Row("blocks.k_bias_LKH", _HF + "self_attn.k_proj.bias", _GGUF + "attn_k.bias", "(K H)"),
    Row("blocks.v_bias_LKH", _HF + "self_attn.v_proj.bias", _GGUF + "attn_v.bias", "(K H)"),
    Row("blocks.o_bias_LD", _HF + "self_attn.o_proj.bias", _GGUF + "attn_output.bias", "D"),
    Row("blocks.q_norm_LH", _HF + "self_attn.q_norm.weight", _GGUF + "attn_q_norm.weight", "H"),
    Row("blocks.k_norm_LH", _HF + "self_attn.k_norm.weight", _GGUF + "attn_k_norm.weight", "H"),
    Row("blocks.q_norm_LNH", _HF + "self_attn.q_norm.weight", _GGUF + "attn_q_norm.weight", "(N H)"),
    Row("blocks.k_norm_LKH", _HF + "self_attn.k_norm.weight", _GGUF + "attn_k_norm.weight", "(K H)"),
    Row("blocks.mlp_norm_LD", _HF + "post_attention_layernorm.weight", _GGUF + "ffn_norm.weight", "D"),
    Row("blocks.gate_LDF", _HF + "mlp.gate_proj.weight", _GGUF + "ffn_gate.weight", "F D"),
    Row("blocks.up_LDF", _HF + "mlp.up_proj.weight", _GGUF + "ffn_up.weight", "F D"),
    Row("blocks.down_LFD", _HF + "mlp.down_proj.weight", _GGUF + "ffn_down.weight", "D F"),
    Row("blocks.gate_bias_LF", _HF + "mlp.gate_proj.bias", _GGUF + "ffn_gate.bias", "F"),
    Row("blocks.up_bias_LF", _HF + "mlp.up_proj.bias", _GGUF + "ffn_up.bias", "F"),
    Row("blocks.down_bias_LD", _HF + "mlp.down_proj.bias", _GGUF + "ffn_down.bias", "D"),
    Row("final_norm_D", "model.norm.weight", "output_norm.weight", "D"),
    Row("head_VD", "lm_head.weight", "output.weight", "V D"),
)
_FOUR_NORMS = (
    Row("blocks.attn_post_norm_LD", _HF + "post_attention_layernorm.weight", _GGUF + "post_attention_norm.weight", "D"),
    Row("blocks.mlp_norm_LD", _HF + "pre_feedforward_layernorm.weight", _GGUF + "ffn_norm.weight", "D"),
    Row("blocks.mlp_post_norm_LD", _HF + "post_feedforward_layernorm.weight", _GGUF + "post_ffw_norm.weight", "D"),
)
_FUSED_QKV = tuple(
    Row(path, _QKV, "", f"({heads} H) D", ("NH", "KH", "KH"), part)
    for part, (path, heads) in enumerate([("blocks.q_LDNH", "N"), ("blocks.k_LDKH", "K"), ("blocks.v_LDKH", "K")])
)
_FUSED_GATE_UP = tuple(
    Row(path, _GATE_UP, "", "F D", ("F", "F"), part) for part, path in enumerate(["blocks.gate_LDF", "blocks.up_LDF"])
)
_EXPERTS = (
    Row("blocks.router_LDE", _HF + "mlp.gate.weight", "", "E D"),
    Row("blocks.gate_LEDF", _EXPERT + "gate_proj.weight", "", "F D"),
    Row("blocks.up_LEDF", _EXPERT + "up_proj.weight", "", "F D"),
    Row("blocks.down_LEFD", _EXPERT + "down_proj.weight", "", "D F"),
)
# Where a model type's files differ from Llama's.
_OTHERS: dict[str, tuple[Row, ...]] = {
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "mixtral": (
        Row("blocks.router_LDE", _MIXTRAL + "gate.weight", "", "E D"),
        Row("blocks.gate_LEDF", _MIXTRAL + "experts.{expert}.w1.weight", "", "F D"),
        Row("blocks.up_LEDF", _MIXTRAL + "experts.{expert}.w3.weight", "", "F D"),
        Row("blocks.down_LEFD", _MIXTRAL + "experts.{expert}.w2.weight", "", "D F"),
    ),
    "gpt_oss": (
        Row("blocks.sinks_LN", _HF + "self_attn.sinks", "", "N"),
        Row("blocks.router_LDE", _HF + "mlp.router.weight", "", "E D"),
        Row("blocks.router_bias_LE", _HF + "mlp.router.bias", "", "E"),
        Row("blocks.gate_LEDF", _ALL_EXPERTS + "gate_up_proj", "", "E D (F 2)", part=0),
        Row("blocks.up_LEDF", _ALL_EXPERTS + "gate_up_proj", "", "E D (F 2)", part=1),
        Row("blocks.down_LEFD", _ALL_EXPERTS + "down_proj", "", "E F D"),
        Row("blocks.gate_bias_LEF", _ALL_EXPERTS + "gate_up_proj_bias", "", "E (F 2)", part=0),
        Row("blocks.up_bias_LEF", _ALL_EXPERTS + "gate_up_proj_bias", "", "E (F 2)", part=1),
        Row("blocks.down_bias_LED", _ALL_EXPERTS + "down_proj_bias", "", "E D"),
    ),
    "gemma2": _FOUR_NORMS,
    "gemma3_text": _FOUR_NORMS,
    "olmo2": _FOUR_NORMS,
    "olmo3": _FOUR_NORMS,
    "phi3": _FUSED_QKV + _FUSED_GATE_UP,
    "glm": _FUSED_GATE_UP,
    "glm4": (
        *_FUSED_GATE_UP,
        Row("blocks.attn_post_norm_LD", _HF + "post_self_attn_layernorm.weight", "", "D"),
        Row("blocks.mlp_post_norm_LD", _HF + "post_mlp_layernorm.weight", "", "D"),
    ),
    "starcoder2": (
        Row("blocks.attn_norm_bias_LD", _HF + "input_layernorm.bias", _GGUF + "attn_norm.bias", "D"),
        Row("blocks.mlp_norm_bias_LD", _HF + "post_attention_layernorm.bias", _GGUF + "ffn_norm.bias", "D"),
        Row("blocks.up_LDF", _HF + "mlp.c_fc.weight", _GGUF + "ffn_up.weight", "F D"),
        Row("blocks.down_LFD", _HF + "mlp.c_proj.weight", _GGUF + "ffn_down.weight", "D F"),
        Row("blocks.up_bias_LF", _HF + "mlp.c_fc.bias", _GGUF + "ffn_up.bias", "F"),
        Row("blocks.down_bias_LD", _HF + "mlp.c_proj.bias", _GGUF + "ffn_down.bias", "D"),
        Row("final_norm_bias_D", "model.norm.bias", "output_norm.bias", "D"),
    ),
}

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$")  # old files carry them; they follow from the config


def rules(config: ModelConfig) -> dict[str, Rule]:
    """The rule of each parameter that a model has, by its path in our tree, in the order of its files.

    Raises:
        KeyError: a parameter is in no row of the table (a fault of ours, not of a user).
    """
    rows = {row.path: row for row in (*_LLAMA, *_OTHERS.get(config.model_type, ()))}
    there = dict(_paths(config.shapes, ""))
    if unknown := sorted(set(there) - set(rows)):
        raise KeyError(f"jax_sft.hf.names has no row for {', '.join(unknown)}")
    sizes = config.sizes | {"V": config.vocab_size}  # files have no rows of padding
    return {path: Rule(row, sizes) for path, row in rows.items() if path in there}


def leaves(tree: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[Rule, Any]]:
    """Each leaf of a tree like the parameters with its rule, in the order of the files."""
    found = dict(_paths(tree, ""))
    yield from ((rule, found[path]) for path, rule in rules(config).items())


def file_tensor(parts: Iterable[tuple[Rule, np.ndarray]]) -> np.ndarray:
    """A tensor of the file from one layer (and expert) of each of ours that it holds; taken one at a time."""
    whole = None
    for rule, x in parts:
        share = rule.to_file(x)
        if share.shape == rule.file_shape:
            return share
        whole = np.empty(rule.file_shape, share.dtype) if whole is None else whole
        whole[rule.file_slices((slice(None),) * x.ndim)] = share
    assert whole is not None, "a tensor of nothing"
    return whole


def get(tree: Mapping[str, Any], path: str) -> Any:
    """What lies at a dotted path of nested dicts; None where nothing does."""
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `value` at a dotted path of nested dicts."""
    *parents, leaf = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def folded(names: list[str]) -> list[str]:
    """Names with their layers and experts drawn together: "model.layers.{0-2,5}.mlp.experts.{0-7}.up_proj.weight"."""
    return _folded_at(0, _folded_at(1, names))  # experts first: layers that lack the same ones are then one line


def _folded_at(which: int, names: list[str]) -> list[str]:
    """Names that differ in nothing but their number so and so, the first or the second, as one."""
    numbers_of: dict[str, list[int]] = {}
    for name in names:
        match = dict(enumerate(re.finditer(r"(?<=\.)\d+(?=\.)", name))).get(which)
        pattern = name if match is None else f"{name[: match.start()]}\0{name[match.end() :]}"
        numbers_of.setdefault(pattern, []).extend([int(match.group())] if match else [])
    return [
        p.replace("\0", str(n[0]) if len(n) == 1 else f"{{{ranges(n)}}}") if n else p for p, n in numbers_of.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as one reads them: [5, 0, 1, 2] -> "0-2,5"."""
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
