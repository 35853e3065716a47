"""Peak host memory of import and export: python bench/import_export.py [--shards 5] [--devices 8]

Makes a random bfloat16 checkpoint in the shape of Llama 3.2 1B, imports it onto fake CPU devices and exports it again,
in a process of its own. All devices live in this host's memory: the import cannot need less than the model's bytes.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time

import ml_dtypes
import numpy as np

LLAMA_1B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def main() -> None:
    """Write the checkpoint, measure in a fresh process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--folder", type=pathlib.Path, help="where the files go; default: a temporary folder")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = pathlib.Path(place)
        total = write_checkpoint(folder / "in", options.shards)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
        command = [sys.executable, __file__, "--measure", "--folder", str(folder)]
        found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        shard = max(f.stat().st_size for f in (folder / "out").glob("*.safetensors"))
    print(f"model {total / 1e9:.2f} GB in {options.shards} shards, {options.devices} devices")
    print(f"import: peak {found['import'] / 1e9:.2f} GB above the start = {found['import'] / total:.2f} x the model")
    print(f"        {found['import_s']:.1f} s, {total / found['import_s'] / 1e9:.2f} GB/s")
    print(f"export: peak {found['export'] / 1e9:.2f} GB more = {found['export'] / shard:.2f} x its largest shard")
    print(f"        {found['export_s']:.1f} s, {total / found['export_s'] / 1e9:.2f} GB/s")


def write_checkpoint(folder: pathlib.Path, shards: int) -> int:
    """A Hugging Face folder of random bfloat16 weights; returns the bytes of its tensors."""
    from jax_sft.hf import names, tensorfile
    from jax_sft.model.families import read_model_config

    folder.mkdir()
    config = read_model_config(LLAMA_1B)
    (folder / "config.json").write_text(json.dumps(LLAMA_1B))
    write_tokenizer(folder)
    shapes = {name: rule.file_shape for rule in names.rules(config).values() for name in rule.names.values()}
    draw = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    split = [list(shapes)[i::shards] for i in range(shards)]
    weight_map = {}
    for number, held in enumerate(split, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = (draw.standard_normal(shapes[name], np.float32).astype(dtype) for name in held)
        tensorfile.write(folder / file, {name: shapes[name] for name in held}, dtype, tensors)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize


def write_tokenizer(folder: pathlib.Path) -> None:
    """Bytes and a stop token: enough for a folder to load."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def measure(folder: pathlib.Path) -> None:
    """Import and export once; prints the growth of the process's memory as JSON."""
    import jax

    from jax_sft.config import MeshConfig
    from jax_sft.export import Export, write_export
    from jax_sft.hf.load import load_params, load_pretrained
    from jax_sft.model.decoder import abstract_params
    from jax_sft.sharding import make_mesh, shard_params

    base = load_pretrained(folder / "in")
    mesh = make_mesh(MeshConfig())
    shardings = shard_params(abstract_params(base.config), mesh)
    start, started = resident_bytes(), time.perf_counter()
    params = load_params(base, shardings=shardings, dtype="bfloat16")
    jax.block_until_ready(params)
    found = {"import": peak_bytes() - start, "import_s": time.perf_counter() - started}
    before, started = resident_bytes(), time.perf_counter()
    told = Export(out=folder / "out", dtype="bfloat16", max_shard_size="600MB", facts={}, exam=None)
    with Peak() as peak:
        write_export(base, params, told)
    found |= {"export": peak.bytes - before, "export_s": time.perf_counter() - started}
    print(json.dumps(found))


class Peak:
    """The largest resident memory while it is open, looked at a hundred times a second."""

    def __enter__(self) -> "Peak":
        self.bytes, self._open = 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, resident_bytes())
            time.sleep(0.01)


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
