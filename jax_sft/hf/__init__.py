"""Hugging Face folders, hub ids and GGUF files: models come in (load, tokenizer, gguf) and go out (save, card).

What a tensor is called and how it lies in a file stands in one table (names); where a model lies, in folder; the bytes
of a safetensors file, in tensorfile.
"""
